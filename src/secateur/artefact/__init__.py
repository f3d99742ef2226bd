"""Files: save, load, export."""
