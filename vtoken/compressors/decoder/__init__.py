"""Compressors of site decoder."""
