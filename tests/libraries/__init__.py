"""Models of other libraries: pruned, and compared with their masked dense selves wherever those run."""
