"""Stage 4: features -> a drafter. A visible loop; every few steps the real tau, by really decoding held-out prompts.

Everything random is keyed by (seed, sample number), so that a resumed run sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from flashdraft.checkpoint import DraftConfig, write_file, write_tensors
from flashdraft.engine import check
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.generate import Model
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.provenance import provenance
from flashdraft.target import Target
from flashdraft.train.features import FeatureSet, Sample
from flashdraft.train.objectives import block_mask, block_positions, decayed_cross_entropy, draw_anchors
from flashdraft.types import Result, SamplingParams, option

__all__ = ["TrainConfig", "Trainer"]

_MEASURED = SamplingParams(max_new_tokens=128)  # the texts on which tau is measured


@dataclass(frozen=True)
class TrainConfig:
    """How one run trains. A default exists here once; the command line reads the help from here."""

    steps: int = option(2000, "optimizer steps")
    sequences: int = option(6, "sequences a step")
    anchors: int = option(64, "random anchors a sequence")
    gamma: float = option(4.0, "loss weight of position k is exp(-(k-1)/gamma)")
    lr: float = option(6e-4, "peak learning rate of AdamW")
    warmup: float = option(0.04, "share of the steps spent warming up")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    clip: float = option(1.0, "largest norm of the gradient")
    vocab: int = option(8192, "the draft vocabulary: this many commonest answer tokens; 0 takes all")
    negatives: int = option(1024, "random other tokens added to that softmax at every step")
    precision: str = option("auto", "bf16, fp32, or auto: bf16 where the machine multiplies it natively")
    eval_every: int = option(250, "steps between measurements of tau")
    save_every: int = option(100, "steps between checkpoints")
    seed: int = option(0, "seed of the data order, the anchors and the initial weights")

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "anchors", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise InvalidParameter(f"{name} is {getattr(self, name)}", hint=f"{name} must be 1 or more")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise InvalidParameter(f"precision is {self.precision!r}", hint="precision must be auto, bf16 or fp32")


@dataclass(frozen=True)
class Batch:
    """Several sequences' contexts and blocks, packed one behind the other."""

    features: Tensor  # [context, F * hidden]
    block_tokens: Tensor  # [rows]: anchor and masks of every block
    positions: tuple[Tensor, Tensor]  # absolute, of context and block rows
    labels: Tensor  # [rows]: the token at each row's position; -1 at anchors and past the end
    offsets: Tensor  # [rows]: distance from the anchor
    spans: list[tuple[int, int, int, int]]  # per sequence: its context and its block rows
    masks: list[Tensor]  # per sequence: block_mask


def make_batch(samples: Iterable[tuple[int, Sample]], config: DraftConfig, num_anchors: int, seed: int) -> Batch:
    """Samples come with their global number, which keys their anchors."""
    size, features, tokens, contexts, blocks, labels, offsets = config.block_size, [], [], [], [], [], []
    spans, masks, at_context, at_row = [], [], 0, 0
    for number, sample in samples:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        room = config.max_position_embeddings - size + 2  # decoding drafts nothing where a block would not fit
        anchors = draw_anchors(sample.num_prompt, min(len(sample.tokens), room), num_anchors, generator)
        if not len(anchors):
            continue
        num_context = int(anchors[-1])  # nothing sees further than the last anchor
        positions = block_positions(anchors, size)
        padded = F.pad(sample.tokens, (0, size), value=-1)
        offset = torch.arange(size).repeat(len(anchors))
        features.append(sample.features[:num_context])
        tokens.append(torch.where(offset == 0, padded[positions], config.mask_token_id))
        labels.append(torch.where(offset == 0, -1, padded[positions]))
        contexts.append(torch.arange(num_context))
        blocks.append(positions)
        offsets.append(offset)
        masks.append(block_mask(anchors, num_context, size))
        spans.append((at_context, at_context + num_context, at_row, at_row + len(positions)))
        at_context, at_row = spans[-1][1], spans[-1][3]
    if not spans:
        raise DataError("no answer in this batch has two tokens", hint="regenerate longer answers")
    return Batch(
        torch.cat(features),
        torch.cat(tokens),
        (torch.cat(contexts), torch.cat(blocks)),
        torch.cat(labels),
        torch.cat(offsets),
        spans,
        masks,
    )


