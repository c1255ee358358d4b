"""A step on a model of many equal layers, from those on models of a few."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from .timeline import Timeline

MOST_RUN_WHOLE = 4  # layers; no more are run for the plan of more


@dataclass(frozen=True)
class Run:
    """What a training step allocated, in order, and the number of the model's weights."""

    parameters: int
    meta_step: Timeline
    optimizer_step: Timeline

    def grown(self, longer: Run, times: int) -> Run:
        """This with what ``longer``, of one layer more, has beside it ``times`` times."""
        return Run(
            self.parameters + times * (longer.parameters - self.parameters),
            self.meta_step.grown(longer.meta_step, times),
            self.optimizer_step.grown(longer.optimizer_step, times),
        )

    def agrees_with(self, other: Run) -> bool:
        return (
            self.parameters == other.parameters
            and self.meta_step.agrees_with(other.meta_step)
            and self.optimizer_step.agrees_with(other.optimizer_step)
        )


def run_layers(run: Callable[[PreTrainedConfig], Run], config: PreTrainedConfig) -> Run:
    """``run(config)``, with equal layers beyond a few not run but repeated.

    What a layer adds to a run is repeated if the same predicts a further run, of one layer more;
    else, and where the layers differ, the whole model is run.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= MOST_RUN_WHOLE or _layers_differ(config):
        return run(config)
    runs = [run(_with_layers(config, few)) for few in (1, 2)]
    for few in range(3, MOST_RUN_WHOLE + 1):
        runs.append(run(_with_layers(config, few)))
        short, longer, checked = runs[-3:]
        if short.grown(longer, 2).agrees_with(checked):
            return short.grown(longer, layers - few + 2)
    return run(config)


def _layers_differ(config: PreTrainedConfig) -> bool:
    """Whether some attend within a window and others do not: all else that the engine's families
    can differ in is numbers, not shapes.
    """
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    few = copy.deepcopy(config)
    few.num_hidden_layers = layers
    if vars(few).get("layer_types"):  # of some it is a property
        few.layer_types = few.layer_types[:layers]
    return few
