"""Maps the source folder ``kernels/`` to the package ``gdprompt_fast.kernels``; builds ``csrc/``.

A top-level package called ``kernels`` would be taken for Hugging Face's own by transformers, hence
the explicit list, and no ``kernels/__init__.py``.
"""

import importlib.util
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

SUBPACKAGES = [
    "app",
    "artifacts",
    "bundled",
    "cli",
    "config",
    "data",
    "distributed",
    "evaluation",
    "exactness",
    "experiments",
    "icl",
    "internalisation",
    "internalisation.material",
    "keep",
    "kernels",
    "kernels.attention",
    "loading",
    "meta",
    "models",
    "ops",
    "ops.cpp",
    "ops.eager",
    "ops.vocabulary",
    "plan",
    "presets",
    "reference",
    "report",
    "runs",
    "teacher",
    "testing",
    "trainer",
    "training",
    "update",
]


def cpp_extension() -> list[Extension]:
    """The CPU ops, built against torch's stable ABI: one library for torch 2.11 and later.

    Optional: without a compiler, or with one that fails, setuptools says so and goes on.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        print(
            "gdprompt_fast: the C++ ops are left out, no torch to build them with: PyTorch serves; "
            "pip install 'setuptools>=77' && pip install --no-build-isolation -e . builds them"
        )
        return []
    sources = sorted(glob("csrc/*.cpp"))
    if not sources:
        print("gdprompt_fast: the C++ ops are left out, PyTorch serves: no csrc/ in this package")
        return []
    root = Path(torch.origin).parent
    flags = "-std=c++20 -O3 -g0 -fopenmp-simd -fno-math-errno -fno-trapping-math"
    no_branches = "-fno-thread-jumps"  # a clamp in a loop becomes two branches, a quarter the speed
    return [
        Extension(
            "gdprompt_fast._cpp",
            sources,
            depends=glob("csrc/*.h"),
            include_dirs=[str(root / "include")],
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=[*flags.split(), no_branches],
            py_limited_api=True,  # it links no Python at all
            optional=True,
        )
    ]


setup(
    packages=["gdprompt_fast", *(f"gdprompt_fast.{name}" for name in SUBPACKAGES)],
    package_dir={"gdprompt_fast": "gdprompt_fast", "gdprompt_fast.kernels": "kernels"},
    package_data={
        "gdprompt_fast": ["py.typed"],
        "gdprompt_fast.app": ["*.css"],
        "gdprompt_fast.bundled": ["model/*", "meta_trained_model/*"],
        "gdprompt_fast.presets": ["*.toml"],
    },
    ext_modules=cpp_extension(),
)
