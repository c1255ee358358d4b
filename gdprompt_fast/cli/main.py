"""The command line, ``gdprompt COMMAND``."""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers.utils.logging import disable_progress_bar

from ..artifacts.files import hash_of_file, recover, write_file, write_folder, write_json
from ..artifacts.outputs import Outputs, check_differ, is_marked, written_by
from ..data import SOURCES, make_data
from ..data.folder import SAMPLES, counts_table, is_data_folder, samples, write_data
from ..errors import UserError
from ..evaluation import (
    InnerStep,
    check_inner_step,
    check_squad_ids,
    evaluate,
    tune_inner_lr,
    whole_groups,
    write_predictions,
    write_squad_predictions,
)
from ..experiments import EXPERIMENTS
from ..experiments.command import OWN_PRESETS, prepare_experiment
from ..loading import (
    DTYPES,
    base_on_disk,
    choose_device,
    load_config,
    load_model,
    positions,
    print_notes,
    room_before_answer,
)
from ..plan import Setting, make_plan, parse_memory, plan_json, plan_table
from ..presets import preset_arguments
from ..report import PAGE_FILE, is_page, results_page, results_table
from ..runs.check import CHECKED, check_before_training, prepare_exactness
from ..runs.demo import OPTIONS, TEST_EXAMPLES, make_demo, run_demo
from ..runs.job import hub_and_weights, limits, load_job
from ..runs.reading import Reader, write_dropped
from ..runs.search import GRID, search_outer_lr, short_trainings
from ..runs.train_run import TestSet, as_results, check_output, claim_output, run, summaries
from ..training.checkpoint import save_model
from ..training.loop import TrainOptions
from ..training.prepare import PrepareOptions, fine_tune

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
DEBUG = "--debug"  # of every command: shows the traceback of an error
# What may change when a run is continued: a search, for one, may go on to other rates.
FREE = {
    *("allow_missing", "check", "device", "eval_batch_size", "grid", "output"),
    *("dropped", "overwrite", "prepare", "preset", "preset_section", "resume", "teacher_cache"),
}
MODELS = ("model", "teacher")
INPUTS = (
    *(*MODELS, "data", "test_data", "joint_data", "teacher_cache", "preset"),
    *("source", "test_source"),
)

# What --overwrite replaces. Without it that is refused; an input is never replaced.
REPLACES = "replace an --output that is not empty, and all in it"
OVERWRITE = {
    "data": f"{REPLACES}; data that this command wrote, unchanged, needs no leave",
    **dict.fromkeys(("demo", "prepare", "train", "search-outer-lr"), REPLACES),
    "evaluate": "replace files that exist; --results and --dropped of this command need no leave",
    **dict.fromkeys(("check", "plan"), "replace a --json that this command did not write"),
    "experiment": f"{REPLACES}, unless it is one of experiments, which is gone on with",
    "report": "replace a page that this command did not write",
}

