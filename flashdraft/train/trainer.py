"""Stage 4: features -> a drafter.

A visible loop on accelerate; every few steps it measures the real tau, by really decoding.
Everything random is keyed by (seed, sample number), so that a resumed run sees what an undisturbed
one would have seen, and so that P processes with A micro-batches each see what one process with
P * A sees. Does not know losses, masks or how a checkpoint becomes whole.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flashdraft.bench.tasks import named
from flashdraft.engine import check
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter, first_line
from flashdraft.files import check_facts, locked, say, write_file, write_tensors
from flashdraft.formats.written import json_of
from flashdraft.generate import Model, Prompt
from flashdraft.methods.network import DraftNetwork
from flashdraft.process import FLOATS, INTS, signals_told, undisturbed
from flashdraft.provenance import provenance
from flashdraft.train.batch import Batch, make_batch, why_no_anchor
from flashdraft.train.config import (
    Json,
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
from flashdraft.train.flops import FlopCount
from flashdraft.train.initialise import Head, check_trained, draft_only, with_head
from flashdraft.train.muon import has_native_bf16
from flashdraft.train.objectives import (
    Accuracy,
    CommonTokens,
    Figures,
    Loss,
    accuracy,
    common_tokens,
)
from flashdraft.train.optimizers import new_optimizers
from flashdraft.train.passes import Pass
from flashdraft.train.rows import LeftOut
from flashdraft.types import SamplingParams

__all__ = ["StepFigures", "Trainer", "process_device"]

_MEASURED = SamplingParams(max_new_tokens=128)  # the texts on which tau is measured
_WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
_COUNTED = 50  # steps between two whose FLOPs are counted
_NOT_OURS = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
_FREE = ("steps", "eval_every", "save_every", "tracker")  # what may change when a run goes on


class StepFigures(Accuracy):
    """What metrics.jsonl tells of one step."""

    step: int
    loss: float
    norm: float  # of the gradient, before it is clipped
    positions: int  # block rows of all processes
    positions_per_second: NotRequired[float]
    tau: NotRequired[float]  # where it was measured behind this step


class Trainer:
    """One run in one folder.

    It holds `checkpoints/`, `best/` (a drafter's folder), metrics.jsonl, tensorboard/, run.json.
    """

    @undisturbed
    def __init__(
        self,
        model: DraftNetwork,
        lm: Model,
        data: Data,
        out: Path,
        config: TrainConfig,
        *,
        head: Head | None = None,
    ) -> None:
        """head: a new one for the network, which is then a copy."""
        if head is not None:
            model = with_head(model, head, config.seed)
        self.model = model
        self.lm = lm
        self.target = lm.target
        self.data = data
        self.out = out.absolute()
        self.config = config
        self.origin = provenance() | {"config": asdict(config)}
        self.begun = check_run_folder(out)  # run.json of the run that goes on
        self.facts = target_facts(lm)
        self._check_data_and_model()

        self.step = 0
        self.positions = 0  # block rows of all steps
        self.best = 0.0  # the highest tau
        self.taus: list[tuple[int, float]] = []  # step and tau of every measurement
        self.flops = 0.0  # of all steps, forward and backward
        self.flops_a_step = 0.0  # of the last step that was counted
        self.stopped = 0  # the signal that this process got
        self.seconds: dict[str, float] = {}  # by part of a step, of all steps of this process
        self._orders: dict[int, Tensor] = {}  # of the samples, by epoch

        self.bf16 = _uses_bf16(config)
        self.acc = _accelerator(config, out)
        self.common: CommonTokens | None = None  # the draft vocabulary, if it was chosen here
        self.vocabulary: Tensor | None = None  # where it is new
        vocabulary = self._draft_vocabulary()
        if self.acc.distributed_type == "FSDP":
            _check_sharded(model, config)

        optimizers = new_optimizers(model, config)
        self.net: nn.Module
        self.optimizers: list[AcceleratedOptimizer]
        network = Pass(model, self.target.embed)
        self.net, *self.optimizers = self.acc.prepare(network, *optimizers)
        self.loss = Loss(model, self.target, vocabulary, config, self.acc.device)
        self.average: dict[str, Tensor] = {}  # of the weights, where it is asked for
        if config.ema:
            self.average = self._copied_parameters()
        self._resume()

    # The run.

    def run(self, prompts: Sequence[Prompt], *, quiet: bool = False) -> float:
        """Train to the last step; returns the best tau measured on `prompts`.

        They are checked before the first step. SIGTERM and SIGINT write a checkpoint and leave with
        exit code 128 + signal; run it again to go on.
        """
        if not prompts:
            raise DataError("there are no prompts to measure tau on", hint="give held-out prompts")
        for number, prompt in enumerate(prompts, 1):
            with named(f"held-out prompt {number}"):
                check(self.target, self.lm.request(prompt, _MEASURED))
        self.data.check()
        inputs = self._inputs(prompts)
        self._check_inputs(inputs)
        self._tell_passed_over()

        lock: AbstractContextManager[None] = nullcontext()
        if self.acc.is_main_process:
            lock = locked(Path(os.path.realpath(self.out)))
        with lock:
            return self._run(inputs, prompts, quiet=quiet)

    def _run(self, inputs: Json, prompts: Sequence[Prompt], *, quiet: bool) -> float:
        config = self.config
        is_main = self.acc.is_main_process
        if is_main:
            self._begin(inputs)
        self.acc.wait_for_everyone()
        self.acc.init_trackers("tensorboard", config=asdict(config))
        self.net.train()

        full_disk = full_disk_named(self.out / "checkpoints", f"a file of `{self.out}`")
        with Progress(disable=quiet or not is_main) as bar, signals_told(self._stop), full_disk:
            task = bar.add_task("train", total=config.steps, completed=self.step)
            while self.step < config.steps:
                figures = self._counted_step()

                is_last = self.step == config.steps
                if is_last or self.step % config.eval_every == 0:
                    weights = self._weights()  # all processes take part
                    if is_main:
                        figures["tau"] = self.measure(weights, prompts)
                self._log(figures)

                stopped = self._stopped_by()
                if is_last or stopped or self.step % config.save_every == 0:
                    self._save()
                bar.update(task, advance=1, description=_told(figures))
                if stopped:
                    raise SystemExit(128 + stopped)
        self.acc.end_training()
        return self.best

    def _counted_step(self) -> StepFigures:
        """One step and its rate. FLOPs are counted now and then: the steps between are alike."""
        started = time.perf_counter()
        if self.step % _COUNTED == 0:
            with FlopCount() as flops:  # type: ignore[no-untyped-call]
                figures = self.train_step()
            self.flops_a_step = flops.total * self.acc.num_processes
        else:
            figures = self.train_step()
        self.flops += self.flops_a_step
        figures["positions_per_second"] = figures["positions"] / (time.perf_counter() - started)
        return figures

    # A step.

    @undisturbed
    @torch.enable_grad()
    def train_step(self) -> StepFigures:
        """One optimizer step.

        Raises FlashDraftError naming step and samples where loss or gradient is not finite.
        """
        config = self.config
        with self._timed("data"):
            batches = self._batches()
            total, positions = self._totals(batches)
        rate = config.lr * _schedule(self.step, config.steps, config.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)

        loss = 0.0
        hits = []
        autocast = torch.autocast(self.acc.device.type, dtype=torch.bfloat16, enabled=self.bf16)
        for i, batch in enumerate(batches):
            is_last = i + 1 == len(batches)
            with nullcontext() if is_last else self.acc.no_sync(self.net):
                with self._timed("forward"), autocast:
                    states = self.net(batch)
                with self._timed("loss"), autocast:
                    surrogate, part, figures = self.loss(states, batch, self.step)
                self._check_losses(figures, batch)
                with self._timed("backward"):
                    self.acc.backward(surrogate * (self.acc.num_processes / total))
            loss += part / total
            hits.append(_hits(figures, batch))

        with self._timed("optimizer"):
            norm = self.acc.clip_grad_norm_(self.net.parameters(), config.clip)
            self._check_norm(norm, batches)
            for optimizer in self.optimizers:
                optimizer.step()
            self._update_average()
        self.step += 1
        self.positions += positions
        hits_of_all = self._gathered(torch.cat(hits))
        guessed = accuracy(hits_of_all, self.model.config.block_size)
        return {
            "step": self.step,
            "loss": self._summed(loss),
            "norm": float(norm),
            "positions": positions,
            "accuracy": guessed["accuracy"],
            "accepted": guessed["accepted"],
        }

    def _batches(self) -> list[Batch]:
        """This process's micro-batches of the step.

        Number m of all processes' holds the samples from m * sequences on.
        """
        config = self.config
        device = self.acc.device
        batches = []
        for micro_batch in range(config.accumulate):
            of_all_processes = self.step * config.accumulate + micro_batch
            number = of_all_processes * self.acc.num_processes + self.acc.process_index
            first = number * config.sequences
            batch = make_batch(
                self._samples(range(first, first + config.sequences)),
                self.model.config,
                config.anchors,
                config.seed,
                min_context=config.min_context,
                flex=device if device.type == "cuda" else None,
            )
            batches.append(batch.to(device))
        return batches

    def _totals(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Of all processes: what the loss is divided by, and the number of block rows."""
        weight = sum(self.loss.weight(batch) for batch in batches)
        num_rows = sum(len(batch.offsets) for batch in batches)
        own = torch.tensor([float(weight), float(num_rows)], **FLOATS)
        total, positions = self.acc.reduce(own.to(self.acc.device), "sum").tolist()
        return total, int(positions)

    def _check_losses(self, figures: Figures, batch: Batch) -> None:
        bad = figures["row"][~figures["loss"].isfinite()]
        if len(bad) == 0:
            return
        row = int(bad[0])
        for number, span in zip(batch.numbers, batch.spans, strict=True):
            if span.row_start <= row < span.row_end:
                raise self._not_finite("loss", math.nan, [number])

    def _check_norm(self, norm: Tensor, batches: Sequence[Batch]) -> None:
        if torch.isfinite(norm):
            return
        numbers = []
        for batch in batches:
            numbers += batch.numbers
        raise self._not_finite("gradient's norm", float(norm), numbers)

    def _not_finite(self, what: str, value: float, numbers: list[int]) -> FlashDraftError:
        places = ", ".join(self.data.describe(self._place(number)) for number in numbers[:3])
        hint = "look at that data, or lower --lr; the last checkpoint is whole"
        return FlashDraftError(f"the {what} is {value} at step {self.step}, in {places}", hint=hint)

    def _update_average(self) -> None:
        if not self.average:
            return
        current = [parameter.detach() for parameter in self.model.parameters()]
        update = get_ema_multi_avg_fn(self.config.ema)
        update(list(self.average.values()), current, self.step)

    def _gathered(self, hits: Tensor) -> Tensor:
        """The rows [n, 2] of all processes."""
        padded = self.acc.gather(self.acc.pad_across_processes(hits))
        gathered: Tensor = padded[padded[:, 1] > 0]  # a pad's offset is 0
        return gathered

    def _summed(self, loss: float) -> float:
        """Over all processes."""
        own = torch.tensor(loss, dtype=torch.float32, device=self.acc.device)
        return float(self.acc.reduce(own, "sum"))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    # Which samples a step sees.

    def _samples(self, numbers: Sequence[int]) -> list[tuple[int, Sample]]:
        """The samples of these numbers, with them.

        If nothing can be learned from any of them, the next one from which something can.
        """
        places = {number: self._place(number) for number in numbers}
        if not any(self._is_usable[place] for place in places.values()):
            number = self._next_usable(numbers[0])
            places = {number: self._place(number)}
        return [(number, self.data[place]) for number, place in places.items()]

    def _place(self, number: int) -> int:
        """Which sample of the set has this global number."""
        epoch, at = divmod(number, len(self.data))
        return int(self._order(epoch)[at])

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            seed = (self.config.seed * 7919 + epoch) % 2**64
            generator = torch.Generator("cpu").manual_seed(seed)
            order = torch.randperm(len(self.data), generator=generator, **INTS)
            kept = {epoch: order}
            if epoch - 1 in self._orders:  # a step may lie in two epochs
                kept[epoch - 1] = self._orders[epoch - 1]
            self._orders = kept
        return self._orders[epoch]

    @cached_property
    def _is_usable(self) -> list[bool]:
        """Of every sample: whether an anchor fits into it. The same on every process."""
        return [not why for why in self._why_unusable()]

    def _why_unusable(self) -> list[str]:
        """Of every sample: why no anchor fits into it; empty where one does."""
        config = self.model.config
        min_context = self.config.min_context
        return [why_no_anchor(sizes, config, min_context) for sizes in self.data.sizes()]

    def _next_usable(self, number: int) -> int:
        """The number in the same epoch that follows this one, round about, with a usable sample."""
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
        for i, why in enumerate(self._why_unusable()):
            if why:
                left_out.add(self.data.describe(i), why)
        return left_out

    def _nothing_usable(self) -> DataError:
        got = f"nothing can be learned from `{self.data.name}`: {self._passed_over()}"
        more = "store more of them with --max-length, or lower --min-context"
        return DataError(got, hint=f"regenerate longer answers, {more}")

    # tau.

    def measure(self, weights: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> float:
        """tau of the drafter with these weights, on held-out prompts.

        The best one is kept as a drafter's folder.
        """
        with torch.random.fork_rng(devices=[]):
            model = type(self.model)(self.model.config)
        model.load_state_dict(weights)
        model.extras = self.model.extras
        drafting = replace(self.lm, new_drafter=model.eval().drafters(self.target))
        results = drafting.generate(list(prompts), _MEASURED)
        tau = float(sum(result.stats.tau for result in results) / len(results))
        self.taus.append((self.step, tau))
        if tau > self.best:
            self.best = tau
            card = self._card(len(prompts))
            model.save_pretrained(self.out / "best", readme=card)
        return tau

    def _card(self, num_prompts: int) -> str:
        figures = {
            "step": self.step,
            "positions_seen": self.positions,
            "flops": self.flops,
            "taus": self.taus,
            "num_prompts": num_prompts,
        }
        target = self.target.name
        num_samples = len(self.data)
        config = self.model.config
        return model_card(config, target, self.origin, figures, num_samples=num_samples)

    def _weights(self) -> dict[str, Tensor]:
        """What is measured and kept, whole, on every process: the weights or their average."""
        if self.average:
            return {name: _whole(tensor) for name, tensor in self.average.items()}
        state: Any = dcp.get_model_state_dict(self.net, options=_WHOLE)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    # The run's folder.

    def _check_data_and_model(self) -> None:
        data = self.data
        config = self.model.config
        data.check_target(self.facts)
        data.only(config.target_layer_ids)
        if data.hidden_size != config.hidden_size:
            held = f"`{data.name}` holds layers {data.layers}"
            got = f"{held}, the drafter reads {config.target_layer_ids}"
            raise DataError(got, hint="run `flashdraft features` for this drafter")
        if self.config.kl + self.config.tv and not data.final:
            got = f"`{data.name}` holds no final states"
            raise DataError(got, hint="run `flashdraft features` with --soft-labels")

        check_trained(self.model)
        for name in ("embed_tokens.weight", "lm_head.weight"):
            if name in self.model.extras:
                got = f"the drafter has {name}, which cannot be trained here"
                raise InvalidParameter(got, hint="start from random weights")

    def _inputs(self, prompts: Sequence[Prompt]) -> Json:
        """What the run is made of, as run.json holds it."""
        held_out = json.dumps(list(prompts), default=str).encode()
        return {
            "target": self.facts["target"],
            "template": self.facts["template"],
            "data": self.data.identity,
            "held_out": hashlib.sha256(held_out).hexdigest()[:16],
        }

    def _check_inputs(self, inputs: Json) -> None:
        """Raises DataError where the run that goes on was begun with other inputs.

        That is with another target, template, samples or held-out prompts.
        """
        if self.step == 0:
            return
        if "inputs" in self.begun:
            hint = "name another folder, or go on with what it was begun with"
            check_facts(self.out, self.begun["inputs"], inputs, hint)
        elif self.acc.is_main_process:
            unknown = "its run.json says nothing of its target and data"
            say(f"{self.out}: {unknown}; it goes on with these")

    def _begin(self, inputs: Json) -> None:
        """Write what says whose folder this is, and forget the steps behind the last checkpoint.

        They come again.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        run = self.origin | {"inputs": inputs}
        write_file(self.out / "run.json", json.dumps(run, indent=2).encode())
        if self.vocabulary is not None:
            write_tensors(self.out / "vocabulary.safetensors", {"tokens": self.vocabulary})

        log = self.out / "metrics.jsonl"
        if not log.exists():
            return
        kept = []
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
            is_whole = line.endswith("\n")  # a kill may cut the last one off
            if is_whole and json.loads(line)["step"] <= self.step:
                kept.append(line)
        write_file(log, "".join(kept).encode())

    def _draft_vocabulary(self) -> Tensor:
        """The tokens that are drafted: the answers' commonest ones when the run began."""
        vocab_size = self.target.vocab_size
        if self.config.vocab == 0 or self.config.vocab >= vocab_size:
            draft_only(self.model, None)
            return torch.arange(vocab_size, **INTS)

        path = self.out / "vocabulary.safetensors"
        goes_on = last_checkpoint(self.out / "checkpoints") is not None
        if goes_on and path.exists():
            tokens = load_file(path)["tokens"]
        else:
            self.common = common_tokens(self.data, self.config.vocab)
            tokens = self.common.tokens
            self.vocabulary = tokens
        draft_only(self.model, tokens)
        return tokens

    def _save(self) -> None:
        """A checkpoint; all processes take part."""
        model: Any
        optimizer: Any
        optimizers = self._own_optimizers()
        model, optimizer = dcp.get_state_dict(self.net, optimizers, options=_WHOLE)
        groups = {"model": model, "optimizer": _flattened(optimizer.get("state", {}))}
        if self.average:
            groups["average"] = self._weights()
        if self.acc.is_main_process:
            state = {
                "best": self.best,
                "positions": self.positions,
                "taus": self.taus,
                "flops": [self.flops, self.flops_a_step],
                "config": asdict(self.config),
                "draft": json_of(self.model.config),
            }
            save_checkpoint(self.out / "checkpoints", self.step, groups, state)
        self.acc.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from the folder's last checkpoint, if it has one."""
        path = last_checkpoint(self.out / "checkpoints")
        if path is None:
            return
        groups, state = load_checkpoint(path)
        self._check_same_run(state)
        self._load(groups)
        self.step = state["step"]
        self.positions = state["positions"]
        self.best = state["best"]
        self.flops, self.flops_a_step = state["flops"]
        self.taus = [(step, tau) for step, tau in state["taus"]]

    def _check_same_run(self, state: Json) -> None:
        begun = {"optimizer": "adamw"} | state["config"]  # all that there was
        for name, value in asdict(self.config).items():
            if name not in _FREE and begun.get(name) != value:
                got = f"`{self.out}` was begun with {name} {begun.get(name)}"
                hint = "name another folder, or the settings of its run.json"
                raise InvalidParameter(got, hint=hint)
        if state["draft"] != json_of(self.model.config):
            got = f"`{self.out}` was begun with another draft network"
            raise InvalidParameter(got, hint="name another folder")

    def _load(self, groups: Mapping[str, dict[str, Any]]) -> None:
        """groups: a checkpoint's tensors by name."""
        if self.average:  # by way of the network, which knows how it is sharded
            average = {f"model.{name}": tensor for name, tensor in groups["average"].items()}
            dcp.set_model_state_dict(self.net, average, options=_WHOLE)
            self.average = self._copied_parameters()

        optimizers = self._own_optimizers()
        settings = dcp.get_optimizer_state_dict(self.net, optimizers)["param_groups"]
        state: Any = {"state": _nested(groups["optimizer"]), "param_groups": settings}
        dcp.set_state_dict(
            self.net,
            optimizers,
            model_state_dict=groups["model"],
            optim_state_dict=state,
            options=_WHOLE,
        )

    def _own_optimizers(self) -> list[Optimizer]:
        """Without accelerate's wrappers."""
        return [optimizer.optimizer for optimizer in self.optimizers]

    def _copied_parameters(self) -> dict[str, Tensor]:
        parameters = self.model.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in parameters}

    def _log(self, figures: StepFigures) -> None:
        if self.acc.is_main_process:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")

        scalars = {}
        for name, value in figures.items():
            if isinstance(value, float):
                scalars[name] = value
        for k, share in enumerate(figures["accuracy"], 1):
            if share is not None:
                scalars[f"accuracy/{k}"] = share
        self.acc.log(scalars, step=figures["step"])

    # Signals.

    def _stop(self, number: int) -> None:
        """The step ends first."""
        self.stopped = number

    def _stopped_by(self) -> int:
        """The signal that any of the processes got; 0: none."""
        own = torch.tensor([self.stopped], dtype=torch.int64, device=self.acc.device)
        return int(max(self.acc.gather(own).tolist()))


def _check_sharded(model: DraftNetwork, config: TrainConfig) -> None:
    """Raises InvalidParameter for what FSDP cannot shard."""
    hint = "use recipes/accelerate/ddp.yaml, or {}"
    if model.config.sequential_head is not None:
        got = "a sequential head cannot be trained under FSDP"
        raise InvalidParameter(got, hint=hint.format("--head none"))
    if config.optimizer == "muon":  # it would orthogonalise each shard by itself
        got = "Muon needs whole matrices, which FSDP shards"
        raise InvalidParameter(got, hint=hint.format("--optimizer adamw"))


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    rising = max(1, round(steps * warmup))
    falling = math.pi * max(0, step - rising) / max(1, steps - rising)
    return min((step + 1) / rising, 0.5 * (1 + math.cos(falling)))


def _hits(figures: Figures, batch: Batch) -> Tensor:
    """Of every labelled row: whether it was guessed, and its offset [n, 2]."""
    offsets = batch.offsets[batch.labels >= 0].float()
    return torch.stack([figures["hit"], offsets], dim=1)


def _told(figures: StepFigures) -> str:
    shares = [f"{share:.2f}" for share in figures["accuracy"] if share is not None]
    loss = f"loss {figures['loss']:.3f}"
    return f"{loss}  accuracy {' '.join(shares)}  accepted {figures['accepted']:.2f}"


def _whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU; all of it, also where it is sharded."""
    full_tensor = getattr(tensor, "full_tensor", None)
    if full_tensor is not None:
        tensor = full_tensor()
    return tensor.cpu()


def _flattened(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """An optimizer's state by parameter and key -> by `parameter.key`, as a file holds it."""
    flat = {}
    for parameter, entry in state.items():
        for key, value in entry.items():
            flat[f"{parameter}.{key}"] = value
    return flat


def _nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `_flattened` was given."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(parameter, {})[key] = value
    return state


# Accelerate's settings.


def _uses_bf16(config: TrainConfig) -> bool:
    launched = _launched_precision(config)
    if config.precision == "bf16" or launched == "bf16":
        return True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return config.precision == "auto" and has_native_bf16(device)


def _launched_precision(config: TrainConfig) -> str:
    """What `accelerate launch` asks for.

    Raises InvalidParameter where that is not what this run does.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() or "no"
    able = ("no",) if config.precision == "fp32" else ("no", "bf16")
    if asked not in able:
        got = f"ACCELERATE_MIXED_PRECISION is {asked}, but precision is {config.precision}"
        decides = "the run's own --precision, bf16 or fp32, decides"
        raise InvalidParameter(got, hint=f"launch with --mixed_precision no: {decides}")
    return asked


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """Processes and devices are accelerate's.

    Precision and accumulation are the run's own, whatever the environment says.
    """
    _check_environment(config)
    try:
        return Accelerator(
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=sorted({"tensorboard", config.tracker}),
            project_dir=out,
        )
    except ValueError as error:  # the process has an Accelerator of another kind
        got = f"accelerate cannot be set up: {first_line(error)}"
        hint = "train in a process of its own, as `flashdraft train` does"
        raise FlashDraftError(got, hint=hint) from None


def _check_environment(config: TrainConfig) -> None:
    """Raises InvalidParameter where `accelerate launch` asks for what this run does not do."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip() or "1"
    if steps not in ("1", str(config.accumulate)):
        asked = f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}"
        hint = f"unset it, and give --accumulate {steps} if that is meant"
        raise InvalidParameter(f"{asked}, but accumulate is {config.accumulate}", hint=hint)

    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").strip()
    if backend.lower() not in ("", "no"):
        got = f"ACCELERATE_DYNAMO_BACKEND is {backend}, but training is not compiled here"
        raise InvalidParameter(got, hint="launch with --dynamo_backend no")

    for name in _NOT_OURS:
        if parse_flag_from_env(name):
            got = f"{name} is set, but training runs on one device, DDP or FSDP"
            raise InvalidParameter(got, hint="see recipes/accelerate")


def process_device() -> torch.device:
    """This process's, where accelerate has launched several."""
    device: torch.device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    return device
