"""A page in the browser: a model learns passages, and its answers stand side by side."""
