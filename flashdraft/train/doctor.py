"""Why a drafter is accepted less than it should be: each known cause has a test of its own.

Nothing here changes anything. Knows drafters of dflash; does not know how one is trained.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.errors import DataError, FlashDraftError
from flashdraft.formats.config import DraftConfig
from flashdraft.generate import Model
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.process import FLOATS, INTS, undisturbed
from flashdraft.train.batch import make_batch
from flashdraft.train.facts import target_facts
from flashdraft.train.features import FeatureSet, Sample
from flashdraft.train.passes import Pass
from flashdraft.types import SamplingParams

__all__ = ["Finding", "diagnose"]

_DRAFTED = 64  # tokens of every answer that are drafted and decoded
_SEARCHED = 512  # answers in which the mask token is looked for
_LAW_ROWS = 128  # positions whose laws are alive at a time
_DRAFT_ROWS = 16  # blocks whose draft laws are alive at a time
_LAYOUTS = {  # of blocks, by whether they are anchor-first
    True: "anchor-first (row k predicts the token at anchor + k + 1, as in DeepSpec's folders)",
    False: "filled in (row k predicts the token at anchor + k, as in z-lab's folders)",
}
_SAID = "FlashDraftAsks"  # what the user says where the chat template is looked at
_DATE = re.compile(r"\d{1,2} [A-Z][a-z]+ \d{4}|\d{4}-\d\d-\d\d")  # some templates tell today's


class Finding(NamedTuple):
    test: str
    passed: bool
    text: str
    hint: str = ""  # what to do where it failed


def _finding(test: str, passed: bool, text: str, cause: str, hint: str) -> Finding:
    """cause: what the text goes on with where the test failed."""
    if passed:
        return Finding(test, True, text)
    return Finding(test, False, f"{text}{cause}", hint)


def diagnose(
    model: DFlashDraftModel, lm: Model, data: FeatureSet, *, num_samples: int = 8, seed: int = 0
) -> Iterator[Finding]:
    """The findings in order, each as it is made.

    After a drafter that does not belong to the target there are no others.
    """
    config = model.config
    try:
        network = PackedDraft(model, lm.target)
        _check_files(lm, data)
    except FlashDraftError as error:
        yield Finding("files", False, error.args[0], error.hint or "")
        return
    whole = f"every shard of `{data.name}` has its checksum"
    yield Finding("files", True, f"the drafter fits `{lm.target.name}`; {whole}")

    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(data), generator=generator, **INTS).tolist()
    room = min(config.trained_length - config.block_rows + 2, lm.target.context_length)
    samples = _first_usable(data, order, num_samples, lm.target.context_length, room)
    if not samples:
        none = "no answer has two tokens that could be drafted"
        yield Finding("answers", False, none, "regenerate longer answers")
        return

    texts = [torch.tensor(data.answer_tokens(i), **INTS) for i in order[:_SEARCHED]]
    texts += [sample.tokens for sample in samples]
    yield _mask_token(model, lm, texts)
    has_its_layers = data.layers == config.target_layer_ids
    if has_its_layers:
        yield _layers(lm, data, samples)
    else:
        text = f"the data holds layers {data.layers}, the drafter reads {config.target_layer_ids}"
        yield Finding("layers", False, text, "run `flashdraft features` for this drafter")
    yield _answers(lm, samples)
    yield from _prompts(lm, samples)
    if has_its_layers:
        samples = [_cut(sample, min(sample.num_prompt + _DRAFTED, room)) for sample in samples]
        drafts = _drafts(model, network, samples, config)
        yield _labels(model, network, samples, drafts)
        yield _served(lm, network, samples, drafts)


# The samples.


def _check_files(lm: Model, data: FeatureSet) -> None:
    """Raises DataError where the features are not whole, or another target's."""
    data.check_target({"target": target_facts(lm)["target"]})  # the template has its own test
    data.check(contents=True)
    width = data[0].features.shape[1]
    hidden_size = lm.target.hidden_size
    if width != len(data.layers) * hidden_size:
        held = f"`{data.name}` holds features of size {width}"
        hint = f"they were made with `{data.target}`; make them again with this target"
        raise DataError(f"{held}, not {len(data.layers)} of {hidden_size}", hint=hint)


