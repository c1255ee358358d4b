"""What a preset file says: the model, the tasks and every size and rate of the experiments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..config.fields import Config, check_counts, check_numbers, from_section
from ..data import SOURCES, Limits
from ..errors import UserError
from ..loading import DTYPES
from ..training.finetune import PrepareOptions
from ..training.options import TrainOptions

METRICS = {"exact_match": "exact match", "f1": "F1", "token_accuracy": "token accuracy"}
GENERATED = {"exact_match", "f1"}
OBJECTIVES = ("kl", "gold")
SEEDS = "seeds"  # of an experiment: a part of the preset's own
OF_VARIANTS = ("objective", "inner_params", "contexts_per_group", "seed")

C = TypeVar("C")


@dataclass(frozen=True)
class ExperimentTask(Config):
    """The section ``[tasks.NAME]``; the name is that of the paper's data set.

    Attributes:
        source: the name of the data, as in ``gdprompt data``.
        label: how results name it; say here if the source stands in the place of the paper's.
        metrics: what is reported, the one that findings go by first.
        train: number of training examples; None for all.
        test: number of test examples; None for all.
        file: the file to read the training examples from, and the test examples if there is no
            ``test_file``; None: generated, or from the hub.
        test_file: the file to read the test examples from.
        options: training options of this task's variants, over those of ``[train]``.
        limits: of this task's examples, over those of ``[limits]``.
        teacher_on_the_fly: its teacher answers anew in every step, and nothing of it is kept.
    """

    source: str
    label: str
    metrics: tuple[str, ...]
    train: int | None = None
    test: int | None = None
    file: str | None = None
    test_file: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    teacher_on_the_fly: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("source", self.source, SOURCES)
        for metric in self.metrics or [""]:
            check_choice("metrics", metric, METRICS)
        for name in ("train", "test"):
            if getattr(self, name) is not None:
                check_counts(self, name)

    @property
    def has_answers(self) -> bool:
        """Whether a metric asks for generated answers."""
        return bool(GENERATED & set(self.metrics))


@dataclass(frozen=True)
class EvaluateOptions(Config):
    """The section ``[evaluate]``.

    Attributes:
        batch_size: examples evaluated at once.
        answer_tokens: the longest answer generated.
        inner_lr_grid: the inner rates of which a model that was not meta-trained gets its best.
        tune_examples: the number of test examples that this choice goes by.
    """

    batch_size: int
    answer_tokens: int
    inner_lr_grid: tuple[float, ...]
    tune_examples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "batch_size", "answer_tokens", "tune_examples")
        if not self.inner_lr_grid or min(self.inner_lr_grid) <= 0:
            raise UserError(
                f"inner_lr_grid: expected rates > 0, at least one, got {list(self.inner_lr_grid)}"
            )


@dataclass(frozen=True)
class FindingOptions(Config):
    """The section ``[findings]``.

    Attributes:
        margin: the largest difference, as a share, at which two scores still count as close.
        text_margin: the largest rise of running text's NLL, in nats a token, that counts as little.
    """

    margin: float
    text_margin: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "text_margin", above_zero=True)
        if not 0 < self.margin < 1:
            raise UserError(f"margin: expected a number between 0 and 1, got {self.margin!r}")


@dataclass(frozen=True)
class TextOptions(Config):
    """The section ``[text]``: running text, on which it is measured what a model forgets.

    Attributes:
        task: whose triples are put together again to the texts they were cut from.
        examples: the number of test examples to measure on.
    """

    task: str
    examples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "examples")


@dataclass(frozen=True)
class Preset:
    """A preset file, checked.

    Attributes:
        sections: the file itself, as nested dictionaries.
        model: a model folder, a name on the Hugging Face hub, or ``"bundled"``.
        revision: of the model on the hub; None: main, or none of the hub.
        dtype: of the weights.
        seeds: every seed is a repetition of everything: data, preparation, training, evaluation.
        prepare_examples: how many training examples the preparation goes by.
        train: the section ``[train]`` with its own ``[train.KIND]`` and
            ``[train.contexts-K]``; see :meth:`train_options`.
        text: the section ``[text]``; None: there is none, and it is not measured.
    """

    sections: dict[str, Any]
    model: str
    revision: str | None
    dtype: str
    seeds: tuple[int, ...]
    limits: Limits
    prepare: PrepareOptions
    prepare_examples: int
    train: dict[str, Any]
    evaluate: EvaluateOptions
    findings: FindingOptions
    tasks: dict[str, ExperimentTask]
    text: TextOptions | None = None

    @staticmethod
    def read(sections: Mapping[str, Any]) -> Preset:
        """The preset in nested dictionaries, as a TOML file gives them.

        Raises:
            ValueError: naming the section and what is wrong in it.
        """
        general = _read("model", ModelOptions, sections)
        for name in ("prepare", "train", "tasks"):
            if not isinstance(sections.get(name), dict) or not sections[name]:
                raise UserError(f"preset: expected a section [{name}], got {sections.get(name)!r}")
        prepare, tasks = dict(sections["prepare"]), sections["tasks"]
        prepare_examples = prepare.pop("examples", None)
        if not isinstance(prepare_examples, int) or prepare_examples < 1:
            raise UserError(
                f"preset, [prepare]: examples: expected an integer >= 1, got {prepare_examples!r}"
            )
        preset = Preset(
            sections=dict(sections),
            model=general.name,
            revision=general.revision,
            dtype=general.dtype,
            seeds=general.seeds,
            limits=_read("limits", Limits, sections),
            prepare=_read("prepare", PrepareOptions, {"prepare": prepare}),
            prepare_examples=prepare_examples,
            train=sections["train"],
            evaluate=_read("evaluate", EvaluateOptions, sections),
            findings=_read("findings", FindingOptions, sections),
            tasks={name: _read(name, ExperimentTask, tasks, within="tasks.") for name in tasks},
            text=_read("text", TextOptions, sections) if "text" in sections else None,
        )
        if preset.text is not None:
            preset._check_task("text", "task", preset.text.task)
        for task in preset.tasks:
            preset.limits_of(task)
            for kind in ("full", "lora", "lora-inner"):
                preset.train_options(task, kind)
        return preset

    @property
    def longest_answer(self) -> int:
        """The longest answer that is generated, by a teacher or in an evaluation."""
        of_teachers = [self.train_options(task).answer_tokens for task in self.tasks]
        return max(self.evaluate.answer_tokens, *of_teachers)

    def section(self, name: str, config: type[C]) -> C:
        """An experiment's own section.

        Raises:
            ValueError: naming the section and what is wrong in it.
        """
        its = self.sections.get(name)
        if isinstance(its, Mapping):
            its = {key: value for key, value in its.items() if key != SEEDS}
        read = _read(name, config, {name: its})
        for key in ("task", "tasks", "source", "target"):
            named = getattr(read, key, ())
            for task in (named,) if isinstance(named, str) else named:
                self._check_task(name, key, task)
        return read

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds of an experiment: its section's, or all of the preset's.

        Raises:
            ValueError: if the section names one that the preset does not.
        """
        seeds = self.sections.get(name, {}).get(SEEDS, list(self.seeds))
        if not isinstance(seeds, list) or not seeds or not set(seeds) <= set(self.seeds):
            raise UserError(
                f"preset, [{name}]: seeds: expected some of {list(self.seeds)}, got {seeds!r}"
            )
        return tuple(seeds)

    @property
    def text_task(self) -> str:
        """The task of ``[text]``.

        Raises:
            ValueError: if there is no such section.
        """
        if self.text is None:
            raise UserError("preset: expected a section [text] with running text, got none")
        return self.text.task

    def _check_task(self, section: str, key: str, task: str) -> None:
        if task not in self.tasks:
            raise UserError(
                f"preset, [{section}]: {key}: expected among {sorted(self.tasks)}, got {task!r}"
            )

    def limits_of(self, task: str) -> Limits:
        """The longest rows of a task.

        Raises:
            ValueError: naming the section and what is wrong in it.
        """
        where = f"limits, tasks.{task}.limits"
        return _read(where, Limits, {where: {**vars(self.limits), **self.tasks[task].limits}})

    @property
    def longest_prompt(self) -> int:
        """The most tokens of context, query and response together, of any task."""
        return max(self.limits_of(task).prompt_tokens for task in self.tasks)

    def train_options(
        self, task: str, kind: str = "full", contexts: int = 1, **of_variant: Any
    ) -> TrainOptions:
        """The training options of a variant.

        Args:
            task: whose ``[tasks.NAME.options]`` go over ``[train]``.
            kind: ``full``, ``lora`` (adapters outside, full rank inside) or ``lora-inner``;
                ``[train.KIND]`` goes over both.
            contexts: as many share a θ'; ``[train.contexts-K]`` goes over all these.
            of_variant: what the variant itself says, over all.

        Raises:
            ValueError: naming the sections and what is wrong in them.
        """
        common = {name: value for name, value in self.train.items() if not isinstance(value, dict)}
        shared = f"contexts-{contexts}"
        options = {**common, **self.tasks[task].options}
        options |= self.train.get(kind, {}) | self.train.get(shared, {})
        where = f"train, tasks.{task}.options, train.{kind}, train.{shared}"
        for name in OF_VARIANTS:
            if name in options:
                raise UserError(f"preset, [{where}]: {name}: expected to be left to the experiment")
        one_each = _read(where, TrainOptions, {where: options | of_variant})
        if one_each.batch_size % contexts:
            raise UserError(
                f"preset, [{where}]: batch_size: expected a multiple of {contexts} contexts, "
                f"got {one_each.batch_size}"
            )
        groups = one_each.batch_size // contexts
        return replace(one_each, batch_size=groups, contexts_per_group=contexts)


@dataclass(frozen=True)
class ModelOptions(Config):
    """The section ``[model]``.

    Attributes:
        name: a model folder, a name on the Hugging Face hub, or ``"bundled"``.
        seeds: every seed is a repetition.
    """

    name: str
    seeds: tuple[int, ...]
    dtype: str = "float32"
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, DTYPES)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: expected different integers, got {list(self.seeds)}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """The value is one of these."""
    if value not in choices:
        raise UserError(f"{name}: expected one of {sorted(choices)}, got {value!r}")


def _read(name: str, config: type[C], sections: Mapping[str, Any], within: str = "") -> C:
    return from_section(config, sections.get(name), f"preset, [{within}{name}]")
