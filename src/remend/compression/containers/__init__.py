"""Containers of weights: one file reads and writes each."""