def _first_usable(
    data: FeatureSet, order: Sequence[int], count: int, length: int, room: int
) -> list[Sample]:
    """The first `count` samples in this order with an answer of two tokens before position `room`.

    They are cut to `length` tokens.
    """
    samples: list[Sample] = []
    for i in order:
        if len(samples) == count:
            break
        sample = _cut(data[i], length)
        if sample.num_prompt + 1 < min(len(sample.tokens), room):
            samples.append(sample)
    return samples


def _cut(sample: Sample, end: int) -> Sample:
    return replace(sample, tokens=sample.tokens[:end], features=sample.features[:end], final=None)


@undisturbed
@torch.inference_mode()
def _read(lm: Model, sample: Sample, layers: Sequence[int]) -> Tensor:
    """The target's own states [tokens, layers, hidden]."""
    cache = lm.target.new_cache(1, len(sample.tokens))
    _, features = lm.target.prefill(cache, 0, sample.tokens, layers)
    assert features is not None
    return features.view(len(features), len(layers), -1)


# Mask token.


def _mask_token(model: DFlashDraftModel, lm: Model, texts: list[Tensor]) -> Finding:
    mask = model.config.mask_token_id
    num_texts = sum(bool((tokens == mask).any()) for tokens in texts)
    special: dict[int | None, str] = {}
    for name in ("unk", "pad", "bos", "eos"):
        special[getattr(lm.tokenizer, f"{name}_token_id", None)] = name
    for token in lm.eos:
        special[token] = "eos"

    what = f"occurs in {num_texts} of {len(texts)} texts of the data"
    if mask in special:
        what = f"is the {special[mask]} token"
    passed = mask not in special and num_texts == 0
    hint = "train with --mask-token-id of an id that the target never reads or writes"
    return _finding("mask token", passed, f"the mask token {mask} {what}", "", hint)


# Layers.


class _Shift(NamedTuple):
    """How far what is stored may lie from what the manifest says."""

    layers: int
    tokens: int


_NO_SHIFT = _Shift(0, 0)
_SHIFTS = {
    _NO_SHIFT: "",
    _Shift(-1, 0): "layer lower",
    _Shift(1, 0): "layer higher",
    _Shift(0, -1): "token earlier",
    _Shift(0, 1): "token later",
}


def _layers(lm: Model, data: FeatureSet, samples: list[Sample]) -> Finding:
    """Whether the stored features are the target's, and if not, whether they are off by one."""
    read_layers = _with_neighbours(data.layers, lm.target.num_layers)
    errors: dict[_Shift, list[Tensor]] = {shift: [] for shift in _SHIFTS}
    for sample in samples:
        stored = sample.features.float().cpu().unflatten(1, (len(data.layers), -1))
        read = _read(lm, sample, read_layers).float().cpu()
        for shift in _SHIFTS:
            columns = _columns(data.layers, read_layers, shift.layers)
            shifted = read.roll(-shift.tokens, 0)[: len(stored)]
            errors[shift].append(_difference(stored, shifted, columns))
    worst = {}
    for shift, of_samples in errors.items():
        worst[shift] = float(torch.stack(of_samples).max())  # nan if there is one

    own = worst[_NO_SHIFT]
    best = min(worst, key=worst.__getitem__)
    hint = "make the features again with this target"
    if worst[best] < min(0.5 * own, 0.2):
        text = f"the features are those of one {_SHIFTS[best]} than the manifest says: off by one"
        return Finding("layers", False, text, hint)
    text = f"the features differ from the target's own by {own:.2%}"
    cause = ": they were made with other weights or tokens"
    return _finding("layers", own < 0.1, text, cause, hint)


def _with_neighbours(layers: Sequence[int], num_layers: int) -> list[int]:
    found = set()
    for layer in layers:
        for near in (layer - 1, layer, layer + 1):
            if 0 <= near <= num_layers:
                found.add(near)
    return sorted(found)


class _Columns(NamedTuple):
    """Which layers are compared with which, by their places among them."""

    stored: list[int]
    read: list[int]


