"""Workers that answer with the prompt."""
