"""The C++ kernels: every format against torch, the bits of a row in any company, trees included,
and what they cannot do.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPE, tiny_model
from test_convolutions import far_from_definition
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from flashdraft.decoding.tree import ancestors
from flashdraft.errors import InvalidParameter
from flashdraft.models import native
from flashdraft.models.heads import SwigluHead
from flashdraft.models.hf import HFTarget
from flashdraft.models.layers import TorchLinear, pack
from flashdraft.models.lean import LeanTarget, fastest
from flashdraft.models.native import NativeLinear
from flashdraft.process import num_threads, serial

pytestmark = pytest.mark.alone

EXACT = ("float32", "bfloat16", "q8", "q4")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**{**SHAPE, **SIZES}),
    "llama with biases": lambda: LlamaConfig(
        **{**SHAPE, **SIZES}, attention_bias=True, mlp_bias=True
    ),
    "llama, one key head": lambda: LlamaConfig(**{**SHAPE, **SIZES, "num_key_value_heads": 1}),
    "qwen2": lambda: Qwen2Config(**{**SHAPE, **SIZES}),
    "qwen3": lambda: Qwen3Config(**{**SHAPE, **SIZES}),
}


def test_the_kernels_are_here() -> None:
    assert native._compiler(), "the tests need a C++ compiler: g++ or clang++"
    assert native.library() is not None


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_for(format: str, outputs: int, inputs: int) -> Tensor:
    """A weight that the format holds exactly."""
    weight = noise(outputs, inputs) * inputs**-0.5
    if format == "bfloat16":
        return weight.bfloat16().float()
    blocks = weight.view(outputs, -1, 32)
    if format == "q8":
        d = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        q = (blocks / d).round()
        q[..., 0] = 127
        return (q * d).view(outputs, inputs)
    if format == "q4":
        low = blocks.amin(-1, keepdim=True).half().float()
        d = ((blocks.amax(-1, keepdim=True) - low) / 15).half().float()
        q = ((blocks - low) / d).round().clamp(0, 15)
        q[..., 0], q[..., 1] = 0, 15
        return (q * d + low).view(outputs, inputs)
    return weight


@pytest.mark.parametrize("format", EXACT)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (50, 96), (32, 160)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_exact_format_multiplies_like_torch_and_alike(
    format: str, outputs: int, inputs: int, biased: bool
) -> None:
    weight, bias, x = (
        weight_for(format, outputs, inputs),
        noise(outputs, seed=1) if biased else None,
        noise(37, inputs, seed=2),
    )
    linear = NativeLinear(weight, bias, kernel=format)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert torch.allclose(linear(x).double(), wanted, atol=1e-5)
    assert torch.equal(linear(x), NativeLinear(weight, bias, kernel="float32")(x))
    for count in range(1, 38):
        assert torch.equal(linear(x[:count]), linear(x)[:count])
        assert torch.equal(linear(x[-count:]), linear(x)[-count:])


@pytest.mark.parametrize("format", EXACT[1:])
def test_a_format_refuses_what_it_would_round(format: str) -> None:
    weight = weight_for(format, 64, 64)
    NativeLinear(weight, kernel=format)
    weight[5, 7] += 2.0**-22
    with pytest.raises(ValueError, match="does not hold this weight"):
        NativeLinear(weight, kernel=format)


def test_compact_takes_the_fewest_bytes_that_are_exact() -> None:
    found = {format: NativeLinear(weight_for(format, 64, 64)).format for format in EXACT}
    assert found == {format: format for format in EXACT}
    sizes = [NativeLinear(weight_for(format, 64, 64), kernel=format).nbytes for format in EXACT]
    assert sizes == sorted(sizes, reverse=True)
    assert NativeLinear(torch.zeros(64, 64)).format == "q4"
    assert (
        NativeLinear(weight_for("q4", 64, 64)[:, :40].contiguous()).format == "float32"
    )  # no whole blocks


@pytest.mark.parametrize("size", [127 * 65536.0, -65536.0])
def test_a_scale_or_a_minimum_that_is_no_float16_is_refused(size: float) -> None:
    weight = torch.full((32, 32), size)  # which q8 and q4 would hold, if float16 reached 65536
    linear = NativeLinear(weight)
    assert linear.format == "bfloat16"
    x = torch.ones(1, 32)
    assert torch.equal(linear(x), x @ weight.T)


def test_int8_rounds_weights_by_output_and_rows_by_blocks_of_32() -> None:
    weight, x = noise(50, 64), noise(21, 64, seed=1) * torch.logspace(-3, 3, 21)[:, None]
    x[:, 40] *= 100  # what stands out costs its own block its bits, and no other
    linear = NativeLinear(weight, noise(50, seed=2), kernel="int8")
    scale, blocks = weight.abs().amax(1, keepdim=True) / 127, x.unflatten(1, (2, 32))
    own = blocks.abs().amax(2, keepdim=True) / 127
    rounded = ((blocks / own).round().double() * own).flatten(1)
    wanted = rounded @ ((weight / scale).round().double() * scale).T + noise(50, seed=2).double()
    assert torch.allclose(linear(x).double(), wanted, rtol=1e-4, atol=1e-4)
    for count in range(1, 22):
        assert torch.equal(linear(x[:count]), linear(x)[:count])
    assert bool((linear(torch.zeros(1, 64)) == noise(50, seed=2)).all())


@pytest.mark.parametrize("hidden", [40, 576])
def test_a_sequential_head_goes_from_left_to_right(hidden: int) -> None:
    torch.manual_seed(0)
    head, tables = SwigluHead(hidden, 24), (noise(90, hidden), noise(90, hidden, seed=1))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states, anchors = noise(3, 5, hidden, seed=2), noise(3, hidden, seed=3)
    ids = torch.stack([torch.randperm(90)[:16] for _ in range(15)]).view(3, 5, 16)
    weights = head.gate_up.weight.detach(), head.down.weight.detach()
    laws = native.chain(states, anchors, (*tables, *weights), ids)
    previous = anchors
    with torch.no_grad():
        for k in range(5):
            logits = (tables[0][ids[:, k]] @ head(states[:, k], previous)[..., None])[..., 0]
            assert torch.allclose(laws[:, k], logits.log_softmax(-1), rtol=1e-4, atol=1e-2)
            previous = tables[1][ids[:, k].gather(1, logits.argmax(-1, keepdim=True))[:, 0]]
    assert not torch.allclose(
        native.chain(states, anchors.roll(1, 0), (*tables, *weights), ids), laws, atol=1e-2
    )


def made(name: str, kernel: str = "float32") -> LeanTarget:
    torch.manual_seed(1)
    model = tiny_model("", dtype=torch.float32, config=CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    target = LeanTarget(model, name, kernel=kernel)
    assert target.kernel_name == kernel
    return target


def read(
    target: Any, texts: list[list[int]], drafts: Tensor, parents: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    cache = target.new_cache(len(texts), 128)
    for slot, text in enumerate(texts):
        target.prefill(cache, slot, torch.tensor(text), (1, 4))
    logits, features = target.forward(
        cache, list(range(len(texts))), drafts, parents, sizes, (1, 4)
    )
    assert features is not None
    return logits, features


DRAW = random.Random(0)
TEXTS = [[DRAW.randrange(3, 60) for _ in range(length)] for length in (61, 3, 40)]
DRAFTS = torch.tensor([[DRAW.randrange(3, 60) for _ in range(9)] for _ in TEXTS])
TREE = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 3, 6]] * 3)
SOME = torch.tensor([9, 4, 7])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_native_step_is_the_torch_step(name: str) -> None:
    for parents in (torch.arange(-1, 8).expand(3, 9), TREE):
        got, wanted = (
            read(made(name, kernel), TEXTS, DRAFTS, parents, SOME)
            for kernel in ("float32", "torch")
        )
        assert all(
            float((a - b).abs().max() / b.abs().max()) < 2e-5
            for a, b in zip(got, wanted, strict=True)
        )


@pytest.mark.parametrize("kernel", ["float32", "torch"])
def test_a_layer_that_is_asked_for_twice_is_there_twice(kernel: str) -> None:
    target = made("llama", kernel)
    last = target.num_layers
    _, once = target.prefill(target.new_cache(1, 128), 0, torch.tensor(TEXTS[0]), (1, last))
    _, twice = target.prefill(
        target.new_cache(1, 128), 0, torch.tensor(TEXTS[0]), (last, 1, last, 1)
    )
    assert once is not None
    assert twice is not None
    first, final = once.chunk(2, dim=-1)
    assert torch.equal(twice, torch.cat([final, first, final, first], dim=-1))


def check_bits(target: LeanTarget) -> None:
    """A tree's nodes beside other rows have the bits of their paths, read alone and token by
    token.
    """
    logits, features = read(target, TEXTS, DRAFTS, TREE, SOME)
    seen = ancestors(TREE)
    for row, text in enumerate(TEXTS):
        for node in range(int(SOME[row])):
            cache = target.new_cache(1, 128)
            target.prefill(cache, 0, torch.tensor(text), ())
            for token in DRAFTS[row, seen[row, node]]:
                one, own = target.forward(
                    cache, [0], token.view(1, 1), torch.tensor([[-1]]), torch.tensor([1]), (1, 4)
                )
                cache.keep(0, [0])
            assert own is not None
            assert torch.equal(one[0, 0], logits[row, node])
            assert torch.equal(own[0, 0], features[row, node])


@pytest.mark.parametrize("kernel", ["float32", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_trees_too_have_the_bits_of_single_steps(kernel: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_bits(made("qwen3", kernel))
    finally:
        torch.set_num_threads(before)


def test_a_linear_whose_bits_depend_on_the_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    target = made("llama")
    head = target.head
    monkeypatch.setattr(target, "head", lambda x: head(x) * (1 + 1e-6 * len(x)))
    with pytest.raises(AssertionError):
        check_bits(target)


def test_a_prompt_has_the_bits_of_its_tokens_one_by_one() -> None:
    target, text = made("llama"), torch.tensor(TEXTS[0])
    whole, single = target.new_cache(1, 64), target.new_cache(1, 64)
    logits, _ = target.prefill(whole, 0, text, ())
    for token in text:
        one, _ = target.forward(
            single, [0], token.view(1, 1), torch.tensor([[-1]]), torch.tensor([1]), ()
        )
        single.keep(0, [0])
    assert torch.equal(one[0, 0], logits)


def test_a_cache_without_room_is_not_written() -> None:
    target = made("llama")
    with pytest.raises(AssertionError, match="too few slots"):
        target.prefill(target.new_cache(1, 64), 0, torch.zeros(65, dtype=torch.long), ())


def test_a_step_says_where_its_time_went() -> None:
    target = made("llama")
    target.decoder.seconds = torch.zeros(3, dtype=torch.float64)
    read(target, TEXTS, DRAFTS, TREE, SOME)
    assert bool((target.decoder.seconds > 0).all())


@pytest.mark.parametrize(
    "sizes",
    [{"head_dim": 8}, {"hidden_size": 48}, {"intermediate_size": 80}],
    ids=["small heads", "hidden", "intermediate"],
)
def test_shapes_that_do_not_fit_the_panels_take_torch(sizes: dict[str, int]) -> None:
    config = LlamaConfig(**{**SHAPE, **SIZES, **sizes})
    target = LeanTarget(tiny_model("", dtype=torch.float32, config=config), "odd", kernel="float32")
    assert target.kernel_name == "torch"


def older_processors() -> list[str]:
    """What the compiler calls processors of this kind with narrower vectors, which this one can
    stand in for.
    """
    if platform.machine() != "x86_64":
        return ["native"]
    return ["x86-64"] + ["x86-64-v3"] * (torch.backends.cpu.get_cpu_capability() != "DEFAULT")


@pytest.mark.parametrize("march", older_processors())
def test_narrower_vectors_give_the_same_numbers(
    march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        native, "_FLAGS", tuple(flag.replace("native", march) for flag in native._FLAGS)
    )
    for cached in (native.library, native.fingerprint):
        cached.cache_clear()
    try:
        for format in EXACT:
            weight, x = weight_for(format, 50, 96), noise(9, 96, seed=2)
            assert torch.allclose(
                NativeLinear(weight, kernel=format)(x), F.linear(x, weight), atol=1e-5
            )
        test_int8_rounds_weights_by_output_and_rows_by_blocks_of_32()
        test_a_native_step_is_the_torch_step("qwen3")
        check_bits(made("qwen3"))
        check_bits(made("llama", "int8"))
        test_a_sequential_head_goes_from_left_to_right(40)
        assert far_from_definition(3, 7) < 1e-3
    finally:
        for cached in (native.library, native.fingerprint):
            cached.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.fingerprint.cache_clear()
    yield
    native.library.cache_clear()
    native.fingerprint.cache_clear()


def test_without_a_compiler_torch_runs_everything(no_compiler: None) -> None:
    assert native.library() is None
    model = tiny_model("", dtype=torch.float32, config=CONFIGS["llama"]())
    assert fastest(model) is None
    assert LeanTarget(model, "llama").kernel_name == "torch"
    assert isinstance(pack(noise(64, 64)), TorchLinear)


def test_the_kernels_are_compiled_once_and_for_older_processors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **options: (calls.append(args), run(*args, **options))[1]
    )
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    for _ in range(2):
        native.library.cache_clear()
        assert native.library() is not None
    native.library.cache_clear()
    assert len(calls) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_a_wheel_brings_kernels_for_machines_without_a_compiler(
    no_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [str(path) for path in native._FILES if path.suffix == ".cpp"]
    (tmp_path / "step.cpp").touch()
    monkeypatch.setattr(native, "_FILES", [tmp_path / "step.cpp"])
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    subprocess.run(["g++", *native._FLAGS, *sources, "-o", str(tmp_path / "step.so")], check=True)
    assert native.library() is not None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    native.library.cache_clear()
    assert native.library() is None


def kernel_of(model: Any) -> str:
    made = fastest(model)
    return "torch" if made is None else made.kernel_name


def test_step_times_are_measured_once_and_the_fastest_kernel_follows_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    model = tiny_model("", dtype=torch.float32, config=CONFIGS["llama"]())
    assert kernel_of(model) in ("torch", "compact")
    notes = {path: json.loads(path.read_text()) for path in tmp_path.glob("seconds-*.json")}
    assert sorted(len(table) for table in notes.values()) == [2, 6]  # of torch, of the kernels
    for path, table in notes.items():
        path.write_text(json.dumps(dict.fromkeys(table, 9.0 if len(table) == 2 else 1.0)))
    assert kernel_of(model) == "compact"


def test_a_noisy_measurement_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    model = tiny_model("", dtype=torch.float32, config=CONFIGS["llama"]())
    kernel_of(model)
    for path in tmp_path.glob("seconds-*.json"):
        table = json.loads(path.read_text())
        path.write_text(
            json.dumps(dict.fromkeys(table, 1.0 if len(table) == 2 else 9.0))
        )  # the kernels look slow
    assert kernel_of(model) == "compact"
    monkeypatch.setattr(
        LeanTarget, "measure_again", lambda self: self.step_seconds
    )  # the planted fault: it is believed
    for path in tmp_path.glob("seconds-*.json"):
        table = json.loads(path.read_text())
        path.write_text(json.dumps(dict.fromkeys(table, 1.0 if len(table) == 2 else 9.0)))
    assert kernel_of(model) == "torch"


def test_a_kernel_that_is_slow_whenever_it_is_measured_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    model = tiny_model("", dtype=torch.float32, config=CONFIGS["llama"]())
    quick = native.step

    def slow(*arguments: Any) -> None:
        time.sleep(0.02)
        quick(*arguments)

    monkeypatch.setattr(native, "step", slow)
    assert kernel_of(model) == "torch"


def test_a_load_packs_every_weight_once_and_lets_the_model_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[int] = []
    plain = native.NativeLinear.__init__

    def counted(self: Any, weight: Tensor, *args: Any, **options: Any) -> None:
        packed.append(weight.numel())
        plain(self, weight, *args, **options)

    monkeypatch.setattr(native.NativeLinear, "__init__", counted)
    model = tiny_model("", dtype=torch.float32, config=CONFIGS["llama"]())
    weights = [
        p.numel() for p in (*model.model.layers.parameters(), model.lm_head.weight) if p.ndim == 2
    ]
    made = fastest(model, consume=True)
    assert made is not None
    assert sum(packed) == sum(weights)
    assert all(p.numel() == 0 for p in model.model.layers.parameters() if p.ndim == 2)


def test_a_cache_that_cannot_be_written_costs_a_measurement_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = made("llama")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path / "file"))
    assert sorted(target.step_seconds) == [1, 2, 4, 8, 16, 32]


def test_a_kernel_that_cannot_run_the_target_is_refused() -> None:
    from flashdraft.loading import load_target

    with pytest.raises(InvalidParameter, match="kernel is 'fast'"):
        load_target("smollm2-135m", kernel="fast")
    assert HFTarget(tiny_model("llama"), "toy").kernel_name == "transformers"


class Serial:
    """Asks what the two sides may use while a drafter proposes."""

    @serial(lambda self: self.wanted)
    def propose(self) -> tuple[int, int]:
        return torch.get_num_threads(), num_threads()

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_torch_stays_on_one_thread_while_our_kernels_draft(two_threads: None) -> None:
    assert Serial(wanted=True).propose() == (1, 2)
    assert Serial(wanted=False).propose() == (2, 2)  # torch does the work there
    assert (torch.get_num_threads(), num_threads()) == (2, 2)


def test_what_a_drafter_changes_of_its_thread_is_undone_after_an_error_and_never_another_threads(
    two_threads: None,
) -> None:
    class Fails(Serial):
        @serial(lambda self: True)
        def propose(self) -> tuple[int, int]:
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == 2
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        Fails(wanted=True).propose()
    assert (torch.get_num_threads(), num_threads()) == (2, 2)


BUSY_CORES = """
import time
import torch
from flashdraft import process

