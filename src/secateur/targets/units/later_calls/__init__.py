"""What a pruned module looks into when it is called: whether it does what was proven."""
