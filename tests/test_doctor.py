"""The doctor: on a healthy drafter it finds nothing, and for every planted fault the test that is
named after the cause fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, MASK, VOCAB, tiny_model
from torch import Tensor
from toy_folders import letter_tokenizer

from flashdraft.formats.config import DraftConfig
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel
from flashdraft.models.hf import HFTarget
from flashdraft.models.lean import LeanTarget
from flashdraft.train.batch import Batch, make_batch
from flashdraft.train.config import TrainConfig
from flashdraft.train.doctor import Finding, diagnose
from flashdraft.train.features import FeatureSet, Reader, Sample, ShardWriter
from flashdraft.train.initialise import random_weights
from flashdraft.train.objectives import Loss, common_tokens
from flashdraft.train.passes import Pass
from flashdraft.types import SamplingParams

LAYERS = (1, 2)
PROMPTS = ("hello there", "what is it", "zebra", "sing a song")
ANSWER = SamplingParams(max_new_tokens=20)
CHAT = (  # like Qwen3's: thinking is on, and what switches it off stands behind the opened answer
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}a "
    "{% if enable_thinking is defined and not enable_thinking %}tT {% endif %}{% endif %}"
)
CONFIG = DraftConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    block_size=4,
    mask_token_id=MASK,
    target_layer_ids=LAYERS,
    num_target_layers=4,
    max_position_embeddings=256,
)
TESTS = ["files", "mask token", "layers", "answers", "template", "thinking", "labels", "served"]


def silent(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model that never writes a special token."""
    with torch.no_grad():
        model.lm_head.weight[[0, 1, EOS, MASK]] = 0.0
    return model.to(dtype)


def language_model(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, chat: str = CHAT, hf: bool = False
) -> Model:
    model = silent(tiny_model("llama", seed=seed), dtype)
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = chat
    target = HFTarget(model, "llama") if hf else LeanTarget(model, "llama")
    return Model(target, tokenizer, Autoregressive, eos=frozenset({EOS}), max_rows=4)


def answered(
    lm: Model, params: SamplingParams = ANSWER, *, thinking: bool | None = None
) -> list[dict[str, Any]]:
    prompts = [lm.encode(prompt, thinking=thinking) for prompt in PROMPTS]
    results = lm.generate(prompts, [replace(params, seed=n) for n in range(len(prompts))])
    return [{"prompt": p, "tokens": r.tokens} for p, r in zip(prompts, results, strict=True)]


def read(
    lm: Model, rows: Sequence[dict[str, Any]], layers: tuple[int, ...] = LAYERS
) -> list[Sample]:
    return [Reader(lm, layers, 128).read(row) for row in rows]


def stored(
    folder: Path, lm: Model, samples: Sequence[Sample], layers: tuple[int, ...] = LAYERS
) -> FeatureSet:
    writer = ShardWriter(lm, folder, layers=layers, max_length=128)
    writer.add("a", samples[:2])
    writer.add("b", samples[2:])
    return FeatureSet(folder)


