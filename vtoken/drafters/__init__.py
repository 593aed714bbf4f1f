"""Drafts with trained weights."""
