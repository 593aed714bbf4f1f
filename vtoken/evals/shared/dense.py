"""The stock model, as a pipeline."""

from vtoken.config import Pipeline

DENSE = Pipeline("dense", "original", ())
