"""What a single weight is worth."""
