"""The same pipeline in a serving engine; nothing imports this room."""
