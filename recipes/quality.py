"""What int8 costs: perplexity on evaluation texts, and agreement of the likeliest token.

    python recipes/quality.py DATA_FOLDER

The folder has gsm8k/test.jsonl and humaneval/HumanEval.jsonl.gz. Both figures stand beside the
exact kernel's. 60 problems of GSM8K with their reference answers, framed by the chat template, and
30 programs of HumanEval, 400 tokens at most.
"""

import gzip
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from flashdraft.decoding.tree import chain
from flashdraft.loading import load_target


class Quality(NamedTuple):
    kernel: str  # in words
    perplexity: float
    likeliest: list[int]  # at every position of all texts


def read_texts(folder, tokenizer):
    packed = (folder / "humaneval" / "HumanEval.jsonl.gz").read_bytes()
    texts = []
    for line in gzip.decompress(packed).splitlines()[:30]:
        program = json.loads(line)
        texts.append(program["prompt"] + program["canonical_solution"])

    for line in (folder / "gsm8k" / "test.jsonl").read_bytes().splitlines()[:60]:
        problem = json.loads(line)
        turns = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": problem["answer"]},
        ]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    return texts


def measure(kernel, folder):
    target, tokenizer, _ = load_target("smollm2-135m", kernel=kernel)
    surprise = 0.0
    count = 0
    likeliest = []
    for text in read_texts(folder, tokenizer):
        tokens = torch.tensor(tokenizer(text)["input_ids"][:400])
        parents = chain(len(tokens))[None]
        sizes = torch.tensor([len(tokens)])
        cache = target.new_cache(1, 512)
        logits, _ = target.forward(cache, [0], tokens[None], parents, sizes, ())
        logprobs = logits[0, :-1].log_softmax(-1)
        surprise -= float(logprobs.gather(1, tokens[1:, None]).sum())
        count += len(logprobs)
        likeliest += logits[0].argmax(-1).tolist()
    return Quality(target.kernel, math.exp(surprise / count), likeliest)


def show(quality, exact):
    pairs = zip(quality.likeliest, exact.likeliest, strict=True)
    same = sum(own == other for own, other in pairs) / len(quality.likeliest)
    change = quality.perplexity / exact.perplexity - 1
    print(
        f"{quality.kernel}: perplexity {quality.perplexity:.3f} ({change:+.2%}), "
        f"likeliest token the same {same:.1%}"
    )


folder = Path(sys.argv[1])
exact = measure("auto", folder)
show(exact, exact)
show(measure("int8", folder), exact)
