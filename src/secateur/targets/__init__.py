"""What is removed: units, single weights, experts."""
