"""The vocabulary-sized weight: losses at the head, lookups when it is tied, and its inner
updates.
"""

from .functions import context_loss, response_loss, tied_lookup
from .state import Vocabulary
from .target import KLTarget, NLLTarget, Target

__all__ = [
    "KLTarget",
    "NLLTarget",
    "Target",
    "Vocabulary",
    "context_loss",
    "response_loss",
    "tied_lookup",
]
