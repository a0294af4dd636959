"""Static shapes: the numbers of the torch kernel from a few traces, and every path on a device that
is not the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, SHAPE, VOCAB, LetterTokenizer, admit, tiny_drafter, tiny_model
from elsewhere import DEVICE, Elsewhere, moved
from test_target import CLOSE, FAR, LEAN_CLOSE, own_model, worst_after_all
from torch import Tensor
from toy_folders import save_target, save_zlab
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import flashdraft
import flashdraft.models.compiled
from flashdraft.decoding.text import TextDecoder
from flashdraft.decoding.tree import chain
from flashdraft.engine import Engine, Request
from flashdraft.errors import InvalidParameter
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.models.compiled import CompiledStep, padded
from flashdraft.models.decoder import Decoder
from flashdraft.models.hf import HFTarget
from flashdraft.models.lean import LeanTarget
from flashdraft.models.target import Target
from flashdraft.types import Drafter, SamplingParams

PROMPTS = ([5, 7, 9, 11, 13], [6, 8])


def uncompiled(trace: Any, **_options: Any) -> Any:
    return trace


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that torch.compile was given so far; they run as they are."""
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_, options = torch.compile, dict[str, Any]()

    def compiling(trace: Any, **given: Any) -> Any:
        options.update(given)
        return compile_(trace, **{**given, "mode": None, "backend": backend})

    monkeypatch.setattr(torch, "compile", compiling)
    yield graphs
    assert options == {} or (options["fullgraph"] is True and options["dynamic"] is False)


