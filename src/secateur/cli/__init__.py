"""The command line. Each command reads settings, calls the public API and prints the result."""
