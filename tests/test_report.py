"""The table, the plain words and the figure of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gdprompt_fast.evaluation import Summary
from gdprompt_fast.report import draw_figure, not_improved, results_table

POOR = Summary(
    examples=100,
    tokens=300,
    accuracy=0.1,
    accuracy_se=0.03,
    nll_per_token=4.0,
    nll_per_token_se=0.1,
    nll_per_example=12.0,
    nll_per_example_se=0.3,
)
GOOD = replace(POOR, accuracy=0.9, nll_per_token=0.2)
BEFORE = {"no_context": POOR, "prompt": POOR, "fine_tuning": POOR}
AFTER = {"no_context": POOR, "prompt": replace(POOR, nll_per_token=3.0), "fine_tuning": GOOD}


def test_the_table_is_markdown_with_errors_and_aligned_columns() -> None:
    lines = results_table({"before": BEFORE, "after": AFTER}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "accuracy before",
        "accuracy after",
        "NLL per token before",
        "NLL per token after",
    ]
    assert lines[0].split("|")[2].strip() == "No Context"
    assert lines[3].split("|")[4].strip() == "90.0 ± 3.0 %"
    assert lines[5].split("|")[4].strip() == "0.200 ± 0.100"
    assert len({len(line) for line in lines}) == 1


def test_what_did_not_improve_is_named_with_its_numbers() -> None:
    assert not_improved(BEFORE, AFTER) == [
        "No Context did not improve in accuracy (10.0% before, 10.0% after) "
        "and NLL (4.00 before, 4.00 after).",
        "Prompt did not improve in accuracy (10.0% before, 10.0% after).",
    ]


def test_a_difference_within_the_error_is_no_improvement() -> None:
    slightly = {**BEFORE, "prompt": replace(POOR, accuracy=0.15, nll_per_token=3.8)}
    sentences = not_improved(BEFORE, slightly)
    assert sentences[1].startswith("Prompt did not improve in accuracy (10.0% before, 15.0% after)")


def test_the_figure_is_drawn_with_and_without_evaluations(tmp_path: Path) -> None:
    metrics = [{"step": step, "query_loss": 1 / step} for step in range(1, 50)]
    draw_figure({"before": BEFORE, "after": AFTER}, metrics, tmp_path / "both.png")
    draw_figure({}, metrics, tmp_path / "curve.png")
    for name in ("both.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
