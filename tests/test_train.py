"""Training: what the network is taught is what decoding asks of it, and a run that was stopped goes
on as if it had not been.

The pipeline runs whole, at toy size: prompts, the target's own answers, features, a drafter. The
last test decodes with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, MASK, VOCAB, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from toy_folders import letter_tokenizer, save_target
from toy_training import language_model, one_line_and_hint, write_lines

import flashdraft.methods.dflash
import flashdraft.methods.network
from flashdraft import files
from flashdraft.errors import CheckpointError, DataError, FlashDraftError, InvalidParameter
from flashdraft.formats.config import DraftConfig
from flashdraft.generate import Model
from flashdraft.loading import load_target
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.models.hf import HFTarget
from flashdraft.train import answers as answers_stage
from flashdraft.train import features as features_stage
from flashdraft.train.batch import (
    Batch,
    Span,
    block_mask,
    block_positions,
    draw_anchors,
    make_batch,
)
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, Sample, write_features
from flashdraft.train.initialise import copied_from_target, draft_config, random_weights
from flashdraft.train.objectives import position_weights, row_loss
from flashdraft.train.passes import Pass
from flashdraft.train.prompts import SOURCES, read_jsonl, write_prompts
from flashdraft.train.regenerate import regenerate
from flashdraft.train.trainer import Trainer
from flashdraft.types import Rows, SamplingParams

LAYERS, BLOCK, HIDDEN = (1, 2), 4, 32
PROMPTS = (
    "hello there",
    "what is it",
    "a b c",
    "zebra",
    "Quick fox",
    "sing a song",
    "why?",
    "tell me",
)
ANSWER = SamplingParams(max_new_tokens=24, ignore_eos=True)
CONFIG = DraftConfig(
    hidden_size=HIDDEN,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    block_size=BLOCK,
    mask_token_id=MASK,
    target_layer_ids=LAYERS,
    num_target_layers=4,
    max_position_embeddings=256,
)
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
    rows = [{"source": "toy", "row": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    assert regenerate(language_model(), prompts, out, params=ANSWER, quiet=True) == len(PROMPTS)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> FeatureSet:
    out = tmp_path_factory.mktemp("features")
    write_features(language_model(), [answers], out, layers=LAYERS, max_length=128, quiet=True)
    return FeatureSet(out)


# The mask: context strictly before the anchor, the own block both ways, nothing else.

Mask = Callable[[Tensor, int, int], Tensor]


def slow_mask(anchors: Sequence[int], num_context: int, size: int) -> list[list[bool]]:
    """Position by position."""
    mask = []
    for block, anchor in enumerate(anchors):
        for _ in range(size):
            row = [position < anchor for position in range(num_context)]
            row += [other == block for other in range(len(anchors)) for _ in range(size)]
            mask.append(row)
    return mask


def anchor_in_context(anchors: Tensor, num_context: int, size: int) -> Tensor:
    return block_mask(anchors + 1, num_context, size)


def blocks_see_each_other(anchors: Tensor, num_context: int, size: int) -> Tensor:
    mask = block_mask(anchors, num_context, size)
    mask[:, num_context:] = True
    return mask


def causal_block(anchors: Tensor, num_context: int, size: int) -> Tensor:
    mask = block_mask(anchors, num_context, size)
    mask[:, num_context:] &= torch.ones_like(mask[:, num_context:]).tril()
    return mask


def is_the_mask(mask: Mask) -> bool:
    cases = [((1,), 1, 2), ((3, 4, 9), 9, 4), ((5,), 8, 1), ((2, 7, 8, 11), 12, 3)]
    return all(
        mask(torch.tensor(a), n, size).tolist() == slow_mask(a, n, size) for a, n, size in cases
    )


def test_block_mask_equals_the_definition() -> None:
    assert is_the_mask(block_mask)


@pytest.mark.parametrize("wrong", [anchor_in_context, blocks_see_each_other, causal_block])
def test_planted_wrong_mask_is_caught(wrong: Mask) -> None:
    assert not is_the_mask(wrong)


def test_block_rows_stand_at_their_own_positions() -> None:
    assert block_positions(torch.tensor([3, 7]), 4).tolist() == [3, 4, 5, 6, 7, 8, 9, 10]


# Anchors.

Draw = Callable[[int, int, int, torch.Generator], Tensor]


def drawn(draw: Draw, num_prompt: int, num_tokens: int, count: int, number: int) -> list[int]:
    anchors: list[int] = draw(
        num_prompt, num_tokens, count, torch.Generator().manual_seed(number)
    ).tolist()
    return anchors


def is_fair(draw: Draw) -> bool:
    """Sorted, different response tokens that have a successor; each of them is drawn as often as
    any other.
    """
    counts = dict.fromkeys(range(5, 11), 0)
    for number in range(600):
        anchors = drawn(draw, 5, 12, 3, number)
        if (
            len(anchors) != 3
            or anchors != sorted(set(anchors))
            or not set(anchors) <= counts.keys()
        ):
            return False
        for anchor in anchors:
            counts[anchor] += 1
    return all(
        abs(count - 300) < 75 for count in counts.values()
    )  # 300 expected, 12 is one standard deviation


def test_anchors_are_fair() -> None:
    assert is_fair(draw_anchors)


PLANTED: dict[str, Draw] = {
    "prompt tokens": lambda p, n, c, g: draw_anchors(0, n, c, g),
    "never the first answer token": lambda p, n, c, g: draw_anchors(p + 1, n, c, g),
    "the last token, which nothing follows": lambda p, n, c, g: draw_anchors(p, n + 1, c, g),
    "always the same": lambda p, n, c, g: draw_anchors(p, n, c, torch.Generator().manual_seed(0)),
    "a fixed grid": lambda p, n, c, g: torch.arange(p, n - 1, 2)[:c],
    "twice the same": lambda p, n, c, g: torch.randint(p, n - 1, (c,), generator=g).sort().values,
}


@pytest.mark.parametrize("wrong", PLANTED)
def test_planted_unfair_anchors_are_caught(wrong: str) -> None:
    assert not is_fair(PLANTED[wrong])


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(3, []), (5, []), (6, []), (7, [5]), (8, [5, 6])]
)
def test_short_or_cut_answers_give_the_anchors_that_they_have(
    num_tokens: int, expected: list[int]
) -> None:
    assert drawn(draw_anchors, 5, num_tokens, 9, 0) == expected


# The loss.

Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def slow_loss(logits: Tensor, labels: Tensor, offsets: Tensor, gamma: float) -> tuple[float, float]:
    total = weight = 0.0
    for row, label, offset in zip(logits.tolist(), labels.tolist(), offsets.tolist(), strict=True):
        if label >= 0:
            w = math.exp(-(offset - 1) / gamma)
            total += w * (math.log(sum(math.exp(x) for x in row)) - row[label])
            weight += w
    return total / weight, weight


def loss_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 7, generator=g, dtype=torch.float64)
    return logits, torch.randint(-2, 7, (12,), generator=g), torch.arange(12) % 4


def decayed_cross_entropy(
    logits: Tensor, labels: Tensor, offsets: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """As the trainer puts it together: labelled rows alone, one sum and one weight."""
    wanted = labels >= 0
    weights = position_weights(
        "decay", logits[wanted, 0], offsets[wanted], offsets[wanted], gamma=gamma
    )
    losses = row_loss("ce", logits[wanted], labels[wanted], None)
    return (losses * weights).sum() / weights.sum().clamp(min=1e-9), weights.sum()


def is_the_loss(loss: Loss) -> bool:
    for seed in range(5):
        case = loss_case(seed)
        if not torch.allclose(
            torch.stack(loss(*case, 3.0)), torch.tensor(slow_loss(*case, 3.0), dtype=torch.float64)
        ):
            return False
    return True


WRONG_LOSSES: dict[str, Loss] = {
    "no decay": lambda x, y, k, gamma: decayed_cross_entropy(x, y, k, 1e9),
    "decay from 0": lambda x, y, k, gamma: decayed_cross_entropy(x, y, k + 1, gamma),
    "ignored labels count": lambda x, y, k, gamma: decayed_cross_entropy(
        x, y.clamp(min=0), k, gamma
    ),
    "labels shifted": lambda x, y, k, gamma: decayed_cross_entropy(x, y.roll(1), k, gamma),
}


def test_loss_equals_the_definition() -> None:
    assert is_the_loss(decayed_cross_entropy)


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_planted_wrong_loss_is_caught(wrong: str) -> None:
    assert not is_the_loss(WRONG_LOSSES[wrong])


def test_losses_of_parts_join_exactly() -> None:
    logits, labels, offsets = loss_case(1)
    whole, _ = decayed_cross_entropy(logits, labels, offsets, 3.0)
    parts = [
        decayed_cross_entropy(logits[p], labels[p], offsets[p], 3.0)
        for p in (slice(0, 5), slice(5, 12))
    ]
    joined = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(joined, whole)


def test_loss_without_labels_is_zero_and_has_a_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    loss, weight = decayed_cross_entropy(logits, torch.full((3,), -1), torch.arange(3), 3.0)
    loss.backward()
    assert (float(loss.detach()), float(weight)) == (0.0, 0.0)
    assert logits.grad is not None
    assert not logits.grad.any()


# Batches: several sequences in one pass.


def toy_sample(length: int, num_prompt: int, seed: int) -> Sample:
    """Tokens count upwards, so that any shift shows; features are noise."""
    g = torch.Generator().manual_seed(seed)
    return Sample(
        torch.arange(length) % 50 + 3, torch.randn(length, 2 * HIDDEN, generator=g), num_prompt
    )


SAMPLES = [
    (7, toy_sample(20, 6, 1)),
    (8, toy_sample(9, 2, 2)),
    (9, toy_sample(33, 30, 3)),
    (10, toy_sample(14, 3, 4)),
]


def network(seed: int = 0, **changes: Any) -> DFlashDraftModel:
    """Random weights that are large enough for everything to matter."""
    model = random_weights(replace(CONFIG, **changes), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
    return model


def states_of(batch: Batch, model: DFlashDraftModel) -> Tensor:
    with torch.no_grad():
        return Pass(model, language_model().target.embed)(batch)


def test_labels_are_the_tokens_at_their_own_positions() -> None:
    (sample,) = [sample for number, sample in SAMPLES if number == 7]
    batch = make_batch([(7, sample)], CONFIG, 99, seed=0)
    tokens = sample.tokens.tolist()
    rows = list(
        zip(
            *(
                t.tolist()
                for t in (batch.positions[1], batch.offsets, batch.block_tokens, batch.labels)
            ),
            strict=True,
        )
    )
    assert len(rows) == 13 * BLOCK  # 14 answer tokens, of which the last has no successor
    for start in range(0, len(rows), BLOCK):
        anchor = rows[start][0]
        for k, (position, offset, token, label) in enumerate(rows[start : start + BLOCK]):
            assert (position, offset) == (anchor + k, k)
            assert token == (tokens[anchor] if k == 0 else MASK)
            inside = k > 0 and anchor + k < len(tokens)
            assert label == (tokens[anchor + k] if inside else -1)
    assert -1 in [
        label for _, offset, _, label in rows if offset
    ]  # a block that reaches past the end is among them


def test_packed_sequences_have_the_states_of_each_alone() -> None:
    model = network()
    together = states_of(make_batch(SAMPLES, CONFIG, 4, seed=0), model)
    alone = torch.cat([states_of(make_batch([one], CONFIG, 4, seed=0), model) for one in SAMPLES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_packed_sequences_that_see_each_other_are_caught() -> None:
    model, batch = network(), make_batch(SAMPLES, CONFIG, 4, seed=0)
    num_context, num_rows = batch.spans[-1][1], batch.spans[-1][3]
    anchors = torch.cat([batch.positions[1][r0:r1:BLOCK] + c0 for c0, _, r0, r1 in batch.spans])
    leaking = replace(
        batch,
        spans=[Span(0, num_context, 0, num_rows)],
        masks=[block_mask(anchors, num_context, BLOCK)],
    )
    assert float((states_of(leaking, model) - states_of(batch, model)).abs().max()) > 0.1


def test_loss_of_a_batch_is_that_of_its_sequences() -> None:
    model, head = network(), language_model().target.head_weight(torch.arange(VOCAB))

    def loss_of(samples: Sequence[tuple[int, Sample]]) -> tuple[Tensor, Tensor]:
        batch = make_batch(samples, CONFIG, 4, seed=0)
        return decayed_cross_entropy(
            states_of(batch, model) @ head.T, batch.labels, batch.offsets, 4.0
        )

    whole, _ = loss_of(SAMPLES)
    parts = [loss_of([one]) for one in SAMPLES]
    joined = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(whole, joined)


def test_anchors_are_new_for_every_sample_number_and_seed() -> None:
    sample = toy_sample(60, 3, 5)
    drawn = {
        (seed, number): tuple(make_batch([(number, sample)], CONFIG, 8, seed).positions[1].tolist())
        for seed in (0, 1)
        for number in range(20)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert make_batch([(3, sample)], CONFIG, 8, 1).positions[1].tolist() == list(drawn[1, 3])


def test_answers_without_two_tokens_are_left_out() -> None:
    short, cut = toy_sample(6, 5, 1), toy_sample(6, 9, 2)
    batch = make_batch([(0, short), SAMPLES[0], (1, cut)], CONFIG, 4, seed=0)
    assert batch.labels.tolist() == make_batch([SAMPLES[0]], CONFIG, 4, seed=0).labels.tolist()
    with pytest.raises(DataError) as error:
        make_batch([(0, short), (1, cut)], CONFIG, 4, seed=0)
    assert "no answer in this batch has two tokens" in one_line_and_hint(error)


@pytest.mark.parametrize("limit", [17, 20, 33])
def test_blocks_beyond_the_draft_positions_are_not_trained(limit: int) -> None:
    config = replace(CONFIG, max_position_embeddings=limit)
    batch = make_batch([(0, toy_sample(34, 5, 1))], config, 99, seed=0)
    assert batch.positions[1].max() == limit - 1
    assert torch.isfinite(states_of(batch, network(max_position_embeddings=limit))).all()


@pytest.mark.parametrize(
    "shift", [0, -1, 1], ids=["as-it-is", "features-one-late", "features-one-early"]
)
def test_training_computes_what_decoding_computes(
    shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else accuracy is high in training and nothing is accepted when served. The planted faults
    shift the features by one.
    """
    monkeypatch.setattr(flashdraft.methods.dflash, "DRAFT_KERNEL", "float32")
    monkeypatch.setattr(
        flashdraft.methods.network, "DRAFT_KERNEL", "float32"
    )  # a draft is rounded to 8 bits otherwise
    model, target = network(), language_model().target
    tokens = torch.tensor([1, 9, 17, 30, 4, 22, 41, 8, 15, 33, 27, 5])
    _, features = target.prefill(target.new_cache(1, 64), 0, tokens, LAYERS)
    assert features is not None
    batch = make_batch(
        [(0, Sample(tokens, features.clone().roll(shift, 0), 4))], CONFIG, 99, seed=0
    )
    states = states_of(batch, model).view(-1, BLOCK, HIDDEN)
    anchors = batch.positions[1][::BLOCK].tolist()
    assert anchors == list(range(4, 11))
    differences = []
    for anchor, trained in zip(anchors, states, strict=True):
        drafter = DFlashDrafter(PackedDraft(model, target))
        history = tokens[: anchor + 1].tolist()
        drafter.observe(Rows([0], [history], [ANSWER], [1]), [tokens[:anchor]], [features[:anchor]])
        caught: list[Tensor] = []
        drafter.network.scored = lambda hidden, *_, into=caught: (
            into.append(hidden[0]),
            hidden.topk(1, -1)[::-1],
        )[1]  # type: ignore
        drafter.propose(Rows([0], [history], [ANSWER], [1]), BLOCK)
        differences.append(float((caught[0] - trained[1:]).abs().max()))
    assert max(differences) < 1e-4 if shift == 0 else min(differences) > 0.05


