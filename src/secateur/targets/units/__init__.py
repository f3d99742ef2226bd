"""Remove it: a plan carried out on a model, in three forms."""