def _columns(layers: Sequence[int], read_layers: list[int], shift: int) -> _Columns:
    """Every stored layer beside the one `shift` higher, where that was read."""
    columns = _Columns([], [])
    for place, layer in enumerate(layers):
        if layer + shift in read_layers:
            columns.stored.append(place)
            columns.read.append(read_layers.index(layer + shift))
    return columns


def _difference(stored: Tensor, read: Tensor, columns: _Columns) -> Tensor:
    """Relative, the median of the worst layer's tokens; infinite without layers to compare.

    Row by row and layer by layer: the first token's state is often so large that it alone would be
    measured. stored, read: [tokens, layers, hidden].
    """
    if not columns.stored:
        return torch.tensor(torch.inf, **FLOATS)
    mine = stored[:, columns.stored]
    theirs = read[:, columns.read]
    difference = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-9)
    worst: Tensor = difference.median(0).values.max()
    return worst


# Answers.


@undisturbed
@torch.inference_mode()
def _answers(lm: Model, samples: list[Sample]) -> Finding:
    """Whether the target wrote the answers: by its surprise at them.

    Under the target's own law surprise less entropy is a martingale of that variance; a greedy text
    has far less surprise.
    """
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    count = sum(len(sample.tokens) - sample.num_prompt for sample in samples)
    for sample in samples:
        before = slice(sample.num_prompt - 1, -1)  # the state before every token of the answer
        states = _read(lm, sample, (lm.target.num_layers,))[before, 0]
        answer = sample.tokens[sample.num_prompt :]
        for rows, tokens in zip(states.split(_LAW_ROWS), answer.split(_LAW_ROWS), strict=True):
            logits = lm.target.lm_head(rows).float()
            sums += _surprise_and_entropy(logits, tokens)

    surprise, entropy = (sums[:2] / count).tolist()
    deviation = float(sums[2].clamp(min=0).sqrt()) / count
    most = max(entropy + 4 * deviation, 1.05 * entropy + 0.05)
    at_answers = f"the target's surprise at the answers is {surprise:.2f} nats a token"
    text = f"{at_answers}, at texts of its own {entropy:.2f}"
    hint = "run `flashdraft regenerate` on the prompts"
    return _finding("answers", surprise <= most, text, ": it did not write them", hint)


def _surprise_and_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sums over the rows, float64 on the CPU: surprise, entropy, and the surprise's variance."""
    log_law = logits.log_softmax(-1).clamp(min=-1e4)
    law = log_law.exp()
    surprise = -log_law.gather(1, tokens[:, None].to(log_law.device))
    entropy = -(law * log_law).sum(-1)
    varentropy = (law * log_law.square()).sum(-1) - entropy.square()
    sums = (surprise.double().sum(), entropy.double().sum(), varentropy.double().sum())
    return torch.stack(sums).cpu()


# Prompts.


class _Frame(NamedTuple):
    """What a chat template puts before and behind the user's words, as its tokens decode."""

    head: str
    tail: str

    def fits(self, text: str) -> bool:
        return text.startswith(self.head) and text.endswith(self.tail)


def _prompts(lm: Model, samples: list[Sample]) -> Iterator[Finding]:
    """A stored prompt must begin and end as the template frames it.

    The longest frame that fits tells its thinking mode.
    """
    if not getattr(lm.tokenizer, "chat_template", None):
        yield Finding("template", True, "the tokenizer has no chat template")
        return

    default = _frames(lm)
    on = _frames(lm, thinking=True)
    off = _frames(lm, thinking=False)
    num_known = 0
    num_served = 0  # of those: in the mode that is served by default
    odd = []
    for sample in samples:
        text = _text(lm, sample.tokens[: sample.num_prompt].tolist())
        of_default = _longest_fit(text, default)
        longest = max(of_default, _longest_fit(text, on), _longest_fit(text, off))
        if longest < 0:
            odd.append(text)
            continue
        num_known += 1
        if of_default == longest:
            num_served += 1
    yield _template(num_known, odd, default)

    if on != off and num_known:
        mode = "on" if default == on else "off"
        served = f"{num_served} of {num_known} prompts have the thinking mode that is served"
        hint = "mix both: `flashdraft prompts --thinking`; or serve in the data's mode"
        yield _finding("thinking", num_served > 0, f"{served} by default ({mode})", "", hint)


