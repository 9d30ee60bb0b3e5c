"""What a model's layers see on text."""
