"""Whole runs, from a command's options to its results."""
