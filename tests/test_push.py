"""A drafter goes to the hub: which files, with which card; a slip or a refusal is one line and a
hint. No network.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from toy_folders import save_target, save_zlab, zlab_tensors
from toy_training import CONFIG, LAYERS, language_model, network, one_line_and_hint, write_lines

import flashdraft
from flashdraft import DFlashDraftModel, hub
from flashdraft.cli import main
from flashdraft.diffusion.learned import BlockDraftModel, DraftShape, Identity
from flashdraft.errors import ModelNotFound
from flashdraft.provenance import provenance
from flashdraft.train.config import TrainConfig, model_card
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.initialise import random_weights
from flashdraft.train.trainer import Trainer

REPO, ADDRESS = "someone/a-drafter", "https://huggingface.co/someone/a-drafter/commit/0123abc"
WEIGHTS = ["config.json", "model.safetensors"]


class Hub:
    """Takes what is uploaded; calls that the real client would not take are errors."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.files: dict[str, bytes] = {}
        self.token: str | None = None
        self.private: bool | None = None
        self.error: Exception | None = None

    def client(self, *, token: str | None = None) -> Any:
        self.token = token
        return SimpleNamespace(create_repo=self.create_repo, upload_folder=self.upload_folder)

    def create_repo(self, *args: Any, **options: Any) -> None:
        given = inspect.signature(HfApi.create_repo).bind(None, *args, **options).arguments
        assert (given["repo_id"], given["exist_ok"]) == (REPO, True)
        self.private = given["private"]
        self._called("create_repo")

    def upload_folder(self, *args: Any, **options: Any) -> CommitInfo:
        given = inspect.signature(HfApi.upload_folder).bind(None, *args, **options).arguments
        assert given["repo_id"] == REPO
        self._called("upload_folder")
        folder = Path(given["folder_path"])
        self.files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return CommitInfo(ADDRESS, given["commit_message"], "", "0123abc")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None and len(self.calls) == 2:
            raise self.error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", made.client)
    return made


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "theirs")).save_pretrained(
        tmp_path / "drafter", readme="# A card\n"
    )
    return tmp_path / "drafter"


def read_back(fake: Hub, folder: Path) -> DFlashDraftModel:
    """What somebody else would download."""
    folder.mkdir()
    for name, content in fake.files.items():
        (folder / name).write_bytes(content)
    return DFlashDraftModel.from_pretrained(folder)


def test_pushed_model_is_the_model(tmp_path: Path, fake: Hub) -> None:
    model = network(seed=3)
    assert model.push_to_hub(REPO) == ADDRESS
    assert type(model.push_to_hub(REPO)) is str
    assert fake.calls[:2] == ["create_repo", "upload_folder"]
    assert sorted(fake.files) == WEIGHTS
    assert (fake.private, fake.token) == (False, None)
    again = read_back(fake, tmp_path / "there")
    assert again.config == model.config
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_card_and_options_are_passed_on(fake: Hub) -> None:
    network().push_to_hub(REPO, readme="# Mine\n", private=True, token="hf_secret")
    assert sorted(fake.files) == ["README.md", *WEIGHTS]
    assert fake.files["README.md"] == b"# Mine\n"
    assert (fake.private, fake.token) == (True, "hf_secret")


def test_plain_model_is_pushed_without_its_head(tmp_path: Path, fake: Hub) -> None:
    model = network()
    model.add_head("swiglu", 4)
    model.push_to_hub(REPO)
    assert read_back(fake, tmp_path / "own").config.sequential_head == "swiglu"
    model.push_to_hub(REPO, plain=True)
    plain = read_back(fake, tmp_path / "plain")
    assert plain.config.sequential_head is None
    assert plain.state_dict().keys() == zlab_tensors().keys()


def test_command_pushes_the_folder_as_it_is(
    fake: Hub, drafter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(drafter), REPO]) == 0
    assert capsys.readouterr().out == f"{ADDRESS}\n"
    assert fake.files == {path.name: path.read_bytes() for path in drafter.iterdir()}
    assert sorted(fake.files) == ["README.md", *WEIGHTS]
    assert fake.private is False
    assert main(["push", str(drafter), REPO, "--private"]) == 0
    assert fake.private is True


