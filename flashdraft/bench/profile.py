"""What is measured on this machine: where a step's time and the memory go, and the CPU as a Device
of roofline.py.

Real steps of the engine, with clocks around the lean target's linears, its attention, its head and
the drafter. Knows the parts of these; does not know prompts or results files.
"""

import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashdraft import hub
from flashdraft.bench.roofline import BYTES, Device
from flashdraft.engine import Engine
from flashdraft.errors import InvalidParameter, UnsupportedTarget
from flashdraft.generate import Model
from flashdraft.loading import MOST_NODES, drafters, load
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.models import native
from flashdraft.models.lean import LeanTarget
from flashdraft.process import FLOATS, INTS, undisturbed
from flashdraft.train.flops import FlopCount
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.types import COUNTS, Allowed, Drafter, SamplingParams, check_option

if TYPE_CHECKING:
    from flashdraft.train.trainer import Trainer

__all__ = ["PARTS", "Profile", "calibrate", "profile", "profile_training"]

PARTS = ("weights", "attention", "lm_head", "drafting", "host")
_WARM_UP = 3  # steps before the measured ones


# --- a decoding step ----------------------------------------------------------------------------


class Profile(NamedTuple):
    """Of one number of nodes: median milliseconds by part, and bytes by what holds them."""

    milliseconds: dict[str, float]
    nbytes: dict[str, int]


def profile(
    target: str,
    *,
    draft: str = "auto",
    nodes: int = 8,
    context: int = 256,
    steps: int = 20,
    kernel: str = "auto",
) -> Profile:
    """Measure steps behind `context` tokens; one node is plain decoding.

    An untrained drafter stands in where none is shipped. Raises UnsupportedTarget for a target or
    kernel whose parts cannot be timed, InvalidParameter for a context that leaves no room.
    """
    check_option("nodes", nodes, int, Allowed(1, MOST_NODES))
    check_option("context", context, int, COUNTS)
    check_option("steps", steps, int, COUNTS)
    model = load(target, draft="autoregressive", kernel=kernel)
    lean = model.target
    if not isinstance(lean, LeanTarget) or kernel == "compiled":
        raise UnsupportedTarget(
            f"`{target}` runs by {lean.kernel}, which has no parts to time",
            hint="profile a llama",
        )
    _check_room(lean, target, nodes, context, steps)

    drafter = _profiled_drafter(model, target, draft, nodes)
    engine = Engine(lean, drafter)
    generator = torch.Generator("cpu").manual_seed(0)
    prompt = torch.randint(lean.vocab_size, (context,), generator=generator, **INTS).tolist()
    most = (steps + _WARM_UP + 1) * nodes + nodes
    params = SamplingParams(max_new_tokens=most, ignore_eos=True)
    engine.submit(model.request(prompt, params))
    engine.step()
    times = _times(engine, lean, steps)

    milliseconds = {}
    for part in PARTS:
        milliseconds[part] = 1000 * median(step[part] for step in times)
    drafter_cache = sum(cache.nbytes for cache in drafter.caches)
    nbytes = {
        "weights": lean.nbytes,
        "cache": engine.cache_nbytes - drafter_cache,
        "drafter weights": _weights_of(drafter),
        "drafter cache": drafter_cache,
    }
    return Profile(milliseconds, nbytes)


def _check_room(target: LeanTarget, name: str, nodes: int, context: int, steps: int) -> None:
    """Raises InvalidParameter where context and all steps are more than the target holds."""
    room = target.context_length - (steps + _WARM_UP + 2) * nodes
    if context <= room:
        return
    hint = "ask for fewer steps or nodes"
    if room > 0:
        hint = f"context must be at most {room} for that"
    raise InvalidParameter(
        f"context is {context}, but {steps} steps of {nodes} nodes behind it need more than "
        f"`{name}` holds",
        hint=hint,
        option="context",
    )


def _profiled_drafter(model: Model, target: str, draft: str, nodes: int) -> Drafter:
    if nodes == 1:
        return Autoregressive()
    if draft != "auto" or hub.builtin_draft(target) is not None:
        return drafters(draft, model.target, target, nodes, tokenizer=model.tokenizer)()

    most = max(model.target.num_layers - 3, 1)
    config = draft_config(
        model.target, num_layers=min(3, most), num_features=min(5, most), mask_token_id=0
    )
    untrained = random_weights(config, 0)
    return untrained.drafters(model.target)(block_size=nodes)


def _weights_of(drafter: Drafter) -> int:
    """Bytes of its network, or of all networks where several drafters are joined."""
    nbytes = 0
    for part in getattr(drafter, "drafters", (drafter,)):
        if hasattr(part, "network"):
            nbytes += part.network.nbytes
    return nbytes


def _times(engine: Engine, target: LeanTarget, steps: int) -> list[dict[str, float]]:
    """Seconds by part of every step after the warm-up.

    The engine and its target stay wrapped: they are not used again.
    """
    clock = _Clock()
    decoder = target.decoder
    _wrap(engine, target, clock)
    times = []
    for step in range(_WARM_UP + steps):
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started

        if decoder.seconds is not None:  # what a native pass says of itself
            weights, attention, _ = decoder.seconds.tolist()
            clock.seconds["weights"] = weights
            clock.seconds["attention"] = attention
            decoder.seconds.zero_()
        clock.seconds["host"] = seconds - sum(clock.seconds.values())
        if step >= _WARM_UP:
            times.append(clock.seconds)
    return times


