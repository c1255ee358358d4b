"""The frozen teacher: what it answers with the context in its prompt, and how surely."""

from .answers import greedy_answers
from .cache import TeacherCache, cache_key, check_cache
from .on_the_fly import Teacher, TeacherOnTheFly
from .targets import teach

__all__ = [
    "Teacher",
    "TeacherCache",
    "TeacherOnTheFly",
    "cache_key",
    "check_cache",
    "greedy_answers",
    "teach",
]