def forward(model: DFlashDraftModel, batch: Batch, embed: Any) -> Tensor:
    """Normed states of every block row [rows, hidden]: all blocks of all sequences in one pass, isolated by their masks."""

    def attend(_layer: int, q: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor]) -> Tensor:
        outputs = []
        for (c0, c1, r0, r1), mask in zip(batch.spans, batch.masks, strict=True):
            keys, values = (torch.cat((c[c0:c1], b[r0:r1])).transpose(0, 1) for c, b in zip(context_kv, block_kv, strict=True))
            out = F.scaled_dot_product_attention(
                q[r0:r1].transpose(0, 1)[None], keys[None].to(q.dtype), values[None].to(q.dtype), attn_mask=mask, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    context = model.context(batch.features.to(model.norm.weight.dtype))
    states: Tensor = model(context, embed(batch.block_tokens), batch.positions, attend)
    return states


class Trainer:
    """One run in one folder: `checkpoints/`, `best/` (a drafter's folder), metrics.jsonl, run.json."""

    def __init__(self, model: DFlashDraftModel, lm: Model, data: FeatureSet, out: Path, config: TrainConfig) -> None:
        self.model, self.lm, self.data, self.out, self.config = model, lm, data, out, config
        if data.layers != model.config.target_layer_ids or data.hidden_size != model.config.hidden_size:
            raise DataError(
                f"`{data.folder}` holds layers {data.layers}, the drafter reads {model.config.target_layer_ids}",
                hint="run `flashdraft features` for this drafter",
            )
        odd: list[str] = [name for name in ("embed_tokens.weight", "lm_head.weight") if name in model.extras]
        odd += ["sliding_attention layers"] * ("sliding_attention" in model.config.layer_types)
        if odd:
            raise InvalidParameter(f"the drafter has {odd[0]}, which cannot be trained here", hint="start from random weights")
        self.target: Target = lm.target
        self.step, self.best = 0, 0.0
        self.optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.95), fused=True)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and _native_bf16())
        self.vocabulary = self._common_tokens()
        if len(self.vocabulary) < self.target.vocab_size:
            model.reduce_vocabulary(self.vocabulary)
        self.head = self.target.head_weight(torch.arange(self.target.vocab_size))
        out.mkdir(parents=True, exist_ok=True)
        self._resume()
        self._cut_log()

    def run(self, prompts: Sequence[str], *, quiet: bool = False) -> float:
        """Train to the last step; returns the best tau measured on `prompts`, which are checked before the first one."""
        if not prompts:
            raise DataError("there are no prompts to measure tau on", hint="give held-out prompts")
        for prompt in prompts:
            check(self.target, self.lm.request(prompt, _MEASURED))
        write_file(self.out / "run.json", json.dumps(provenance() | {"config": asdict(self.config)}, indent=2).encode())
        self.model.train()
        with Progress(disable=quiet) as bar:
            task = bar.add_task("train", total=self.config.steps, completed=self.step)
            while self.step < self.config.steps:
                started = time.perf_counter()
                figures = self.train_step()
                figures["positions_per_second"] = figures["positions"] / (time.perf_counter() - started)
                if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                    figures |= self.measure(prompts)
                self._log(figures)
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self._save()
                bar.update(task, advance=1, description=f"loss {figures['loss']:.3f}  accuracy {figures['accuracy'][0]:.2f}")
        return self.best

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; raises FlashDraftError naming the step if loss or gradient is not finite, with nothing saved."""
        c = self.config
        first = self.step * c.sequences
        batch = make_batch(
            [(n, self._sample(n)) for n in range(first, first + c.sequences)], self.model.config, c.anchors, c.seed
        )
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * _schedule(self.step, c.steps, c.warmup)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            wanted = batch.labels >= 0
            states = forward(self.model, batch, self.target.embed)[wanted]
            candidates, labels = self._candidates(batch.labels[wanted])
            logits = F.linear(states, self.head[candidates].to(states.dtype)).float()
        loss, _ = decayed_cross_entropy(logits, labels, batch.offsets[wanted], c.gamma)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        for name, value in (("loss", loss.detach()), ("gradient's norm", norm)):
            if not torch.isfinite(value):
                hint = "lower --lr; the last checkpoint is whole"
                raise FlashDraftError(f"the {name} is {float(value)} at step {self.step}", hint=hint)
        self.optimizer.step()
        self.step += 1
        hits = (logits.detach().argmax(-1) == labels).float()
        offsets = batch.offsets[wanted]
        here = [hits[offsets == k] for k in range(1, self.model.config.block_size)]
        accuracy = [round(float(h.mean()), 4) if len(h) else None for h in here]  # JSON has no NaN
        figures = {"step": self.step, "loss": float(loss.detach()), "accuracy": accuracy, "norm": float(norm)}
        return figures | {"positions": len(batch.offsets)}

    def measure(self, prompts: Sequence[str]) -> dict[str, Any]:
        """tau of the drafter as it is, on held-out prompts; the best one is kept as a drafter's folder."""
        network = PackedDraft(self.model.eval(), self.target)
        lm = Model(self.target, self.lm.tokenizer, lambda: DFlashDrafter(network), eos=self.lm.eos, max_rows=self.lm.max_rows)
        results: list[Result] = lm.generate(list(prompts), _MEASURED)
        self.model.train()
        tau = sum(result.stats.tau for result in results) / len(results)
        if tau > self.best:
            self.best = tau
            self.model.save_pretrained(self.out / "best")
        return {"tau": tau}

    def _sample(self, number: int) -> Sample:
        epoch, at = divmod(number, len(self.data))
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.config.seed * 7919 + epoch))
        return self.data[int(order[at])]

    def _common_tokens(self) -> Tensor:
        """The tokens of the training softmax: the commonest of all answers, in ascending order."""
        if self.config.vocab == 0 or self.config.vocab >= self.target.vocab_size:
            return torch.arange(self.target.vocab_size)
        counts = Counter(t for i in range(len(self.data)) for t in self.data.answer_tokens(i))
        common = [token for token, _ in counts.most_common(self.config.vocab)]
        return torch.tensor(sorted(common))

    def _candidates(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Ids in this step's softmax, and the labels as indices into them; a rare label is always among them."""
        if len(self.vocabulary) == self.target.vocab_size:
            return self.vocabulary, labels
        generator = torch.Generator().manual_seed(self.config.seed * 104_729 + self.step)
        others = torch.randint(self.target.vocab_size, (self.config.negatives,), generator=generator)
        candidates = torch.cat((self.vocabulary, others, labels)).unique()
        return candidates, torch.searchsorted(candidates, labels)

    def _log(self, figures: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")

    def _cut_log(self) -> None:
        """Steps behind the last checkpoint come again; a kill may have left half a line."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            write_file(path, "".join(line for line in whole if json.loads(line)["step"] <= self.step).encode())

    def _save(self) -> None:
        """A whole checkpoint or none: filled beside, then renamed; the last two are kept."""
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        scratch = folder / ".tmp-save"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        write_tensors(scratch / "model.safetensors", self.model.state_dict())
        state = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}
        write_tensors(scratch / "optimizer.safetensors", flat)
        write_file(scratch / "state.json", json.dumps(self._state()).encode())
        os.replace(scratch, folder / f"step-{self.step:07d}")
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "best": self.best, "config": asdict(self.config), "draft": self.model.config.to_json()}

    def _resume(self) -> None:
        found = sorted((self.out / "checkpoints").glob("step-*"))
        if not found:
            return
        state = json.loads((found[-1] / "state.json").read_text())
        if replace(self.config, steps=1, eval_every=1, save_every=1) != replace(
            TrainConfig(**state["config"]), steps=1, eval_every=1, save_every=1
        ):
            raise InvalidParameter(
                f"`{self.out}` was begun with other settings", hint="name another folder, or the settings of its run.json"
            )
        if state.get("draft", now := self.model.config.to_json()) != now:
            raise InvalidParameter(f"`{self.out}` was begun with another draft network", hint="name another folder")
        self.model.load_state_dict(load_file(found[-1] / "model.safetensors"))
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(found[-1] / "optimizer.safetensors").items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.step, self.best = state["step"], state["best"]


def _groups(model: DFlashDraftModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _native_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "avx512_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
