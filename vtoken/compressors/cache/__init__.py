"""Compressors of site cache."""