class Drafter:
    @process.serial(lambda self: True)
    def busy_cores(self):
        logits = torch.randn(5, 8192)
        used, started = time.process_time(), time.perf_counter()
        while time.perf_counter() < started + 0.5:
            logits.logsumexp(-1)
            time.sleep(0.002)
        return (time.process_time() - used) / (time.perf_counter() - started)

torch.set_num_threads(2)
drafter = Drafter()
print(drafter.busy_cores())
process._set_mkl_threads = lambda count: 0
print(drafter.busy_cores())
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
def test_mkls_team_does_not_spin_behind_a_drafters_logarithms() -> None:
    """Behind `torch.set_num_threads` it did, on a core that our kernels need: the planted fault.

    A process of its own: OpenMP spins less where a test before had more threads than cores.
    """
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    program = [sys.executable, "-c", BUSY_CORES]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    rested, spinning = (float(cores) for cores in ran.stdout.split())
    assert rested < 0.3
    assert spinning > 2 * rested


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int, two_threads: None) -> None:
    linear, x = NativeLinear(noise(96, 64)), noise(5, 64)
    expected = linear(x)
    torch.set_num_threads(threads)
    for _ in range(20):
        assert torch.equal(linear(x), expected)


def test_passes_of_several_threads_at_once_have_the_bits_of_one(two_threads: None) -> None:
    linear, x = NativeLinear(noise(256, 64)), noise(7, 64)
    expected = linear(x)

    def many(_: int) -> bool:
        return all(torch.equal(linear(x), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))


