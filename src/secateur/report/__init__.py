"""What a person looks at: one report as data, in sentences, and its faces: text, HTML and Markdown."""
