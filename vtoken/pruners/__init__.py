"""Which tokens live: one method per file, no model in sight."""
