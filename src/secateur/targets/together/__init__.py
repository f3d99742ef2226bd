"""Units and experts under one budget."""
