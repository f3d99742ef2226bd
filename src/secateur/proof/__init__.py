"""Whether a pruned model is right: against the masked dense one."""
