"""The process around us: torch's globals, threads, forks, streams and the environment neither
change a text nor are changed.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import copy
import ctypes
import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, tiny_model
from toy_folders import save_target
from transformers import LlamaConfig

import flashdraft
from flashdraft import hub
from flashdraft.bench.peers import Transformers
from flashdraft.cli import main
from flashdraft.decoding.control import Control
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.generate import Model
from flashdraft.loading import NETWORKS, drafters, load_target
from flashdraft.models import native
from flashdraft.models.decoder import Layout
from flashdraft.models.lean import LeanTarget
from flashdraft.pretrained import without_bars
from flashdraft.process import signals_told, threads_set
from flashdraft.train import trainer
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, Sample, ShardWriter
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.types import SamplingParams

pytestmark = pytest.mark.alone

PACKAGE = Path(__file__).parent.parent / "flashdraft"
WIDE = {
    **SHAPE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
}  # as the C++ kernels want it
DRAFTS = ("autoregressive", *NETWORKS, "prompt_lookup", "dflash+prompt_lookup", "small")
PROMPTS = ("hi you", "Why, why? " * 7)


# ---- every tensor states its dtype and its device
# ---------------------------------------------------------------------

FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
}
FACTORIES |= {"as_tensor", "scalar_tensor", "tensor", "zeros"}
KINDS = {"INTS", "FLOATS", "DOUBLES", "BOOLS"}  # of flashdraft.process
MODULES = {"Embedding", "LayerNorm", "Linear"}


def unstated(source: str) -> list[str]:
    """The calls that make a tensor of the process's default dtype, or on its default device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        makes = (owner == "torch" and name in FACTORIES) or (owner == "nn" and name in MODULES)
        if owner == "torch" and name == "Generator" and not node.args:
            found.append(ast.unparse(node))
        if not makes:
            continue
        spread = {ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None}
        stated = {keyword.arg for keyword in node.keywords}
        if not (spread & KINDS or {"dtype", "device"} <= stated):
            found.append(ast.unparse(node))
    return found


def test_every_tensor_states_its_dtype_and_its_device() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert {
        str(path): found for path in paths if (found := unstated(path.read_text(encoding="utf-8")))
    } == {}


@pytest.mark.parametrize(
    "fault",
    [
        "torch.tensor([1.0])",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.arange(3, device='cpu')",
        "x = f(torch.ones(2, **options))",
        "nn.Linear(2, 3, bias=False)",
        "torch.Generator().manual_seed(0)",
    ],
)
def test_a_tensor_of_the_default_dtype_or_device_is_reported(fault: str) -> None:
    assert len(unstated(fault)) == 1
    assert (
        unstated(
            "torch.zeros(3, **FLOATS); torch.full_like(x, 1); "
            "nn.Linear(2, 3, **FLOATS); torch.Generator('cpu')"
        )
        == []
    )


