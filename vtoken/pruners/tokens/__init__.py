"""Pruners of site tokens."""