TRIPLES = (
    'JSONL or a JSON array of {"context", "query", "response"}, gzipped or not; "question", '
    '"privileged_context", "prompt" and the first of "answers" are taken for them'
)
Work = Callable[[], int | None]  # an exit code of its own, or None for 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 (failed on the way), 2 (bad input) or 130."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = DEBUG in arguments
    arguments = [each for each in arguments if each != DEBUG]
    args = _parser().parse_args(arguments)
    disable_progress_bar()  # of transformers, for the writing of files: it would break ours
    _print_anything()
    try:
        return _prepare_and_work(args, arguments, debug)
    except KeyboardInterrupt:
        hint = "; --resume continues the run" if hasattr(args, "resume") else ""
        hint = "; the same command continues it" if args.command == "experiment" else hint
        print(f"\ngdprompt {args.command}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED


def _print_anything() -> None:
    """No character that the terminal's encoding lacks ends a command before it has written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _prepare_and_work(args: argparse.Namespace, arguments: list[str], debug: bool) -> int:
    try:
        if hasattr(args, "preset_section") and args.preset:
            args = _with_preset(args, arguments)
        for path in _paths(args).values():
            recover(path)
            recover(path.parent)
        work: Work = args.prepare(args)
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"gdprompt {args.command}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    try:
        return work() or 0
    except (FloatingPointError, OSError, UserError) as error:
        if debug:
            raise
        print(f"gdprompt {args.command}: stopped: {error}", file=sys.stderr)
        return FAILED


def prepare_data(args: argparse.Namespace) -> Work:
    """The whole of ``gdprompt data`` but for what it writes and prints."""
    _outputs(args).check_folder(args.output, is_data_folder)
    data = make_data(
        args.name,
        args.train,
        args.test,
        args.seed,
        args.source,
        args.test_source,
        args.max_characters,
        args.encoding,
    )

    def work() -> None:
        settings = {n: v for n, v in _settings(args).items() if n not in ("command", "name")}
        write_data(data, args.output, args.name, settings)
        write_dropped(args.dropped, args.command, data.dropped)
        print(counts_table(data, SOURCES[args.name].paper))
        print(f"\n{samples(data.train.take(SAMPLES))}\n\nwritten to {args.output}")

    return work


def _with_preset(args: argparse.Namespace, arguments: list[str]) -> argparse.Namespace:
    """The arguments parsed again after those of the preset, which they override."""
    no_settings = ("command", "prepare", "preset", "preset_section")
    known = [
        name
        for name, value in vars(args).items()
        if name not in no_settings and not isinstance(value, bool)
    ]
    preset = preset_arguments(args.preset, args.preset_section, sorted(known))
    return _parser().parse_args([arguments[0], *preset, *arguments[1:]])


def prepare_demo(args: argparse.Namespace) -> Work:
    """Everything before the long work of ``gdprompt demo``."""
    check_output(args.output, args.resume, _outputs(args))
    demo = make_demo(
        choose_device(args.device),
        args.steps,
        args.seed,
        args.test_examples,
        args.eval_batch_size,
    )
    settings = {**_settings(args), **asdict(demo.options)}
    claim_output(args.output, settings, args.resume, _outputs(args))
    print(
        f"the bundled model, {len(demo.examples)} questions on passages to train on and "
        f"{len(demo.test.examples)} to measure on, with no person and no thing in common"
    )
    return lambda: run_demo(demo, args.output)


def prepare_prepare(args: argparse.Namespace) -> Work:
    """Everything before the long work of ``gdprompt prepare``: its input, checked and loaded."""
    options = PrepareOptions(**{f.name: getattr(args, f.name) for f in fields(PrepareOptions)})
    _outputs(args).check_folder(args.output)
    if args.examples < 1:
        raise UserError(f"examples: expected an integer >= 1, got {args.examples}")
    device = choose_device(args.device)
    model, tokenizer = load_model(args.model, "float32", device, **hub_and_weights(args))
    print_notes(model, tokenizer)
    reader = Reader.of(args)
    chosen = reader.examples(args.data, model, tokenizer, limits(args, positions(model)))
    random.Random(options.seed).shuffle(chosen)  # a file comes in order of its articles
    chosen = chosen[: args.examples]
    print(f"fine-tuning on {len(chosen)}")

    def work() -> None:
        write_dropped(args.dropped, args.command, reader.dropped)
        fine_tune(model, chosen, options)
        write_folder(args.output, lambda folder: save_model(model, tokenizer, folder))
        print(f"model: {args.output}")

    return work


def prepare_train(args: argparse.Namespace) -> Work:
    """Everything before the long work of ``gdprompt train``: its input, checked and loaded."""
    options = _train_options(args)
    check_output(args.output, args.resume, _outputs(args))
    job = load_job(args, options)
    claim_output(args.output, _run_settings(args), args.resume, _outputs(args))

    def work() -> None:
        write_dropped(args.dropped, args.command, job.reader.dropped)
        teacher = job.build_teacher_cache()
        if args.check:
            check_before_training(job, teacher, args.output)
        run(
            job.model,
            job.tokenizer,
            job.examples,
            job.options,
            args.output,
            teacher,
            job.test,
            job.joint,
        )

    return work


def prepare_check(args: argparse.Namespace) -> Work:
    """Everything before the long work of ``gdprompt check``: its input, checked and loaded."""
    _outputs(args).check_file("json", args.json, lambda path: is_marked(path, args.command))
    options = TrainOptions(**{name: getattr(args, name) for name in CHECKED})
    return prepare_exactness(args, options)


def prepare_search(args: argparse.Namespace) -> Work:
    """Everything before the long work of ``gdprompt search-outer-lr``: its input, checked."""
    trainings = short_trainings(_train_options(args), args.grid, args.steps_per_rate)
    if args.test_data is None:
        raise UserError("test_data: expected held-out triples to score the rates on, got none")
    check_output(args.output, args.resume, _outputs(args))
    job = load_job(args, trainings[0])
    claim_output(args.output, _run_settings(args), args.resume, _outputs(args))

    def work() -> None:
        write_dropped(args.dropped, args.command, job.reader.dropped)
        search_outer_lr(job, trainings, args.output)

    return work


def prepare_evaluate(args: argparse.Namespace) -> Work:
    """Everything before the long work of ``gdprompt evaluate``: its input, checked and loaded."""
    asked = InnerStep(args.inner_lr, args.inner_steps, args.inner_params)
    outputs = _outputs(args)
    outputs.check_file("results", args.results, lambda path: is_marked(path, args.command))
    outputs.check_file("predictions", args.predictions)
    outputs.check_file("squad_predictions", args.squad_predictions)
    if args.squad_predictions and not args.answer_tokens:
        raise UserError("squad_predictions: expected answer_tokens >= 1, got 0: there is no answer")
    device = choose_device(args.device)
    model, tokenizer = load_model(args.model, args.dtype, device, **hub_and_weights(args))
    print_notes(model, tokenizer)
    check_inner_step(model, asked, args.one_after_another)
    room = room_before_answer(model, args.answer_tokens)
    reader = Reader.of(args)
    triples = reader.examples(args.data, model, tokenizer, limits(args, room))
    test = TestSet(triples, args.inner_lr_grid, args.eval_batch_size, args.answer_tokens)
    examples = whole_groups(test.examples, args.contexts_per_group)
    if args.squad_predictions:
        check_squad_ids(examples)
    grouping = {n: vars(args)[n] for n in ("contexts_per_group", "one_after_another")}

    def work() -> None:
        write_dropped(args.dropped, args.command, reader.dropped)
        inner = asked
        if args.tune_inner_lr:
            grid, size = test.inner_lr_grid, test.batch_size
            inner = tune_inner_lr(model, examples, asked, grid, size, **grouping).inner
        scores = evaluate(
            model,
            tokenizer,
            examples,
            inner,
            test.batch_size,
            answer_tokens=test.answer_tokens,
            **grouping,
        )
        result = {**as_results(scores, inner), **grouping}
        if args.results:
            write_json(args.results, {**written_by(args.command), **result})
        if args.predictions:
            write_predictions(args.predictions, examples, scores)
        if args.squad_predictions:
            write_squad_predictions(args.squad_predictions, examples, scores)
        print(f"\n{len(examples)} examples, ± one standard error:\n")
        print(f"{results_table(summaries({'': result}))}\n\nFine-Tuning: η = {inner.lr:g}")

    return work


def prepare_plan(args: argparse.Namespace) -> Work:
    """The whole of ``gdprompt plan`` but for what it prints."""
    setting = Setting(**{f.name: getattr(args, f.name) for f in fields(Setting)})
    memory = None if args.memory is None else parse_memory(args.memory)
    _outputs(args).check_file("json", args.json, lambda path: is_marked(path, args.command))
    plan = make_plan(load_config(args.model, args.revision), setting, memory)

    def work() -> None:
        if args.json:
            write_json(args.json, {**written_by(args.command), **plan_json(args.model, plan)})
        print(plan_table(args.model, plan))

    return work


def prepare_experiment_of(args: argparse.Namespace) -> Work:
    """Everything before the long work of ``gdprompt experiment``."""
    return prepare_experiment(
        args.name,
        args.preset,
        args.output,
        args.seeds,
        args.model,
        args.device,
        _outputs(args),
        **hub_and_weights(args),
    )


def prepare_report(args: argparse.Namespace) -> Work:
    """The whole of ``gdprompt report`` but for what it prints."""
    page, path = results_page(args.folder), args.folder / PAGE_FILE
    _outputs(args).check_file(PAGE_FILE, path, is_page)

    def work() -> None:
        write_file(path, page)
        print(f"written to {path}")

    return work


def _paths(args: argparse.Namespace) -> dict[str, Path]:
    """The files and folders that the options name; a model may be a name on the hub instead."""
    named = ("model", "teacher", "preset")
    given = {name: value for name, value in vars(args).items() if value is not None}
    return {n: Path(v) for n, v in given.items() if isinstance(v, Path) or n in named}


def _outputs(args: argparse.Namespace) -> Outputs:
    """What a command must not write over; the file of dropped records is checked at once."""
    paths = _paths(args)
    inputs = {n: p for n, p in paths.items() if n in INPUTS and p.exists()}
    bases = {f"base of the {n}": base_on_disk(inputs[n]) for n in MODELS if n in inputs}
    inputs |= {n: base for n, base in bases.items() if base is not None}
    written = {n: p for n, p in paths.items() if n not in INPUTS or n == "teacher_cache"}
    check_differ(**written)
    outputs = Outputs(inputs, args.overwrite, written)
    outputs.check_file("dropped", paths.get("dropped"), lambda path: is_marked(path, args.command))
    return outputs


def _train_options(args: argparse.Namespace) -> TrainOptions:
    return TrainOptions(**{f.name: getattr(args, f.name) for f in fields(TrainOptions)})


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a run must have in common with the one that it continues."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    return {n: str(value) if isinstance(value, Path) else value for n, value in settings.items()}


def _run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings, and what the files of triples hold that they name."""
    files = {name: getattr(args, name) for name in ("data", "test_data", "joint_data")}
    hashes = {f"{name}_sha256": hash_of_file(path) for name, path in files.items() if path}
    return {**_settings(args), **hashes}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdprompt",
        description=__doc__,
        epilog=f"{DEBUG} after any command shows the traceback of an error.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_data(commands)
    _add_demo(commands)
    _add_prepare(commands)
    _add_check(commands)
    _add_train(commands)
    _add_search(commands)
    _add_evaluate(commands)
    _add_plan(commands)
    _add_experiment(commands)
    _add_report(commands)
    return parser


def _command(
    commands: Any, name: str, what: str, prepare: Callable[[argparse.Namespace], Work]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(prepare=prepare)
    parser.add_argument(
        "--overwrite", action="store_true", help=f"{OVERWRITE[name]}; never an input"
    )
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: cuda or cpu")
    parser.add_argument("--eval-batch-size", type=int, default=32, help="examples at once")


def _add_data(commands: Any) -> None:
    what = "Make triples of context, query and response to train and to test on."
    parser = _command(commands, "data", what, prepare_data)
    sources = "; ".join(f"{name}: {source.what}" for name, source in SOURCES.items())
    parser.add_argument("name", choices=SOURCES, metavar="NAME", help=sources)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, help="training triples; None: 5,000, or all of a text")
    parser.add_argument("--test", type=int, help="test triples; None: 500, or all of a text")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn at random")
    parser.add_argument(
        "--source",
        type=Path,
        help="file of squad, wikitext or jsonl; divided in two unless --test-source is given",
    )
    parser.add_argument("--test-source", type=Path, help="file to take the test triples from")
    parser.add_argument(
        "--max-characters", type=int, help="drop a record with longer texts (squad: 1500)"
    )
    _add_reading(parser)


def _add_demo(commands: Any) -> None:
    what = "Meta-train the bundled model on made-up facts; no download, minutes on a CPU."
    parser = _command(commands, "demo", what, prepare_demo)
    _add_device(parser)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=OPTIONS.steps, help="outer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and its order")
    parser.add_argument(
        "--test-examples", type=int, default=TEST_EXAMPLES, help="passages to measure on"
    )
    _add_resume(parser)


