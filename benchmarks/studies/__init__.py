"""Single questions, answered with numbers."""
