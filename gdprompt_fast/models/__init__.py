"""What is known of a model: its architecture, its families, what in it was changed."""
