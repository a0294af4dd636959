"""What a drafter reads: stored, computed on the fly, or kept while the target answers, it is the
same; damage is found by name.

Answers end together in fours here, so that a killed run has answers which its shards have not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from toy_training import (
    CONFIG,
    HIDDEN,
    LAYERS,
    language_model,
    one_line_and_hint,
    toy_sample,
    write_lines,
)

from flashdraft.errors import DataError, InvalidParameter
from flashdraft.train import features as features_stage
from flashdraft.train import regenerate as regenerate_stage
from flashdraft.train.batch import make_batch
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import (
    FeatureSet,
    OnlineFeatures,
    Sample,
    ShardWriter,
    write_features,
)
from flashdraft.train.initialise import random_weights
from flashdraft.train.objectives import common_tokens
from flashdraft.train.prompts import read_jsonl
from flashdraft.train.regenerate import Server, regenerate
from flashdraft.train.trainer import Trainer
from flashdraft.types import SamplingParams

LONG = 128
ANSWER = SamplingParams(max_new_tokens=20, ignore_eos=True)


def random_answers(path: Path, count: int, length: int, seed: int = 0) -> Path:
    """Answers as `regenerate` writes them, of random tokens, and one that has no token ids."""
    tokens = torch.randint(
        3, 50, (count, length), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    rows: list[dict[str, Any]] = [
        {"prompt": "why? " * (1 + n % 3), "response": "", "finish": "length", "tokens": row}
        for n, row in enumerate(tokens)
    ]
    return write_lines(
        path, [*rows, {"prompt": f"what {seed}", "response": "no idea, really", "finish": "stop"}]
    )


def same(first: Sample, second: Sample) -> bool:
    """Bit for bit."""
    pairs = [(first.tokens, second.tokens), (first.features, second.features)]
    if first.final is not None and second.final is not None:
        pairs.append((first.final, second.final))
    same_kind = first.num_prompt == second.num_prompt and (first.final is None) == (
        second.final is None
    )
    return same_kind and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def samples_of(data: FeatureSet | OnlineFeatures) -> list[Sample]:
    return [data[i] for i in range(len(data))]


# On the fly.


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (features_stage, regenerate_stage):
        monkeypatch.setattr(stage, "SHARD", 3)


def both_kinds(
    folder: Path, answers: Sequence[Path], *, max_length: int = LONG, final: bool = False
) -> tuple[Any, Any]:
    lm = language_model()
    write_features(
        lm, answers, folder, layers=LAYERS, max_length=max_length, final=final, quiet=True
    )
    return FeatureSet(folder), OnlineFeatures(
        lm, answers, layers=LAYERS, max_length=max_length, final=final
    )


@pytest.mark.usefixtures("small_shards")
def test_the_draft_vocabulary_is_measured_on_every_file_of_answers(tmp_path: Path) -> None:
    """Of a folder of before, which does not know its files, until `features` runs again."""
    files = [random_answers(tmp_path / f"{n}.jsonl", 3 + n, 20, seed=n) for n in range(2)]
    folder = tmp_path / "features"
    stored, online = both_kinds(folder, files)
    common = common_tokens(stored, 20)
    drafted = set(common.tokens.tolist())

    for n, file in enumerate(files):
        alone = OnlineFeatures(language_model(), [file], layers=LAYERS, max_length=LONG)
        tokens = [token for i in range(len(alone)) for token in alone.answer_tokens(i)]
        covered = sum(token in drafted for token in tokens) / len(tokens)
        assert common.covered_by_file[f"{n}.jsonl"] == covered
        assert covered < 1
    assert common_tokens(online, 20).covered_by_file == common.covered_by_file
    first, second = common.covered_by_file.values()
    assert min(first, second) < common.covered < max(first, second)

    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["shards"].values():
        del entry["file"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert common_tokens(FeatureSet(folder), 20).covered_by_file == {"": common.covered}
    again, _ = both_kinds(folder, files)
    assert common_tokens(again, 20).covered_by_file == common.covered_by_file


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("final", [False, True], ids=["hard", "soft-labels"])
@pytest.mark.parametrize("max_length", [LONG, 14], ids=["whole", "cut"])
def test_online_features_are_the_stored_ones_in_their_order(
    tmp_path: Path, final: bool, max_length: int
) -> None:
    """Several files and shards, and a file given twice."""
    files = [random_answers(tmp_path / f"{n}.jsonl", 3 + n, 20, seed=n) for n in range(3)]
    stored, online = both_kinds(
        tmp_path / "features", [*files, files[0]], max_length=max_length, final=final
    )
    assert len(stored) == len(online) == sum(3 + n + 1 for n in range(3))
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 6
    assert (stored.layers, stored.hidden_size, stored.target, stored.final) == (
        LAYERS,
        HIDDEN,
        "llama",
        final,
    )
    assert (online.layers, online.hidden_size, online.target, online.final) == (
        LAYERS,
        HIDDEN,
        "llama",
        final,
    )
    for i, (first, second) in enumerate(zip(samples_of(stored), samples_of(online), strict=True)):
        assert same(first, second)
        assert (
            stored.answer_tokens(i)
            == online.answer_tokens(i)
            == first.tokens[first.num_prompt :].tolist()
        )
        assert len(first.tokens) <= max_length
    assert not same(stored[0], online[1])


def test_shards_are_rounded_to_bfloat16_and_online_features_likewise(tmp_path: Path) -> None:
    stored, online = both_kinds(
        tmp_path / "features", [random_answers(tmp_path / "a.jsonl", 2, 20)]
    )
    lm = language_model()
    for first, second in zip(samples_of(stored), samples_of(online), strict=True):
        _, exact = lm.target.prefill(lm.target.new_cache(1, LONG), 0, first.tokens, LAYERS)
        assert exact is not None
        assert torch.equal(first.features, exact.bfloat16())
        assert torch.equal(second.features, exact.bfloat16())
        assert not torch.equal(first.features.float(), exact)


SETTINGS = TrainConfig(
    steps=3, sequences=3, anchors=6, vocab=0, precision="fp32", save_every=100, eval_every=100
)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    "changes",
    [{}, {"kl": 0.3, "tv": 0.2, "weights": "dpace"}, {"vocab": 20}],
    ids=["ce", "soft", "reduced"],
)
def test_losses_on_online_features_are_those_on_stored_ones(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config, files = (
        replace(SETTINGS, **changes),
        [random_answers(tmp_path / f"{n}.jsonl", 3, 20, seed=n) for n in (0, 1)],
    )
    losses = []
    for data in both_kinds(tmp_path / "features", files, final=bool(config.kl)):
        trainer = Trainer(
            random_weights(CONFIG, 0),
            language_model(),
            data,
            tmp_path / type(data).__name__,
            config,
        )
        losses.append([trainer.train_step()["loss"] for _ in range(config.steps)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(set(losses[0])) == config.steps


def test_soft_labels_need_final_states_of_either_kind(tmp_path: Path) -> None:
    for data in both_kinds(tmp_path / "features", [random_answers(tmp_path / "a.jsonl", 2, 20)]):
        with pytest.raises(DataError) as error:
            Trainer(
                random_weights(CONFIG, 0),
                language_model(),
                data,
                tmp_path / "run",
                replace(SETTINGS, kl=0.5),
            )
        assert "holds no final states" in one_line_and_hint(error)


def test_online_features_of_no_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        OnlineFeatures(
            language_model(),
            [write_lines(tmp_path / "empty.jsonl", [])],
            layers=LAYERS,
            max_length=9,
        )
    assert "empty.jsonl` holds no answers" in one_line_and_hint(error)


# The final state.


def test_final_states_give_the_targets_own_logits(tmp_path: Path) -> None:
    """After the lm_head, to bfloat16's rounding; the planted faults: another position's state, and
    one that is not normed.
    """
    stored, online = both_kinds(
        tmp_path / "features", [random_answers(tmp_path / "a.jsonl", 3, 20)], final=True
    )
    model, target = tiny_model("llama", dtype=torch.float32), language_model().target
    head = target.head_weight(torch.arange(target.vocab_size))
    for sample in (*samples_of(stored), *samples_of(online)):
        assert sample.final is not None
        assert sample.features.shape[1] == 2 * HIDDEN
        with torch.no_grad():
            whole = model(sample.tokens[None], output_hidden_states=True)
            unnormed = []
            hook = model.model.norm.register_forward_hook(
                lambda _m, inputs, _o, into=unnormed: into.append(inputs[0][0])
            )
            model(sample.tokens[None])
            hook.remove()
        exact = whole.hidden_states[-1][0]

        def off(state: Tensor, exact: Tensor = exact, logits: Tensor = whole.logits[0]) -> bool:
            bound = (
                1e-3 + 2**-8 * exact.abs() @ head.abs().T
            )  # half a unit of bfloat16's eight bits, in every coordinate
            return bool(((target.lm_head(state.float()) - logits).abs() > bound).any())

        assert not off(sample.final)
        assert off(sample.final.roll(1, 0))
        assert off(sample.final.roll(-1, 0))
        assert off(unnormed[0])
        assert off(sample.features[:, -HIDDEN:])


# Kept while the target answers.

PROMPTS = (
    "one",
    "two?",
    "three??",
    "four",
    "five?",
    "six??",
    "seven",
    "eight?",
    "nine??",
    "ten",
    "no",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "prompts.jsonl",
        [{"source": "toy", "row": n, "prompt": p} for n, p in enumerate(PROMPTS)],
    )


class Counting(ShardWriter):
    """Counts what is made."""

    made = 0

    def add(self, key: str, samples: Sequence[Sample], *, place: str = "shards") -> None:
        type(self).made += 1
        super().add(key, samples, place=place)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(features_stage, "ShardWriter", Counting)
    monkeypatch.setattr(Counting, "made", 0)
    return Counting


def kept(folder: Path, *, final: bool = False, max_length: int = LONG) -> ShardWriter:
    return ShardWriter(language_model(), folder, layers=LAYERS, max_length=max_length, final=final)


def killed_after(monkeypatch: pytest.MonkeyPatch, finished: int) -> None:
    """The next stream ends by a kill behind so many answers."""
    feed = regenerate_stage.feed

    def killed(*args: Any, **options: Any) -> Iterator[Any]:
        count = 0
        for chunk in feed(*args, **options):
            yield chunk
            count += chunk.result is not None
            if count == finished:
                raise KeyboardInterrupt

    monkeypatch.setattr(regenerate_stage, "feed", killed)


def answer(
    prompts: Path, out: Path, shards: ShardWriter | None, params: SamplingParams = ANSWER
) -> int:
    lm = language_model()
    lm.max_rows = 4
    return regenerate(lm, prompts, out, params=params, shards=shards, quiet=True)


def number_made(
    counting: type[Counting],
    answers: Path,
    folder: Path,
    *,
    final: bool = False,
    max_length: int = LONG,
) -> int:
    """Shards that `features` still had to make."""
    counting.made = 0
    write_features(
        language_model(),
        [answers],
        folder,
        layers=LAYERS,
        max_length=max_length,
        final=final,
        quiet=True,
    )
    return counting.made


def is_prefills(
    folder: Path, scratch: Path, answers: Path, *, final: bool = False, max_length: int = LONG
) -> bool:
    """The folder's samples are those of a second reading, of which decoding's rounding differs in
    the last bits.
    """
    write_features(
        language_model(),
        [answers],
        scratch,
        layers=LAYERS,
        max_length=max_length,
        final=final,
        quiet=True,
    )
    pairs = list(zip(samples_of(FeatureSet(folder)), samples_of(FeatureSet(scratch)), strict=True))
    for got, expected in pairs:
        n = len(got.features)
        if not torch.equal(got.tokens, expected.tokens) or got.num_prompt != expected.num_prompt:
            return False
        if (
            not len(got.tokens) - 2 <= n <= len(got.tokens)
        ):  # a row that ends shows the drafter no more
            return False
        for ours, theirs in ((got.features, expected.features), (got.final, expected.final)):
            if (ours is None) != (theirs is None):
                return False
            if (
                ours is not None
                and theirs is not None
                and not torch.allclose(ours, theirs[:n], rtol=2**-7, atol=1e-2)
            ):
                return False
    return bool(pairs)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("final", [False, True], ids=["hard", "soft-labels"])
@pytest.mark.parametrize("max_length", [LONG, 18], ids=["whole", "cut"])
def test_features_that_were_kept_are_not_made_again(
    tmp_path: Path, prompts: Path, counting: type[Counting], final: bool, max_length: int
) -> None:
    out, folder = tmp_path / "answers.jsonl", tmp_path / "features"
    assert answer(prompts, out, kept(folder, final=final, max_length=max_length)) == 11
    assert len(list(folder.glob("*.safetensors"))) == 3
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert (
        number_made(counting, out, folder, final=final, max_length=max_length) == 1
    )  # the last two answers are no whole shard
    assert (
        before.items()
        <= {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}.items()
    )
    assert is_prefills(folder, tmp_path / "again", out, final=final, max_length=max_length)
    assert number_made(counting, out, folder, final=final, max_length=max_length) == 0
    FeatureSet(folder).check(contents=True)


@pytest.mark.usefixtures("small_shards")
def test_features_of_other_positions_or_answers_are_caught(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted faults of keeping: one position late, and the layers in another order."""

    real = ShardWriter.sample

    def late(writer: ShardWriter, tokens: list[int], features: Tensor, num_prompt: int) -> Sample:
        return real(writer, tokens, features.roll(1, 0), num_prompt)

    def swapped(
        writer: ShardWriter, tokens: list[int], features: Tensor, num_prompt: int
    ) -> Sample:
        return real(writer, tokens, features.roll(HIDDEN, 1), num_prompt)

    for wrong in (late, swapped):
        out, folder = tmp_path / f"{wrong.__name__}.jsonl", tmp_path / wrong.__name__
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "sample", wrong)
            answer(prompts, out, kept(folder))
        write_features(language_model(), [out], folder, layers=LAYERS, max_length=LONG, quiet=True)
        assert not is_prefills(folder, tmp_path / f"{wrong.__name__}-again", out)