def _template(num_known: int, odd: list[str], default: list[_Frame]) -> Finding:
    """odd: prompts that no frame fits."""
    num_prompts = num_known + len(odd)
    text = f"{num_known} of {num_prompts} prompts begin and end as the chat template frames them"
    example = ""
    if odd:
        given = " to ".join(map(repr, default[0])) if default else ""
        one = f"{odd[0][:30]!r} to {odd[0][-30:]!r}"
        example = f"; one is {one}, the template gives {given}"
    make = "make the data again with this tokenizer"
    hint = f"{make}, or serve with the template that it was made with"
    return _finding("template", not odd, text, example, hint)


def _frames(lm: Model, *, thinking: bool | None = None) -> list[_Frame]:
    """Of the user's words alone, and after a system turn. thinking: None leaves it out."""
    options = {} if thinking is None else {"enable_thinking": thinking}
    user = {"role": "user", "content": _SAID}
    system = {"role": "system", "content": _SAID}
    frames = []
    for turns in ([user], [system, user]):
        try:
            text = lm.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception:  # a template raises what it likes, for instance at a system turn
            continue
        head = _as_decoded(lm, text.partition(_SAID)[0])
        tail = _as_decoded(lm, text.rpartition(_SAID)[2])
        frames.append(_Frame(head, tail.lstrip()))
    return frames


def _as_decoded(lm: Model, text: str) -> str:
    return _text(lm, lm.tokenizer.encode(text, add_special_tokens=False))


