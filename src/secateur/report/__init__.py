"""The report of a run: its data, the sentences made from it, and its text, HTML and Markdown versions."""
