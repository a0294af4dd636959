"""Muon beside AdamW: every parameter has one of them, a step is the polar factor's, and a run that
was stopped ends with the bits of one that was not.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import SETTINGS, equal, new_trainer, stop_at, weights
from toy_pipeline import PROMPTS, written_answers, written_features, written_prompts
from toy_training import network, one_line_and_hint

from flashdraft.errors import InvalidParameter
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet
from flashdraft.train.initialise import with_head
from flashdraft.train.muon import Muon
from flashdraft.train.optimizers import new_optimizers

MUON = replace(SETTINGS, optimizer="muon")
HEADS = (None, "swiglu", "selector", "markov")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    folder = tmp_path_factory.mktemp("data")
    return written_features(folder, written_answers(folder, written_prompts(folder)))


def headed(kind: str | None) -> DFlashDraftModel:
    return network() if kind is None else with_head(network(), (kind, 8), 0)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_moved_by_one_optimizer(kind: str | None, optimizer: str) -> None:
    model = headed(kind)
    config = TrainConfig(optimizer=optimizer)
    moved = []
    for one in new_optimizers(model, config):
        for group in one.param_groups:
            moved += [id(parameter) for parameter in group["params"]]
    assert sorted(moved) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_muon_moves_matrices_and_no_tables(kind: str | None) -> None:
    model = headed(kind)
    muon = new_optimizers(model, TrainConfig(optimizer="muon"))[0]
    moved = {id(parameter) for parameter in muon.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        is_table = "codebook" in name or "markov_w" in name
        is_kernel = "base_kernel" in name
        wanted = parameter.ndim == 2 and not is_table and not is_kernel
        assert (id(parameter) in moved) == wanted, name


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_a_step_of_muon_is_the_polar_factor(shape: tuple[int, int]) -> None:
    """The five iterations bring singular values near one, the smallest of them last."""
    torch.manual_seed(0)
    model = network()
    muon = new_optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.0))[0]
    parameter = torch.nn.Parameter(torch.zeros(shape))
    muon.param_groups[0]["params"] = [parameter]
    parameter.grad = torch.randn(shape) * torch.logspace(0, -1, shape[1])
    muon.step()

    scale = muon.param_groups[0]["lr"] * 0.2 * max(shape) ** 0.5
    step = -parameter.detach() / scale
    left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
    values = torch.linalg.svdvals(step)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3
    polar = left @ right
    assert float((step * polar).sum() / (step.norm() * polar.norm())) > 0.95
    planted = parameter.grad / parameter.grad.norm()  # a plain step along the gradient
    assert float((planted * polar).sum() / polar.norm()) < 0.9


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_steps_of_muon_are_torchs(
    shape: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own multiplies in bfloat16, so ours differs where the products are in float32."""
    monkeypatch.setattr("flashdraft.train.muon.has_native_bf16", lambda device: native)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    planted = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.05, "weight_decay": 0.1}
    pairs: list[tuple[torch.nn.Parameter, torch.optim.Optimizer]] = [
        (ours, Muon([ours], **settings)),
        (theirs, torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)),
        (planted, Muon([planted], lr=0.05, weight_decay=0.0)),
    ]
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in pairs:
            parameter.grad = gradient.clone()
            optimizer.step()
    tolerance = 1e-5 if native else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert (planted - theirs).abs().max() > 2 * tolerance
    if not native:
        assert (ours - theirs).abs().max() > 1e-4  # those products are not bfloat16's


def test_a_run_with_muon_that_was_stopped_ends_with_the_same_bits(
    tmp_path: Path, data: FeatureSet
) -> None:
    whole = new_trainer(data, tmp_path / "whole", config=MUON)
    whole.run(PROMPTS[:1], quiet=True)
    stop_at(new_trainer(data, tmp_path / "stopped", config=MUON), 7)
    stop_at(new_trainer(data, tmp_path / "faulty", config=MUON), 7)

    resumed = new_trainer(data, tmp_path / "stopped", config=MUON, seed=9)
    assert resumed.step == 4
    resumed.run(PROMPTS[:1], quiet=True)
    assert equal(weights(resumed), weights(whole))

    faulty = new_trainer(data, tmp_path / "faulty", config=MUON, seed=9)
    faulty.optimizers[0].optimizer.state.clear()  # the momentum is lost
    faulty.run(PROMPTS[:1], quiet=True)
    assert not equal(weights(faulty), weights(whole))


def test_muon_is_another_run_than_adamw(tmp_path: Path, data: FeatureSet) -> None:
    stop_at(new_trainer(data, tmp_path), 5)
    with pytest.raises(InvalidParameter) as error:
        new_trainer(data, tmp_path, config=MUON)
    assert "was begun with optimizer adamw" in one_line_and_hint(error)


def test_a_run_of_an_earlier_version_was_adamw(tmp_path: Path, data: FeatureSet) -> None:
    stop_at(new_trainer(data, tmp_path), 5)
    path = tmp_path / "checkpoints" / "step-0000004" / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["optimizer"]
    path.write_text(json.dumps(state))

    assert new_trainer(data, tmp_path).step == 4
    with pytest.raises(InvalidParameter):
        new_trainer(data, tmp_path, config=MUON)


def test_muon_under_fsdp_is_refused(
    tmp_path: Path, data: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = SimpleNamespace(distributed_type="FSDP")
    monkeypatch.setattr("flashdraft.train.trainer._accelerator", lambda config, out: sharding)
    with pytest.raises(InvalidParameter) as error:
        new_trainer(data, tmp_path, config=MUON)
    assert "Muon needs whole matrices" in one_line_and_hint(error)


def test_best_of_a_run_with_muon_is_a_drafter(tmp_path: Path, data: FeatureSet) -> None:
    new_trainer(data, tmp_path, config=MUON).run(PROMPTS[:1], quiet=True)
    assert load_file(tmp_path / "best" / "model.safetensors")
    assert DFlashDraftModel.from_pretrained(tmp_path / "best").config.block_size
