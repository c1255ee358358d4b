"""Many processes, on many GPUs or machines: who they are, what they share, what they sum."""
