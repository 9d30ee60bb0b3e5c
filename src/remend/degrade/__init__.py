"""Make degraded students: what damaged models look like, under control."""
