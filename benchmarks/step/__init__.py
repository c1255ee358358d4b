"""Whole steps: this package beside other ways to take them."""
