"""Whether the engine computes a given model's own meta-gradient, by that model's own forward."""

from .check import check_exactness
from .report import ExactnessReport, Finding, Precision

__all__ = ["ExactnessReport", "Finding", "Precision", "check_exactness"]
