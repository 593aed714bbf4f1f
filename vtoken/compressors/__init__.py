"""Methods that do more than choose: they merge tokens, drop all of them, sparsify attention or shrink the cache."""
