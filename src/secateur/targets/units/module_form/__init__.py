"""Form ``module``: the classes of the model with smaller tensors, and with new numbers in its code."""
