"""Families that vLLM serves, a file each, called like its `model_type`."""
