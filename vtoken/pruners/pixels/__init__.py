"""Pruners of site pixels."""
