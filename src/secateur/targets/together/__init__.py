"""Units and experts, or units and blocks, under one budget."""