# ---- texts
#


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target for the kernels, a smaller LM, and a random drafter of every method; dflash with all
    that it may have.
    """
    torch.set_num_threads(1)
    where = tmp_path_factory.mktemp("process")
    save_target(
        where / "target", model=tiny_model("llama", dtype=torch.float32, config=LlamaConfig(**WIDE))
    )
    small = LlamaConfig(**{**WIDE, "num_hidden_layers": 1})
    save_target(
        where / "small", model=tiny_model("llama", seed=1, dtype=torch.float32, config=small)
    )
    target, _, _ = load_target(str(where / "target"))
    for method in NETWORKS:
        config = draft_config(target, method=method, num_layers=1, num_features=1, mask_token_id=60)
        network: Any = random_weights(config, 0)
        if method == "dflash":
            network.add_head("swiglu", 8)
            torch.nn.init.normal_(
                network.sequential_head.down.weight, generator=torch.Generator().manual_seed(1)
            )
        network.reduce_vocabulary(torch.arange(3, 50))
        network.save_pretrained(where / method)
    return where


def texts(folder: Path, kernel: str, drafts: tuple[str, ...] = DRAFTS) -> dict[str, Any]:
    """Greedy and sampled tokens, and what was accepted of every drafter."""
    name = str(folder / "target")
    target, tokenizer, eos = load_target(name, kernel=kernel)
    found = {}
    for draft in drafts:
        parts = [
            str(folder / part) if (folder / part).exists() else part for part in draft.split("+")
        ]
        size = None if draft == "autoregressive" else 4
        made = drafters("+".join(parts), target, name, size, tokenizer=tokenizer)
        model = Model(target, tokenizer, made, eos=eos, max_rows=2)
        for temperature in (0.0, 1.0):
            results = model.generate(
                PROMPTS, max_new_tokens=12, temperature=temperature, seed=3, logit_bias={5: 3.14159}
            )
            found[f"{draft} at {temperature}"] = [
                (one.tokens, one.stats.accepted_lengths) for one in results
            ]
    return found


@functools.cache
def right(folder: Path, kernel: str) -> dict[str, Any]:
    return texts(folder, kernel)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


DISTURBED: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "default device": default_device,
    "with a device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "enable grad": torch.enable_grad,
    "deterministic": deterministic,
}


@pytest.mark.parametrize("kernel", ["compact", "torch", "transformers"])
@pytest.mark.parametrize("disturbed", DISTURBED)
def test_what_is_loaded_and_written_does_not_depend_on_torchs_globals(
    folder: Path, kernel: str, disturbed: str
) -> None:
    wanted = right(folder, kernel)
    with DISTURBED[disturbed]():
        found = texts(folder, kernel)
    assert found == wanted


def test_loading_and_training_leave_the_users_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(7)
    wanted = torch.random.get_rng_state()
    model = flashdraft.load(
        folder / "target", draft=folder / "dflash", kernel="torch", block_size=4
    )
    model.generate("hi", max_new_tokens=4, temperature=1.0)
    target, _, _ = load_target(str(folder / "target"))
    random_weights(draft_config(target, method="eagle3"), 0)
    Transformers(str(folder / "target"), "float32", tuned=False).method("transformers")(
        [[5, 6]], [SamplingParams(temperature=1.0)]
    )
    assert torch.equal(torch.random.get_rng_state(), wanted)
    assert torch.get_num_threads() == 1


# ---- accelerate's environment
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "precision"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "not compiled"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DDP or FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "DDP or FSDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "DDP or FSDP"),
    ],
)
def test_what_the_environment_asks_of_accelerate_is_refused_by_name(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = TrainConfig(precision="fp32")
    monkeypatch.setenv(name, value)

    def begin() -> None:
        trainer._launched_precision(config)
        trainer._accelerator(config, tmp_path)

    with pytest.raises(InvalidParameter, match=f"{name}.*{told}"):
        begin()


def test_what_a_launch_with_its_usual_settings_says_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = {
        "MIXED_PRECISION": "no",
        "GRADIENT_ACCUMULATION_STEPS": "1",
        "DYNAMO_BACKEND": "NO",
        "USE_DEEPSPEED": "false",
    }
    for name, value in (usual | {"USE_CPU": "true"}).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for precision in ("fp32", "bf16", "auto"):
        assert trainer._launched_precision(TrainConfig(precision=precision)) == "no"
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")  # as the run's own
    made = trainer._accelerator(TrainConfig(accumulate=3), tmp_path)
    assert made.gradient_accumulation_steps == 1  # the loop counts them itself
    assert made.mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trainer._launched_precision(TrainConfig(precision="bf16")) == "bf16"
    assert trainer._launched_precision(TrainConfig()) == "bf16"


# ---- threads, forks, interrupts
# ---------------------------------------------------------------------------------------


def loaded(folder: Path, draft: str, kernel: str) -> Model:
    target, tokenizer, eos = load_target(str(folder / "target"), kernel=kernel)
    name = str(folder / draft) if (folder / draft).exists() else draft
    made = drafters(name, target, str(folder / "target"), 4, tokenizer=tokenizer)
    model = Model(target, tokenizer, made, eos=eos, max_rows=2)
    model.control = Control({1: 1.0, 8: 1.5})
    return model


@pytest.mark.parametrize("kernel", ["compact", "torch", "transformers"])
def test_threads_that_share_a_model_write_the_texts_of_one(folder: Path, kernel: str) -> None:
    model = loaded(folder, "dflash", kernel)
    prompts = [("hi you", "Why")[n % 2] * (1 + 3 * n % 7) for n in range(12)]

    def text(prompt: str) -> Any:
        return model.generate(prompt, max_new_tokens=10).tokens

    wanted = [text(prompt) for prompt in prompts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with threads_set(2), ThreadPoolExecutor(4) as pool:
            assert list(pool.map(text, prompts)) == wanted
    finally:
        sys.setswitchinterval(before)


def test_without_its_lock_a_target_shows_features_of_other_threads_passes(folder: Path) -> None:
    """With a planted fault: the lock is gone."""
    target: Any = loaded(folder, "dflash", "transformers").target

    def features(tokens: list[int]) -> Any:
        return target.prefill(target.new_cache(1, 64), 0, torch.tensor(tokens), (1,))[1].tolist()

    prompts = [[5, 6, 7], [9, 8, 20]]
    wanted = [features(tokens) for tokens in prompts]
    handle = target._decoder.layers[-1].register_forward_pre_hook(lambda *_: time.sleep(0.05))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(features, prompts)) == wanted
        target._lock = contextlib.nullcontext()
        assert list(pool.map(features, prompts)) != wanted
    handle.remove()


def test_streams_that_take_turns_in_one_thread_write_the_texts_of_one(folder: Path) -> None:
    for kernel in ("compact", "transformers"):
        model = loaded(folder, "dflash", kernel)
        wanted = [model.generate(prompt, max_new_tokens=10).text for prompt in PROMPTS]
        turns = zip_longest(*(model.stream(prompt, max_new_tokens=10) for prompt in PROMPTS))
        texts = ["", ""]
        for turn in turns:
            for n, chunk in enumerate(turn):
                texts[n] += "" if chunk is None else chunk.text
        assert texts == wanted


def test_a_tokenizers_truncation_and_padding_are_gone_when_it_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    """Otherwise two threads' first calls would change it at once, which tokenizers refuses (Already
    borrowed).
    """
    shutil.copytree(folder / "target", tmp_path / "own")
    path = tmp_path / "own" / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    rules["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(rules), encoding="utf-8")
    _, tokenizer, _ = load_target(str(tmp_path / "own"), kernel="torch")
    assert tokenizer.backend_tokenizer.truncation is None


def test_a_text_may_be_written_by_asyncio_in_other_threads(folder: Path) -> None:
    model = loaded(folder, "eagle3", "compact")
    wanted = [model.generate(prompt, max_new_tokens=8).tokens for prompt in PROMPTS]

    async def both() -> list[Any]:
        return await asyncio.gather(
            *(asyncio.to_thread(model.generate, prompt, max_new_tokens=8) for prompt in PROMPTS)
        )

    assert [result.tokens for result in asyncio.run(both())] == wanted


def test_an_interrupted_pass_leaves_a_model_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel, place in (
        ("compact", (native, "step")),
        ("transformers", (torch.nn.functional, "silu")),
    ):
        model = loaded(folder, "dflash", kernel)
        wanted = model.generate("hi you", max_new_tokens=10).tokens
        own, calls = getattr(*place), count()

        def interrupted(*args: Any, own: Any = own, calls: Any = calls, **options: Any) -> Any:
            if next(calls) == 9:
                raise KeyboardInterrupt
            return own(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate("hi you", max_new_tokens=10)
        assert model.generate("hi you", max_new_tokens=10).tokens == wanted


FORKED = """
import os, sys, torch
import flashdraft
torch.set_num_threads(2)
big = torch.ones(2048, 2048)
total = float((big @ big).sum())
for kernel in ("compact", "transformers"):
    m = flashdraft.load(sys.argv[1], draft=sys.argv[2], kernel=kernel, block_size=4)
    right = m.generate("hi", max_new_tokens=8).tokens
    lock = m.target.__dict__.get("_lock", flashdraft.process.new_lock())
    lock.acquire()  # as another thread may hold it
    child = os.fork()
    if not child:
        same = m.generate("hi", max_new_tokens=8).tokens == right
        same = same and abs(float((big @ big).sum()) / total - 1) < 1e-3
        again = flashdraft.load(sys.argv[1], draft=sys.argv[2], kernel=kernel, block_size=4)
        same = same and again.generate("hi", max_new_tokens=8).tokens == right
        os._exit(0 if same and torch.get_num_threads() == 1 else 3)
    print(os.waitpid(child, 0)[1], torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on_alone(folder: Path) -> None:
    done = script(FORKED, folder / "target", folder / "dflash")
    assert (done.stdout, done.returncode) == ("0 2\n0 2\n", 0), done.stderr


SPAWNED = """
import multiprocessing, sys, threading
import flashdraft
def text(names):
    m = flashdraft.load(names[0], draft=names[1], block_size=4)
    return m.generate("hi", max_new_tokens=8).tokens
if __name__ == "__main__":
    right = text(sys.argv[1:])
    for method in ("spawn", "fork"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map_async(text, [sys.argv[1:]]).get(60) == [right], method
    m = flashdraft.load(sys.argv[1], draft=sys.argv[2], block_size=4)
    busy = lambda: [m.generate("hi", max_new_tokens=200, ignore_eos=True) for _ in range(99)]
    threading.Thread(target=busy, daemon=True).start()
    print("the end", flush=True)
"""


def test_workers_of_every_kind_load_for_themselves_and_daemons_do_not_keep_the_process(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "workers.py").write_text(SPAWNED, encoding="utf-8")
    done = script(tmp_path / "workers.py", folder / "target", folder / "dflash")
    assert (done.stdout, done.returncode) == ("the end\n", 0), done.stderr


def script(code: str | Path, *arguments: object) -> Any:
    """A process of its own with two threads."""
    start = [str(code)] if isinstance(code, Path) else ["-c", code]
    env = os.environ | {
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(PACKAGE.parent),
        "HF_HUB_OFFLINE": "1",
    }
    how: Any = {"capture_output": True, "encoding": "utf-8", "timeout": 120, "env": env}
    return subprocess.run([sys.executable, *start, *map(str, arguments)], check=False, **how)


def test_a_model_says_why_it_cannot_be_sent_to_another_process(folder: Path) -> None:
    model = loaded(folder, "dflash", "compact")
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(FlashDraftError, match="cannot be pickled") as refused:
            send(model)
        assert "load" in str(refused.value.hint)
    assert (
        copy.copy(model).generate("hi", max_new_tokens=4).tokens
        == model.generate("hi", max_new_tokens=4).tokens
    )


# ---- the kernels' border
# ----------------------------------------------------------------------------------------------


def addresses_taken(source: str) -> list[str]:
    """The functions that take a tensor's address."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            calls = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
            ]
            found += [function.name] if calls else []
    return found


def test_every_address_is_taken_where_the_tensor_is_checked() -> None:
    taken = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if functions := addresses_taken(path.read_text(encoding="utf-8")):
            taken[path.name] = functions
    assert taken == {
        "native.py": ["pointer"],
        "blocks.py": ["_forget_pages"],
    }  # the latter for the system, not for C++
    assert addresses_taken("def step(x):\n    return x.data_ptr()") == ["step"]


WEIGHT = torch.ones(64, 64)
CHAIN = {
    "states": (1, 2, 32),
    "anchors": (1, 32),
    "head": (9, 32),
    "embedding": (9, 32),
    "gate_up": (8, 64),
    "down": (32, 4),
}


@pytest.mark.parametrize(
    "fault", [lambda x: x.double(), lambda x: x[:, :32], lambda x: x.to("meta"), lambda x: x.long()]
)
def test_a_linear_refuses_what_is_not_its_input(fault: Callable[[Any], Any]) -> None:
    linear = native.NativeLinear(WEIGHT)
    with pytest.raises(AssertionError, match=r"a linear's input is \[3"):
        linear(fault(torch.ones(3, 64)))


@pytest.mark.parametrize("name", CHAIN)
@pytest.mark.parametrize("fault", [lambda t: t.double(), lambda t: torch.cat((t, t), -1)])
def test_a_chain_refuses_what_is_of_another_kind_or_size(
    name: str, fault: Callable[[Any], Any]
) -> None:
    given = {each: torch.ones(shape) for each, shape in CHAIN.items()}
    ids = torch.zeros(1, 2, 3, dtype=torch.int64)

    def run(own: dict[str, Any], ids: Any) -> Any:
        states, anchors, *tables = own.values()
        return native.chain(states, anchors, tables, ids)

    assert run(given, ids).shape == (1, 2, 3)
    with pytest.raises((AssertionError, ValueError)):
        run(given | {name: fault(given[name])}, ids)
    for wrong in (9, -1):
        with pytest.raises(AssertionError, match="an id of"):
            run(given, ids + wrong)
    with pytest.raises(AssertionError, match="ids"):
        run(given, ids.int())


def test_a_step_refuses_what_its_cache_or_its_tables_do_not_hold(folder: Path) -> None:
    target, _, _ = load_target(str(folder / "target"), kernel="compact")
    assert target.kernel_name == "compact"
    chain, one = torch.tensor([[-1, 0]]), torch.tensor([2])

    def step(
        cache: Any, tokens: Any = None, slots: Any = (0,), parents: Any = chain, sizes: Any = one
    ) -> Any:
        return target.forward(
            cache, slots, torch.tensor([[5, 6]]) if tokens is None else tokens, parents, sizes, ()
        )

    assert step(target.new_cache(1, 64))[0].shape == (1, 2, SHAPE["vocab_size"])
    cases: list[tuple[Any, str]] = []
    full, narrow = target.new_cache(1, 64), target.new_cache(1, 64)
    full.lengths[0] = 63
    cases.append((lambda: step(full), "too few slots"))
    decoder: Any = target.decoder  # type: ignore[attr-defined]
    seen = torch.ones(1, 2, 2, dtype=torch.bool)
    shape = Layout(seen=seen, depths=torch.tensor([[0, 9999]]), sizes=one)
    beyond = target.embed(torch.tensor([[5, 6]]))
    cases.append(
        (lambda: decoder(target.new_cache(1, 64), (0,), beyond, shape, ()), "position 9999 of")
    )
    cases.append((lambda: step(target.new_cache(1, 64), slots=(1,)), "no such row|range"))
    cases.append((lambda: step(target.new_cache(1, 64), sizes=torch.tensor([3])), "more nodes"))
    narrow.keys[:] = [torch.zeros(1, 2, 1, 8, 64) for _ in narrow.keys]
    narrow.values[:] = [torch.zeros(1, 2, 64, 8) for _ in narrow.values]
    cases.append((lambda: step(narrow), "keys"))
    halves = target.new_cache(1, 64)
    halves.keys[:] = [torch.zeros(1, 2, 1, 16, 64, dtype=torch.bfloat16) for _ in halves.keys]
    halves.values[:] = [torch.zeros(1, 2, 64, 16) for _ in halves.values]
    cases.append((lambda: step(halves), "keys"))
    for wrong, told in cases:
        with pytest.raises((AssertionError, IndexError), match=told):
            wrong()


# ---- streams, folders, compilers, other systems
# -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("command", ["generate", "json", "chat", "demo", "slip"])
def test_a_command_runs_with_a_standard_stream_that_is_closed(
    name: str,
    closed: bool,
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    how = ["--target", str(folder / "target"), "--max-new-tokens", "2", "--kernel", "torch"]
    words = {
        "generate": ["generate", "hi"],
        "json": ["generate", "hi", "--json"],
        "chat": ["chat"],
        "demo": ["demo", "hi"],
    }
    gone = io.StringIO()
    gone.close()
    own = gone if closed else None
    if name != "stdin":
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    monkeypatch.setattr(sys, name, own)
    status = main(words[command] + how if command in words else ["generate"])
    assert status == (0 if command in words else 2)
    assert getattr(sys, name) is own
    out, err = capfd.readouterr()
    assert "error" not in out  # what nobody reads does not go elsewhere
    assert "Traceback" not in err


def test_a_free_descriptor_is_not_given_to_a_file_that_a_command_writes(
    folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"source": "x", "row": 0, "prompt": "hi"}) + "\n", encoding="utf-8"
    )
    code = (
        "import os, sys; from flashdraft.cli import main; main(sys.argv[1:]); "
        "os.write(1, b'printed by a library')"
    )
    words = [
        "regenerate",
        prompts,
        "--out",
        tmp_path / "out.jsonl",
        "--target",
        folder / "target",
        "--max-new-tokens",
        2,
    ]
    closing = (
        "import os, subprocess, sys; os.close(1); os.close(0); "
        "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    )
    done = script(closing, code, *words)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt"] == "hi"


def test_the_level_of_transformers_warnings_and_its_bars_are_the_callers(folder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        assert (
            main(["generate", "hi", "--target", str(folder / "target"), "--max-new-tokens", "1"])
            == 0
        )
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
    assert logging.is_progress_bar_enabled()
    with without_bars():
        assert not logging.is_progress_bar_enabled()
        with without_bars():
            pass
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


def test_a_load_leaves_standard_error_to_other_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    own = LeanTarget.__init__
    monkeypatch.setattr(
        LeanTarget, "__init__", lambda *a, **k: (seen.append(sys.stderr), own(*a, **k))[1]
    )
    real = sys.stderr
    load_target(str(folder / "target"), kernel="torch")
    assert seen == [real]
    assert "redirect_std" not in "".join(
        path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")
    )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Kernels are looked for anew, in an empty cache; compiling only writes what was compiled
    before.
    """
    library = native.library()
    assert library is not None
    built = Path(library._name).read_bytes()
    run = subprocess.run

    def compile(command: Any, **how: Any) -> Any:
        if "-o" not in command:
            return run(command, **how)
        assert how["stdin"] == subprocess.DEVNULL
        assert how["timeout"] > 0
        Path(command[command.index("-o") + 1]).write_bytes(built)
        return subprocess.CompletedProcess(command, 0)

    kept = native.library, native.fingerprint
    for cached in kept:
        cached.cache_clear()
    monkeypatch.setattr(subprocess, "run", compile)
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path / "cache"))
    yield monkeypatch
    for cached in kept:
        cached.cache_clear()


