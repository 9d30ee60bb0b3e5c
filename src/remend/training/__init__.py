"""The one optimisation loop, its teachers and constraints."""
