"""Exact, low-memory meta-training: one gradient step on a text does what prompting with it does."""

from pathlib import Path as _Path

from .batch import MetaBatch
from .exactness import ExactnessReport, check_exactness
from .layout import BatchShape
from .meta.config import MetaStepConfig, MetaStepOutput
from .meta.inner import InnerUpdate, inner_step
from .meta.lm_batch import LMBatch
from .meta.step import fast_meta_step
from .meta.targets import TeacherTargets
from .reference.step import reference_meta_step

__version__ = "0.1.0"
__all__ = [
    "BatchShape",
    "ExactnessReport",
    "InnerUpdate",
    "LMBatch",
    "MetaBatch",
    "MetaStepConfig",
    "MetaStepOutput",
    "TeacherTargets",
    "check_exactness",
    "fast_meta_step",
    "inner_step",
    "reference_meta_step",
]

# In a source checkout the Triton kernels stand beside the package, not inside it.
_here = _Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))
