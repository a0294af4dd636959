"""A drafter's model card: what it was made for, of what, how, and what was measured; written beside its weights."""

from typing import Any

from flashdraft.checkpoint import DraftConfig

__all__ = ["model_card"]


def model_card(config: DraftConfig, target: str, run: dict[str, Any], figures: dict[str, Any], *, num_samples: int) -> str:
    """run: what run.json holds; figures: `step`, `positions_seen`, `num_prompts` and `taus`, (step, tau) of every measurement."""
    made, size = run["versions"], config.block_size
    head = "none" if config.sequential_head is None else f"{config.sequential_head}, inner size {config.head_rank}"
    settings = ", ".join(f"{name} {value}" for name, value in run["config"].items())
    measured = "\n".join(f"| {step} | {tau:.2f} |" for step, tau in figures["taus"])
    return f"""---
library_name: flashdraft
tags: [speculative-decoding, dflash]
---

# DFlash drafter of {target}

A block-diffusion draft network (DFlash, arXiv 2602.06036). It proposes, the target decides: no text of the target changes.

| | |
|---|---|
| target | `{target}` |
| draft layers | {config.num_hidden_layers} |
| block | {size}: the anchor and {size - 1} masked positions; mask token {config.mask_token_id} |
| features | outputs of target layers {", ".join(map(str, config.target_layer_ids))} |
| draft vocabulary | {config.draft_vocab_size or config.vocab_size} of {config.vocab_size} tokens |
| sequential head | {head} |
| training data | {num_samples} answers of the target itself |
| steps, block positions | {figures["step"]}, {figures["positions_seen"]} |

Settings: {settings}.

## Measured

tau (tokens per target pass) on {figures["num_prompts"]} held-out prompts, greedy, decoded by the engine:

| step | tau |
|---|---|
{measured}

`{run["command"]}`; {run["device"]}, {run["threads"]} threads, torch {made["torch"]}, transformers {made["transformers"]},
flashdraft {made["flashdraft"]} at commit {run["commit"]}.
"""
