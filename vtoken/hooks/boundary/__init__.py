"""Where the prompt enters the language model and its output leaves it."""
