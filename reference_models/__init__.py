"""Recipes, training and held-out questions of the reference VLMs; not in the wheel."""