def trained(
    lm: Model,
    samples: Sequence[Sample],
    config: DraftConfig = CONFIG,
    *,
    plant: Callable[[Batch], Batch] = lambda batch: batch,
    vocabulary: Tensor | None = None,
    head: str | None = None,
) -> DFlashDraftModel:
    """A drafter that knows these samples by heart: the library's own blocks and loss, on one batch
    of all anchors.
    """
    model = random_weights(config, 0)
    if vocabulary is not None:
        model.reduce_vocabulary(vocabulary)
    if head is not None:
        model.add_head(head, 8)
    settings = TrainConfig(vocab=0, precision="fp32", gamma=100.0)
    tokens = torch.arange(VOCAB) if vocabulary is None else vocabulary
    blocks, loss = (
        Pass(model, lm.target.embed),
        Loss(model, lm.target, tokens, settings, torch.device("cpu")),
    )
    batch = plant(make_batch(list(enumerate(samples)), config, 64, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    weight = loss.weight(batch)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10, (150 - step) / 50)
        optimizer.zero_grad()
        surrogate, total, figures = loss(blocks(batch), batch, step)
        (surrogate / weight).backward()
        optimizer.step()
        if float(figures["hit"].mean()) == 1.0 and total / weight < 0.02:
            break
    return model.eval()


@dataclass(frozen=True)
class World:
    lm: Model
    rows: list[dict[str, Any]]
    samples: list[Sample]
    data: FeatureSet
    silent: list[Sample]  # prompts that switch thinking off
    model: DFlashDraftModel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A target, its own answers, what it saw, and a drafter that was trained on that."""
    torch.set_num_threads(1)
    lm = language_model()
    rows = answered(lm)
    samples, switched = read(lm, rows), read(lm, answered(lm, thinking=False))
    data = stored(tmp_path_factory.mktemp("data"), lm, samples)
    return World(lm, rows, samples, data, switched, trained(lm, samples + switched))


def findings(
    model: DFlashDraftModel, lm: Model, data: FeatureSet, **options: Any
) -> dict[str, Finding]:
    found = list(diagnose(model, lm, data, **options))
    assert all(finding.passed != bool(finding.hint) for finding in found)
    assert len({finding.test for finding in found}) == len(found)
    return {finding.test: finding for finding in found}


def failed(found: dict[str, Finding]) -> list[str]:
    return [test for test, finding in found.items() if not finding.passed]


def test_healthy_drafter_passes_every_test(world: World) -> None:
    found = findings(world.model, world.lm, world.data)
    assert list(found) == TESTS
    assert failed(found) == []


def test_nothing_is_changed(world: World) -> None:
    before = {name: tensor.clone() for name, tensor in world.model.state_dict().items()}
    first, second = (
        findings(world.model, world.lm, world.data),
        findings(world.model, world.lm, world.data),
    )
    assert first == second
    assert all(
        torch.equal(before[name], tensor) for name, tensor in world.model.state_dict().items()
    )


def test_accepted_length_on_the_answers_is_what_decoding_reaches(world: World) -> None:
    """Not a mean over random anchors: the steps that decoding takes."""
    text = findings(world.model, world.lm, world.data)["served"].text.split()
    assert float(text[2]) == float(text[7]) > 3.0


# Prompts.


def with_template(lm: Model, chat: str | None) -> Model:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = chat
    return Model(lm.target, tokenizer, lm.new_drafter, eos=lm.eos, max_rows=lm.max_rows)


TEMPLATES = {
    "another opening of the answer": CHAT.replace("}a ", "}bot, "),
    "another role": CHAT.replace("m['role'][0]", "m['role']"),
    "another end of turn": CHAT.replace(" }}.", " }}!"),
    "a system turn of its own": "s be brief." + CHAT,
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_other_template_is_named(world: World, case: str) -> None:
    found = findings(world.model, with_template(world.lm, TEMPLATES[case]), world.data)
    assert failed(found) == ["template"]
    assert "0 of 4 prompts" in found["template"].text
    assert "one is 'u hello there.a '" in found["template"].text


def test_prompt_of_another_template_among_others_is_found(world: World, tmp_path: Path) -> None:
    other = with_template(world.lm, TEMPLATES["another role"])
    data = stored(tmp_path, world.lm, [*world.samples[:3], *read(other, answered(other)[3:])])
    found = findings(world.model, world.lm, data)
    assert failed(found) == ["template"]
    assert "3 of 4 prompts" in found["template"].text
    assert "user sing a song" in found["template"].text


def test_prompts_with_a_system_turn_and_of_several_turns_are_known(
    world: World, tmp_path: Path
) -> None:
    lm = with_template(
        world.lm, "{% if messages[0]['role'] != 'system' %}s be brief.{% endif %}" + CHAT
    )
    say = [
        {"role": role, "content": content}
        for role, content in (("system", "be kind"), ("user", "hi"), ("assistant", "you"))
    ]
    prompts = [lm.encode([*say[start:], {"role": "user", "content": "why"}]) for start in (0, 1, 3)]
    rows = [{"prompt": prompt, "tokens": lm.generate(prompt, ANSWER).tokens} for prompt in prompts]
    assert "template" not in failed(findings(world.model, lm, stored(tmp_path, lm, read(lm, rows))))


def test_template_that_refuses_a_system_turn_or_tells_the_date_is_known(
    world: World, tmp_path: Path
) -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    )
    assert failed(findings(world.model, with_template(world.lm, refusing), world.data)) == []


def test_prompts_without_a_template_are_not_judged(world: World) -> None:
    found = findings(world.model, with_template(world.lm, None), world.data)
    assert failed(found) == []
    assert "no chat template" in found["template"].text


def test_data_of_one_thinking_mode_served_in_the_other_is_named(
    world: World, tmp_path: Path
) -> None:
    data = stored(tmp_path / "off", world.lm, world.silent)
    found = findings(world.model, world.lm, data)
    assert failed(found) == ["thinking"]
    assert (
        "0 of 4 prompts have the thinking mode that is served by default (on)"
        in found["thinking"].text
    )
    mixed = stored(tmp_path / "mixed", world.lm, [*world.samples[:1], *world.silent[1:]])
    assert failed(findings(world.model, world.lm, mixed)) == []


def test_data_that_thinks_served_by_a_template_that_does_not_is_named(world: World) -> None:
    off = CHAT.replace("enable_thinking is defined and not", "not")
    found = findings(world.model, with_template(world.lm, off), world.data)
    assert failed(found) == ["thinking"]
    assert "(off)" in found["thinking"].text


# Features.


@pytest.mark.parametrize(
    ("held", "said"), [((0, 1), "one layer lower"), ((2, 3), "one layer higher")]
)
def test_features_of_the_neighbouring_layers_are_named(
    world: World, tmp_path: Path, held: tuple[int, ...], said: str
) -> None:
    found = findings(
        world.model, world.lm, stored(tmp_path, world.lm, read(world.lm, world.rows, held))
    )
    assert failed(found) == ["layers"]
    assert said in found["layers"].text


@pytest.mark.parametrize(("step", "said"), [(-1, "one layer lower"), (1, "one layer higher")])
def test_neighbours_of_the_first_and_the_last_layer_are_named(
    world: World, tmp_path: Path, step: int, said: str
) -> None:
    """The embeddings stand before the first one, the final normed state behind the last."""
    layers = (0, 2) if step < 0 else (1, 3)
    model = random_weights(replace(CONFIG, target_layer_ids=layers), 0)
    samples = read(world.lm, world.rows, tuple(max(i + step, 0) for i in layers))
    if step < 0:
        samples = [
            replace(
                s,
                features=torch.cat(
                    (world.lm.target.embed(s.tokens).bfloat16(), s.features[:, 32:]), 1
                ),
            )
            for s in samples
        ]
    assert (
        said
        in findings(model, world.lm, stored(tmp_path, world.lm, samples, layers))["layers"].text
    )


def test_neighbours_are_told_apart_where_one_token_outweighs_all(
    world: World, tmp_path: Path
) -> None:
    """Large models hold the first token's state, a hundred times the others', unchanged through
    their layers.
    """
    samples = read(world.lm, world.rows, (0, 1))
    for sample in samples:
        sample.features[0] = 1e4
    lm = copy.copy(world.lm)
    lm.target = copy.copy(lm.target)

    def sink(*args: Any) -> Any:
        logits, features = world.lm.target.prefill(*args)
        assert features is not None
        return logits, torch.cat((torch.full_like(features[:1], 1e4), features[1:]))

    lm.target.prefill = sink  # type: ignore[method-assign,assignment]
    assert (
        "one layer lower" in findings(world.model, lm, stored(tmp_path, lm, samples))["layers"].text
    )


def test_features_of_other_weights_are_named(world: World, tmp_path: Path) -> None:
    found = findings(
        world.model, world.lm, stored(tmp_path, world.lm, read(language_model(seed=1), world.rows))
    )
    assert failed(found) == ["layers"]
    assert "other weights or tokens" in found["layers"].text


def test_drafter_of_other_layers_is_named(world: World) -> None:
    other = random_weights(replace(CONFIG, target_layer_ids=(0, 2)), 0)
    found = findings(other, world.lm, world.data)
    assert failed(found) == ["layers"]
    assert "the data holds layers (1, 2), the drafter reads (0, 2)" in found["layers"].text


def test_features_that_are_no_numbers_or_of_another_width_are_named(
    world: World, tmp_path: Path
) -> None:
    nan = [replace(sample, features=sample.features * float("nan")) for sample in world.samples]
    for n, samples in enumerate((nan, [*world.samples[:3], nan[3]])):
        found = findings(world.model, world.lm, stored(tmp_path / str(n), world.lm, samples))
        assert failed(found) == ["layers"]
        assert "by nan%" in found["layers"].text
    wide = [replace(sample, features=sample.features.repeat(1, 2)) for sample in world.samples]
    found = findings(world.model, world.lm, stored(tmp_path / "wide", world.lm, wide))
    assert list(found) == failed(found) == ["files"]
    assert "holds features of size 128, not 2 of 32" in found["files"].text


# Answers.


def other_answers(world: World, kind: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    answers = {
        "another model's": lambda: [row["tokens"] for row in answered(language_model(seed=1))],
        "another prompt's": lambda: [row["tokens"] for row in (*world.rows[1:], world.rows[0])],
        "shuffled": lambda: [
            [row["tokens"][i] for i in torch.randperm(len(row["tokens"]), generator=generator)]
            for row in world.rows
        ],
        "random": lambda: [
            torch.randint(3, MASK, (20,), generator=generator).tolist() for _ in world.rows
        ],
    }[kind]()
    return [row | {"tokens": tokens} for row, tokens in zip(world.rows, answers, strict=True)]


@pytest.mark.parametrize("kind", ["another model's", "another prompt's", "shuffled", "random"])
def test_answers_that_the_target_did_not_write_are_named(
    world: World, tmp_path: Path, kind: str
) -> None:
    found = findings(
        world.model,
        world.lm,
        stored(tmp_path, world.lm, read(world.lm, other_answers(world, kind))),
    )
    assert failed(found) == ["answers"]
    assert "it did not write them" in found["answers"].text


@pytest.mark.parametrize("seed", range(3))
def test_answers_that_were_drawn_are_known_as_its_own(
    world: World, tmp_path: Path, seed: int
) -> None:
    lm = world.lm
    prompts = [row["prompt"] for row in world.rows]
    results = lm.generate(
        prompts,
        [replace(ANSWER, temperature=1.0, seed=100 * seed + n) for n in range(len(prompts))],
    )
    rows = [
        row | {"tokens": result.tokens} for row, result in zip(world.rows, results, strict=True)
    ]
    assert "answers" not in failed(findings(world.model, lm, stored(tmp_path, lm, read(lm, rows))))


# The mask token.


@pytest.mark.parametrize("name", ["pad", "eos", "bos"])
def test_mask_token_with_a_meaning_is_named(world: World, name: str) -> None:
    lm = with_template(world.lm, CHAT)
    setattr(lm.tokenizer, f"{name}_token", "<mask>")
    found = findings(world.model, lm, world.data)
    assert failed(found) == ["mask token"]
    assert f"the mask token {MASK} is the {name} token" in found["mask token"].text


def test_mask_token_that_ends_texts_is_named(world: World) -> None:
    lm = with_template(world.lm, CHAT)
    lm.eos = frozenset({EOS, MASK})
    assert failed(findings(world.model, lm, world.data)) == ["mask token"]


def test_mask_token_in_a_prompt_is_named(world: World, tmp_path: Path) -> None:
    told = world.lm.encode("whys")
    told[told.index(world.lm.encode("s")[2])] = MASK
    rows = [*world.rows[:3], {"prompt": told}]
    rows[3]["tokens"] = world.lm.generate(rows[3]["prompt"], ANSWER).tokens
    assert MASK in rows[3]["prompt"]
    found = findings(world.model, world.lm, stored(tmp_path, world.lm, read(world.lm, rows)))
    assert failed(found) == ["mask token"]
    assert f"the mask token {MASK} occurs in 1 of 8 texts" in found["mask token"].text


@pytest.mark.parametrize("seed", range(4))
def test_mask_token_in_an_answer_is_found_beyond_the_samples(
    world: World, tmp_path: Path, seed: int
) -> None:
    rows = [*world.rows[:3], world.rows[3] | {"tokens": [*world.rows[3]["tokens"][:10], MASK]}]
    data = stored(tmp_path, world.lm, read(world.lm, rows))
    assert "mask token" in failed(findings(world.model, world.lm, data, num_samples=1, seed=seed))


# Files.


def test_damaged_shard_is_named_and_nothing_else_is_tested(world: World, tmp_path: Path) -> None:
    data = stored(tmp_path, world.lm, world.samples)
    path = tmp_path / "b.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    found = findings(world.model, world.lm, data)
    assert list(found) == failed(found) == ["files"]
    assert "its checksum differs" in found["files"].text
    assert "b.safetensors" in found["files"].text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 48}, "hidden size 48"),
        ({"num_target_layers": 6}, "made for a target with 6 layers"),
    ],
)
def test_drafter_of_another_target_is_named(
    world: World, changes: dict[str, Any], said: str
) -> None:
    found = findings(random_weights(replace(CONFIG, **changes), 0), world.lm, world.data)
    assert list(found) == failed(found) == ["files"]
    assert said in found["files"].text


def test_drafter_of_a_foreign_embedding_is_named(world: World) -> None:
    model = copy.copy(world.model)
    model.extras = {"embed_tokens.weight": torch.zeros(VOCAB - 1, 32)}
    assert failed(findings(model, world.lm, world.data)) == ["files"]


# The drafter's own training.


def shifted(batch: Batch, by: int) -> Batch:
    """Row k's label is the token at anchor + k + by."""
    blocks = torch.where(batch.offsets == 0, batch.block_tokens, batch.labels).view(
        -1, CONFIG.block_size
    )
    labels = blocks.roll(-by, 1)
    labels[:, 0] = -1
    if by > 0:
        labels[:, -1] = -1  # what stands behind the block
    return replace(batch, labels=labels.flatten())


@pytest.mark.parametrize(("by", "said"), [(1, "one position behind"), (-1, "one position before")])
def test_drafter_of_shifted_labels_is_named(world: World, by: int, said: str) -> None:
    model = trained(world.lm, world.samples, plant=lambda batch: shifted(batch, by))
    found = findings(model, world.lm, world.data)
    assert set(failed(found)) - {"served"} == {"labels"}
    assert f"those {said}: the labels were shifted" in found["labels"].text
    assert "blocks" not in found["labels"].text


def anchor_first(batch: Batch) -> Batch:
    """Row k's label is the token at anchor + k + 1, from the anchor's own row on."""
    blocks = torch.where(batch.offsets == 0, batch.block_tokens, batch.labels).view(
        -1, CONFIG.block_size
    )
    labels = blocks.roll(-1, 1)
    labels[:, -1] = -1
    return replace(batch, labels=labels.flatten())


def test_drafter_of_another_block_layout_is_named(world: World) -> None:
    """What no key and no tensor says."""
    model = trained(world.lm, world.samples, plant=anchor_first)
    found = findings(model, world.lm, world.data)
    assert set(failed(found)) - {"served"} == {"labels"}
    assert (
        "its blocks are anchor-first (row k predicts the token at anchor + k + 1"
        in found["labels"].text
    )
    assert "off by one" in found["labels"].text


def test_blocks_of_either_layout_are_healthy_and_read_as_the_other_they_are_named(
    world: World,
) -> None:
    """With a Markov head and a vocabulary of its own, too: what training makes of `--head`. Told is
    how long drafts are accepted, read rightly and as they are."""
    vocabulary = common_tokens(world.data, 40)[0]
    config = replace(CONFIG, anchor_first=True)
    first = trained(world.lm, world.samples, config, vocabulary=vocabulary, head="markov")
    assert failed(findings(first, world.lm, world.data)) == []

    for model, said in ((first, "anchor-first (row k"), (world.model, "filled in (row k")):
        right = model.config
        is_first = not right.anchor_first
        nodes = right.block_rows + is_first  # of as many rows
        model.config = replace(right, anchor_first=is_first, block_size=nodes)
        found = findings(model, world.lm, world.data)
        model.config = right
        assert set(failed(found)) - {"served"} == {"labels"}
        assert f"if its blocks are {said}" in found["labels"].text
        told = found["labels"].text.split(": off by one, ")[1].split()
        assert float(told[0]) > 3.0
        assert float(told[-1]) < 1.4
        assert "sample_from_anchor" in found["labels"].hint


def late(sample: Sample) -> Sample:
    return replace(sample, features=sample.features.roll(-1, 0))


def test_drafter_of_late_features_is_named(world: World, tmp_path: Path) -> None:
    """Trained on the features of one position later; then with data that holds them so."""
    samples = [late(sample) for sample in world.samples]
    model = trained(world.lm, samples)
    found = findings(model, world.lm, world.data)
    assert set(failed(found)) - {"served"} == {"labels"}
    assert "if the features are those of one token later" in found["labels"].text
    found = findings(model, world.lm, stored(tmp_path, world.lm, samples))
    assert failed(found) == ["layers", "served"]
    assert "one token later" in found["layers"].text


def test_drafter_that_decoding_feeds_otherwise_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data is right, the drafter too, and the engine's features come a row late."""
    observe = DFlashDrafter.observe

    def broken(self: DFlashDrafter, rows: Any, tokens: Any, features: Any) -> None:
        observe(self, rows, tokens, [f.roll(1, 0) for f in features])

    monkeypatch.setattr(DFlashDrafter, "observe", broken)
    found = findings(world.model, world.lm, world.data)
    assert failed(found) == ["served"]


def test_untrained_drafter_is_named(world: World) -> None:
    found = findings(random_weights(CONFIG, 0), world.lm, world.data)
    assert failed(found) == ["served"]
    assert "it was hardly trained" in found["served"].hint


# All that a drafter, a target and data may be.


@pytest.mark.parametrize("head", ["swiglu"])
def test_healthy_drafter_with_a_head_and_a_vocabulary_of_its_own_passes(
    world: World, head: str
) -> None:
    vocabulary = common_tokens(world.data, 40)[0]
    model = trained(world.lm, world.samples, vocabulary=vocabulary, head=head)
    assert failed(findings(model, world.lm, world.data)) == []


def test_healthy_drafter_of_two_rows_passes_and_its_shifted_labels_are_named(world: World) -> None:
    """A block of one draft: what is shifted lies outside of the block."""
    config = replace(CONFIG, block_size=2)
    assert failed(findings(trained(world.lm, world.samples, config), world.lm, world.data)) == []

    def plant(batch: Batch) -> Batch:
        labels = batch.labels.view(-1, 2).roll(-1, 0)
        labels[-1] = -1
        return replace(batch, labels=labels.flatten())

    found = findings(trained(world.lm, world.samples, config, plant=plant), world.lm, world.data)
    assert failed(found) == ["labels", "served"]
    assert "one position behind" in found["labels"].text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hf", [False, True])
def test_target_of_another_precision_is_healthy(
    world: World, tmp_path: Path, dtype: torch.dtype, hf: bool
) -> None:
    lm = language_model(dtype=dtype, hf=hf)
    found = findings(world.model, lm, stored(tmp_path, lm, read(lm, answered(lm))))
    assert failed(found) == []


def test_features_one_row_short_and_short_answers_are_healthy(world: World, tmp_path: Path) -> None:
    """Decoding never reads the last token, and answers may end at once."""
    short = [replace(sample, features=sample.features[:-1]) for sample in world.samples]
    assert (
        failed(findings(world.model, world.lm, stored(tmp_path / "short", world.lm, short))) == []
    )
    cut = [
        replace(s, tokens=s.tokens[:end], features=s.features[:end].clone())
        for s in world.samples
        for end in (s.num_prompt + n for n in (0, 1, 2, 7))
    ]
    assert failed(findings(world.model, world.lm, stored(tmp_path / "cut", world.lm, cut))) == []
    found = findings(
        world.model, world.lm, stored(tmp_path / "none", world.lm, [cut[n] for n in (0, 1, 4, 5)])
    )
    assert list(found) == ["files", "answers"]
    assert failed(found) == ["answers"]


def test_data_beyond_the_positions_is_cut(world: World, tmp_path: Path) -> None:
    """The drafter's positions end within the answers; one prompt is longer than that."""
    model = copy.copy(world.model)
    model.config = replace(CONFIG, max_position_embeddings=30)
    row = {"prompt": world.lm.encode("a very long question is this one")}
    row["tokens"] = world.lm.generate(row["prompt"], ANSWER).tokens
    found = findings(
        model, world.lm, stored(tmp_path, world.lm, [*world.samples, *read(world.lm, [row])])
    )
    assert failed(found) == []
