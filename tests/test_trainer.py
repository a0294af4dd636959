"""The trainer: a run that was stopped ends with the bits of one that was not, its first weights may
be the target's own, and what it has taught is accepted.

The pipeline runs whole, at toy size: prompts, the target's own answers, features, a drafter. The
last test decodes with it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, MASK, VOCAB, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from toy_folders import letter_tokenizer, save_target
from toy_pipeline import ANSWER, CONFIG, PROMPTS, written_answers, written_features, written_prompts
from toy_training import BLOCK, HIDDEN, LAYERS, language_model, one_line_and_hint

from flashdraft import files
from flashdraft.errors import CheckpointError, DataError, FlashDraftError, InvalidParameter
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.generate import Model
from flashdraft.loading import load_target
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.models.hf import HFTarget
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, Sample
from flashdraft.train.initialise import copied_from_target, draft_config, random_weights
from flashdraft.train.prompts import read_jsonl
from flashdraft.train.trainer import Trainer

SETTINGS = TrainConfig(
    steps=12,
    sequences=4,
    anchors=6,
    lr=3e-3,
    vocab=0,
    precision="fp32",
    save_every=4,
    eval_every=100,
    weight_decay=0.1,
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    return written_answers(tmp_path_factory.mktemp("answers"), prompts)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> FeatureSet:
    return written_features(tmp_path_factory.mktemp("features"), answers)


# Runs.


def new_trainer(
    data: FeatureSet, out: Path, *, config: TrainConfig = SETTINGS, seed: int = 0
) -> Trainer:
    return Trainer(random_weights(CONFIG, seed), language_model(), data, out, config)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def stop_at(trainer: Trainer, step: int) -> None:
    """Pull the plug before this step."""
    train_step = trainer.train_step

    def stopping() -> dict[str, Any]:
        if trainer.step == step:
            raise KeyboardInterrupt
        return train_step()

    trainer.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run(PROMPTS[:1], quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: FeatureSet) -> Trainer:
    trainer = new_trainer(data, tmp_path_factory.mktemp("finished"))
    trainer.run(PROMPTS[:1], quiet=True)
    return trainer


def test_finished_run_leaves_its_files(finished: Trainer) -> None:
    out = finished.out
    assert sorted(path.name for path in out.iterdir()) == [
        "best",
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "tensorboard",
    ]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-0000008",
        "step-0000012",
    ]
    rows = list(read_jsonl(out / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert "tau" in rows[-1]
    assert json.loads((out / "run.json").read_text())["config"]["steps"] == 12
    assert DFlashDraftModel.from_pretrained(out / "best").config.block_size == BLOCK


@pytest.mark.parametrize("step", [1, 4, 7, 11])
def test_stopped_run_ends_with_the_same_bits(
    tmp_path: Path, data: FeatureSet, finished: Trainer, step: int
) -> None:
    stop_at(new_trainer(data, tmp_path), step)
    resumed = new_trainer(
        data, tmp_path, seed=9 if step >= 4 else 0
    )  # weights come from the checkpoint, if there is one
    assert resumed.step == step // 4 * 4
    resumed.run(PROMPTS[:1], quiet=True)
    assert equal(weights(resumed), weights(finished))


def test_every_epoch_reads_every_sample_once_in_a_new_order(
    tmp_path: Path, data: FeatureSet
) -> None:
    trainer = new_trainer(data, tmp_path)
    numbers: list[int] = []
    place = trainer._place
    trainer._place = lambda number: (numbers.append(number), place(number))[1]  # type: ignore[method-assign]
    trainer.run(PROMPTS[:1], quiet=True)
    assert numbers == list(range(12 * 4))
    epochs = [
        [tuple(data[place(n)].tokens.tolist()) for n in range(first, first + len(data))]
        for first in (0, 8, 16)
    ]
    assert {len(set(epoch)) for epoch in epochs} == {len(data)}
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_run_resumed_without_its_optimizer_state_is_caught(
    tmp_path: Path, data: FeatureSet, finished: Trainer
) -> None:
    stop_at(new_trainer(data, tmp_path), 7)
    resumed = new_trainer(data, tmp_path)
    resumed.optimizers[0].optimizer.state.clear()
    resumed.run(PROMPTS[:1], quiet=True)
    assert not equal(weights(resumed), weights(finished))


@pytest.mark.parametrize("step", [2, 7], ids=["before-the-first-checkpoint", "behind-a-checkpoint"])
def test_metrics_of_a_resumed_run_hold_every_step_once(
    tmp_path: Path, data: FeatureSet, step: int
) -> None:
    stop_at(new_trainer(data, tmp_path), step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    new_trainer(data, tmp_path).run(PROMPTS[:1], quiet=True)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 13))


def test_finished_run_stays_finished(tmp_path: Path, data: FeatureSet, finished: Trainer) -> None:
    again = new_trainer(data, finished.out, seed=3)
    assert (again.step, again.best) == (12, finished.best)
    assert again.run(PROMPTS[:1], quiet=True) == finished.best
    assert equal(weights(again), weights(finished))


@pytest.mark.parametrize(
    "changes", [{"lr": 1e-3}, {"seed": 1}, {"anchors": 5}, {"vocab": 20}, {"gamma": 7.0}]
)
def test_other_settings_on_resume_are_refused(
    finished: Trainer, data: FeatureSet, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidParameter) as error:
        new_trainer(data, finished.out, config=replace(SETTINGS, **changes))
    assert f"was begun with {next(iter(changes))} " in one_line_and_hint(error)


def test_another_draft_network_on_resume_is_refused(finished: Trainer, data: FeatureSet) -> None:
    wider = random_weights(replace(CONFIG, intermediate_size=48), 0)
    with pytest.raises(InvalidParameter) as error:
        Trainer(wider, language_model(), data, finished.out, SETTINGS)
    assert "was begun with another draft network" in one_line_and_hint(error)


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


class Poisoned(FeatureSet):
    """Features that are not numbers, from one sample number on."""

    served = 0
    poison_from = 4 * 9  # the tenth step's first sample

    def __getitem__(self, i: int) -> Sample:
        sample = super().__getitem__(i)
        self.served += 1
        return (
            sample
            if self.served <= self.poison_from
            else replace(sample, features=sample.features * math.nan)
        )


def test_loss_that_is_no_number_stops_the_run_and_overwrites_nothing(
    tmp_path: Path, data: FeatureSet
) -> None:
    trainer = new_trainer(Poisoned(data.folder), tmp_path)
    files: list[dict[str, bytes]] = []
    save = trainer._save
    trainer._save = lambda: (save(), files.append(files_of(tmp_path / "checkpoints")))[0]  # type: ignore[method-assign]
    with pytest.raises(FlashDraftError) as error:
        trainer.run(PROMPTS[:1], quiet=True)
    assert "the loss is nan at step 9" in one_line_and_hint(error)
    assert files_of(tmp_path / "checkpoints") == files[-1]
    assert all(torch.isfinite(t).all() for t in weights(trainer).values())
    assert new_trainer(data, tmp_path).step == 8


def test_gradient_that_is_no_number_stops_the_run_before_the_weights_are_touched(
    tmp_path: Path, data: FeatureSet
) -> None:
    trainer = new_trainer(data, tmp_path)
    trainer.model.fc.weight.register_hook(
        lambda gradient: gradient * math.inf if trainer.step == 3 else gradient
    )
    with pytest.raises(FlashDraftError) as error:
        trainer.run(PROMPTS[:1], quiet=True)
    assert "at step 3" in one_line_and_hint(error)
    assert all(torch.isfinite(t).all() for t in weights(trainer).values())
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize(
    "nth", [0, 1], ids=["while-weights-are-written", "while-the-optimizer-is-written"]
)
def test_kill_while_saving_leaves_the_last_whole_checkpoint(
    tmp_path: Path, data: FeatureSet, finished: Trainer, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    real, calls = files.save_file, []

    def dying(tensors: Any, path: Any, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) == 3 + nth:  # two files a checkpoint: this one is the second
            Path(path).write_bytes(b"half a file")
            raise KeyboardInterrupt
        real(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", dying)
        with pytest.raises(KeyboardInterrupt):
            new_trainer(data, tmp_path).run(PROMPTS[:1], quiet=True)
    resumed = new_trainer(data, tmp_path, seed=5)
    assert resumed.step == 4
    resumed.run(PROMPTS[:1], quiet=True)
    assert equal(weights(resumed), weights(finished))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000008",
        "step-0000012",
    ]


def test_features_of_other_layers_are_refused(tmp_path: Path, data: FeatureSet) -> None:
    other = random_weights(replace(CONFIG, target_layer_ids=(0, 1)), 0)
    with pytest.raises(DataError) as error:
        Trainer(other, language_model(), data, tmp_path, SETTINGS)
    assert "holds layers (1, 2), the drafter reads (0, 1)" in one_line_and_hint(error)


@pytest.mark.parametrize(
    "what", ["lm_head.weight", "embed_tokens.weight", "sliding_attention layers"]
)
def test_network_that_is_trained_otherwise_than_it_would_run_is_refused(
    tmp_path: Path, data: FeatureSet, what: str
) -> None:
    kinds = ("sliding_attention", "full_attention") if "sliding" in what else ()
    model = random_weights(replace(CONFIG, layer_types=kinds, sliding_window=4), 0)
    if "weight" in what:
        model.extras = {what: torch.zeros(VOCAB, HIDDEN)}
    with pytest.raises(InvalidParameter) as error:
        Trainer(model, language_model(), data, tmp_path, SETTINGS)
    assert f"the drafter has {what}" in one_line_and_hint(error)


@pytest.mark.parametrize(
    ("measured", "expected"), [([], "no prompts"), (["a", "b" * 130], "tokens and 128 new ones")]
)
def test_prompts_that_cannot_be_measured_stop_the_run_before_its_first_step(
    tmp_path: Path, data: FeatureSet, measured: list[str], expected: str
) -> None:
    trainer = new_trainer(data, tmp_path)
    with pytest.raises(FlashDraftError) as error:
        trainer.run(measured, quiet=True)
    assert expected in one_line_and_hint(error)
    assert trainer.step == 0


@pytest.mark.parametrize("name", ["steps", "sequences", "anchors", "eval_every", "save_every"])
def test_setting_below_one_is_refused(name: str) -> None:
    with pytest.raises(InvalidParameter) as error:
        TrainConfig(**{name: 0})
    assert f"{name} is 0" in one_line_and_hint(error)


def test_target_is_not_trained(tmp_path: Path, data: FeatureSet) -> None:
    """A transformers target, whose parameters would take gradients if they were given any."""
    model = tiny_model("llama", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lm = Model(
        HFTarget(model, "llama"),
        letter_tokenizer(),
        Autoregressive,
        eos=frozenset({EOS}),
        max_rows=8,
    )
    trainer = Trainer(random_weights(CONFIG, 0), lm, data, tmp_path, SETTINGS)
    first = weights(trainer)
    trainer.train_step()
    assert not equal(weights(trainer), first)
    assert equal(dict(model.state_dict()), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_target_of_another_precision_trains(
    tmp_path: Path, data: FeatureSet, dtype: torch.dtype
) -> None:
    trainer = Trainer(
        random_weights(CONFIG, 0), language_model(dtype), data, tmp_path, replace(SETTINGS, steps=2)
    )
    assert trainer.run(PROMPTS[:1], quiet=True) >= 1.0


def test_bf16_training_stays_near_fp32(tmp_path: Path, data: FeatureSet) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = new_trainer(
            data, tmp_path / precision, config=replace(SETTINGS, precision=precision)
        )
        losses[precision] = [trainer.train_step()["loss"] for _ in range(4)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)
    assert losses["bf16"] != losses["fp32"]


# The training softmax over a part of the vocabulary.


def test_reduced_softmax_holds_every_label(tmp_path: Path, data: FeatureSet) -> None:
    trainer = new_trainer(data, tmp_path, config=replace(SETTINGS, vocab=20, negatives=5))
    answers = [token for i in range(len(data)) for token in data.answer_tokens(i)]
    kept = trainer.loss.vocabulary.tolist()
    assert len(kept) == 20
    assert min(answers.count(token) for token in kept) >= max(
        answers.count(t) for t in range(VOCAB) if t not in kept
    )
    labels = torch.tensor(answers[:40])
    candidates, indices = trainer.loss._candidates(labels, 0)
    assert torch.equal(candidates[indices], labels)
    assert set(kept) <= set(candidates.tolist())
    assert len(candidates) < VOCAB


def test_reduced_vocabulary_is_what_the_drafter_drafts(tmp_path: Path, data: FeatureSet) -> None:
    trainer = new_trainer(data, tmp_path, config=replace(SETTINGS, vocab=20, steps=4))
    trainer.run(PROMPTS[:1], quiet=True)
    best = DFlashDraftModel.from_pretrained(tmp_path / "best")
    assert best.config.draft_vocab_size == 20
    network = PackedDraft(best, language_model().target)
    assert network.vocabulary is not None
    assert network.vocabulary.tolist() == trainer.loss.vocabulary.tolist()


# First weights.


def normed_model() -> Any:
    """A target whose norms have weights other than one."""
    model = tiny_model("llama", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(2 * torch.rand(parameter.shape, generator=generator) + 0.1)
    return model


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), model=normed_model())


def test_copy_of_the_target_holds_its_last_layers(data: FeatureSet, target_folder: Path) -> None:
    config = draft_config(
        load_target(str(target_folder))[0],
        num_layers=2,
        block_size=BLOCK,
        num_features=1,
        mask_token_id=MASK,
    )
    config = replace(config, target_layer_ids=LAYERS)
    state = copied_from_target(config, str(target_folder), data[0], seed=0).state_dict()
    theirs = load_file(target_folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == tensor_shapes(config)
    for n in range(2):
        for name in (
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "post_attention_layernorm",
        ):
            assert torch.equal(
                state[f"layers.{n}.{name}.weight"], theirs[f"model.layers.{2 + n}.{name}.weight"]
            ), name
    assert torch.equal(state["norm.weight"], theirs["model.norm.weight"])


def test_copy_draws_its_context_keys_like_the_target(data: FeatureSet, target_folder: Path) -> None:
    """The context's values are those that the copied layer would have made of the same states, up
    to fc's noise.
    """
    config = replace(CONFIG, num_hidden_layers=1)
    model = copied_from_target(config, str(target_folder), data[0], seed=0)
    features, layer = data[0].features.float(), normed_model().model.layers[3]
    with torch.no_grad():
        states = features[:, -HIDDEN:]
        expected = layer.self_attn.v_proj(layer.input_layernorm(states))
        got = model.layers[0].self_attn.v_proj(model.context(features))
        noise = random_weights(config, 0).layers[0].self_attn.v_proj(model.context(features))
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.9
    assert torch.nn.functional.cosine_similarity(noise, expected).abs().mean() < 0.5


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 8}, {"intermediate_size": 48}, {"num_key_value_heads": 4}]
)
def test_copy_of_a_target_of_another_shape_is_refused(
    data: FeatureSet, target_folder: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError) as error:
        copied_from_target(replace(CONFIG, **changes), str(target_folder), data[0], seed=0)
    assert "of the draft's size to copy" in one_line_and_hint(error)


def test_copy_trains(tmp_path: Path, data: FeatureSet, target_folder: Path) -> None:
    model = copied_from_target(CONFIG, str(target_folder), data[0], seed=0)
    trainer = Trainer(model, language_model(), data, tmp_path, replace(SETTINGS, steps=40))
    losses = [trainer.train_step()["loss"] for _ in range(40)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# The point of it all.

OVERFIT = TrainConfig(
    steps=140, sequences=8, anchors=24, lr=1e-2, weight_decay=0.0, vocab=0, precision="fp32"
)


def tau_of(model: DFlashDraftModel) -> float:
    """The accepted length on the training prompts, decoded by the engine; the texts must be the
    plain ones.
    """
    lm = language_model()
    network = PackedDraft(model.eval(), lm.target)
    drafting = Model(
        lm.target, lm.tokenizer, lambda: DFlashDrafter(network), eos=lm.eos, max_rows=8
    )
    plain, drafted = lm.generate(list(PROMPTS), ANSWER), drafting.generate(list(PROMPTS), ANSWER)
    assert [result.tokens for result in drafted] == [result.tokens for result in plain]
    return float(sum(result.stats.tau for result in drafted) / len(drafted))


def test_overfitted_drafter_is_accepted_and_an_untrained_one_is_not(
    tmp_path: Path, data: FeatureSet
) -> None:
    trainer = new_trainer(data, tmp_path, config=OVERFIT)
    assert tau_of(trainer.model) < 1.3
    trainer.model.train()
    figures = [trainer.train_step() for _ in range(OVERFIT.steps)]
    assert figures[-1]["loss"] < 0.1 * figures[0]["loss"]
    assert min(figures[-1]["accuracy"]) > 0.9
    assert tau_of(trainer.model) > 3.0
    trainer.model.save_pretrained(tmp_path / "saved")
    assert tau_of(DFlashDraftModel.from_pretrained(tmp_path / "saved")) > 2.5  # rounded to bfloat16


def test_drafter_of_late_features_is_not_accepted(tmp_path: Path, data: FeatureSet) -> None:
    """The planted fault: trained on the features of one position later, it learns the labels and
    fails in decoding.
    """

    class Late(FeatureSet):
        def __getitem__(self, i: int) -> Sample:
            sample = super().__getitem__(i)
            return replace(sample, features=sample.features.roll(-1, 0))

    trainer = new_trainer(Late(data.folder), tmp_path, config=OVERFIT)
    figures = [trainer.train_step() for _ in range(OVERFIT.steps)]
    assert min(figures[-1]["accuracy"]) > 0.9
    assert tau_of(trainer.model) < 2.0
