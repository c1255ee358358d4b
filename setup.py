"""Maps the source folder ``kernels/`` to the package ``gdprompt_fast.kernels``.

A top-level package called ``kernels`` would be taken for Hugging Face's own by transformers, hence
the explicit list, and no ``kernels/__init__.py``.
"""

from setuptools import setup

SUBPACKAGES = [
    "data",
    "evaluation",
    "kernels",
    "meta",
    "ops",
    "ops.eager",
    "ops.vocabulary",
    "plan",
    "reference",
    "report",
    "teacher",
    "update",
]

setup(
    packages=["gdprompt_fast", *(f"gdprompt_fast.{name}" for name in SUBPACKAGES)],
    package_dir={"gdprompt_fast": "gdprompt_fast", "gdprompt_fast.kernels": "kernels"},
    package_data={"gdprompt_fast": ["py.typed"]},
)
