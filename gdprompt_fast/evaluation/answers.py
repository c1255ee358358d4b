"""Generated answers as texts, compared with the gold ones as SQuAD's official script does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens such as BOS and EOS, stripped."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def normalise(text: str) -> str:
    """Lower case, without (ASCII) punctuation, without articles, with single spaces; in that order,
    which matters: "a-b" is "ab" then, no article and a "b".
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether the answer equals any of the gold answers after normalisation."""
    return _best(_equal, answer, golds) == 1.0


def f1(answer: str, golds: Sequence[str]) -> float:
    """The harmonic mean of precision and recall in words after normalisation, for the gold answer
    where it is highest. Where the answer or the gold one has no words: 1 if both, else 0.
    """
    return _best(_words_f1, answer, golds)


def _best(score: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """As the official script: a gold answer without words counts only if there is no other."""
    said = normalise(answer)
    with_words = list(filter(None, map(normalise, golds)))
    return max(score(said, gold) for gold in with_words or [""])


def _equal(said: str, gold: str) -> float:
    return float(said == gold)


def _words_f1(said: str, gold: str) -> float:
    words, gold_words = said.split(), gold.split()
    if not words or not gold_words:
        return _equal(said, gold)
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words))
