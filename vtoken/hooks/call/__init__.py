"""What only the calls around the language model know."""