def _wrap(engine: Engine, target: LeanTarget, clock: "_Clock") -> None:
    """Put the clock around the parts of a step; a native decoder has clocks of its own."""
    decoder = target.decoder
    if decoder.kernel == "torch":
        for linears in decoder.linears:
            for name, linear in linears.items():
                linears[name] = clock.wrap("weights", linear)
        decoder.attention = clock.wrap("attention", decoder.attention)
    else:
        decoder.seconds = torch.zeros(3, dtype=torch.float64, device="cpu")
    target.head = clock.wrap("lm_head", target.head)
    for name in ("propose", "observe"):
        method = getattr(engine.drafter, name)
        setattr(engine.drafter, name, clock.wrap("drafting", method))


class _Clock:
    """Adds up the time inside wrapped calls; one inside another one counts for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # by part
        self.is_running = False

    def wrap(self, part: str, call: Callable[..., object]) -> Any:
        """What can stand where `call` stood, whose type may be a class with more to it."""

        def timed(*args: object, **options: object) -> object:
            if self.is_running:
                return call(*args, **options)
            self.is_running = True
            started = time.perf_counter()
            result = call(*args, **options)
            self.seconds[part] += time.perf_counter() - started
            self.is_running = False
            return result

        return timed


# --- a training step ----------------------------------------------------------------------------


def profile_training(trainer: "Trainer", steps: int) -> list[list[str]]:
    """Rows (part, milliseconds a step, share): where `steps` of a Trainer go.

    Then its rate in block positions a second, and the share of the machine's matmul rate.
    """
    # the first step builds kernels: its FLOPs are counted, its time is not
    with FlopCount() as flops:  # type: ignore[no-untyped-call]
        trainer.train_step()
    trainer.seconds.clear()

    positions = 0.0
    started = time.perf_counter()
    for _ in range(steps):
        positions += trainer.train_step()["positions"]
    seconds = time.perf_counter() - started

    parts = dict(trainer.seconds)
    parts["other"] = seconds - sum(parts.values())
    rows = []
    for part, spent in parts.items():
        rows.append([part, f"{1000 * spent / steps:.1f}", f"{spent / seconds:.0%}"])
    rows.append(["step", f"{1000 * seconds / steps:.1f}", "100%"])
    rows.append([f"{positions / seconds:.0f} positions/s", "", ""])
    share = flops.total * steps / seconds / _matmul_rate()
    rows.append([f"{share:.0%} of the float32 matmul rate", "", ""])
    rows.append([f"{flops.total / 1e12:.4f} TFLOP a step", "", ""])
    return rows


def _matmul_rate() -> float:
    """FLOP/s of a float32 product of 1024 x 1024 matrices, at its best of five."""
    x = torch.ones(1024, 1024, **FLOATS)
    best = min(timeit.repeat(lambda: x @ x, number=1))
    return 2 * 1024**3 / best


# --- the machine --------------------------------------------------------------------------------


@undisturbed
def calibrate(weights: str) -> tuple[Device, Device]:
    """What runs a target with weights of that format, and drafts in 8 bits; takes seconds.

    Raises UnsupportedTarget where the C++ kernels do not run.
    """
    if not native.usable(torch.zeros(1, **FLOATS)):
        raise UnsupportedTarget(
            "the C++ kernels do not run on this machine",
            hint="install g++ or clang++, or name a GPU",
        )

    bandwidth = _bandwidth()
    target = _tiny_target()
    # as deep as the target, so that a pass of it costs as much: what is left is the round's own
    untrained = random_weights(draft_config(target, num_layers=8, mask_token_id=0), 0)
    plain = _step_seconds(target, Autoregressive)
    drafted = _step_seconds(target, untrained.drafters(target))
    device = Device(
        bandwidth=bandwidth,
        rates=_rates(weights),
        weight=BYTES[weights],
        cached=4.0,
        layer=0.0,
        host=plain,
        round=max(drafted - 2 * plain, 0.0),
    )
    return device, replace(device, rates=_rates("int8"), weight=BYTES["int8"])


def _bandwidth() -> float:
    """Bytes/s at which weights are read that lie in no cache: 128 MiB, the best of eight times."""
    large = native.NativeLinear(torch.zeros(1 << 15, 1024, **FLOATS), kernel="float32")
    one_token = torch.ones(1, 1024, **FLOATS)
    times = timeit.repeat(partial(large, one_token), number=1, repeat=8)
    return large.nbytes / min(times)


def _rates(kernel: str) -> dict[int, float]:
    """FLOP/s by number of tokens, on a matrix that stays in the cache; zeros fit every format."""
    linear = native.NativeLinear(torch.zeros(1536, 576, **FLOATS), kernel=kernel)
    rates = {}
    for width in (1, 2, 4, 8, 16, 32):
        tokens = torch.ones(width, 576, **FLOATS)
        seconds = min(timeit.repeat(partial(linear, tokens), number=1, repeat=60))
        rates[width] = 2 * width * 1536 * 576 / seconds
    return rates


def _tiny_target() -> LeanTarget:
    """Of eight layers whose arithmetic costs next to nothing: a step of it is overhead."""
    sizes = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        vocab_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
    )
    with torch.random.fork_rng(devices=[]):
        tiny = LlamaForCausalLM(sizes).float().eval()
    return LeanTarget(tiny, "tiny", kernel="float32")


def _step_seconds(target: LeanTarget, new_drafter: Callable[[], Drafter]) -> float:
    """Of a decoding step, in the best of 20 texts of 24 tokens."""
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "a" * len(ids))
    model = Model(target, tokenizer, new_drafter, eos=frozenset(), max_rows=1)
    times: list[float] = []
    for _ in range(20):
        stats = model.generate([1] * 8, max_new_tokens=24).stats
        times.append(stats.decode_seconds / stats.target_passes)
    return min(times)
