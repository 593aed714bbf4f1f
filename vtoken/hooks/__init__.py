"""Hooks that shorten what a stock model works on, the same for all families. None knows a family or a method."""
