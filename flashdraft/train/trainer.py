"""Stage 4: features -> a drafter. A visible loop on accelerate; every few steps the real tau, by really decoding.

Everything random is keyed by (seed, sample number), so that a resumed run sees what an undisturbed one would have seen, and
so that P processes with A micro-batches each see what one process with P * A sees.
"""

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flashdraft.bench.tasks import named
from flashdraft.engine import check
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter, first_line
from flashdraft.files import check_facts, locked, say, write_file, write_tensors
from flashdraft.generate import Model, Prompt
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.network import DraftNetwork
from flashdraft.process import FLOATS, INTS, undisturbed
from flashdraft.provenance import provenance
from flashdraft.train.batch import Batch, FlopCount, Pass, make_batch, why_no_anchor
from flashdraft.train.config import (
    TrainConfig,
    check_run_folder,
    full_disk_named,
    last_checkpoint,
    load_checkpoint,
    model_card,
    save_checkpoint,
)
from flashdraft.train.facts import target_facts
from flashdraft.train.features import Data, Sample
from flashdraft.train.objectives import Loss, accuracy, common_tokens
from flashdraft.train.rows import LeftOut
from flashdraft.types import SamplingParams

__all__ = ["Trainer", "process_device"]

_MEASURED = SamplingParams(max_new_tokens=128)  # the texts on which tau is measured
_WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
_COUNTED = 50  # steps between two whose FLOPs are counted
_NOT_OURS = tuple(
    f"ACCELERATE_USE_{name}" for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
)
_FREE = ("steps", "eval_every", "save_every", "tracker")  # what may change when a run goes on
Head = tuple[str, int] | None  # kind and rank of a sequential head to add