# Stage 1: prompts.


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A data folder with two entries of every training set, one of them twice."""
    folder = tmp_path / "data"
    for source, name in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = [
            {"question": f"{source} {n}", "instruction": f"{source} {n}", "input": ""}
            for n in range(2)
        ]
        if name.endswith(".json"):
            path.write_text(json.dumps([*rows, rows[0]]))
        else:
            write_lines(path, [*rows, rows[0]])
    return folder


def test_prompts_are_written_once_each_in_a_seeded_order(tmp_path: Path, sets: Path) -> None:
    out = tmp_path / "out" / "prompts.jsonl"
    assert write_prompts(sets, out) == 10
    rows = list(read_jsonl(out))
    assert {(row["source"], row["row"]) for row in rows} == {
        (source, n) for source in SOURCES for n in range(2)
    }
    assert len({row["prompt"] for row in rows}) == 10
    first = out.read_bytes()
    write_prompts(sets, out)
    assert out.read_bytes() == first
    write_prompts(sets, out, seed=1)
    assert out.read_bytes() != first
    assert sorted(out.read_bytes().split(b"\n")) == sorted(first.split(b"\n"))


@pytest.mark.parametrize(
    "name", ["gsm8k/test.jsonl", "openai_humaneval:test", "mt_bench", "alpaca_eval"]
)
def test_evaluation_sets_are_refused_by_name(tmp_path: Path, sets: Path, name: str) -> None:
    with pytest.raises(InvalidParameter) as error:
        write_prompts(sets, tmp_path / "out.jsonl", files=[name])
    assert name in one_line_and_hint(error)
    assert "evaluation sets are not trained on" in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


BAD_SETS = {
    "broken line": (
        "gsm8k/train.jsonl",
        '{"question": "a"}\n{"question": \n',
        "train.jsonl, line 2: not valid JSON",
    ),
    "not an object": (
        "gsm8k/train.jsonl",
        '{"question": "a"}\n\n[1]\n',
        "train.jsonl, line 3: not a JSON object",
    ),
    "another field": (
        "gsm8k/train.jsonl",
        '{"question": "a"}\n{"asked": "b"}\n',
        "train.jsonl, line 2: none of the fields",
    ),
    "list of others": (
        "gpteacher/codegen-instruct.json",
        '[{"instruction": "a"}, "b"]',
        "codegen-instruct.json, entry 2: ",
    ),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_row_of_a_known_set_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, sets: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, content, expected = BAD_SETS[case]
    (sets / name).write_text(content)
    assert write_prompts(sets, tmp_path / "out.jsonl") == 9
    told = capsys.readouterr().err
    assert told.startswith("1 row left out: ")
    assert expected in told


def test_damaged_set_is_named(tmp_path: Path, sets: Path) -> None:
    (sets / "gpteacher/codegen-instruct.json").write_text('[{"instruction": "a"},')
    with pytest.raises(DataError) as error:
        write_prompts(sets, tmp_path / "out.jsonl")
    assert "codegen-instruct.json: not valid JSON" in one_line_and_hint(error)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_missing_set_is_named(tmp_path: Path, sets: Path, source: str) -> None:
    (sets / SOURCES[source]).unlink()
    with pytest.raises(DataError) as error:
        write_prompts(sets, tmp_path / "out.jsonl")
    assert SOURCES[source] in one_line_and_hint(error)


# Stage 2: the target's own answers.

SAMPLED = replace(ANSWER, temperature=1.0, seed=3)


def sorted_lines(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "answers.jsonl"
    regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True)
    return out


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.55, 0.97])
def test_regenerate_resumes_after_a_torn_last_line(
    tmp_path: Path, prompts: Path, undisturbed: Path, share: float
) -> None:
    whole, out = undisturbed.read_bytes(), tmp_path / "answers.jsonl"
    out.write_bytes(whole[: int(share * len(whole))])
    kept = out.read_bytes().count(b"\n")
    assert share == 0 or not out.read_bytes().endswith(b"\n")
    count = regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True)
    assert count == len(PROMPTS) - kept
    assert sorted_lines(out) == sorted_lines(undisturbed)
    assert regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True) == 0


def test_torn_line_that_is_kept_is_caught(
    tmp_path: Path, prompts: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_stage, "_torn_bytes", lambda content: 0)
    whole, out = undisturbed.read_bytes(), tmp_path / "answers.jsonl"
    out.write_bytes(whole[: int(0.55 * len(whole))])
    with pytest.raises(FlashDraftError, match=r"line \d: not valid JSON"):
        regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True)


def test_answers_are_written_as_they_end(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle loses only what was not finished."""
    lm, out, stream = language_model(), tmp_path / "answers.jsonl", Model.stream
    lm.max_rows = 2

    def killed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        finished = 0
        for chunk in stream(*args, **kwargs):
            yield chunk
            finished += chunk.result is not None
            if finished == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Model, "stream", killed)
        with pytest.raises(KeyboardInterrupt):
            regenerate(lm, prompts, out, params=ANSWER, quiet=True)
    assert len(sorted_lines(out)) == 3
    assert regenerate(lm, prompts, out, params=ANSWER, quiet=True) == len(PROMPTS) - 3


