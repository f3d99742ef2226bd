"""What the pipeline does for each granularity: one class each, with the same calls."""
