"""The state of a forward, and the one writer to a model: all other rooms build on them."""
