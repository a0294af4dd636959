"""What the tests of prompts and answers share: a chat template that thinks, a conversation, files
of prompts and a toy target that answers them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, tiny_target
from toy_folders import CHAT, letter_tokenizer

from flashdraft.errors import FlashDraftError
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.types import SamplingParams

ANSWER = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = replace(ANSWER, temperature=1.0, seed=3)
THINKING = (
    CHAT + "{% if enable_thinking is defined %}{{ 'on' if enable_thinking else 'off' }} {% endif %}"
)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
SYSTEM = {"role": "system", "content": "s"}
NO_USER = {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}]}


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def one_line(error: pytest.ExceptionInfo[FlashDraftError]) -> str:
    message, *hint = str(error.value).split("\n")
    assert [line[:6] for line in hint] == ["hint: "]
    return message


def language_model(template: str = THINKING) -> Model:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    target = tiny_target("llama", lean=True, dtype=torch.float64)
    return Model(target, tokenizer, Autoregressive, eos=frozenset({EOS}), max_rows=4)


def prompt_file(folder: Path, prompts: Sequence[Any], **fields: Any) -> Path:
    rows = [
        {"source": "toy", "row": n, "prompt": prompt, **fields} for n, prompt in enumerate(prompts)
    ]
    return write_lines(folder / "prompts.jsonl", rows)
