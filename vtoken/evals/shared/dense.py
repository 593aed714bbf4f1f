"""The stock model, as a pipeline."""

from vtoken.config import Pipeline

DENSE = Pipeline("dense", "original", ())


def is_stock(pipeline: Pipeline) -> bool:
    """Whether it leaves model, processor and decoding as they are."""
    return not pipeline.stages and pipeline.contrast is None and pipeline.anyres == "model"
