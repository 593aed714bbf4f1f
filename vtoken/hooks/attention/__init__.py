"""What takes the place of a decoder layer's own attention."""
