"""Methods that choose which tokens stay: one per file, none knows a model."""
