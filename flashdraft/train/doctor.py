"""Why a drafter is accepted less than it should be: each known cause has a test of its own. Nothing here changes anything."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.errors import DataError, FlashDraftError
from flashdraft.generate import Model
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.process import FLOATS, INTS, undisturbed
from flashdraft.train.batch import Pass, make_batch
from flashdraft.train.facts import target_facts
from flashdraft.train.features import FeatureSet, Sample
from flashdraft.types import SamplingParams

__all__ = ["Finding", "diagnose"]

_DRAFTED = 64  # tokens of every answer that are drafted and decoded
_SAID = "FlashDraftAsks"  # what the user says where the chat template is looked at
_DATE = re.compile(r"\d{1,2} [A-Z][a-z]+ \d{4}|\d{4}-\d\d-\d\d")  # some templates tell today's
_SHIFTS = {
    (0, 0): "",
    (-1, 0): "layer lower",
    (1, 0): "layer higher",
    (0, -1): "token earlier",
    (0, 1): "token later",
}


class Finding(NamedTuple):
    test: str
    passed: bool
    text: str
    hint: str = ""  # what to do where it failed


def diagnose(
    model: DFlashDraftModel, lm: Model, data: FeatureSet, *, num_samples: int = 8, seed: int = 0
) -> Iterator[Finding]:
    """The findings in order, each as it is made; after a drafter that does not belong to the target there are no others."""
    try:
        network = PackedDraft(model, lm.target)
        data.check_target(
            {"target": target_facts(lm)["target"]}
        )  # the template has a test of its own
        data.check(contents=True)
        if (width := data[0].features.shape[1]) != len(data.layers) * lm.target.hidden_size:
            got = f"`{data.name}` holds features of size {width}, not {len(data.layers)} of {lm.target.hidden_size}"
            raise DataError(
                got, hint=f"they were made with `{data.target}`; make them again with this target"
            )
    except FlashDraftError as error:
        yield Finding("files", False, error.args[0], error.hint or "")
        return
    yield Finding(
        "files",
        True,
        f"the drafter fits `{lm.target.name}`; every shard of `{data.name}` has its checksum",
    )
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(data), generator=generator, **INTS).tolist()
    room = min(model.config.trained_length - model.config.block_size + 2, lm.target.context_length)
    cut = (_cut(data[i], lm.target.context_length) for i in order)
    samples = list(
        islice((s for s in cut if s.num_prompt + 1 < min(len(s.tokens), room)), num_samples)
    )
    if not samples:
        yield Finding(
            "answers",
            False,
            "no answer has two tokens that could be drafted",
            "regenerate longer answers",
        )
        return
    answers = [torch.tensor(data.answer_tokens(i), **INTS) for i in order[:512]]
    yield _mask_token(model, lm, [*answers, *(sample.tokens for sample in samples)])
    fits = data.layers == model.config.target_layer_ids
    text = f"the data holds layers {data.layers}, the drafter reads {model.config.target_layer_ids}"
    yield (
        _layers(lm, data, samples)
        if fits
        else Finding("layers", False, text, "run `flashdraft features` for this drafter")
    )
    yield _answers(lm, samples)
    yield from _prompts(lm, samples)
    if fits:
        samples = [_cut(sample, min(sample.num_prompt + _DRAFTED, room)) for sample in samples]
        drafts = _drafts(model, network, samples)
        yield _labels(model, network, samples, drafts)
        yield _served(lm, network, samples, drafts)


def _finding(test: str, passed: bool, text: str, cause: str, hint: str) -> Finding:
    return Finding(test, True, text) if passed else Finding(test, False, f"{text}{cause}", hint)


def _cut(sample: Sample, end: int) -> Sample:
    return replace(sample, tokens=sample.tokens[:end], features=sample.features[:end], final=None)


def _mask_token(model: DFlashDraftModel, lm: Model, texts: list[Tensor]) -> Finding:
    mask, seen = (
        model.config.mask_token_id,
        sum(bool((tokens == model.config.mask_token_id).any()) for tokens in texts),
    )
    special = {
        getattr(lm.tokenizer, f"{name}_token_id", None): name
        for name in ("unk", "pad", "bos", "eos")
    }
    special |= dict.fromkeys(lm.eos, "eos")
    what = (
        f"is the {special[mask]} token"
        if mask in special
        else f"occurs in {seen} of {len(texts)} texts of the data"
    )
    hint = "train with --mask-token-id of an id that the target never reads or writes"
    return _finding(
        "mask token", mask not in special and not seen, f"the mask token {mask} {what}", "", hint
    )


@undisturbed
@torch.inference_mode()
def _read(lm: Model, sample: Sample, layers: Sequence[int]) -> Tensor:
    _, features = lm.target.prefill(
        lm.target.new_cache(1, len(sample.tokens)), 0, sample.tokens, layers
    )
    assert features is not None
    return features.view(len(features), len(layers), -1)  # [tokens, layers, hidden]


def _layers(lm: Model, data: FeatureSet, samples: list[Sample]) -> Finding:
    """Row by row and layer by layer: the first token's state is often so large that it alone would be measured."""
    wanted = sorted(
        {
            i + step
            for i in data.layers
            for step in (-1, 0, 1)
            if 0 <= i + step <= lm.target.num_layers
        }
    )
    errors: dict[tuple[int, int], list[Tensor]] = {shift: [] for shift in _SHIFTS}
    for sample in samples:
        ours, read = (
            sample.features.float().cpu().unflatten(1, (len(data.layers), -1)),
            _read(lm, sample, wanted).float().cpu(),
        )
        for step, late in _SHIFTS:
            pairs = [
                (k, wanted.index(i + step)) for k, i in enumerate(data.layers) if i + step in wanted
            ]
            mine, theirs = (
                ours[:, [k for k, _ in pairs]],
                read[:, [k for _, k in pairs]].roll(-late, 0)[: len(ours)],
            )
            apart = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(
                min=1e-9
            )  # [tokens, layers]
            errors[step, late].append(
                apart.median(0).values.max() if pairs else torch.tensor(torch.inf, **FLOATS)
            )
    worst = {
        shift: float(torch.stack(each).max()) for shift, each in errors.items()
    }  # nan if there is one
    own, best = worst[0, 0], min(worst, key=worst.__getitem__)
    text, hint = (
        f"the features differ from the target's own by {own:.2%}",
        "make the features again with this target",
    )
    if worst[best] < min(0.5 * own, 0.2):
        return Finding(
            "layers",
            False,
            f"the features are those of one {_SHIFTS[best]} than the manifest says: off by one",
            hint,
        )
    return _finding(
        "layers", own < 0.1, text, ": they were made with other weights or tokens", hint
    )


