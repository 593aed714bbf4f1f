"""What everything else is written in terms of: the state of a forward, and the one writer to a model."""
