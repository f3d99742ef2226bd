"""Remove it: a plan carried out on a model, in three forms.

``module_form`` changes the user's own classes, ``graph_form`` runs the captured program, and `masked` keeps
all tensors. ``later_calls`` checks later calls of a pruned module.
"""
