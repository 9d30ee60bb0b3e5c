"""Prompts, rows and tasks: what models are trained and measured on."""
