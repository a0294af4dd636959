"""Tiny random models of every family, on the CPU, in float64 so that ties do not blur equality. No
downloads.
"""

from __future__ import annotations

import functools
import os
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    KimiLinearConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MistralConfig,
    OlmoHybridConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from flashdraft.decoding.sampling import probabilities, uniforms
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.models.cache import SlotCache
from flashdraft.models.hf import HFTarget
from flashdraft.models.lean import LeanTarget
from flashdraft.models.target import Target
from flashdraft.types import Chunk, Result, SamplingParams

# Their asserts say as much as a test's own; only files named test_*.py are rewritten unasked.
pytest.register_assert_rewrite(
    "toy_arrivals", "toy_drafts", "toy_engine", "toy_gguf", "toy_hooks", "toy_pipeline"
)
pytest.register_assert_rewrite("toy_browser", "toy_page", "toy_prompts", "toy_runs", "toy_training")

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # `make test` gives each one torch thread
VOCAB, WINDOW, EOS, MASK = 61, 8, 2, 60
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MIXED: dict[str, Any] = {
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "truncate": False,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=32
    ),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **MIXED),
    "phi3": lambda: Phi3Config(**SHAPE),
    "gpt_oss": lambda: GptOssConfig(
        **SHAPE, **EXPERTS, **MIXED, num_local_experts=4, rope_parameters=YARN
    ),
    "glm4": lambda: Glm4Config(**SHAPE, head_dim=8),
}

# Families with running states; three layers of four have one, or all.
GDN: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SPARSE: dict[str, Any] = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32}
SHARED: dict[str, Any] = {**SPARSE, "shared_expert_intermediate_size": 32}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
CONV: dict[str, Any] = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
LATENTS: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
HYBRIDS = {
    "qwen3_next": lambda: Qwen3NextConfig(**SHAPE, **GDN, **SHARED),
    "qwen3_5": lambda: Qwen3_5TextConfig(**SHAPE, **GDN),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**{**SHAPE, **GDN, **SHARED}),
    "kimi_linear": lambda: KimiLinearConfig(
        **{**SHAPE, "num_key_value_heads": 4},
        **LATENTS,
        **LINEAR,
        num_experts_per_tok=2,
        num_local_experts=4,
        moe_intermediate_size=32,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **SHAPE,
        **EXPERTS,
        **MAMBA,
        **LINEAR,
        num_local_experts=4,
        shared_intermediate_size=32,
        logits_scaling=4.0,
        embedding_multiplier=2.0,
    ),
    "falcon_h1": lambda: FalconH1Config(
        **SHAPE, **MAMBA, mamba_d_ssm=64, lm_head_multiplier=0.5, embedding_multiplier=2.0
    ),
    "bamba": lambda: BambaConfig(**SHAPE, **MAMBA, attn_layer_indices=[2]),
    "olmo_hybrid": lambda: OlmoHybridConfig(
        **SHAPE,
        **LINEAR,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "lfm2": lambda: Lfm2Config(**SHAPE, **CONV, block_auto_adjust_ff_dim=False),
    "lfm2_moe": lambda: Lfm2MoeConfig(**SHAPE, **CONV, **SPARSE, num_dense_layers=1),
}
SLIDING = ("mistral-sliding", "gemma3", "gpt_oss")
LEAN = ("llama", "mistral", "qwen2", "qwen3")


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, config: Any = None
) -> Any:
    """A random model whose logits are far from flat, so that greedy texts differ between
    prompts.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or (FAMILIES | HYBRIDS)[family]())
    model.set_experts_implementation("eager")  # the grouped one has no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                parameter.ndim > 1 and "A_log" not in name
            ):  # kimi's, or its states would last no token
                parameter.mul_(20.0)
    if family in HYBRIDS and dtype == torch.float64:
        decoder = model.get_decoder()
        decoder.forward = in_float64(decoder.forward)
    return model.to(dtype).eval()


def in_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward without its islands of float32: transformers computes states in it."""

    def widened(*args: Any, **given: Any) -> Any:
        with _Float64():
            return forward(*args, **given)

    return widened


class _Float64(TorchFunctionMode):
    """Whatever would be float32 is float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        widened = [torch.float64 if value is torch.float32 else value for value in args]
        given = dict(kwargs or {})
        if given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        return func(*widened, **given)


@functools.cache
def tiny_target(family: str, *, lean: bool = False, dtype: torch.dtype = torch.float64) -> Target:
    """The family's random model as a target; shared between tests, which may not change it."""
    return (LeanTarget if lean else HFTarget)(tiny_model(family, dtype=dtype), family)


