"""Fine-tuning and meta-training: options, the loops, Adam, checkpoints and metrics."""
