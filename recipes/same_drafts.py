"""Of recipes/authors_dflash.py and recipes/vllm_drafts.py: the questions, our own side, a DFlash 2
drafter with random heads, and the table."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

import flashdraft
from flashdraft import hub
from flashdraft.bench.report import print_table
from flashdraft.formats.read import read_draft
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.write import write_draft
from flashdraft.loading import shipped

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 60 km in 45 minutes. How fast is it in km/h? Reason step by step.",
    "Explain to a child why the sky is blue.",
    "Name five fruits and a colour for each, one per line.",
    "Translate into French: The cat sleeps on the warm roof.",
)
SEED = 0


def with_random_heads(draft, target, folder, head):
    """A drafter of another kind on the same network: its proposals hang on every new part."""
    config, tensors = read_draft(Path(hub.resolve(shipped(draft, target))))
    config = replace(config.without_heads(), sequential_head=head, head_rank=32)
    if head == "selector":
        config = replace(config, conv_kernel_size=2, conv_group_size=16)
    generator = torch.Generator().manual_seed(SEED)
    made = {}
    for name, shape in tensor_shapes(config).items():
        if name in tensors:
            made[name] = tensors[name]
            continue
        noise = torch.randn(shape, generator=generator)
        if name.endswith("base_kernel"):
            noise = 0.05 * noise
            noise[:, 0] += 1
        elif "kernel_projection" in name or "hidden_projection" in name:
            noise = 0.02 * noise
        else:
            noise = 0.5 * noise
        made[name] = noise.bfloat16()
    shutil.rmtree(folder, ignore_errors=True)
    write_draft(folder, config, made)
    return folder


def ours(draft, target, num_tokens, **how):
    """(token ids of the prompts, [(tokens, tokens of every pass)]): whole blocks, greedy."""
    config, _ = read_draft(Path(hub.resolve(shipped(str(draft), target))))
    lm = flashdraft.load(target, draft=str(draft), block_size=config.block_size, **how)
    prompts, answers = [], []
    for question in QUESTIONS:
        ids = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        result = lm.generate(ids, max_new_tokens=num_tokens)
        prompts.append(list(ids))
        passes = cut(result.stats.accepted_lengths, len(result.tokens) - 1)
        answers.append((list(result.tokens), passes))
    return prompts, answers, lm.eos


def cut(passes, num_tokens):
    """Tokens of every pass, without those behind the text's end."""
    left = num_tokens
    kept = []
    for length in passes:
        if left > 0:
            kept.append(min(length, left))
        left -= length
    return kept


def tau(passes):
    """Of one answer: tokens behind the first one by pass."""
    return sum(passes) / len(passes) if passes else 1.0


def show(name, own, others):
    """A row a question: whether the texts are equal, and tau on both sides."""
    rows = []
    for number, (mine, other) in enumerate(zip(own, others, strict=True)):
        is_equal = "yes" if mine[0] == other[0] else "NO"
        same = "yes" if mine[1] == other[1] else "no"
        rows.append([str(number), is_equal, same, f"{tau(mine[1]):.3f}", f"{tau(other[1]):.3f}"])
    means = []
    for side in (own, others):
        means.append(f"{sum(tau(passes) for _, passes in side) / len(side):.3f}")
    rows.append(["mean", "", "", *means])
    print_table(["question", "same text", "same passes", "ours", name], rows)
