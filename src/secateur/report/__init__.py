"""What a person looks at: one report as data, in words, and its faces: text, HTML and Markdown."""
