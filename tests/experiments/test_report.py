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
    token_accuracy=0.4,
    token_accuracy_se=0.02,
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
        "token accuracy before",
        "token accuracy after",
        "NLL per token before",
        "NLL per token after",
    ]
    assert lines[0].split("|")[2].strip() == "No Context"
    assert lines[3].split("|")[4].strip() == "90.0 ± 3.0 %"
    assert lines[7].split("|")[4].strip() == "0.200 ± 0.100"
    assert len({len(line) for line in lines}) == 1


def test_generated_answers_have_rows_and_unknown_numbers_a_dash() -> None:
    answered = replace(POOR, exact_match=0.5, exact_match_se=None, f1=0.625, f1_se=0.04)
    lost = replace(POOR, nll_per_token=None, nll_per_token_se=None)
    lines = results_table({"": {**BEFORE, "prompt": answered, "fine_tuning": lost}}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[2:] == [
        ["exact match", "–", "50.0 ± – %", "–"],
        ["F1", "–", "62.5 ± 4.0 %", "–"],
        ["NLL per token", "4.000 ± 0.100", "4.000 ± 0.100", "–"],
    ]


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


def test_without_a_standard_error_nothing_is_an_improvement() -> None:
    single = replace(GOOD, accuracy_se=None, nll_per_token=None, nll_per_token_se=None)
    sentences = not_improved(BEFORE, {**AFTER, "fine_tuning": single})
    assert sentences[-1] == (
        "Fine-Tuning did not improve in accuracy (10.0% before, 90.0% after) "
        "and NLL (4.00 before, – after)."
    )


def test_the_figure_is_drawn_with_and_without_evaluations(
    full_figures: None, tmp_path: Path
) -> None:
    metrics = [{"step": step, "query_loss": 1 / step} for step in range(1, 50)]
    draw_figure({"before": BEFORE, "after": AFTER}, metrics, tmp_path / "both.png")
    draw_figure({}, metrics, tmp_path / "curve.png")
    lost = replace(POOR, accuracy_se=None, nll_per_token=None, nll_per_token_se=None)
    draw_figure({"single": {**BEFORE, "prompt": lost}}, metrics, tmp_path / "unknown.png")
    for name in ("both.png", "curve.png", "unknown.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
