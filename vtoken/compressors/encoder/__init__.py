"""Compressors of site encoder."""
