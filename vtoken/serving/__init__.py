"""The pipelines of vtoken in a serving engine; nothing else in the package imports this."""
