"""Compressors of site decode."""
