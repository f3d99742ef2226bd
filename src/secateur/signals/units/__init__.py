"""What a unit is worth."""
