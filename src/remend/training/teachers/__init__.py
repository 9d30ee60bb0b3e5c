"""Whatever scores the student's tokens."""
