"""Instead of a layer's own attention."""
