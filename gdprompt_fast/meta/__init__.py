"""The meta step: inner step, outer loss and the gradient through both."""