def killed_and_resumed(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> Path:
    out = folder / "answers.jsonl"
    folder.mkdir()
    with monkeypatch.context() as patch:
        killed_after(patch, finished)
        with pytest.raises(KeyboardInterrupt):
            answer(prompts, out, kept(folder / "features"))
    assert len(list(read_jsonl(out))) in (
        finished - 1,
        finished,
    )  # the last one may not have been written
    assert answer(prompts, out, kept(folder / "features")) > 0
    assert len(list(read_jsonl(out))) == len(PROMPTS)
    return out


def lines_kept(folder: Path, answers: Path) -> list[int]:
    """Where in the file the shards in the folder begin."""
    rows = list(read_jsonl(answers))
    keys = {features_stage.shard_key(rows[start : start + 3]): start for start in range(len(rows))}
    return sorted(keys[path.stem] for path in folder.glob("*.safetensors"))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("finished", [1, 4, 5, 6, 9])
def test_features_kept_across_a_kill_are_whole_shards_of_the_file(
    tmp_path: Path,
    prompts: Path,
    counting: type[Counting],
    monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:
    """What the killed run began is made by `features`; what comes behind it was kept."""
    out, folder = (
        killed_and_resumed(tmp_path / "run", prompts, monkeypatch, finished),
        tmp_path / "run" / "features",
    )
    starts = lines_kept(folder, out)
    assert starts
    assert all(start % 3 == 0 for start in starts)
    assert len(starts) >= 2
    assert number_made(counting, out, folder) == 4 - len(starts)
    assert is_prefills(folder, tmp_path / "again", out)


@pytest.mark.usefixtures("small_shards")
def test_misaligned_groups_are_caught(
    tmp_path: Path, prompts: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a resumed run begins a shard at once."""
    real = regenerate_stage._Keeper.__init__
    monkeypatch.setattr(
        regenerate_stage._Keeper, "__init__", lambda self, shards, _: real(self, shards, 0)
    )
    out, folder = (
        killed_and_resumed(tmp_path / "run", prompts, monkeypatch, 5),
        tmp_path / "run" / "features",
    )
    starts = lines_kept(folder, out)
    assert not all(start % 3 == 0 for start in starts)
    assert number_made(counting, out, folder) > 4 - len(starts)


@pytest.mark.usefixtures("small_shards")
def test_every_label_of_kept_features_has_its_own_law(tmp_path: Path, prompts: Path) -> None:
    """Decoding does not show the drafter the last tokens' states: what has no law is no label, and
    every block has a label.
    """
    out, folder = tmp_path / "answers.jsonl", tmp_path / "features"
    answer(prompts, out, kept(folder, final=True))
    write_features(
        language_model(), [out], folder, layers=LAYERS, max_length=LONG, final=True, quiet=True
    )
    data, missing = FeatureSet(folder), 0
    for i, sample in enumerate(samples_of(data)):
        assert sample.final is not None
        batch = make_batch([(i, sample)], CONFIG, 99, 0)
        assert batch.final is not None
        labelled = batch.labels >= 0
        before = batch.positions[1][labelled] - 1
        assert int(before.max()) < len(sample.final)
        assert torch.equal(batch.final[labelled], sample.final[before])
        assert labelled.view(-1, CONFIG.block_size)[:, 1].all()
        missing += int(batch.positions[1][labelled].max()) < len(sample.tokens) - 1
    assert missing > 0


def test_answer_of_two_tokens_whose_last_state_was_not_kept_is_left_out() -> None:
    short, whole = toy_sample(8, 6, 1, final=True), toy_sample(20, 6, 2, final=True)
    assert short.final is not None
    make_batch([(0, short)], CONFIG, 4, 0)
    short = replace(short, features=short.features[:-2], final=short.final[:-2])
    assert make_batch([(0, short), (1, whole)], CONFIG, 4, 0).numbers == [1]
    with pytest.raises(DataError) as error:
        make_batch([(0, short)], CONFIG, 4, 0)
    assert "no answer in this batch has two tokens" in one_line_and_hint(error)


@pytest.mark.usefixtures("small_shards")
def test_sampled_answers_and_equal_ones_are_kept(tmp_path: Path, counting: type[Counting]) -> None:
    """The same prompt again and again, greedily: the same answer, also in the same step."""
    for name, params in (("greedy", ANSWER), ("sampled", replace(ANSWER, temperature=1.0, seed=5))):
        rows = [{"source": "toy", "row": n, "prompt": "the same"} for n in range(6)]
        prompts, out, folder = (
            write_lines(tmp_path / "p.jsonl", rows),
            tmp_path / f"{name}.jsonl",
            tmp_path / name,
        )
        assert answer(prompts, out, kept(folder), params) == 6
        assert len({tuple(row["tokens"]) for row in read_jsonl(out)}) == (
            1 if name == "greedy" else 6
        )
        assert number_made(counting, out, folder) == 0
        assert is_prefills(folder, tmp_path / f"{name}-again", out)


@pytest.mark.usefixtures("small_shards")
def test_keeping_changes_no_answer(tmp_path: Path, prompts: Path) -> None:
    params = replace(ANSWER, temperature=1.0, seed=5)
    for name, shards in (("plain", None), ("kept", kept(tmp_path / "features"))):
        answer(prompts, tmp_path / name, shards, params)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "kept").read_bytes()


def test_server_keeps_no_features(tmp_path: Path, prompts: Path) -> None:
    server = Server("http://127.0.0.1:9/v1", "m", 1)
    with pytest.raises(InvalidParameter) as error:
        regenerate(
            server,
            prompts,
            tmp_path / "out.jsonl",
            params=ANSWER,
            shards=kept(tmp_path / "features"),
            quiet=True,
        )
    assert "a server shows no features" in one_line_and_hint(error)


# Damage.


@pytest.fixture
def folder(tmp_path: Path, small_shards: None) -> Path:
    answers = random_answers(tmp_path / "answers.jsonl", 8, 20)
    write_features(
        language_model(),
        [answers],
        tmp_path / "features",
        layers=LAYERS,
        max_length=LONG,
        quiet=True,
    )
    return tmp_path / "features"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Any, str, bool]] = {  # what, what is said, whether sizes alone show it
    "gone": (lambda path: path.unlink(), "is gone", True),
    "empty": (lambda path: path.write_bytes(b""), "is gone", True),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes of", True),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes of", True),
    "one bit": (flip_a_bit, "its checksum differs", False),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, 2])
def test_damaged_shard_is_found_by_name(
    tmp_path: Path, folder: Path, damage: str, number: int
) -> None:
    do, expected, at_once = DAMAGES[damage]
    data, path = FeatureSet(folder), sorted(folder.glob("*.safetensors"))[number]
    data.check(contents=True)
    whole = path.read_bytes()
    do(path)
    for contents in (False, True):
        if not contents and not at_once:
            FeatureSet(folder).check()
            continue
        with pytest.raises(DataError) as error:
            FeatureSet(folder).check(contents=contents)
        message = one_line_and_hint(error)
        assert message.startswith(f"`{path}` ")
        assert expected in message
    path.unlink(missing_ok=True)  # as the hint says
    answers = folder.parent / "answers.jsonl"
    write_features(language_model(), [answers], folder, layers=LAYERS, max_length=LONG, quiet=True)
    FeatureSet(folder).check(contents=True)
    assert path.read_bytes() == whole


def test_run_on_a_damaged_folder_stops_before_its_first_step(tmp_path: Path, folder: Path) -> None:
    trainer = Trainer(
        random_weights(CONFIG, 0), language_model(), FeatureSet(folder), tmp_path / "run", SETTINGS
    )
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError) as error:
        trainer.run(["hello"], quiet=True)
    assert one_line_and_hint(error) == f"`{shard}` is gone"
    assert trainer.step == 0


# Size.


@pytest.mark.parametrize("final", [False, True], ids=["hard", "soft-labels"])
def test_folder_takes_little_more_than_the_wanted_layers(tmp_path: Path, final: bool) -> None:
    """Of layers so thin, tokens and headers are a large part; still it is 1.1 times the raw 16-bit
    states at most.
    """
    answers = random_answers(tmp_path / "answers.jsonl", 12, 230)
    lm, out = language_model(), tmp_path / "features"
    write_features(lm, [answers], out, layers=LAYERS, max_length=256, final=final, quiet=True)
    num_tokens = sum(len(sample.tokens) for sample in samples_of(FeatureSet(out)))
    raw = num_tokens * HIDDEN * (len(LAYERS) + final) * 2
    size = sum(path.stat().st_size for path in out.iterdir())
    assert raw < size <= 1.1 * raw
    assert {path.suffix for path in out.iterdir()} == {".safetensors", ".json"}
    assert json.loads((out / "manifest.json").read_text())["final"] is final


# Answers that cannot be read, and those of which nothing can be learned.


def short_answers(path: Path, lengths: Sequence[int]) -> Path:
    rows = [
        {
            "prompt": "why? " * (1 + n),
            "response": "",
            "finish": "length",
            "tokens": [5 + n] * length,
        }
        for n, length in enumerate(lengths)
    ]
    return write_lines(path, rows)


def opened(
    answers: Path, folder: Path, *, online: bool, final: bool = False
) -> FeatureSet | OnlineFeatures:
    lm = language_model()
    if online:
        return OnlineFeatures(lm, [answers], layers=LAYERS, max_length=LONG, final=final)
    write_features(lm, [answers], folder, layers=LAYERS, max_length=LONG, final=final, quiet=True)
    return FeatureSet(folder)


def one_by_one(data: FeatureSet | OnlineFeatures, out: Path, **changes: Any) -> Trainer:
    """Micro-batches of one sequence."""
    settings = {
        "steps": 8,
        "sequences": 1,
        "accumulate": 1,
        "anchors": 4,
        "eval_every": 8,
        "save_every": 2,
        **changes,
    }
    return Trainer(random_weights(CONFIG, 0), language_model(), data, out, TrainConfig(**settings))


@pytest.mark.parametrize("final", [False, True], ids=["tokens", "final-states"])
@pytest.mark.parametrize("online", [False, True], ids=["stored", "online"])
def test_sizes_are_those_of_the_samples(tmp_path: Path, online: bool, final: bool) -> None:
    data = opened(
        random_answers(tmp_path / "a.jsonl", 5, 140), tmp_path / "f", online=online, final=final
    )
    assert data.sizes() == [sample.sizes for sample in samples_of(data)]


@pytest.mark.parametrize("online", [False, True], ids=["stored", "online"])
def test_short_answers_are_passed_over_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: bool
) -> None:
    """All steps are made, a run that was stopped makes the same ones, and what is passed over is
    told once a run.
    """
    data = opened(
        short_answers(tmp_path / "a.jsonl", [20, 1, 20, 0, 1, 20]), tmp_path / "f", online=online
    )
    whole = one_by_one(data, tmp_path / "whole")
    whole.run(["ab"], quiet=True)
    told = capsys.readouterr().err
    assert whole.step == 8
    assert told.count("3 samples left out: ") == 1
    assert told.count("of its answer are there, two are needed") == 3

    parts = one_by_one(data, tmp_path / "parts")
    train_step = parts.train_step
    parts.train_step = lambda: train_step() if parts.step < 5 else parts.out / 0  # type: ignore[method-assign, operator]
    with pytest.raises(TypeError):
        parts.run(["ab"], quiet=True)
    resumed = one_by_one(data, tmp_path / "parts")
    assert resumed.step == 4
    resumed.run(["ab"], quiet=True)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_batch_in_which_one_answer_is_long_enough_is_as_it_was(tmp_path: Path) -> None:
    """What is passed over is a whole micro-batch; beside another sample a short one adds nothing,
    as ever.
    """
    data = opened(short_answers(tmp_path / "a.jsonl", [20, 1]), tmp_path / "f", online=False)
    trainer = one_by_one(data, tmp_path / "run", sequences=2)
    assert [number for number, _ in trainer._samples([6, 7])] == [6, 7]
    (batch,) = trainer._batches()
    assert len(batch.numbers) == 1


def test_stand_ins_are_the_same_however_the_steps_are_cut(tmp_path: Path) -> None:
    """A number's sample depends on the number alone: not on the process, the step, or what was read
    before.
    """
    data = opened(
        short_answers(tmp_path / "a.jsonl", [1, 20, 1, 20, 1]), tmp_path / "f", online=False
    )
    trainer = one_by_one(data, tmp_path / "run")
    found = [number for first in range(15) for number, _ in trainer._samples([first])]
    assert [trainer._is_usable[trainer._place(number)] for number in found] == [True] * 15
    assert [number // 5 for number in found] == [first // 5 for first in range(15)]
    usable = [first for first in range(15) if trainer._is_usable[trainer._place(first)]]
    assert [found[first] for first in usable] == usable
    other = one_by_one(data, tmp_path / "other", accumulate=2)
    assert [
        number for first in reversed(range(15)) for number, _ in other._samples([first])
    ] == found[::-1]


@pytest.mark.parametrize(
    ("lengths", "changes", "cause"),
    [
        ([1, 0, 1], {}, "1 tokens of its answer are there, two are needed"),
        ([20, 20], {"min_context": 100}, "too early for min_context 100"),
    ],
)
def test_run_from_which_nothing_can_be_learned_is_refused_before_its_first_step(
    tmp_path: Path, lengths: list[int], changes: dict[str, Any], cause: str
) -> None:
    data = opened(short_answers(tmp_path / "a.jsonl", lengths), tmp_path / "f", online=False)
    with pytest.raises(DataError) as error:
        one_by_one(data, tmp_path / "run", **changes).run(["ab"], quiet=True)
    assert f"{len(lengths)} samples left out: " in one_line_and_hint(error)
    assert cause in one_line_and_hint(error)
    assert not (tmp_path / "run/metrics.jsonl").exists()


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no-answer": ({"prompt": "a"}, "no field `response`"),
    "number": ({"prompt": "a", "response": 3}, "`response` is no text"),
    "half": ({"prompt": "a", "response": "\ud800"}, "half a character"),
    "tokens": ({"prompt": "a", "response": "", "tokens": "5 6"}, "`tokens` is no list"),
    "true": ({"prompt": "a", "response": "", "tokens": [5, True]}, "True is not a token id"),
    "beyond": ({"prompt": "a", "response": "", "tokens": [5, 999]}, "token id 999 is outside"),
    "prompt": ({"prompt": None, "response": "a"}, "is not a prompt"),
    "empty": ({"prompt": "", "response": "a"}, "the prompt is empty"),
    "image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "response": "a"},
        "a part of type 'image'",
    ),
    "thinking": ({"prompt": "a", "response": "a", "thinking": 1}, "`thinking` is 1"),
}


@pytest.mark.parametrize("online", [False, True], ids=["stored", "online"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_answer_that_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, online: bool
) -> None:
    row, cause = UNREADABLE[case]
    good = {"prompt": "why", "response": "no idea"}
    path = write_lines(tmp_path / "a.jsonl", [good, row, {**good, "prompt": "who"}])
    assert len(opened(path, tmp_path / "f", online=online)) == 2
    told = capsys.readouterr().err
    assert f"1 answer left out: {path}, line 2: " in told
    assert cause in told
    with pytest.raises(DataError) as error:
        opened(write_lines(tmp_path / "b.jsonl", [row]), tmp_path / "g", online=online)
    assert cause in one_line_and_hint(error)
