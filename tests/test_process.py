"""The process around us: torch's globals, threads, forks, streams and the environment neither change a text nor are changed."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, tiny_model
from toy_folders import save_target
from transformers import LlamaConfig

from flashdraft.generate import Model, drafters, load_target
from flashdraft.methods import NETWORKS
from flashdraft.train.initialise import draft_config, random_weights

PACKAGE = Path(__file__).parent.parent / "flashdraft"
WIDE = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # as the C++ kernels want it
DRAFTS = ("autoregressive", *NETWORKS, "prompt_lookup", "dflash+prompt_lookup", "small")
PROMPTS = ("hi you", "Why, why? " * 7)


# ---- every tensor states its dtype and its device ---------------------------------------------------------------------

FACTORIES = {"arange", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"as_tensor", "scalar_tensor", "tensor", "zeros"}
KINDS = {"INTS", "FLOATS", "BOOLS"}  # of flashdraft.process
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
    assert {str(path): found for path in paths if (found := unstated(path.read_text(encoding="utf-8")))} == {}


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
    assert unstated("torch.zeros(3, **FLOATS); torch.full_like(x, 1); nn.Linear(2, 3, **FLOATS); torch.Generator('cpu')") == []


# ---- texts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target for the kernels, a smaller LM, and a random drafter of every method; dflash with all that it may have."""
    torch.set_num_threads(1)
    where = tmp_path_factory.mktemp("process")
    save_target(where / "target", model=tiny_model("llama", dtype=torch.float32, config=LlamaConfig(**WIDE)))
    small = LlamaConfig(**{**WIDE, "num_hidden_layers": 1})
    save_target(where / "small", model=tiny_model("llama", seed=1, dtype=torch.float32, config=small))
    target, _, _ = load_target(str(where / "target"))
    for method in NETWORKS:
        config = draft_config(target, method=method, num_layers=1, num_features=1, mask_token_id=60)
        network: Any = random_weights(config, 0)
        if method == "dflash":
            network.add_head("swiglu", 8)
            torch.nn.init.normal_(network.sequential_head.down.weight, generator=torch.Generator().manual_seed(1))
        network.reduce_vocabulary(torch.arange(3, 50))
        network.save_pretrained(where / method)
    return where


def texts(folder: Path, kernel: str, drafts: tuple[str, ...] = DRAFTS) -> dict[str, Any]:
    """Greedy and sampled tokens, and what was accepted of every drafter."""
    name = str(folder / "target")
    target, tokenizer, eos = load_target(name, kernel=kernel)
    found = {}
    for draft in drafts:
        parts = [str(folder / part) if (folder / part).exists() else part for part in draft.split("+")]
        size = None if draft == "autoregressive" else 4
        made = drafters("+".join(parts), target, name, size, tokenizer=tokenizer)
        model = Model(target, tokenizer, made, eos=eos, max_rows=2)
        for temperature in (0.0, 1.0):
            results = model.generate(PROMPTS, max_new_tokens=12, temperature=temperature, seed=3, logit_bias={5: 3.14159})
            found[f"{draft} at {temperature}"] = [(one.tokens, one.stats.accepted_lengths) for one in results]
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
def test_what_is_loaded_and_written_does_not_depend_on_torchs_globals(folder: Path, kernel: str, disturbed: str) -> None:
    wanted = right(folder, kernel)
    with DISTURBED[disturbed]():
        found = texts(folder, kernel)
    assert found == wanted
