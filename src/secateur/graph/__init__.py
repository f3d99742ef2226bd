"""What may go together: capture, labels, groups."""