def _add_prepare(commands: Any) -> None:
    what = (
        "Briefly fine-tune a model in the Prompt and No Context formats (§4.3): what gdprompt "
        "train then starts from, and its teacher."
    )
    parser = _command(commands, "prepare", what, prepare_prepare)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: cuda or cpu")
    _add_model(parser)
    parser.add_argument("--data", type=Path, required=True, help=TRIPLES)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--examples", type=int, default=1000, help="take the first so many records")
    _add_limits(parser)
    _add_fields(parser, PrepareOptions)


def _add_train(commands: Any) -> None:
    what = "Meta-train a transformers model on triples of context, query and response."
    parser = _command(commands, "train", what, prepare_train)
    _add_training(parser)
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first of all gdprompt check on one example; train nothing where it is not exact",
    )


def _add_check(commands: Any) -> None:
    what = (
        "Whether the engine's meta-gradient is this model's exact one: against the model's own "
        "forward, whatever was changed in it. Exit code 0: it is; 1: it is not, or cannot be told."
    )
    parser = _command(commands, "check", what, prepare_check)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: cuda or cpu")
    _add_model_and_data(parser)
    parser.add_argument("--examples", type=int, default=2, help="take the first so many records")
    parser.add_argument("--lora-rank", type=int, default=0, help="of LoRA adapters; 0: train all")
    parser.add_argument("--json", type=Path, help="JSON file to write the report to")
    _add_fields(parser, TrainOptions, CHECKED)


