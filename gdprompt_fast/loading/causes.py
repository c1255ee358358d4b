"""Whatever transformers, PEFT and tokenizers raise when they load, as one line of the user's."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers
import transformers
from transformers.utils.logging import get_verbosity, set_verbosity

from ..errors import UserError

LONGEST = 300  # characters of another's message
CAUSES = {
    r"^Exception: ": (  # the type of all errors of tokenizers
        f"a tokenizer.json that tokenizers {tokenizers.__version__} cannot read: of a newer one "
        "(pip install -U tokenizers transformers), or damaged"
    ),
    r"does not recognize this architecture|Unrecognized model": (
        f"a model_type that transformers {transformers.__version__} does not know: of a newer one "
        "(pip install -U transformers), or damaged"
    ),
    r"Validation error": "a config.json with a value that cannot be",
    r"instantiate the backend tokenizer": "a tokenizer whose files are not all there",
    r"trust_remote_code": "a model with code of its own, which is not run",
    r"Unrecognized configuration class": "a model that is no causal LM",
    r"out of memory|can't allocate memory|MemoryError": "more than the memory holds",
    r"weights_only|Unpickling|zip archive|pickle": "a .bin file that is damaged or holds code",
    r"^(ModuleNotFoundError|ImportError): ": "something that needs another package",
}


@contextmanager
def one_line_errors(expected: str) -> Iterator[None]:
    """Inside, the libraries warn of nothing, and any error of theirs is a UserError.

    They raise Exception, ImportError, KeyError, pickle's errors and more for one and the same: a
    folder that is no model, hence the broad except.
    """
    level = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: expected {expected}, got {likely_cause(error)}") from error
    finally:
        set_verbosity(level)


def likely_cause(error: BaseException) -> str:
    """What is probably wrong, and what the library says."""
    said = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()
    for pattern, cause in CAUSES.items():
        if re.search(pattern, said):
            return f"{cause} ({said[:LONGEST]})"
    return said[:LONGEST]