def test_a_compiler_may_be_several_words(fresh: pytest.MonkeyPatch) -> None:
    compiler = native._compiler()[0]
    plain = native.fingerprint()
    native.fingerprint.cache_clear()
    fresh.setenv("CXX", f"'{shutil.which(compiler)}'  -m64")
    assert native._compiler() == [shutil.which(compiler), "-m64"]
    assert native.fingerprint() != plain
    assert native.library() is not None


@pytest.mark.parametrize(
    "fault",
    [subprocess.TimeoutExpired("c++", 1), subprocess.CalledProcessError(1, "c++"), OSError()],
)
def test_a_compiler_that_hangs_or_fails_costs_the_kernels_and_no_more(
    fresh: pytest.MonkeyPatch, fault: Exception
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise fault

    fresh.setattr(subprocess, "run", failing)
    fresh.setattr(native, "_FILES", [Path(native._FILES[0]).with_name("nowhere.cpp")])
    fresh.setattr(native, "fingerprint", lambda: "0")
    assert native.library() is None


@pytest.mark.parametrize("where", ["a folder", "ünï cödé", ".", "a file", "nowhere to run"])
def test_kernels_are_had_whatever_the_cache_folder_is(
    where: str, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh.chdir(tmp_path)
    fresh.setenv("FLASHDRAFT_CACHE", where)
    if where == "a file":
        (tmp_path / where).touch()
    if where == "nowhere to run":  # as a file system mounted without the right to execute
        own = ctypes.CDLL

        def refused(path: str, *more: Any) -> Any:
            if path.startswith(str(tmp_path)):
                raise OSError("failed to map segment from shared object")
            return own(path, *more)

        fresh.setattr(ctypes, "CDLL", refused)
    assert native.library() is not None
    assert hub.cache_dir().is_absolute()
    cache = hub.cache_dir()
    (tmp_path / "elsewhere").mkdir()
    fresh.chdir(tmp_path / "elsewhere")
    if where != ".":
        assert hub.cache_dir() == cache


def test_without_a_home_everything_lies_in_a_folder_of_the_process(
    fresh: pytest.MonkeyPatch, folder: Path
) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FLASHDRAFT_CACHE", "XDG_CACHE_HOME"):
        fresh.delenv(name, raising=False)
    fresh.setattr(Path, "expanduser", homeless)
    assert hub.cache_dir() == hub.cache_dir()
    assert hub.cache_dir().stat().st_mode & 0o077 == 0  # code is loaded from there
    assert native.library() is not None
    assert load_target(str(folder / "target"))[0].kernel_name in ("compact", "torch")


def test_files_are_to_others_what_the_umask_says(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from flashdraft.files import write_file\n"
    code += (
        "os.umask(int(sys.argv[2], 8)); write_file(Path(sys.argv[1]), b'x'); "
        "print(oct(Path(sys.argv[1]).stat().st_mode & 0o777))"
    )
    assert script(code, tmp_path / "new", "077").stdout.strip() == "0o600"


def unencoded(source: str) -> list[str]:
    """The calls that read or write text as the locale has it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        words = {keyword.arg for keyword in node.keywords}
        modes = [
            arg.value
            for arg in node.args
            if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
        binary = any(re.fullmatch(r"[rwax+]*b[rwax+]*", mode) for mode in modes)
        owner = ast.unparse(node.func).rpartition(".")[0]
        opens = name == "open" and owner not in ("os", "where", "webbrowser") and not binary
        texts = name in ("read_text", "write_text") or (name == "run" and "text" in words)
        if (opens or texts) and "encoding" not in words:
            found.append(ast.unparse(node))
    return found


def test_every_text_is_read_and_written_as_utf_8() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert {
        str(path): found for path in paths if (found := unencoded(path.read_text(encoding="utf-8")))
    } == {}
    for fault in (
        "path.read_text()",
        "path.open('a')",
        "open(path)",
        "subprocess.run(x, text=True)",
    ):
        assert len(unencoded(fault)) == 1
    assert (
        unencoded("path.open('rb'); path.open('a', encoding='utf-8'); os.open(path, os.O_RDONLY)")
        == []
    )


def test_every_module_is_imported_on_systems_without_unixs_own() -> None:
    code = """
import builtins, importlib, os, pathlib, sys
own = builtins.__import__
def without(name, globals=None, *more, **options):
    ours = str((globals or {}).get("__name__")).startswith("flashdraft")
    if ours and name in ("resource", "fcntl", "pwd", "grp", "termios", "tty"):
        raise ModuleNotFoundError(name)
    return own(name, globals, *more, **options)
builtins.__import__ = without
package = pathlib.Path(sys.argv[1])
import torch, transformers
for name in ("register_at_fork", "fork", "getuid", "sync"):
    delattr(os, name)
for path in sorted(package.rglob("*.py")):
    parts = path.relative_to(package.parent).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    if not name.endswith("__main__"):
        importlib.import_module(name)
print("all")
"""
    done = script(code, PACKAGE)
    assert done.stdout == "all\n", done.stderr


def test_a_run_knows_its_folders_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_features import language_model

    monkeypatch.chdir(tmp_path)
    lm: Any = language_model()
    writer = ShardWriter(lm, Path("shards"), layers=(0,), max_length=8)
    monkeypatch.chdir("/")
    writer.add(
        "one",
        [Sample(torch.arange(4), torch.zeros(4, lm.target.hidden_size, dtype=torch.bfloat16), 1)],
    )
    assert (tmp_path / "shards" / "one.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    data = FeatureSet(Path("shards"))
    monkeypatch.chdir("/")
    data.check(contents=True)
    assert data[0].tokens.tolist() == [0, 1, 2, 3]


def test_training_outside_the_main_thread_leaves_signals_alone() -> None:
    held = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def inside() -> list[Any]:
        with signals_told(lambda number: None):
            return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == held
    assert inside() != held
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == held