def uniform(seed: int, position: int, lane: int = 0) -> float:
    """One of flashdraft.decoding.sampling's numbers."""
    return float(uniforms([seed], [position], 1, lane))


def tiny_drafter(
    target: Target,
    *,
    block_size: int = 4,
    tree_nodes: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> DFlashDrafter:
    """A random two-layer DFlash drafter for any tiny target; `changes` are fields of its
    DraftConfig.
    """
    shape: dict[str, Any] = {
        "hidden_size": target.hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": target.vocab_size,
        "block_size": block_size,
        "mask_token_id": MASK,
        "target_layer_ids": (0, target.num_layers - 1),
        "num_target_layers": target.num_layers,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(seed)
    network = DFlashDraftModel(DraftConfig(**{**shape, **changes})).eval()
    return DFlashDrafter(PackedDraft(network, target), tree_nodes=tree_nodes)


class LetterTokenizer:
    """One letter or digit a token, so that a place in a text is a place in its tokens; ids 0 to 2
    are special.
    """

    LETTERS = string.ascii_letters + string.digits

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(self.LETTERS[token] for token in ids if token > EOS)


def requests_of(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    eos: Iterable[int] = (),
    first: int = 0,
) -> list[Request]:
    return [
        Request(
            list(prompt), own, TextDecoder(LetterTokenizer(), own.stop), frozenset(eos), first + i
        )
        for i, (prompt, own) in enumerate(zip(prompts, params, strict=True))
    ]


def run(engine: Engine, waiting: Sequence[Request]) -> list[Result]:
    """Every result, in order; `engine` may have fewer rows than there are requests."""
    results = {}
    for request in waiting:
        engine.submit(request)
    while engine.has_work:
        for chunk in step(engine):
            if chunk.result is not None:
                results[chunk.index] = chunk.result
    return [results[index] for index in sorted(results)]


def step(engine: Engine) -> list[Chunk]:
    """What a step gives; raises the error of a row that failed."""
    chunks = engine.step()
    for chunk in chunks:
        if chunk.error is not None:
            raise chunk.error
    return chunks


def admit(engine: Engine, request: Request) -> Chunk:
    """Give a request a row at once and read its prompt; the others do not move."""
    engine.submit(request)
    engine._place()
    chunks: list[Chunk] = []
    while not chunks:
        chunks = engine._read_prompts()
    (chunk,) = chunks
    if chunk.error is not None:
        raise chunk.error
    return chunk


class Table:
    """A language of four tokens whose logits are a table of the last one: exact laws, and thousands
    of rows in no time.
    """

    name, kernel, row_exact, nbytes = "table", "table", True, 0
    vocab_size, hidden_size, num_layers, context_length = 4, 1, 1, 1000

    def __init__(self, seed: int, sharpness: float) -> None:
        noise = torch.randn(
            4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        self.logits = noise * sharpness

    def new_cache(self, rows: int, slots: int) -> SlotCache:
        return SlotCache(0, rows, slots)

    def read(
        self, cache: SlotCache, slots: Sequence[int], texts: Sequence[Tensor], layers: Sequence[int]
    ) -> tuple[list[Tensor], None]:
        """A token is its own state."""
        for slot, text in zip(slots, texts, strict=True):
            cache.keep(slot, range(len(text)))
        return list(texts), None

    def lm_head(self, states: Tensor) -> Tensor:
        return self.logits[states]

    def forward(
        self, cache: SlotCache, slots: Any, tokens: Tensor, parents: Any, sizes: Any, layers: Any
    ) -> tuple[Tensor, None]:
        return self.logits[tokens], None

    def law(self, params: SamplingParams, length: int) -> Tensor:
        """The law of the first `length` tokens after token 0, flat."""
        table = probabilities(self.logits, params)
        law = table[0]
        for _ in range(length - 1):
            law = law[..., None] * table
        return law.flatten()


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Tiny tensors gain nothing from threads; the real model does, where no worker runs beside."""
    is_large = request.node.get_closest_marker("real_model") is not None
    threads = (os.cpu_count() or 1) if is_large and not IS_WORKER else 1
    torch.set_num_threads(threads)