def chain_by_torch(states: Tensor, anchors: Tensor, tables: list[Tensor], ids: Tensor) -> Tensor:
    head, embedding, gate_up, down = tables
    scores = torch.empty(ids.shape)
    for row in range(len(ids)):
        before = anchors[row]
        for node in range(ids.shape[1]):
            gate, up = (gate_up @ torch.cat((states[row, node], before))).chunk(2)
            state = states[row, node] + down @ (F.silu(gate) * up)
            scores[row, node] = (head[ids[row, node]] @ state).log_softmax(-1)
            before = embedding[ids[row, node, scores[row, node].argmax()]]
    return scores


def test_a_long_chain_goes_through_several_jobs(two_threads: None) -> None:
    """Three phases a place: more places than one list of phases holds."""
    hidden, rank, rows, nodes = 32, 8, 100, 16
    states, anchors = noise(rows, nodes, hidden), noise(rows, hidden)
    tables = [
        noise(50, hidden),
        noise(50, hidden),
        noise(2 * rank, 2 * hidden),
        noise(hidden, rank),
    ]
    ids = torch.randint(50, (rows, nodes, 5), generator=torch.Generator().manual_seed(0))
    found = native.chain(states, anchors, tables, ids)
    torch.testing.assert_close(
        found, chain_by_torch(states, anchors, tables, ids), rtol=1e-3, atol=1e-2
    )
