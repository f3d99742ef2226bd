"""Imported once by the server that the processes are forked from: they inherit what takes long."""

from tests.signals.shared import plain

plain()
