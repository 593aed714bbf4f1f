"""A model that answers prompts (generation.py, which needs no lmms-eval), and lmms-eval's tasks and scorers for it
(model.py, harness.py)."""
