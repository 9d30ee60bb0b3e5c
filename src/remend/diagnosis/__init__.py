"""Where the damage of a model sits: student against reference, layer by layer and token by token."""
