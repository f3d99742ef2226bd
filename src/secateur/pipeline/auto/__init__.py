"""Rules that measure what they choose among: `Auto` compares allocators, `Search` moves budget."""
