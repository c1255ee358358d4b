"""What a check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..artifacts.markdown import markdown_table

EXACT, NOT_EXACT, CANNOT_TELL = "exact", "not exact", "cannot tell"


@dataclass(frozen=True)
class Finding:
    """One comparison of the engine with the model's own forward.

    Attributes:
        name: of what is compared.
        engine, own: the two numbers; of many, as logits, only their relative ``difference`` is
            given.
        difference: of the two.
        allowed: the largest difference that counts as equal, the uncertainty in it.
        uncertainty: of ``own``, where it is an estimate.
    """

    name: str
    engine: float | None
    own: float | None
    difference: float
    allowed: float
    uncertainty: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the two are equal; NaN is not."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Precision:
    """The meta-gradient in bf16 against that of the check, each as (cosine, ratio of norms).

    Attributes:
        gradient: the whole.
        second_order: its second-order term alone, g − g_first-order.
        first_order: first-order MAML, computed exactly: what dropping that term would give.
    """

    gradient: tuple[float, float]
    second_order: tuple[float, float]
    first_order: tuple[float, float]


@dataclass(frozen=True)
class ExactnessReport:
    """Whether ``fast_meta_step`` computes the model's own meta-gradient; see docs/exactness.md.

    Attributes:
        verdict: "exact", "not exact" or "cannot tell".
        reasons: what the verdict rests on, a sentence each.
        suggestions: what to do about it.
        findings: every comparison.
        precision: what bf16 makes of the meta-gradient; None where there was no memory for it.
        power: how many times its allowed difference the second-order term is, in the direction
            that shows it best: a step that drops it is found out if this is above 1.
        dtype: that the gradients were compared in.
        backend: the implementation that was checked.
        inner_lr: η.
        suggested_inner_lr: one at which a verdict is possible, where there is none.
    """

    verdict: str
    reasons: tuple[str, ...]
    suggestions: tuple[str, ...]
    findings: tuple[Finding, ...]
    precision: Precision | None
    power: float
    dtype: str
    backend: str
    inner_lr: float
    suggested_inner_lr: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the verdict is "exact"."""
        return self.verdict == EXACT

    def table(self) -> str:
        """Everything as Markdown that reads well in a terminal."""
        heading = [
            f"gradients in {self.dtype}",
            "engine",
            "model's own",
            "difference",
            "allowed",
            "",
        ]
        rows = [
            [
                finding.name,
                _number(finding.engine),
                _number(finding.own),
                f"{finding.difference:.1e}",
                f"{finding.allowed:.1e}",
                "equal" if finding.agrees else "DIFFERS",
            ]
            for finding in self.findings
        ]
        lines = [markdown_table([heading, *rows]), ""]
        if self.precision is not None:
            lines += [markdown_table(_precision_rows(self.precision)), ""]
        lines += [f"{self.verdict} (backend {self.backend}, η = {self.inner_lr:g})"]
        lines += [f"- {sentence}" for sentence in (*self.reasons, *self.suggestions)]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries."""
        report = asdict(self)
        findings: Sequence[Finding] = self.findings
        for entry, finding in zip(report["findings"], findings, strict=True):
            entry["agrees"] = finding.agrees
        return {"exact": self.exact, **report}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def _precision_rows(precision: Precision) -> list[list[str]]:
    rows = [["against the exact meta-gradient", "cosine", "ratio of norms"]]
    for name, (cosine, ratio) in (
        ("the meta-gradient in bf16", precision.gradient),
        ("its second-order term in bf16", precision.second_order),
        ("first order instead, without rounding", precision.first_order),
    ):
        rows.append([name, f"{cosine:.4f}", f"{ratio:.4f}"])
    return rows
