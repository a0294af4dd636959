"""Whole runs that train a published head at toy size: what they learn, save and go on with."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_training import (
    CONFIG,
    LAYERS,
    language_model,
    network,
    one_line_and_hint,
    write_lines,
)

from flashdraft.errors import InvalidParameter
from flashdraft.generate import Model
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.initialise import draft_only, random_weights, taken_from, with_head
from flashdraft.train.regenerate import regenerate
from flashdraft.train.trainer import Trainer
from flashdraft.types import SamplingParams

KINDS = {"selector": False, "markov": True}  # with the layout of its format: anchor-first or not
RANK = 8
PROMPTS = ("hello", "how are you", "count to ten", "write a line", "sing a song", "why?")
ANSWER = SamplingParams(max_new_tokens=24, ignore_eos=True)
OVERFIT = TrainConfig(
    steps=40,
    sequences=6,
    anchors=24,
    lr=1e-2,
    weight_decay=0.0,
    vocab=0,
    precision="fp32",
    eval_every=40,
    save_every=40,
)
SHORT = replace(OVERFIT, steps=4, sequences=3, anchors=6, vocab=20, negatives=9, save_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"source": "toy", "row": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    prompts = write_lines(folder / "prompts.jsonl", rows)
    answers = folder / "answers.jsonl"
    regenerate(language_model(), prompts, answers, params=ANSWER, quiet=True)
    out = folder / "features"
    write_features(language_model(), [answers], out, layers=LAYERS, max_length=64, quiet=True)
    return FeatureSet(out)


def new_trainer(
    data: FeatureSet,
    out: Path,
    kind: str,
    config: TrainConfig,
    *,
    rank: int = RANK,
    model: DFlashDraftModel | None = None,
) -> Trainer:
    if model is not None:
        return Trainer(model, language_model(), data, out, config)
    shape = replace(CONFIG, anchor_first=KINDS[kind])
    network = random_weights(shape, 0)
    return Trainer(network, language_model(), data, out, config, head=(kind, rank))


def drafting_with(model: DFlashDraftModel) -> Model:
    lm = language_model()
    return replace(lm, new_drafter=model.eval().drafters(lm.target))


def texts_and_tau(lm: Model, params: SamplingParams) -> tuple[list[tuple[int, ...]], float]:
    results = lm.generate(list(PROMPTS), params)
    tau = sum(result.stats.tau for result in results) / len(results)
    return [result.tokens for result in results], tau


@functools.cache
def plain_texts(params: SamplingParams) -> list[tuple[int, ...]]:
    return texts_and_tau(language_model(), params)[0]


@pytest.fixture(scope="module", params=KINDS)
def overfitted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: FeatureSet
) -> Trainer:
    trainer = new_trainer(data, tmp_path_factory.mktemp("run"), request.param, OVERFIT)
    trainer.run(PROMPTS[:2], quiet=True)
    return trainer


def head_of(model: DFlashDraftModel) -> torch.nn.Module:
    head = model.candidate_selector or model.markov_head
    assert head is not None
    return head


def test_head_learns_with_its_network_and_the_text_stays_the_targets(overfitted: Trainer) -> None:
    """Loss falls; what is saved drafts as it was trained; without its head it is accepted less."""
    log = (overfitted.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert losses[-1] < losses[0] / 3

    best = DFlashDraftModel.from_pretrained(overfitted.out / "best")
    config = best.config
    assert config.sequential_head == overfitted.model.config.sequential_head
    assert config.anchor_first == KINDS[str(config.sequential_head)]
    assert config.conv_kernel_size == (2 if config.sequential_head == "selector" else 0)
    texts, tau = texts_and_tau(drafting_with(best), ANSWER)
    assert texts == plain_texts(ANSWER)
    assert tau > 2.5
    sampled = replace(ANSWER, temperature=0.5, seed=3)
    assert texts_and_tau(drafting_with(best), sampled)[0] == plain_texts(sampled)

    for parameter in head_of(best).parameters():
        torch.nn.init.zeros_(parameter)
    texts, without = texts_and_tau(drafting_with(best), ANSWER)
    assert texts == plain_texts(ANSWER)
    assert without < tau


def test_run_goes_on_from_a_drafter_with_its_head(
    tmp_path: Path, data: FeatureSet, overfitted: Trainer
) -> None:
    """The head comes along, with a smaller vocabulary, and is as good as it was at once."""
    donor = overfitted.model
    shape = replace(CONFIG, anchor_first=donor.config.anchor_first)
    network = taken_from(shape, donor, 1)
    assert isinstance(network, DFlashDraftModel)
    kind = str(donor.config.sequential_head)
    again = new_trainer(data, tmp_path, kind, replace(OVERFIT, vocab=30), model=network)
    assert again.model.config.draft_vocab_size == 30
    log = (overfitted.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert again.train_step()["accepted"] > json.loads(log[-1])["accepted"] - 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_run_ends_with_the_same_bits(tmp_path: Path, data: FeatureSet, kind: str) -> None:
    states = []
    for out, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for stop in stops:
            trainer = new_trainer(data, tmp_path / out, kind, SHORT)
            while trainer.step < stop:
                trainer.train_step()
            trainer._save()
        states.append(trainer.model.state_dict())
    whole, stopped = states
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)

    before = new_trainer(data, tmp_path / "fresh", kind, SHORT).model.state_dict()
    learnt = [name for name in before if not torch.equal(whole[name], before[name])]
    assert set(learnt) == set(before)
    with pytest.raises(InvalidParameter) as error:
        new_trainer(data, tmp_path / "whole", kind, SHORT, rank=RANK + 1)
    assert "was begun with another draft network" in one_line_and_hint(error)


def test_head_under_fsdp_is_refused(
    tmp_path: Path, data: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = SimpleNamespace(distributed_type="FSDP")
    monkeypatch.setattr("flashdraft.train.trainer._accelerator", lambda config, out: sharding)
    for kind in KINDS:
        with pytest.raises(InvalidParameter) as error:
            new_trainer(data, tmp_path, kind, SHORT)
        assert "a sequential head cannot be trained under FSDP" in one_line_and_hint(error)


@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize("kind", [None, "swiglu", *KINDS])
def test_every_head_is_saved_in_either_layout(
    tmp_path: Path, kind: str | None, layout: bool
) -> None:
    model = network(0, anchor_first=layout)
    if kind is not None:
        model = with_head(model, (kind, RANK), 0)
    for name, tokens in (("whole", None), ("reduced", torch.arange(5, 30))):
        draft_only(model, tokens)
        model.save_pretrained(tmp_path / name)
        again = DFlashDraftModel.from_pretrained(tmp_path / name)
        assert again.config == model.config
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
