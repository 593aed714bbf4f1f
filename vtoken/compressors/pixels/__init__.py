"""Compressors of site pixels."""
