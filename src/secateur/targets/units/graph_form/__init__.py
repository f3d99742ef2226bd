"""Form ``graph``: the captured program with smaller tensors."""
