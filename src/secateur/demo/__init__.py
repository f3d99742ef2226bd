"""A real network on real data in under a minute: what `secateur demo` runs."""
