"""Configurations: their fields and the files they are read from."""