def made(
    family: str = "llama", kernel: str = "compiled", dtype: torch.dtype = torch.float64
) -> LeanTarget:
    """Two layers: a trace takes a second and more."""
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    model = tiny_model("", dtype=dtype, config=kind(**{**SHAPE, "num_hidden_layers": 2}))
    return LeanTarget(model, family, kernel=kernel)


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def read(
    target: Target, cache: Any, lengths: dict[int, int], sizes: list[int], seed: int = 0
) -> Tensor:
    """Give rows these lengths and read a chain behind each: the logits that count."""
    for slot, length in lengths.items():
        cache.lengths[slot] = length
    n = max(sizes)
    shape = text(len(sizes), n, seed=seed), chain(n).repeat(len(sizes), 1), torch.tensor(sizes)
    logits, _ = target.forward(cache, list(lengths), *shape, ())
    return logits[torch.arange(n) < shape[2][:, None]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_trees_after_rejected_drafts_in_a_ragged_batch_read_as_plain_text(
    family: str, traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if family != "qwen3":  # one family traced is enough
        monkeypatch.setattr(torch, "compile", uncompiled)
    assert (
        worst_after_all(
            LeanTarget(tiny_model(family), family, kernel="compiled"), own_model(family)
        )
        < LEAN_CLOSE
    )
    assert len(traces) == (4 if family == "qwen3" else 0)  # widths 8, 32, 4 and 2


@pytest.mark.parametrize("fault", ["tree", "length", "padding"])
def test_a_planted_fault_is_far_off(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Decoder.attend_to

    def wrong(self: Decoder, kv: Any, starts: Tensor, seen: Tensor, at: Any) -> Any:
        seen = torch.ones_like(seen).tril() if fault == "tree" else seen
        starts = starts + 1 if fault == "length" else starts
        seen = torch.ones_like(seen) if fault == "padding" else seen
        return real(self, kv, starts, seen, at)

    monkeypatch.setattr(torch, "compile", uncompiled)
    target = LeanTarget(tiny_model("llama"), "llama", kernel="compiled")
    monkeypatch.setattr(Decoder, "attend_to", wrong)
    assert worst_after_all(target, own_model("llama")) > FAR


def test_bfloat16_is_the_torch_kernels_to_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    logits = []
    for kernel, dtype in (
        ("torch", torch.bfloat16),
        ("compiled", torch.bfloat16),
        ("torch", torch.float64),
    ):
        target = made("qwen3", kernel, dtype)
        cache = target.new_cache(3, 64)
        target.prefill(cache, 2, text(13), ())
        logits.append(read(target, cache, {2: 13, 0: 0}, [5, 3]))
    assert logits[1].dtype == torch.bfloat16
    plain, got, exact = (each.double() for each in logits)
    assert float((got - plain).abs().max()) <= float((plain - exact).abs().max())


def test_a_pass_leaves_the_other_rows_nodes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)

    def after(target: Target) -> Tensor:
        cache = target.new_cache(2, 64)
        read(target, cache, {0: 0}, [6])
        read(target, cache, {1: 0}, [4], seed=1)
        return read(target, cache, {0: 6}, [2], seed=2)

    wanted, got = after(made(kernel="torch")), after(made())
    assert float((got - wanted).abs().max()) < CLOSE
    real = CompiledStep._trace

    def everywhere(self: Any, shape: list[Tensor], *rest: Any) -> Any:
        tokens, lengths, sizes, *others = shape
        return real(
            self, [tokens, lengths, torch.full_like(sizes, tokens.shape[1]), *others], *rest
        )

    monkeypatch.setattr(CompiledStep, "_trace", everywhere)
    assert float((after(made()) - wanted).abs().max()) > FAR


def use(target: Target) -> None:
    """Proposals of 5 to 8 nodes at many lengths, in one row or both, of two engines."""
    for cache in (target.new_cache(2, 128), target.new_cache(2, 128)):
        for length in (0, 1, 17, 90, 119):
            read(target, cache, {1: length, 0: 3}, [5 + length % 4, 2])
            read(target, cache, {0: length}, [8])


def test_one_trace_serves_every_length_and_proposal_of_a_width(traces: list[Any]) -> None:
    target = made()
    use(target)
    assert len(traces) == 1
    read(target, target.new_cache(2, 128), {0: 5}, [4])
    assert len(traces) == 2
    grown = target.new_cache(2, 128)
    read(target, grown, {0: 125}, [3])  # the last slot is nobody's: it grows here
    assert (grown.slots, len(traces)) == (256, 3)


def test_lengths_as_numbers_would_trace_again(
    traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = torch.compile

    def numbers(trace: Any, **options: Any) -> Any:
        inner = compiling(
            lambda shape, lengths, *rest: trace(
                [shape[0], torch.tensor(lengths), *shape[1:]], *rest
            ),
            **options,
        )
        return lambda shape, *rest: inner([shape[0], *shape[2:]], shape[1].tolist(), *rest)

    monkeypatch.setattr(torch, "compile", numbers)
    target = made()
    cache = target.new_cache(1, 64)
    for length in (0, 1, 17):
        read(target, cache, {0: length}, [2])
    assert len(traces) == 3


@pytest.mark.parametrize("pinned", [True, False])
def test_a_graph_copies_in_the_proposal_only(
    pinned: bool, traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pinned:
        monkeypatch.setattr(flashdraft.models.compiled, "_pin", lambda tensors: None)
    target = made("qwen2")
    drafter = tiny_drafter(target)
    texts(target, drafter, 3)
    assert len(traces) >= 2  # the target's and the drafter's
    for graph in traces:
        inputs = [
            node.meta["tensor_dict"] for node in graph.graph.nodes if node.op == "placeholder"
        ]
        copied = [facts for facts in inputs if "_dynamo_static_input_type" not in facts]
        assert (len(copied) == 5) is pinned  # tokens, lengths, sizes, depths, and who sees whom
        assert len(inputs) > 20


@pytest.mark.parametrize(
    ("nodes", "width"),
    [(1, 1), (2, 2), (3, 4), (5, 8), (16, 16), (17, 32), (32, 32), (33, 64), (65, 96)],
)
def test_widths(nodes: int, width: int) -> None:
    assert padded(nodes) == width


def texts(
    target: Target, drafter: Drafter, count: int, temperature: float = 0.0
) -> list[list[int]]:
    """Two rows of different lengths decoded together; the second one ends first."""
    engine = Engine(target, drafter, max_rows=2)
    requests = []
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_new_tokens=count - i, temperature=temperature, ignore_eos=True)
        requests.append(
            Request(list(prompt), params, TextDecoder(LetterTokenizer(), ()), frozenset({EOS}), i)
        )
        admit(engine, requests[-1])
    while engine.running:
        engine.step()
    return [request.history for request in requests]


@pytest.mark.parametrize("tree_nodes", [None, 12])
def test_drafted_text_is_plain_text(tree_nodes: int | None, traces: list[Any]) -> None:
    target = made("qwen3")
    drafter = tiny_drafter(target, tree_nodes=tree_nodes)
    assert drafter.network.decoder.kernel == "compiled"
    assert texts(target, drafter, 24) == texts(made("qwen3", "torch"), Autoregressive(), 24)


def test_the_compiled_drafter_drafts_what_the_torch_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    proposals: dict[str, list[Any]] = {"torch": [], "compiled": []}
    windows: Any = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 5}
    for kernel, seen in proposals.items():
        drafter = tiny_drafter(target := made("llama", kernel), block_size=6, **windows)

        def propose(*given: Any, real: Any = drafter.propose, seen: list[Any] = seen) -> Any:
            seen.append(real(*given))
            return seen[-1]

        monkeypatch.setattr(drafter, "propose", propose)
        texts(target, drafter, 12)
    assert len(proposals["torch"]) == len(proposals["compiled"]) > 3
    for plain, got in zip(*proposals.values(), strict=True):
        assert torch.equal(plain.tokens, got.tokens)
        assert torch.allclose(plain.scores, got.scores, atol=1e-4)


def test_load_takes_it_by_name_and_refuses_other_models(tmp_path: Path, traces: list[Any]) -> None:
    save_target(tmp_path / "target")
    save_zlab(tmp_path / "draft")
    model = flashdraft.load(
        tmp_path / "target",
        draft=tmp_path / "draft",
        block_size=4,
        kernel="compiled",
        dtype="bfloat16",
    )
    assert (model.target.kernel_name, model.target.kernel) == ("compiled", "compiled bfloat16")
    assert model.generate("Hello", max_new_tokens=8, ignore_eos=True).stats.num_tokens == 8
    assert len(traces) >= 2
    tiny_model("gemma3").save_pretrained(tmp_path / "gemma")
    for file in tmp_path.glob("target/tokenizer*"):
        (tmp_path / "gemma" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidParameter, match="runs by transformers"):
        flashdraft.load(tmp_path / "gemma", kernel="compiled")


HEAD: dict[str, Any] = {"sequential_head": "swiglu", "head_rank": 8}
SELECTOR: dict[str, Any] = {"sequential_head": "selector", "head_rank": 8, "tree_nodes": 6}
MARKOV: dict[str, Any] = {
    "sequential_head": "markov_rnn",
    "head_rank": 8,
    "anchor_first": True,
    "confidence_head": True,
    "confidence_with_markov": True,
}
DOMINO: dict[str, Any] = {"sequential_head": "domino", "head_rank": 8, "head_states": 8}
EMBEDDINGS: dict[str, Any] = {"target_layer_ids": (-1, 2)}
TARGETS: dict[str, Callable[[Any], Target]] = {
    "torch": lambda model: LeanTarget(model, "", kernel="torch"),
    "compiled": lambda model: LeanTarget(model, "", kernel="compiled"),
    "transformers": lambda model: HFTarget(model, ""),
}


@pytest.mark.parametrize(
    ("kernel", "changes", "temperature"),
    [
        ("torch", {"tree_nodes": 6}, 0.0),
        ("torch", HEAD, 0.7),
        ("torch", SELECTOR, 0.0),
        ("torch", MARKOV | {"tree_nodes": 6}, 0.0),
        ("torch", DOMINO | EMBEDDINGS, 0.7),
        ("compiled", MARKOV, 0.0),
        ("compiled", {}, 0.0),
        ("transformers", {}, 0.7),
    ],
)
def test_no_tensor_is_left_on_the_cpu(
    kernel: str, changes: dict[str, Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    here = TARGETS[kernel](tiny_model("qwen3"))
    wanted = texts(here, tiny_drafter(here, **changes), 7, temperature)
    with Elsewhere():
        target = TARGETS[kernel](moved(tiny_model("qwen3")))
        drafter = tiny_drafter(target, **changes)
        assert texts(target, drafter, 7, temperature) == wanted
        assert all(
            keys is not None and keys.device == DEVICE
            for cache in drafter.caches
            for keys in cache.keys
        )
        (rotary,) = drafter.network.decoder.rotaries
        rotary.tables = rotary.tables[0].cpu(), rotary.tables[1]
        with pytest.raises(RuntimeError, match="on the CPU"):
            texts(target, drafter, 7, temperature)
