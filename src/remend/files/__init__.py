"""Files: atomic writes, the run directory, settings from YAML, shipped recipes."""
