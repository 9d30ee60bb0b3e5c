"""Grids that weights lie on: formats, closed-form solvers, and the containers that store them."""