class Trainer:
    """One run in one folder: `checkpoints/`, `best/` (a drafter's folder), metrics.jsonl, tensorboard/, run.json."""

    @undisturbed
    def __init__(
        self,
        model: DraftNetwork,
        lm: Model,
        data: Data,
        out: Path,
        config: TrainConfig,
        *,
        head: Head = None,
    ) -> None:
        self.model, self.lm, self.data, self.out, self.config = (
            model,
            lm,
            data,
            out.absolute(),
            config,
        )
        self.target = lm.target
        self.origin = provenance() | {"config": asdict(config)}
        self.begun = check_run_folder(out)  # run.json of the run that goes on
        self.facts = target_facts(lm)
        self._check()
        self.step, self.positions, self.best, self.stopped = 0, 0, 0.0, 0
        self.flops, self.flops_a_step = (
            0.0,
            0.0,
        )  # of all steps, forward and backward; of the last step that was counted
        self.taus: list[tuple[int, float]] = []  # step and tau of every measurement
        native = (
            torch.cuda.is_bf16_supported()
            if torch.cuda.is_available()
            else torch.cpu._is_avx512_bf16_supported()
        )
        launched = _launched_precision(config)
        self.bf16 = "bf16" in (config.precision, launched) or (
            config.precision == "auto" and native
        )
        self.acc = _accelerator(config, out)
        self.coverage: float | None = (
            None  # share of the answers' tokens that the draft vocabulary has
        )
        self.vocabulary: Tensor | None = None  # where it is new
        vocabulary = self._draft_vocabulary()
        if head is not None:
            assert isinstance(model, DFlashDraftModel), "only dflash has a sequential head"
            if (held := model.config.sequential_head) is not None:
                raise InvalidParameter(
                    f"the drafter has a {held} head already", hint="leave out --head"
                )
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(config.seed)
                model.add_head(*head)
        if model.sequential_head is not None and self.acc.distributed_type == "FSDP":
            raise InvalidParameter(
                "a sequential head cannot be trained under FSDP",
                hint="use recipes/accelerate/ddp.yaml",
            )
        self.net: Any = Pass(model, self.target.embed)
        matrices, norms = (
            [p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False)
        )
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        self.optimizer: Any = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
        self.net, self.optimizer = self.acc.prepare(self.net, self.optimizer)
        self.loss = Loss(model, self.target, vocabulary, config, self.acc.device)
        self.average = (
            {n: p.detach().clone() for n, p in model.named_parameters()} if config.ema else {}
        )
        self.seconds: dict[str, float] = {}  # by part of a step, of all steps of this process
        self._orders: dict[int, Tensor] = {}  # of the samples, by epoch
        self._resume()

    def run(self, prompts: Sequence[Prompt], *, quiet: bool = False) -> float:
        """Train to the last step; returns the best tau measured on `prompts`, which are checked before the first one.

        SIGTERM and SIGINT write a checkpoint and leave with exit code 128 + signal; run it again to go on.
        """
        if not prompts:
            raise DataError("there are no prompts to measure tau on", hint="give held-out prompts")
        for number, prompt in enumerate(prompts, 1):
            with named(f"held-out prompt {number}"):
                check(self.target, self.lm.request(prompt, _MEASURED))
        self.data.check()
        inputs = {
            "target": self.facts["target"],
            "template": self.facts["template"],
            "data": self.data.identity,
        }
        inputs |= {
            "held_out": hashlib.sha256(json.dumps(list(prompts), default=str).encode()).hexdigest()[
                :16
            ]
        }
        self._check_inputs(inputs)
        self._tell_passed_over()
        lock = (
            locked(Path(os.path.realpath(self.out))) if self.acc.is_main_process else nullcontext()
        )
        with lock:
            return self._run(inputs, prompts, quiet=quiet)

    def _run(self, inputs: dict[str, Any], prompts: Sequence[Prompt], *, quiet: bool) -> float:
        main, config = self.acc.is_main_process, self.config
        if main:
            self._begin(inputs)
        self.acc.wait_for_everyone()
        self.acc.init_trackers("tensorboard", config=asdict(config))
        self.net.train()
        full = full_disk_named(self.out / "checkpoints", f"a file of `{self.out}`")
        with Progress(disable=quiet or not main) as bar, self._stoppable(), full:
            task = bar.add_task("train", total=config.steps, completed=self.step)
            while self.step < config.steps:
                started = time.perf_counter()
                with FlopCount() if self.step % _COUNTED == 0 else nullcontext() as counted:  # type: ignore[no-untyped-call]
                    figures = self.train_step()
                if counted is not None:  # the steps between are alike
                    self.flops_a_step = counted.total * self.acc.num_processes
                self.flops += self.flops_a_step
                figures["positions_per_second"] = figures["positions"] / (
                    time.perf_counter() - started
                )
                ended = self.step == config.steps
                if self.step % config.eval_every == 0 or ended:
                    weights = self._weights()  # of all processes
                    figures |= self.measure(weights, prompts) if main else {}
                self._log(figures)
                mine = torch.tensor([self.stopped], dtype=torch.int64, device=self.acc.device)
                stopped = max(self.acc.gather(mine).tolist())  # of any process
                if self.step % config.save_every == 0 or ended or stopped:
                    self._save()
                shares = " ".join(
                    f"{share:.2f}" for share in figures["accuracy"] if share is not None
                )
                told = f"loss {figures['loss']:.3f}  accuracy {shares}  accepted {figures['accepted']:.2f}"
                bar.update(task, advance=1, description=told)
                if stopped:
                    raise SystemExit(128 + stopped)
        self.acc.end_training()
        return self.best

    @undisturbed
    @torch.enable_grad()
    def train_step(self) -> dict[str, Any]:
        """One optimizer step. Raises FlashDraftError naming step and samples where loss or gradient is not finite."""
        c = self.config
        with self._timed("data"):
            batches = self._batches()
            weight, rows_seen = (
                sum(map(self.loss.weight, batches)),
                sum(len(b.offsets) for b in batches),
            )
            share = torch.tensor([float(weight), float(rows_seen)], **FLOATS)
            total, positions = self.acc.reduce(share.to(self.acc.device), "sum").tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * _schedule(self.step, c.steps, c.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        loss, rows, autocast = (
            0.0,
            [],
            torch.autocast(self.acc.device.type, dtype=torch.bfloat16, enabled=self.bf16),
        )
        for i, batch in enumerate(batches):
            with self.acc.no_sync(self.net) if i + 1 < len(batches) else nullcontext():
                with self._timed("forward"), autocast:
                    states = self.net(batch)
                with self._timed("loss"), autocast:
                    surrogate, part, figures = self.loss(states, batch, self.step)
                if len(bad := figures["row"][~figures["loss"].isfinite()]):
                    spans = zip(batch.numbers, batch.spans, strict=True)
                    raise self._not_finite(
                        "loss",
                        torch.nan,
                        [n for n, (*_, start, end) in spans if start <= int(bad[0]) < end],
                    )
                with self._timed("backward"):
                    self.acc.backward(surrogate * (self.acc.num_processes / total))
            loss += part / total
            rows.append(torch.stack([figures["hit"], batch.offsets[batch.labels >= 0].float()]))
        with self._timed("optimizer"):
            norm = self.acc.clip_grad_norm_(self.net.parameters(), c.clip)
            if not torch.isfinite(norm):
                raise self._not_finite(
                    "gradient's norm", float(norm), [n for b in batches for n in b.numbers]
                )
            self.optimizer.step()
            if self.average:
                current = [p.detach() for p in self.model.parameters()]
                get_ema_multi_avg_fn(c.ema)(list(self.average.values()), current, self.step)
        self.step, self.positions = self.step + 1, self.positions + int(positions)
        hits = self.acc.gather(
            self.acc.pad_across_processes(torch.cat(rows, 1).T.contiguous())
        )  # a pad's offset is 0
        loss = float(
            self.acc.reduce(torch.tensor(loss, dtype=torch.float32, device=self.acc.device), "sum")
        )
        whole = {"step": self.step, "loss": loss, "norm": float(norm), "positions": int(positions)}
        return whole | accuracy(hits[hits[:, 1] > 0], self.model.config.block_size)

    def measure(self, weights: dict[str, Tensor], prompts: Sequence[Prompt]) -> dict[str, Any]:
        """tau of the drafter with these weights, on held-out prompts; the best one is kept as a drafter's folder."""
        with torch.random.fork_rng(devices=[]):
            model = type(self.model)(self.model.config)
        model.load_state_dict(weights)
        model.extras = self.model.extras
        drafting = replace(self.lm, new_drafter=model.eval().drafters(self.target))
        results = drafting.generate(list(prompts), _MEASURED)
        tau = sum(result.stats.tau for result in results) / len(results)
        self.taus.append((self.step, tau))
        if tau > self.best:
            self.best = tau
            facts: dict[str, Any] = {
                "step": self.step,
                "positions_seen": self.positions,
                "flops": self.flops,
            }
            facts |= {"taus": self.taus, "num_prompts": len(prompts)}
            card = model_card(
                model.config, self.target.name, self.origin, facts, num_samples=len(self.data)
            )
            model.save_pretrained(self.out / "best", readme=card)
        return {"tau": tau}

    def _batches(self) -> list[Batch]:
        """This process's micro-batches of the step: number m of all processes' holds samples m * sequences and on."""
        c, device = self.config, self.acc.device
        numbers = [
            (self.step * c.accumulate + a) * self.acc.num_processes + self.acc.process_index
            for a in range(c.accumulate)
        ]
        samples = [self._samples(range(m * c.sequences, (m + 1) * c.sequences)) for m in numbers]
        options: Any = {
            "min_context": c.min_context,
            "flex": device if device.type == "cuda" else None,
        }
        return [
            make_batch(each, self.model.config, c.anchors, c.seed, **options).to(device)
            for each in samples
        ]

    def _begin(self, inputs: dict[str, Any]) -> None:
        """Write what says whose folder this is, and forget the steps behind the last checkpoint: they come again."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_file(
            self.out / "run.json", json.dumps(self.origin | {"inputs": inputs}, indent=2).encode()
        )
        if self.vocabulary is not None:
            write_tensors(self.out / "vocabulary.safetensors", {"tokens": self.vocabulary})
        log = self.out / "metrics.jsonl"
        if not log.exists():
            return
        kept = []
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
            if (
                line.endswith("\n") and json.loads(line)["step"] <= self.step
            ):  # a kill may cut the last one off
                kept.append(line)
        write_file(log, "".join(kept).encode())

    def _check_inputs(self, inputs: dict[str, Any]) -> None:
        """Raises DataError where the run that goes on was begun with another target, template, samples or held-out prompts."""
        if self.step == 0:
            return
        if "inputs" in self.begun:
            check_facts(
                self.out,
                self.begun["inputs"],
                inputs,
                "name another folder, or go on with what it was begun with",
            )
        elif self.acc.is_main_process:
            say(
                f"{self.out}: its run.json says nothing of its target and data; it goes on with these"
            )

    def _samples(self, numbers: Sequence[int]) -> list[tuple[int, Sample]]:
        """The samples of these numbers. If nothing can be learned from any of them, the next one from which something can."""
        places = {number: self._place(number) for number in numbers}
        if not any(self._is_usable[place] for place in places.values()):
            number = self._next_usable(numbers[0])
            places = {number: self._place(number)}
        return [(number, self.data[place]) for number, place in places.items()]

    @cached_property
    def _is_usable(self) -> list[bool]:
        """Of every sample: whether an anchor fits into it. The same on every process."""
        config = self.model.config
        return [
            not why_no_anchor(sizes, config, self.config.min_context) for sizes in self.data.sizes()
        ]

    def _next_usable(self, number: int) -> int:
        """The number in the same epoch that follows this one, round about, and whose sample is usable."""
        size = len(self.data)
        begin = number - number % size
        for step in range(1, size):
            other = begin + (number + step) % size
            if self._is_usable[self._place(other)]:
                return other
        raise self._nothing_usable()

    def _tell_passed_over(self) -> None:
        """Raises DataError where nothing can be learned from any sample."""
        if not any(self._is_usable):
            raise self._nothing_usable()
        if self.acc.is_main_process:
            self._passed_over().tell()

    def _passed_over(self) -> LeftOut:
        left_out = LeftOut("sample")
        for i, sizes in enumerate(self.data.sizes()):
            if why := why_no_anchor(sizes, self.model.config, self.config.min_context):
                left_out.add(self.data.describe(i), why)
        return left_out

    def _nothing_usable(self) -> DataError:
        hint = "regenerate longer answers, store more of them with --max-length, or lower --min-context"
        return DataError(
            f"nothing can be learned from `{self.data.name}`: {self._passed_over()}", hint=hint
        )

    def _check(self) -> None:
        data, config = self.data, self.model.config
        data.check_target(self.facts)
        data.only(config.target_layer_ids)
        if data.hidden_size != config.hidden_size:
            got = f"`{data.name}` holds layers {data.layers}, the drafter reads {config.target_layer_ids}"
            raise DataError(got, hint="run `flashdraft features` for this drafter")
        if self.config.kl + self.config.tv and not data.final:
            raise DataError(
                f"`{data.name}` holds no final states",
                hint="run `flashdraft features` with --soft-labels",
            )
        odd: list[str] = [
            name for name in ("embed_tokens.weight", "lm_head.weight") if name in self.model.extras
        ]
        odd += ["sliding_attention layers"] * ("sliding_attention" in config.layer_types)
        if odd:
            raise InvalidParameter(
                f"the drafter has {odd[0]}, which cannot be trained here",
                hint="start from random weights",
            )

    def _place(self, number: int) -> int:
        """Which sample of the set has this global number."""
        epoch, at = divmod(number, len(self.data))
        if epoch not in self._orders:
            generator = torch.Generator("cpu").manual_seed(
                (self.config.seed * 7919 + epoch) % 2**64
            )
            order = torch.randperm(len(self.data), generator=generator, **INTS)
            self._orders = {key: kept for key, kept in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = order
        return int(self._orders[epoch][at])

    def _draft_vocabulary(self) -> Tensor:
        """The tokens that are drafted: the answers' commonest ones when the run began."""
        size, path = self.target.vocab_size, self.out / "vocabulary.safetensors"
        if self.config.vocab == 0 or self.config.vocab >= size:
            return torch.arange(size, **INTS)
        goes_on = last_checkpoint(self.out / "checkpoints") is not None
        if goes_on and path.exists():
            tokens = load_file(path)["tokens"]
        else:
            tokens, self.coverage = common_tokens(self.data, self.config.vocab)
            self.vocabulary = tokens
        self.model.reduce_vocabulary(tokens)
        return tokens

    def _not_finite(self, what: str, value: float, numbers: list[int]) -> FlashDraftError:
        places = ", ".join(self.data.describe(self._place(n)) for n in numbers[:3])
        hint = "look at that data, or lower --lr; the last checkpoint is whole"
        return FlashDraftError(f"the {what} is {value} at step {self.step}, in {places}", hint=hint)

    def _weights(self) -> dict[str, Tensor]:
        """What is measured and kept: the weights or their moving average, whole, on every process."""
        if self.average:
            return {
                n: getattr(t, "full_tensor", lambda t=t: t)().cpu() for n, t in self.average.items()
            }
        whole: Any = dcp.get_model_state_dict(self.net, options=_WHOLE)
        return {name.removeprefix("model."): tensor for name, tensor in whole.items()}

    def _save(self) -> None:
        both: Any = dcp.get_state_dict(self.net, self.optimizer.optimizer, options=_WHOLE)
        model, optimizer = both
        flat = {
            f"{name}.{key}": value
            for name, entry in optimizer.get("state", {}).items()
            for key, value in entry.items()
        }
        groups = {"model": model, "optimizer": flat} | (
            {"average": self._weights()} if self.average else {}
        )
        held = {
            "best": self.best,
            "positions": self.positions,
            "taus": self.taus,
            "flops": [self.flops, self.flops_a_step],
        }
        if self.acc.is_main_process:
            settings = {"config": asdict(self.config), "draft": self.model.config.to_json()}
            save_checkpoint(self.out / "checkpoints", self.step, groups, held | settings)
        self.acc.wait_for_everyone()

    def _resume(self) -> None:
        if (path := last_checkpoint(self.out / "checkpoints")) is None:
            return
        groups, state = load_checkpoint(path)
        begun = state["config"]
        if differing := [
            name
            for name, value in asdict(self.config).items()
            if name not in _FREE and begun.get(name) != value
        ]:
            got = f"`{self.out}` was begun with {differing[0]} {begun.get(differing[0])}"
            raise InvalidParameter(got, hint="name another folder, or the settings of its run.json")
        if state["draft"] != self.model.config.to_json():
            raise InvalidParameter(
                f"`{self.out}` was begun with another draft network", hint="name another folder"
            )
        ours = self.net, self.optimizer.optimizer
        entries: dict[str, dict[str, Tensor]] = {}
        for name, value in groups["optimizer"].items():
            parameter, _, key = name.rpartition(".")
            entries.setdefault(parameter, {})[key] = value
        optimizer: Any = {
            "state": entries,
            "param_groups": dcp.get_optimizer_state_dict(*ours)["param_groups"],
        }
        if self.average:  # by way of the network, which knows how it is sharded
            average = {f"model.{name}": tensor for name, tensor in groups["average"].items()}
            dcp.set_model_state_dict(self.net, average, options=_WHOLE)
            self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        dcp.set_state_dict(
            *ours, model_state_dict=groups["model"], optim_state_dict=optimizer, options=_WHOLE
        )
        self.step, self.positions, self.best = state["step"], state["positions"], state["best"]
        self.flops, self.flops_a_step = state["flops"]
        self.taus = [(step, tau) for step, tau in state["taus"]]

    def _log(self, figures: dict[str, Any]) -> None:
        if self.acc.is_main_process:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
        scalars = {name: value for name, value in figures.items() if isinstance(value, float)}
        scalars |= {
            f"accuracy/{k}": value
            for k, value in enumerate(figures["accuracy"], 1)
            if value is not None
        }
        self.acc.log(scalars, step=figures["step"])

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGTERM and SIGINT let the step end; in another thread than the main one they are not ours to handle."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _frame: Any) -> None:
            self.stopped = number

        old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(
                    number, signal.SIG_DFL if handler is None else handler
                )  # None: not one of Python's


def _launched_precision(config: TrainConfig) -> str:
    """What `accelerate launch` asks for. Raises InvalidParameter where that is not what this run does."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() or "no"
    able = {"auto": ("no", "bf16"), "bf16": ("no", "bf16"), "fp32": ("no",)}[config.precision]
    if asked not in able:
        got = f"ACCELERATE_MIXED_PRECISION is {asked}, but precision is {config.precision}"
        raise InvalidParameter(
            got,
            hint="launch with --mixed_precision no: the run's own --precision, bf16 or fp32, decides",
        )
    return asked


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """Processes and devices are accelerate's; precision and accumulation are the run's own, whatever the environment says."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip() or "1"
    if steps not in ("1", str(config.accumulate)):
        got = f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, but accumulate is {config.accumulate}"
        raise InvalidParameter(
            got, hint=f"unset it, and give --accumulate {steps} if that is meant"
        )
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").strip()).lower() not in (
        "",
        "no",
    ):
        got = f"ACCELERATE_DYNAMO_BACKEND is {backend}, but training is not compiled here"
        raise InvalidParameter(got, hint="launch with --dynamo_backend no")
    for name in _NOT_OURS:
        if parse_flag_from_env(name):
            raise InvalidParameter(
                f"{name} is set, but training runs on one device, DDP or FSDP",
                hint="see recipes/accelerate",
            )

    own = GradientAccumulationPlugin(num_steps=1)
    trackers = sorted({"tensorboard", config.tracker})
    try:
        return Accelerator(
            mixed_precision="no",
            gradient_accumulation_plugin=own,
            log_with=trackers,
            project_dir=out,
        )
    except ValueError as error:  # the process has an Accelerator of another kind
        hint = "train in a process of its own, as `flashdraft train` does"
        raise FlashDraftError(
            f"accelerate cannot be set up: {first_line(error)}", hint=hint
        ) from None


def process_device() -> torch.device:
    """This process's, where accelerate has launched several."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # type: ignore[no-any-return]


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    rising = max(1, round(steps * warmup))
    falling = math.pi * max(0, step - rising) / max(1, steps - rising)
    return min((step + 1) / rising, 0.5 * (1 + math.cos(falling)))
