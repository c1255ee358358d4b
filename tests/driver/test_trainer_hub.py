"""What of a MetaTrainer leaves it: the card, what is pushed; and arguments from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from gdprompt_fast.trainer import MetaTrainingArguments
from helpers.trainer import trainer_on


def test_the_card_says_how_the_model_is_used(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    trainer.create_model_card(tags=["mine"], dataset_tags="people")
    card = (tmp_path / "README.md").read_text()
    assert "- gdprompt_fast" in card and "- mine" in card and "datasets:\n- people" in card
    assert "| `inner_lr` | 0.3 |" in card and "inner_lr=0.3" in card
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text().count("## Meta-training") == 1


def test_push_to_hub_sends_model_tokenizer_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    class Repository:
        repo_id = "me/people"

        def __str__(self) -> str:
            return "https://huggingface.co/me/people"

    import transformers.trainer as trainers
    from huggingface_hub import HfApi

    def upload(*_: Any, folder_path: str, **options: Any) -> str:
        sent.update(options, files={path.name for path in Path(folder_path).iterdir()})
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    for name in ("create_repo", "upload_folder"):  # functions of their own in earlier ones
        if hasattr(trainers, name):
            monkeypatch.setattr(trainers, name, getattr(HfApi(), name))
    trainer = trainer_on(tmp_path, push_to_hub=True, objective="kl", answer_tokens=3)
    trainer.train()
    trainer.push_to_hub()
    wanted = {"README.md", "model.safetensors", "tokenizer.json", "config.json"}
    assert wanted <= sent["files"] and sent["repo_id"] == "me/people"
    assert "_teacher" in sent["files"] and "_*" in sent["ignore_patterns"]


def test_arguments_are_read_from_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "arguments.json"
    given = {"output_dir": str(tmp_path), "use_cpu": True, "inner_lr": 0.5, "micro_groups": 2}
    path.write_text(json.dumps(given))
    (args,) = HfArgumentParser(MetaTrainingArguments).parse_json_file(str(path))  # type: ignore[arg-type]
    assert args.step_config.inner_lr == 0.5 and args.step_config.micro_groups == 2
    assert args.to_dict()["inner_lr"] == 0.5
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--inner_lr", "0.5", "--first_order"]
    (args,) = HfArgumentParser(MetaTrainingArguments).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    assert args.first_order
