"""The bars of an experiment's figure."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gdprompt_fast.report.experiment import COLOURS, HATCHES, _colour_by_head

pytestmark = pytest.mark.quick


def test_a_head_has_one_colour_in_all_panels_and_the_next_round_is_hatched() -> None:
    panels = Figure().subplots(1, 2)
    heads = [["a", "b"], ["c", "b", *map(str, range(len(COLOURS)))]]
    for ax, of_panel in zip(panels, heads, strict=True):
        for head in of_panel:
            ax.bar([0], [1], label=head)
        ax.plot([0], [1], label="the paper")
    _colour_by_head(panels)
    seen = [
        {bars.get_label(): (to_hex(bars[0].get_facecolor()), bars[0].get_hatch()) for bars in each}
        for each in (ax.containers for ax in panels)
    ]
    assert seen[0] == {"a": (COLOURS[0], ""), "b": (COLOURS[1], "")}
    assert seen[1]["b"] == seen[0]["b"] and seen[1]["c"] == (COLOURS[2], "")
    assert seen[1][str(len(COLOURS) - 1)] == (COLOURS[2], HATCHES[1])
