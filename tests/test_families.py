"""Families that the tables of docs/formats.md count on besides those of test_target.py: targets of
published drafters, at toy size, after rejected drafts.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE
from test_target import CLOSE, FAR, Faults, worst_after_all
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flashdraft.models.hf import HFTarget

WORKS_WITH = Path(__file__).parent.parent / "recipes" / "works_with.py"
LATENT: dict[str, Any] = {  # keys and values in one narrow state, of two widths
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**SHAPE, **EXPERTS, **LATENT},
    "mellum": {**SHAPE, **EXPERTS, "head_dim": 8, "num_experts": 4},
    "minimax_m2": {
        **SHAPE,
        "head_dim": 8,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def test_every_family_that_is_counted_on_is_tested() -> None:
    assert runpy.run_path(str(WORKS_WITH))["MEASURED"].keys() == CONFIGS.keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_trees_after_rejected_drafts_read_as_plain_text(family: str) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    target = HFTarget(model, family)
    assert worst_after_all(target, model) < CLOSE
    assert worst_after_all(target, model, Faults(rollback=True)) > FAR
