"""Pruners of site frames."""
