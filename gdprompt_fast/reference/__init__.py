"""Plain materialised MAML by autograd: slow, and obviously right."""
