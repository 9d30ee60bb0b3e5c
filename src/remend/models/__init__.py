"""Models: found, loaded, sampled from and looked into."""
