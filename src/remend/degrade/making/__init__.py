"""What degradations do to weights, and what all of them share: load, change a copy, measure, save."""