def _add_search(commands: Any) -> None:
    what = (
        "Find the outer rate for gdprompt train: a short training at each, scored on --test-data "
        "by the NLL of the gold responses after an inner step, then by accuracy."
    )
    parser = _command(commands, "search-outer-lr", what, prepare_search)
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, help="rates to try")
    parser.add_argument("--steps-per-rate", type=int, default=100, help="outer steps at each")
    _add_training(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(preset_section="train")
    _add_device(parser)
    _add_model_and_data(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--preset", help="TOML file, or paper: its [train] sets defaults of these options"
    )
    parser.add_argument("--test-data", type=Path, help="triples to evaluate on before and after")
    parser.add_argument(
        "--joint-data", type=Path, help="triples to fine-tune on, as usual, in the same steps"
    )
    parser.add_argument(
        "--teacher", type=Path, help="kl teacher, as --model, a hub's at main; None: --model"
    )
    parser.add_argument(
        "--teacher-cache", type=Path, help="folder of its answers; None: in --output"
    )
    parser.add_argument("--lora-rank", type=int, default=0, help="of LoRA adapters; 0: train all")
    _add_inner_lr_grid(parser)
    _add_resume(parser)
    _add_fields(parser, TrainOptions)


def _add_evaluate(commands: Any) -> None:
    what = (
        "No Context, Prompt and Fine-Tuning: accuracy and NLL of gold responses, exact match and "
        "F1 of generated answers."
    )
    parser = _command(commands, "evaluate", what, prepare_evaluate)
    _add_device(parser)
    _add_model_and_data(parser)
    parser.add_argument("--inner-lr", type=float, default=1e-3, help="rate η of the inner step")
    parser.add_argument("--inner-steps", type=int, default=1, help="inner steps on a context")
    parser.add_argument(
        "--inner-params", default="full", choices=("full", "lora"), help="what the inner step moves"
    )
    parser.add_argument(
        "--tune-inner-lr", action="store_true", help="take the best rate of the grid instead"
    )
    _add_inner_lr_grid(parser)
    parser.add_argument(
        "--contexts-per-group", type=int, default=1, help="examples that share one inner step"
    )
    parser.add_argument(
        "--one-after-another",
        action="store_true",
        help="an inner step on each context of a group in turn, not one on all of them",
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=32, help="longest answer generated; 0: none are"
    )
    parser.add_argument("--results", type=Path, help="JSON file to write the results to")
    parser.add_argument("--predictions", type=Path, help="JSONL file to write every answer to")
    parser.add_argument(
        "--squad-predictions",
        type=Path,
        help="JSON file to write Fine-Tuning's answers to by id, as SQuAD's official script takes",
    )


def _add_plan(commands: Any) -> None:
    what = "The memory that a meta step will need, predicted from shapes in seconds."
    parser = _command(commands, "plan", what, prepare_plan)
    parser.add_argument(
        "--model", required=True, help="config.json, model folder or name on the Hugging Face hub"
    )
    _add_revision(parser)
    _add_fields(parser, Setting)
    parser.add_argument("--memory", help="size of the card, as 80GB: finds the largest batch")
    parser.add_argument("--json", type=Path, help="JSON file to write the numbers to")


def _add_experiment(commands: Any) -> None:
    what = (
        "One of the paper's experiments: JSON, a Markdown table beside the paper's numbers and a "
        "figure. Stages that --output holds already, of any experiment, are not done again."
    )
    parser = _command(commands, "experiment", what, prepare_experiment_of)
    parser.add_argument("name", choices=EXPERIMENTS, help="which one")
    parser.add_argument(
        "--preset",
        default="small",
        help=f"sizes and rates: {', '.join(OWN_PRESETS)} or a TOML file",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of results and stages")
    parser.add_argument("--seeds", type=int, nargs="+", help="repetitions; None: the preset's")
    parser.add_argument("--model", help="model folder or name on the hub; None: the preset's")
    _add_revision(parser)
    _add_allow_missing(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: cuda or cpu")


def _add_report(commands: Any) -> None:
    what = "One self-contained HTML page of the experiments and runs in a folder."
    parser = _command(commands, "report", what, prepare_report)
    parser.add_argument("folder", type=Path, help="an --output folder, or one with such folders")


def _add_fields(
    parser: argparse.ArgumentParser, settings: type, names: Sequence[str] | None = None
) -> None:
    """An option for every field of a dataclass, or for those of ``names``."""
    types = get_type_hints(settings)
    for field in fields(settings):
        if names is not None and field.name not in names:
            continue
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=types[field.name],
            default=field.default,
            choices=field.metadata["choices"],
            help=field.metadata["help"],
        )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="transformers model or PEFT adapters: a folder, GGUF file or name on the hub",
    )
    _add_revision(parser)
    _add_allow_missing(parser)


def _add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of --model on the hub")


def _add_allow_missing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="go on with random weights for those that a model's files do not have",
    )


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--data", type=Path, required=True, help=TRIPLES)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights")
    _add_limits(parser)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoding", default="utf-8", help="of the files read, as utf-16")
    parser.add_argument(
        "--dropped", type=Path, help="JSON file to write to which records were dropped, and why"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """How records become examples, and which do not."""
    _add_reading(parser)
    parser.add_argument(
        "--chat-template",
        action="store_true",
        help="ask as a user's turn and take the response as the assistant's, in the words of the "
        "tokenizer's chat template; the context of the inner step stays running text",
    )
    for part, tokens in (("context", 256), ("query", 128), ("prompt", 384)):
        parser.add_argument(
            f"--max-{part}-tokens",
            type=int,
            default=tokens,
            help=f"drop a record whose {part} row is longer",
        )


def _add_inner_lr_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inner-lr-grid",
        type=float,
        nargs="+",
        default=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        help="inner rates of which an untrained model gets its best",
    )


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
