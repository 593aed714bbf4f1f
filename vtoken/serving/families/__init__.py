"""Families that vLLM serves, one file each, named after its `model_type`."""
