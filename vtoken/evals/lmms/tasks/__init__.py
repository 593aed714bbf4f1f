"""Tasks of the reference VLM, for `lmms-eval --include_path` and `vtoken eval`."""
