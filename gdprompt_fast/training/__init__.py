"""Preparation and meta-training: the loop, its schedule and its checkpoints."""
