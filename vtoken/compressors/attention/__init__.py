"""Compressors of site attention."""
