"""Compressors of site tokens."""