@undisturbed
@torch.inference_mode()
def _answers(lm: Model, samples: list[Sample]) -> Finding:
    """Under the target's own law surprise less entropy is a martingale of that variance; a greedy text has far less."""
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    count = sum(len(sample.tokens) - sample.num_prompt for sample in samples)
    for sample in samples:
        states = _read(lm, sample, (lm.target.num_layers,))[sample.num_prompt - 1 : -1, 0]
        for rows, tokens in zip(
            states.split(128), sample.tokens[sample.num_prompt :].split(128), strict=True
        ):
            log_law = lm.target.lm_head(rows).float().log_softmax(-1).clamp(min=-1e4)
            law, surprise = log_law.exp(), -log_law.gather(1, tokens[:, None].to(log_law.device))
            entropy = -(law * log_law).sum(-1)
            varentropy = (law * log_law.square()).sum(-1) - entropy.square()
            sums += torch.stack([t.double().sum().cpu() for t in (surprise, entropy, varentropy)])
    (got, own), deviation = (sums[:2] / count).tolist(), float(sums[2].clamp(min=0).sqrt()) / count
    text = f"the target's surprise at the answers is {got:.2f} nats a token, at texts of its own {own:.2f}"
    hint, most = (
        "run `flashdraft regenerate` on the prompts",
        max(own + 4 * deviation, 1.05 * own + 0.05),
    )
    return _finding("answers", got <= most, text, ": it did not write them", hint)


def _frames(lm: Model, **options: Any) -> list[tuple[str, str]]:
    """What the template puts before and behind the user's words, alone and after a system turn, as its tokens decode."""
    frames, user = [], {"role": "user", "content": _SAID}
    for turns in ([user], [user | {"role": "system"}, user]):
        try:
            text = lm.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception:  # a template raises what it likes, for instance at a system turn
            continue
        ends = text.partition(_SAID)[0], text.rpartition(_SAID)[2]
        head, tail = (_text(lm, lm.tokenizer.encode(end, add_special_tokens=False)) for end in ends)
        frames.append((head, tail.lstrip()))
    return frames


def _text(lm: Model, tokens: list[int]) -> str:
    return _DATE.sub(
        "DATE",
        lm.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    )


def _prompts(lm: Model, samples: list[Sample]) -> Iterator[Finding]:
    """A stored prompt must begin and end as the template frames it; the longest frame that fits tells its thinking mode."""
    if not getattr(lm.tokenizer, "chat_template", None):
        yield Finding("template", True, "the tokenizer has no chat template")
        return
    default, on, off = modes = [
        _frames(lm),
        _frames(lm, enable_thinking=True),
        _frames(lm, enable_thinking=False),
    ]
    texts = [_text(lm, sample.tokens[: sample.num_prompt].tolist()) for sample in samples]
    fits = [
        [
            max((len(h + t) for h, t in m if x.startswith(h) and x.endswith(t)), default=-1)
            for m in modes
        ]
        for x in texts
    ]
    known, odd = (
        [f for f in fits if max(f) >= 0],
        [x for x, f in zip(texts, fits, strict=True) if max(f) < 0],
    )
    text = f"{len(known)} of {len(texts)} prompts begin and end as the chat template frames them"
    own = " to ".join(repr(end) for frame in default[:1] for end in frame)
    example = (
        f"; one is {odd[0][:30]!r} to {odd[0][-30:]!r}, the template gives {own}" if odd else ""
    )
    hint = (
        "make the data again with this tokenizer, or serve with the template that it was made with"
    )
    yield _finding("template", not odd, text, example, hint)
    if on != off and known:
        served, mode = sum(f[0] == max(f) for f in known), "on" if default == on else "off"
        text = f"{served} of {len(known)} prompts have the thinking mode that is served by default ({mode})"
        yield _finding(
            "thinking",
            served > 0,
            text,
            "",
            "mix both: `flashdraft prompts --thinking`; or serve in the data's mode",
        )