def _text(lm: Model, tokens: list[int]) -> str:
    """Of all tokens, special ones too; dates are left out."""
    text = lm.tokenizer.decode(
        tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return _DATE.sub("DATE", text)


def _longest_fit(text: str, frames: list[_Frame]) -> int:
    """Characters of the longest frame that fits; -1: none does."""
    longest = -1
    for frame in frames:
        if frame.fits(text):
            longest = max(longest, len(frame.head) + len(frame.tail))
    return longest


# Drafts.


@undisturbed
@torch.inference_mode()
def _drafts(
    model: DFlashDraftModel, network: PackedDraft, samples: list[Sample], config: DraftConfig
) -> list[Tensor]:
    """What is drafted behind every token of every answer but the last, as the network is trained.

    [anchors, block - 1] of every sample. config: the model's, or that of another layout of blocks.
    """
    weight = model.norm.weight
    like = network.hidden_norm
    num_rows = config.block_rows
    first = config.first_row
    end = first + config.block_size - 1
    blocks = Pass(model, lambda tokens: network.embed(tokens).to(weight))
    drafts = []
    for sample in samples:
        batch = make_batch([(0, sample)], config, len(sample.tokens), 0).to(weight.device)
        states = blocks(batch).unflatten(0, (-1, num_rows))[:, first:end].to(like)
        anchors = batch.block_tokens[::num_rows].to(like.device)
        drafted = []
        for rows, own in zip(states.split(_DRAFT_ROWS), anchors.split(_DRAFT_ROWS), strict=True):
            tokens, _ = network.scored(rows, own)
            drafted.append(tokens[..., 0].cpu())
        drafts.append(torch.cat(drafted))
    return drafts


def _hits(samples: list[Sample], drafts: list[Tensor], shift: int = 0) -> Tensor:
    """Where drafts are the tokens `shift` behind their own positions [all anchors, block - 1].

    1 where one is, 0 where not, nan behind the end.
    """
    hits = []
    for sample, drafted in zip(samples, drafts, strict=True):
        num_anchors, num_drafts = drafted.shape
        anchors = sample.num_prompt + torch.arange(num_anchors, **INTS)
        offsets = 1 + torch.arange(num_drafts, **INTS)
        padded = F.pad(sample.tokens, (0, num_drafts + 1), value=-1)
        tokens = padded[anchors[:, None] + offsets + shift]
        hits.append((drafted == tokens).float().where(tokens >= 0, torch.nan))
    return torch.cat(hits)


def _share(samples: list[Sample], drafts: list[Tensor], shift: int = 0) -> float:
    return float(_hits(samples, drafts, shift).nanmean().nan_to_num())


def _labels(
    model: DFlashDraftModel, network: PackedDraft, samples: list[Sample], drafts: list[Tensor]
) -> Finding:
    """Whether the drafts are the tokens at their own positions, or those of a shift.

    Shifted labels and shifted features look alike to a network that knows positions by their
    distance, and blocks of the other layout to both: the best one tells.
    """
    config = model.config
    own = _share(samples, drafts)
    shares = {"": own}  # by what the drafts are
    other = _other_layout(config)
    if other.block_size > 1:
        otherwise = _drafts(model, network, samples, other)
        taus = f"{_tau(samples, otherwise):.2f} tokens a step, not {_tau(samples, drafts):.2f}"
        blocks = f"so if its blocks are {_LAYOUTS[other.anchor_first]}: off by one, {taus}"
        shares[blocks] = _share(samples, otherwise)

    for shift, token, feature in ((-1, "before", "later"), (1, "behind", "earlier")):
        shifted = f"those one position {token}: the labels were shifted"
        shares[shifted] = _share(samples, drafts, shift)

        rolled = [replace(each, features=each.features.roll(shift, 0)) for each in samples]
        other_features = f"so if the features are those of one token {feature}: they were shifted"
        shares[other_features] = _share(samples, _drafts(model, network, rolled, config))

    best = max(shares, key=shares.__getitem__)
    text = f"{own:.0%} of the drafts are the tokens at their own positions"
    rule = "row k of a block predicts the token AT anchor + k"
    if config.anchor_first:
        rule = "row k of its blocks predicts the token at anchor + k + 1"
    passed = shares[best] <= 1.5 * own + 0.1
    hint = f"{rule}, of the features before the anchor; train again without a shift"
    if "blocks" in best:
        hint = "its config.json must say which: sample_from_anchor is true of anchor-first blocks"
    return _finding("labels", passed, text, f", {shares[best]:.0%} {best}", hint)


def _other_layout(config: DraftConfig) -> DraftConfig:
    """The same rows of a block, of which others predict."""
    is_first = not config.anchor_first
    block_size = config.block_size
    if config.sequential_head != "domino":  # it feeds as many rows in both
        block_size += 1 if is_first else -1
    return replace(config, anchor_first=is_first, block_size=block_size)


def _served(
    lm: Model, network: PackedDraft, samples: list[Sample], drafts: list[Tensor]
) -> Finding:
    """tau on the stored answers, by the steps that decoding would take, beside the engine's."""
    forced = _tau(samples, drafts)
    num_anchors = [len(drafted) for drafted in drafts]
    drafting = replace(lm, new_drafter=lambda: DFlashDrafter(network))
    prompts = [sample.tokens[: sample.num_prompt].tolist() for sample in samples]
    params = [SamplingParams(max_new_tokens=count + 1) for count in num_anchors]
    results = drafting.generate(prompts, params)
    tau = sum(result.stats.tau for result in results) / len(samples)

    stored = f"tau is {forced:.2f} on the stored answers"
    text = f"{stored}, {tau:.2f} when the engine decodes the same prompts"
    otherwise = "it was hardly trained, or knows these answers by heart: train on more"
    hint = f"look at the failed tests above; if none failed, {otherwise}"
    is_accepted = tau >= 1.1
    is_as_trained = tau - 1 >= 0.6 * (forced - 1)
    return _finding("served", is_accepted and is_as_trained, text, "", hint)


def _tau(samples: list[Sample], drafts: list[Tensor]) -> float:
    """Tokens a step on the stored answers, by the steps that decoding would take."""
    num_anchors = [len(drafted) for drafted in drafts]
    total = 0.0
    for hits in _hits(samples, drafts).split(num_anchors):
        accepted = (hits == 1).cumprod(1).sum(1).tolist()
        total += len(accepted) / _num_passes(accepted)
    return total / len(samples)


def _num_passes(accepted: list[int]) -> int:
    """Over an answer, where `accepted` drafts behind each of its tokens are right."""
    passes = 0
    at = 0
    while at < len(accepted):
        at += accepted[at] + 1
        passes += 1
    return passes
