"""GSM8K from a folder on disk, for the tasks beside this file; lm-eval calls these by name.

The folder, with gsm8k/train.jsonl and gsm8k/test.jsonl, is the environment's FLASHDRAFT_DATA.
"""

import os
from pathlib import Path

import datasets


def splits(**_):
    """By name. lm-eval passes metadata that a local set has no use for."""
    folder = Path(os.environ["FLASHDRAFT_DATA"]) / "gsm8k"
    made = {}
    for name in ("train", "test"):
        made[name] = datasets.Dataset.from_json(str(folder / f"{name}.jsonl"))
    return made


def result(doc):
    """The number behind the four hashes, as text."""
    return doc["answer"].split("#### ")[-1].strip()


def choices(doc):
    """The right result first, then three wrong ones that look alike."""
    right = int(result(doc).replace(",", ""))
    wrong = [right + 1, 2 * right + 3, 10 * right + 7]
    return [str(number) for number in (right, *wrong)]


def right_choice(doc):
    return 0
