"""What a person looks at: one report as data, and its two faces, text and HTML."""