@undisturbed
@torch.inference_mode()
def _drafts(model: DFlashDraftModel, network: PackedDraft, samples: list[Sample]) -> list[Tensor]:
    """What is drafted behind every token of every answer but the last [anchors, block - 1], as the network is trained."""
    drafts, weight, like = [], model.norm.weight, network.hidden_norm
    blocks = Pass(model, lambda tokens: network.embed(tokens).to(weight))
    for sample in samples:
        batch = make_batch([(0, sample)], model.config, len(sample.tokens), 0).to(weight.device)
        rows = blocks(batch).unflatten(0, (-1, model.config.block_size))[:, 1:].to(like)
        anchors = batch.block_tokens[:: model.config.block_size].to(like.device)
        parts = zip(rows.split(16), anchors.split(16), strict=True)
        drafts.append(torch.cat([network.scored(*part)[0][..., 0].cpu() for part in parts]))
    return drafts


def _hits(samples: list[Sample], drafts: list[Tensor], shift: int = 0) -> Tensor:
    """1 where a draft is the token `shift` behind its own position, 0 where not, nan behind the end [all anchors, block - 1]."""
    hits = []
    for sample, drafted in zip(samples, drafts, strict=True):
        at = (
            sample.num_prompt
            + 1
            + shift
            + torch.arange(len(drafted), **INTS)[:, None]
            + torch.arange(drafted.shape[1], **INTS)
        )
        tokens = F.pad(sample.tokens, (0, drafted.shape[1] + 1), value=-1)[at]
        hits.append((drafted == tokens).float().where(tokens >= 0, torch.nan))
    return torch.cat(hits)


def _labels(
    model: DFlashDraftModel, network: PackedDraft, samples: list[Sample], drafts: list[Tensor]
) -> Finding:
    """Shifted labels and shifted features look alike to a network that knows positions by their distance: the best one tells."""
    tried = {"": (drafts, 0)}
    layout = ", or its blocks are anchor-first (row k predicts the token at anchor + k + 1, as in DeepSpec's folders): off by one"
    for shift, token, feature in ((-1, "before", "later"), (1, "behind", "earlier")):
        cause = f"the labels were shifted{layout if shift == 1 else ''}"
        tried[f"those one position {token}: {cause}"] = drafts, shift
        rolled = [replace(sample, features=sample.features.roll(shift, 0)) for sample in samples]
        tried[f"so if the features are those of one token {feature}: they were shifted"] = (
            _drafts(model, network, rolled),
            0,
        )
    shares = {
        text: float(_hits(samples, *each).nanmean().nan_to_num()) for text, each in tried.items()
    }
    text, best = (
        f"{shares['']:.0%} of the drafts are the tokens at their own positions",
        max(shares, key=shares.__getitem__),
    )
    hint = "row k of a block predicts the token AT anchor + k, of the features before the anchor; train again without a shift"
    return _finding(
        "labels", shares[best] <= 1.5 * shares[""] + 0.1, text, f", {shares[best]:.0%} {best}", hint
    )


def _served(
    lm: Model, network: PackedDraft, samples: list[Sample], drafts: list[Tensor]
) -> Finding:
    """tau on the stored answers, by the steps that decoding would take, beside the real one of the engine."""
    forced = 0.0
    for hits in _hits(samples, drafts).split([len(drafted) for drafted in drafts]):
        accepted, at, passes = (hits == 1).cumprod(1).sum(1).tolist(), 0, 0
        while at < len(accepted):
            at, passes = at + accepted[at] + 1, passes + 1
        forced += len(accepted) / passes / len(samples)
    drafting = replace(lm, new_drafter=lambda: DFlashDrafter(network))
    prompts: list[Any] = [sample.tokens[: sample.num_prompt].tolist() for sample in samples]
    params = [SamplingParams(max_new_tokens=len(drafted) + 1) for drafted in drafts]
    tau = sum(result.stats.tau for result in drafting.generate(prompts, params)) / len(samples)
    text = f"tau is {forced:.2f} on the stored answers, {tau:.2f} when the engine decodes the same prompts"
    hint = "look at the failed tests above; if none failed, it was hardly trained, or knows these answers by heart: train on more"
    return _finding("served", tau >= 1.1 and tau - 1 >= 0.6 * (forced - 1), text, "", hint)
