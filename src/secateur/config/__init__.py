"""What a run is asked to do, as data: declared once, read from YAML and options, checked without torch."""
