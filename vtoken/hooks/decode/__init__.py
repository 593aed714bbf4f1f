"""What a generated token reads of the cache."""
