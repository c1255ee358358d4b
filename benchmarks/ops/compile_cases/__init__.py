"""What is compiled of the kernels: every kernel as a launch at the shapes of Llama specialises it.

A case is a dict of name, kernel, signature (type strings, or tuples of them), constexprs,
num_warps, num_stages and, if any, aligned: names of the arguments that are multiples of 16, as
pointers always are; of a tuple, every element.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import attention_cases
from .case import Case
from .elementwise import gelu_cases, norm_cases, rotary_cases, swiglu_cases
from .products import linear_cases, lora_cases
from .vocabulary import online_cases, vocabulary_cases

# By the kernels' module: the cases for a target.
CASES: dict[str, Callable[[str], list[Case]]] = {
    "attention": attention_cases,
    "gelu": gelu_cases,
    "linear": linear_cases,
    "lora": lora_cases,
    "norm": norm_cases,
    "online": online_cases,
    "rotary": rotary_cases,
    "swiglu": swiglu_cases,
    "vocabulary": vocabulary_cases,
}
