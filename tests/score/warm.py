"""Imported once by the server that the processes of a crew are forked from: they inherit what takes long."""

from tests.score.shared import plain

plain()
