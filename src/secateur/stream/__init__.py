"""Running captured programs node by node: over all batches at once, in parts, two of them side by side."""
