"""Pruners of site encoder."""
