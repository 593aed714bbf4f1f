"""Pruners of site decoder."""
