"""Grade a model on tasks: answers or answer letters, kept with every grade; see job.py."""
