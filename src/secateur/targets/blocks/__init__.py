"""Residual blocks: which of a network's may be dropped whole, what each is worth, and their removal."""
