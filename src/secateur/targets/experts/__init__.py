"""Mixture-of-experts models: which experts may go, what each is worth, and their removal."""
