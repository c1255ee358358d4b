"""Triples in the words of a chat template: the ids of every row, to the token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from gdprompt_fast.cli.main import main
from gdprompt_fast.data import (
    ChatEncoder,
    Example,
    end_token,
    prompt_rows,
    query_rows,
    tokenise_triples,
)
from gdprompt_fast.evaluation import read_predictions
from helpers.models import small_llama
from helpers.training import ROOMY

TRIPLE = {"context": "Bob sings.", "query": "Who?", "response": "Bob"}
TURNS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]


def chat_tokenizer(template: str | None = TURNS) -> PreTrainedTokenizerBase:
    """A token a byte; it opens a text with ``<s>``, and an answer ends with ``<|end|>``."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )
    fast.chat_template = template
    return fast


def spelled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def example(tokenizer: PreTrainedTokenizerBase, **changes: str) -> Example:
    (made,) = tokenise_triples([{**TRIPLE, **changes}], tokenizer, ROOMY, ChatEncoder).examples
    return made


def test_every_row_is_what_the_template_makes_of_it() -> None:
    tokenizer = chat_tokenizer()
    made = example(tokenizer)
    user, assistant, end = (SPECIAL.index(name) for name in SPECIAL[2:])

    def spell(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert list(made.context) == [0, *spell("Bob sings.")]  # running text
    assert list(made.query) == [0, user, *spell("Who?"), end, *spell("\n"), assistant]
    asked = spell("Bob sings.\n\nWho?")
    assert list(made.prompt) == [0, user, *asked, end, *spell("\n"), assistant]
    assert list(made.response) == [*spell("Bob"), end]  # not the line break that follows
    assert end_token([made]) == end != tokenizer.eos_token_id
    said = {"user": "Bob sings.\n\nWho?", "assistant": "Bob"}
    turns = [{"role": role, "content": text} for role, text in said.items()]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert spelled([*made.prompt, *made.response], tokenizer) + "\n" == whole


def test_the_loss_is_on_the_response_and_the_end_of_its_turn() -> None:
    tokenizer = chat_tokenizer()
    for rows in (query_rows([example(tokenizer)]), prompt_rows([example(tokenizer)])):
        counted = rows.ids[rows.response_mask].tolist()
        assert spelled(counted, tokenizer) == "Bob<|end|>"
        before = rows.ids[rows.mask & ~rows.response_mask].tolist()
        assert spelled(before, tokenizer).endswith("Who?<|end|>\n<|assistant|>")


def test_a_template_that_ends_no_turn_leaves_the_end_to_eos() -> None:
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    made = example(tokenizer)
    assert spelled(list(made.prompt), tokenizer) == "user: Bob sings.\n\nWho?\nassistant: "
    assert spelled(list(made.response), tokenizer) == "Bob\n</s>"


def test_a_template_that_can_think_is_asked_not_to() -> None:
    thought = "<think></think>"
    template = TURNS.replace(
        "{{ m['content']",
        "{% if m['role'] == 'assistant' %}" + thought + "{% endif %}{{ m['content']",
    ).replace(
        "<|assistant|>{% endif %}",
        "<|assistant|>{% if enable_thinking is defined and not "
        "enable_thinking %}" + thought + "{% endif %}{% endif %}",
    )
    tokenizer = chat_tokenizer(template)
    made = example(tokenizer)
    assert spelled(list(made.prompt), tokenizer).endswith("Who?<|end|>\n<|assistant|>" + thought)
    assert spelled(list(made.response), tokenizer) == "Bob<|end|>"


def test_an_opening_that_the_answers_do_not_share_is_an_error() -> None:
    opened = TURNS.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    with pytest.raises(ValueError, match="chat_template: expected its opening of an answer to be"):
        example(chat_tokenizer(opened))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected a tokenizer with a chat template, got none"),
        ("{{ raise_exception('no users here') }}", "got no users here"),
        ("{% if %}", "chat_template: expected it to take"),
        ("{{ 1 / 0 }}", "chat_template: expected it to take .* division by zero"),
        ("{% for i in range(10 ** 6) %}{% endfor %}", "chat_template: expected it to take"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example(chat_tokenizer(template))


def test_a_record_that_speaks_like_the_template_keeps_its_whole_response() -> None:
    tokenizer = chat_tokenizer()
    made = example(tokenizer, response="Bob<|end|>Ann")
    assert spelled(list(made.response), tokenizer) == "Bob<|end|>Ann<|end|>"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = chat_tokenizer()
    small_llama(len(tokenizer), num_hidden_layers=1, max_position_embeddings=128).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({**TRIPLE, "query": q}) + "\n" for q in ("Who?", "What?")))
    return path


def test_the_commands_prepare_train_and_evaluate_a_chat_model(
    chat_model: Path, data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "prepared"
    short = ["--data", str(data), "--chat-template", "--device", "cpu"]
    steps = ["--steps", "1", "--batch-size", "2"]
    command = ["prepare", "--model", str(chat_model), *short, *steps, "--lr", "1e-2"]
    assert main([*command, "--output", str(model)]) == 0
    train = ["--model", str(model), *short, "--test-data", str(data), "--answer-tokens", "3"]
    search = ["search-outer-lr", "--grid", "1e-3", "--steps-per-rate", "1", *train]
    assert main([*search, "--batch-size", "2", "--output", str(tmp_path / "search")]) == 0
    assert main(["train", *train, *steps, "--output", str(tmp_path / "run")]) == 0
    key = json.loads((tmp_path / "run" / "teacher" / "key.json").read_text())
    assert key["eos_token"] == SPECIAL.index("<|end|>")
    trained = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert trained.chat_template == TURNS and trained.eos_token == "</s>"
    predictions = tmp_path / "predictions.jsonl"
    evaluate = ["evaluate", "--model", str(tmp_path / "run" / "model"), *short]
    assert main([*evaluate, "--answer-tokens", "3", "--predictions", str(predictions)]) == 0
    assert [row["query"] for row in read_predictions(predictions)] == ["Who?", "What?"]


def test_the_commands_refuse_a_tokenizer_without_a_template(
    chat_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder)
    (folder / "chat_template.jinja").unlink()
    command = ["evaluate", "--model", str(folder), "--data", str(data), "--chat-template"]
    assert main([*command, "--device", "cpu"]) == 2
    assert "expected a tokenizer with a chat template" in capsys.readouterr().err