def test_answers_are_the_models_own(answers: Path, prompts: Path) -> None:
    rows, lm = list(read_jsonl(answers)), language_model()
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    for row in rows[:3]:
        result = lm.generate(row["prompt"], ANSWER)
        assert row == {
            **{"source": "toy", "row": PROMPTS.index(row["prompt"]), "prompt": row["prompt"]},
            **{
                "response": result.text,
                "finish": "length",
                "num_tokens": 24,
                "tokens": list(result.tokens),
            },
        }


def test_sampled_answers_differ_by_prompt_number_and_seed(
    tmp_path: Path, undisturbed: Path
) -> None:
    same = [{"source": "toy", "row": n, "prompt": "why?"} for n in range(3)]
    path, texts = write_lines(tmp_path / "prompts.jsonl", same), set()
    for seed in (0, 100):
        out = tmp_path / f"answers{seed}.jsonl"
        regenerate(language_model(), path, out, params=replace(SAMPLED, seed=seed), quiet=True)
        texts |= {row["response"] for row in read_jsonl(out)}
    assert len(texts) == 6


def test_prompt_beyond_the_context_is_left_out_and_limit_counts(tmp_path: Path) -> None:
    rows = [
        {"source": "toy", "row": n, "prompt": prompt}
        for n, prompt in enumerate(("a", "x" * 250, "b", "c"))
    ]
    path, out = write_lines(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    assert regenerate(language_model(), path, out, params=ANSWER, limit=3, quiet=True) == 2
    assert {row["row"] for row in read_jsonl(out)} == {0, 2}


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"source": "s", "row": 1}', "[]", "{"])
def test_prompt_file_of_another_form_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """A line is left out; a file of such lines is refused."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"source": "s", "row": 0, "prompt": "a"}\n' + line + "\n")
    assert (
        regenerate(language_model(), path, tmp_path / "answers.jsonl", params=ANSWER, quiet=True)
        == 1
    )
    assert "prompts.jsonl, line 2: " in capsys.readouterr().err
    path.write_text(line)
    with pytest.raises(DataError) as error:
        regenerate(language_model(), path, tmp_path / "none.jsonl", params=ANSWER, quiet=True)
    assert "prompts.jsonl" in one_line_and_hint(error)


# Stage 3: features.


def test_features_are_the_targets_hidden_states(tmp_path: Path, answers: Path) -> None:
    """Checked against transformers itself: the output of layer i is hidden_states[i + 1]; one layer
    off is caught.
    """
    lm, model = language_model(torch.float64), tiny_model("llama")
    write_features(lm, [answers], tmp_path, layers=LAYERS, max_length=128, quiet=True)
    data = FeatureSet(tmp_path)
    assert (data.layers, data.hidden_size, data.target, len(data)) == (
        LAYERS,
        HIDDEN,
        "llama",
        len(PROMPTS),
    )
    texts = {
        tuple(lm.encode(row["prompt"]) + row["tokens"]): len(lm.encode(row["prompt"]))
        for row in read_jsonl(answers)
    }
    for sample in (data[i] for i in range(len(data))):
        assert sample.num_prompt == texts[tuple(sample.tokens.tolist())]
        with torch.no_grad():
            hidden = model(sample.tokens[None], output_hidden_states=True).hidden_states
        theirs = [torch.cat([hidden[i + off][0] for i in LAYERS], -1) for off in (0, 1, 2)]
        half_a_bit = {"rtol": 2**-8, "atol": 1e-3}  # of bfloat16's eight
        assert [torch.allclose(sample.features.double(), one, **half_a_bit) for one in theirs] == [
            False,
            True,
            False,
        ]
        _, own = lm.target.prefill(lm.target.new_cache(1, 64), 0, sample.tokens, LAYERS)
        assert own is not None
        assert torch.equal(sample.features, own.bfloat16())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_features_resume_and_make_nothing_twice(
    tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_stage, "SHARD", 3)
    lm, made = language_model(), []

    def write(folder: str, stop_at: int = 99) -> int:
        real = files.save_file

        def save(tensors: Any, path: Any, metadata: Any = None) -> None:
            if len(made) == stop_at:
                Path(path).write_bytes(b"half")
                raise KeyboardInterrupt
            made.append(path)
            real(tensors, path, metadata=metadata)

        with monkeypatch.context() as patch:
            patch.setattr(files, "save_file", save)
            return write_features(
                lm, [answers], tmp_path / folder, layers=LAYERS, max_length=128, quiet=True
            )

    assert write("whole") == 3
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        write("stopped", stop_at=2)
    assert len(FeatureSet(tmp_path / "stopped")) == 6
    assert write("stopped") == 3
    assert len(made) == 3
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_more_answers_do_not_count_the_first_ones_twice(
    tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_stage, "SHARD", 3)
    lines, growing, lm = (
        answers.read_text().splitlines(keepends=True),
        tmp_path / "growing.jsonl",
        language_model(),
    )
    for count in (4, 8, 8):
        growing.write_text("".join(lines[:count]))
        write_features(
            lm, [growing], tmp_path / "features", layers=LAYERS, max_length=128, quiet=True
        )
        data = FeatureSet(tmp_path / "features")
        assert len({tuple(data[i].tokens.tolist()) for i in range(len(data))}) == len(data) == count


def test_features_of_another_kind_are_refused(tmp_path: Path, answers: Path) -> None:
    lm = language_model()
    write_features(lm, [answers], tmp_path, layers=LAYERS, max_length=128, quiet=True)
    before = contents(tmp_path)
    for layers, max_length in (((0, 1), 128), (LAYERS, 64)):
        with pytest.raises(DataError) as error:
            write_features(
                lm, [answers], tmp_path, layers=layers, max_length=max_length, quiet=True
            )
        assert "holds features of another kind" in one_line_and_hint(error)
    assert contents(tmp_path) == before


def test_long_answers_are_cut(tmp_path: Path, answers: Path) -> None:
    lm = language_model()
    write_features(lm, [answers], tmp_path, layers=LAYERS, max_length=14, quiet=True)
    data = FeatureSet(tmp_path)
    lengths = {len(data[i].tokens) for i in range(len(data))}
    assert lengths == {14}
    assert any(data[i].num_prompt > 14 for i in range(len(data)))
    make_batch(((i, data[i]) for i in range(len(data))), CONFIG, 4, 0)


@pytest.mark.parametrize(
    "read", [lambda data: data[0], lambda data: data.answer_tokens(0)], ids=["sample", "tokens"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_shard_is_named(
    tmp_path: Path, answers: Path, damage: str, read: Callable[[FeatureSet], Any]
) -> None:
    write_features(language_model(), [answers], tmp_path, layers=LAYERS, max_length=128, quiet=True)
    data, (shard,) = FeatureSet(tmp_path), tmp_path.glob("*.safetensors")
    read(data)
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    with pytest.raises(DataError) as error:
        read(data)
    assert shard.name in one_line_and_hint(error)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"layers": [1]}'])
def test_damaged_manifest_is_named(tmp_path: Path, answers: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    for read in (
        FeatureSet,
        lambda out: write_features(
            language_model(), [answers], out, layers=LAYERS, max_length=9, quiet=True
        ),
    ):
        with pytest.raises(DataError) as error:
            read(tmp_path)
        assert "manifest.json` cannot be read" in one_line_and_hint(error)


def test_answers_in_the_place_of_features_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        FeatureSet(write_lines(tmp_path / "answers.jsonl", []))
    assert "is a file, not a folder of features" in one_line_and_hint(error)
    assert "--online" in str(error.value.hint)


def test_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        FeatureSet(tmp_path)
    assert "holds no manifest.json" in one_line_and_hint(error)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    write_features(
        language_model(), [empty], tmp_path / "out", layers=LAYERS, max_length=9, quiet=True
    )
    with pytest.raises(DataError) as error:
        FeatureSet(tmp_path / "out")
    assert "holds no samples" in one_line_and_hint(error)


# Stage 4: the trainer.


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
    resumed.optimizer.optimizer.state.clear()
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
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == config.shapes()
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
