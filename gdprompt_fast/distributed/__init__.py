"""Many processes, on many GPUs or machines: who they are, what they share, what they sum."""

from .group import launched, rank, world_size
from .reduce import reduce_gradients

__all__ = ["launched", "rank", "reduce_gradients", "world_size"]
