"""The frozen teacher: what it answers with the context in its prompt, and how surely."""

from .answers import greedy_answers
from .cache import TeacherCache, cache_key, check_cache
from .targets import teach

__all__ = ["TeacherCache", "cache_key", "check_cache", "greedy_answers", "teach"]
