"""The recipe of the digits: its words are tokens, its captions say what was measured, and the model
that it leaves says what it is.
"""

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from flashdraft.diffusion.drawing import unknown_words
from flashdraft.diffusion.models import known_words, load_pipe

RECIPE = Path(__file__).parent.parent / "recipes" / "image_digits.py"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("image_digits", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def untrained(digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = digits.new_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    vae, text, unet = digits.new_parts(tokenizer)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=digits.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_every_word_is_one_token(digits: ModuleType, untrained: Any) -> None:
    for word in digits.SAID:
        assert len(untrained.tokenizer.tokenize(word)) == 1, word
    longest = "a thick upright seven"
    assert len(untrained.tokenizer(longest).input_ids) <= digits.LENGTH


def test_captions_say_only_what_was_measured(digits: ModuleType) -> None:
    draw = random.Random(0)
    said = {digits.caption((7, 2, 0), draw) for _ in range(200)}
    assert said == {
        "seven",
        "a seven",
        "a thick seven",
        "a upright seven",
        "a thick upright seven",
    }
    middle = {digits.caption((0, 1, 1), draw) for _ in range(50)}
    assert middle == {"zero", "a zero"}


def test_slant_is_positive_to_the_right(digits: ModuleType) -> None:
    upright = np.zeros((28, 28))
    upright[4:24, 14] = 1.0
    leaning = np.zeros((28, 28))
    for row in range(4, 24):
        leaning[row, 24 - row // 2] = 1.0
    assert digits.slant(upright) == pytest.approx(0.0)
    assert digits.slant(leaning) == pytest.approx(0.5, abs=0.05)
    assert digits.slant(leaning[:, ::-1]) == pytest.approx(-0.5, abs=0.05)


def test_the_model_that_is_left_says_what_it_is(
    digits: ModuleType, untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "sample_sheet", lambda pipe: Image.new("RGB", (8, 8)))
    told = {"vae_told": "12 steps", "unet_told": "34 steps"}
    folder = tmp_path / "model"
    for _ in range(2):  # over the one before
        digits.save(untrained, folder, told)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "{" not in card
    for word in ("12 steps", "34 steps", "MNIST", "CC BY-SA 3.0", *digits.SAID):
        assert word in card
    assert json.loads((folder / "words.json").read_text()) == list(digits.SAID)

    pipe = load_pipe(str(folder))
    assert known_words(pipe) == list(digits.SAID)
    assert unknown_words(pipe, "A thick 7") == ["7"]
    pipe.scheduler.set_timesteps(1000)
    assert int(pipe.scheduler.timesteps.max()) == 999
