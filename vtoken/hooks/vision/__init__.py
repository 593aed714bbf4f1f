"""Around and inside the vision tower."""
