"""mypy lets kernels go without types; every other function in ``kernels/`` has them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT

pytestmark = pytest.mark.quick

FILES = sorted((ROOT / "kernels").rglob("*.py"))


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether it is decorated with ``triton.jit`` or ``triton.jit(...)``."""
    names = [ast.unparse(each).partition("(")[0] for each in function.decorator_list]
    return "triton.jit" in names


def lacks_types(function: ast.FunctionDef) -> bool:
    of = function.args
    variadic = [each for each in (of.vararg, of.kwarg) if each]
    arguments = [*of.posonlyargs, *of.args, *of.kwonlyargs, *variadic]
    untyped = [each.arg for each in arguments if each.annotation is None]
    return function.returns is None or not {"self", "cls"}.issuperset(untyped)


def untyped_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not is_kernel(node) and lacks_types(node):
            yield node.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_function_that_is_no_kernel_is_typed(file: Path) -> None:
    assert list(untyped_functions(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("untyped", ["def f(x) -> int: ...", "def f(x: int): ...", "def f(): ..."])
def test_an_untyped_function_is_found(untyped: str) -> None:
    assert list(untyped_functions(untyped)) == ["f"]
    assert list(untyped_functions(f"@triton.jit(do_not_specialize=['N'])\n{untyped}")) == []
