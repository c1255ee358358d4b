"""The frozen teacher: what it answers with the context in its prompt, and how surely."""

from .answers import greedy_answers
from .targets import teach

__all__ = ["greedy_answers", "teach"]
