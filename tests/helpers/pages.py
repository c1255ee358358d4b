"""The page's model, and what stands in the HTML that the page shows."""

from __future__ import annotations

import copy
import re
import zipfile
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from gdprompt_fast.app.desk import Desk
from gdprompt_fast.app.lesson import Lesson
from gdprompt_fast.app.student import Options, Student
from gdprompt_fast.bundled import META_TRAINED_INNER_LR, meta_trained_folder
from gdprompt_fast.data import make_people_data
from gdprompt_fast.loading import load_model

RATE = META_TRAINED_INNER_LR
PEOPLE = [dict(triple) for triple in make_people_data(1, 12, seed=5).test]


@cache
def bundled() -> tuple[Any, Any]:
    """The bundled meta-trained model and its tokenizer; nothing may change them."""
    return load_model(meta_trained_folder(), "float32", torch.device("cpu"))


def student_in(folder: Path, **options: Any) -> Student:
    """The bundled meta-trained model, which writes its adapters there."""
    return Student(*bundled(), Options(**options), folder)


def with_adapter(archive: Path, folder: Path) -> Any:
    """Plain PEFT with the adapter in a zip, unpacked to ``folder``, on a fresh base model."""
    peft = pytest.importorskip("peft", reason="PEFT is an optional dependency")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(bundled()[0]), folder).eval()


def desk_in(folder: Path, **options: Any) -> Desk:
    return Desk(student_in(folder, **options))


def lesson_of(person: dict[str, str], rate: float = RATE) -> Lesson:
    return Lesson.of(person["context"], rate)


def text_of(html: str) -> str:
    """What a reader sees of HTML."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def said(card: str) -> str:
    """The answer on a card; "": none."""
    found = re.search(r'<p class="said">(.*?)</p>', card)
    return unescape(found[1]) if found else ""