@pytest.mark.parametrize(
    ("method", "title"),
    [("dflash", "DFlash"), ("eagle3", "EAGLE-3"), ("medusa", "Medusa"), ("draft_model", "draft")],
)
def test_command_pushes_drafters_of_every_method_and_names_it(
    monkeypatch: pytest.MonkeyPatch, fake: Hub, method: str, title: str
) -> None:
    said: list[str] = []
    upload = fake.upload_folder

    def noted(*args: Any, **options: Any) -> CommitInfo:
        said.append(options["commit_message"])
        return upload(*args, **options)

    monkeypatch.setattr(fake, "upload_folder", noted)
    assert (
        main(
            [
                "push",
                str(Path(flashdraft.__file__).parent / "assets" / f"smollm2-135m-{method}"),
                REPO,
            ]
        )
        == 0
    )
    assert len(said) == 1
    assert title in said[0]
    assert method == "dflash" or "DFlash" not in said[0]


def test_image_draft_is_pushed_like_a_drafter(
    fake: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = BlockDraftModel(DraftShape(width=8, blocks=1), Identity("0", [0.5]))
    model.save_pretrained(tmp_path, readme="# Mine\n")
    assert main(["push", str(tmp_path), REPO]) == 0
    assert capsys.readouterr().out == f"{ADDRESS}\n"
    assert sorted(fake.files) == ["README.md", *WEIGHTS]
    cut(tmp_path)
    fake.calls.clear()
    assert main(["push", str(tmp_path), REPO]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert fake.calls == []


def test_language_model_is_not_pushed(
    fake: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_target(tmp_path / "t")
    assert main(["push", str(target), REPO]) == 1
    assert "it is a language model" in capsys.readouterr().err
    assert fake.calls == []


def without_weights(drafter: Path) -> None:
    (drafter / "model.safetensors").unlink()


def cut(drafter: Path) -> None:
    path = drafter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (without_weights, "holds no .safetensors file"),
    (cut, "is damaged"),
    (lambda drafter: (drafter / "config.json").unlink(), "holds no config.json"),
    (
        lambda drafter: (drafter / "config.json").write_text('{"model_type": "llama"}'),
        "is not a DFlash drafter",
    ),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES, ids=[expected for _, expected in DAMAGES])
def test_folder_that_is_no_drafter_is_not_pushed(
    fake: Hub,
    drafter: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    expected: str,
) -> None:
    damage(drafter)
    assert main(["push", str(drafter), REPO]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert expected in error
    assert hint.startswith("hint: ")
    assert fake.calls == []


class ConnectError(Exception):
    """As the HTTP library's, which is not an OSError."""


FORBIDDEN: Any = SimpleNamespace(headers={}, request=None)
REFUSALS: list[tuple[Exception, str]] = [
    (HfHubHTTPError("403 Forbidden\n\nYou may not.", response=FORBIDDEN), "403 Forbidden"),
    (ConnectError("[Errno 111] Connection refused"), "[Errno 111] Connection refused"),
    (LocalTokenNotFoundError("Token is required"), "Token is required"),
    (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    (ConnectError(), "ConnectError"),
]


@pytest.mark.parametrize(("refusal", "said"), REFUSALS, ids=[said for _, said in REFUSALS])
def test_refusal_is_one_line_and_a_hint(
    fake: Hub, drafter: Path, capsys: pytest.CaptureFixture[str], refusal: Exception, said: str
) -> None:
    fake.error = refusal
    with pytest.raises(ModelNotFound) as error:
        network().push_to_hub(REPO)
    assert one_line_and_hint(error) == f"cannot push to `{REPO}`: {said}"
    fake.calls.clear()
    assert main(["push", str(drafter), REPO]) == 1
    out, err = capsys.readouterr()
    hint = "hint: check the name, the network and `hf auth login`"
    assert (out, err.splitlines()) == ("", [f"error: cannot push to `{REPO}`: {said}", hint])


@pytest.mark.parametrize(
    ("repo", "said"),
    [("someone/a-drafter", "refused"), ("not/a/name", "not/a/name"), ("a b", "a b")],
)
def test_errors_of_the_real_client_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drafter: Path, repo: str, said: str
) -> None:
    """Nobody listens at this address; names are checked before anything is sent."""
    monkeypatch.setattr(
        huggingface_hub,
        "HfApi",
        lambda token=None: HfApi(endpoint="http://127.0.0.1:9", token=token),
    )
    with pytest.raises(ModelNotFound) as error:
        hub.push(drafter, repo)
    message = one_line_and_hint(error)
    assert message.startswith(f"cannot push to `{repo}`: ")
    assert said in message.removeprefix(f"cannot push to `{repo}`: ")


def test_push_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Hub
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    network().push_to_hub(REPO)
    fake.error = ConnectError("gone")
    fake.calls.clear()
    with pytest.raises(ModelNotFound):
        network().push_to_hub(REPO)
    assert list(tmp_path.iterdir()) == []


# The card.

RUN = provenance() | {"config": asdict(TrainConfig(lr=3e-4, gamma=5.5))}
FIGURES = {
    "step": 40,
    "positions_seen": 12345,
    "num_prompts": 6,
    "flops": 1.5e14,
    "taus": [(20, 1.5), (40, 2.345)],
}


def test_card_names_target_figures_command_and_versions() -> None:
    card = model_card(
        replace(CONFIG, draft_vocab_size=20), "org/target", RUN, FIGURES, num_samples=77
    )
    assert "# DFlash drafter of org/target" in card
    table = dict(re.findall(r"^\| ([a-z, ]+) \| (.+) \|$", card, re.M))
    assert table["target"] == "`org/target`"
    assert table["draft vocabulary"] == "20 of 61 tokens"
    assert table["training data"].startswith("77 answers")
    assert table["steps, block positions"] == "40, 12345"
    assert "| training FLOPs | 1.5e+14," in card
    assert table["features"].endswith("layers 1, 2")
    assert table["sequential head"] == "none"
    assert "| 20 | 1.50 |\n| 40 | 2.35 |\n" in card or "| 20 | 1.50 |\n| 40 | 2.34 |\n" in card
    assert "on 6 held-out prompts" in card
    assert f"`{RUN['command']}`" in card
    for part in (
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"flashdraft {flashdraft.__version__}",
    ):
        assert part in card
    assert "lr 0.0003" in card
    assert "gamma 5.5" in card
    assert RUN["device"] in card


def test_card_names_the_head() -> None:
    card = model_card(
        replace(CONFIG, sequential_head="swiglu", head_rank=7), "t", RUN, FIGURES, num_samples=1
    )
    assert "| sequential head | swiglu (FlashDraft's own), inner size 7 |" in card
    assert "| draft vocabulary | 61 of 61 tokens |" in card


def test_card_begins_with_metadata_for_the_hub() -> None:
    card = model_card(CONFIG, "t", RUN, FIGURES, num_samples=1)
    data = huggingface_hub.ModelCard(card).data
    assert data.library_name == "flashdraft"
    assert data.tags == ["speculative-decoding", "dflash"]


def test_trained_drafter_is_pushed_with_the_card_of_its_run(
    tmp_path: Path, fake: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every measurement up to the best one is in the card's table."""
    lm, tokens = (
        language_model(),
        torch.randint(3, 50, (4, 30), generator=torch.Generator().manual_seed(0)).tolist(),
    )
    rows = [
        {"prompt": "abc"[: 1 + n % 3], "response": "", "tokens": row}
        for n, row in enumerate(tokens)
    ]
    answers = write_lines(tmp_path / "answers.jsonl", rows)
    write_features(lm, [answers], tmp_path / "features", layers=LAYERS, max_length=64, quiet=True)
    config = TrainConfig(steps=3, sequences=2, anchors=4, vocab=0, precision="fp32", eval_every=1)
    trainer = Trainer(
        random_weights(CONFIG, 0), lm, FeatureSet(tmp_path / "features"), tmp_path / "run", config
    )
    trainer.run(["hello"], quiet=True)
    assert main(["push", str(tmp_path / "run" / "best"), REPO]) == 0
    assert sorted(fake.files) == ["README.md", *WEIGHTS]
    card = fake.files["README.md"].decode()
    measured = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    best = next(row["step"] for row in measured if row["tau"] == trainer.best)
    expected = [f"| {row['step']} | {row['tau']:.2f} |" for row in measured[:best]]
    assert re.findall(r"^\| \d+ \| [\d.]+ \|$", card, re.M) == expected
    assert "4 answers of the target itself" in card
    assert f"`{lm.target.name}`" in card
