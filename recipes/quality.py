"""What int8 costs: perplexity on evaluation texts and agreement of the likeliest token, beside the exact kernel.

    python recipes/quality.py DATA_FOLDER     (with gsm8k/test.jsonl and humaneval/HumanEval.jsonl.gz)

60 problems of GSM8K with their reference answers, framed by the chat template, and 30 programs of HumanEval, 400 tokens at most.
"""

import gzip
import json
import math
import sys
from pathlib import Path

import torch

from flashdraft.decoding.tree import chain
from flashdraft.loading import load_target

data = Path(sys.argv[1])
problems = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").open()][:60]
packed = (data / "humaneval" / "HumanEval.jsonl.gz").read_bytes()
programs = [json.loads(line) for line in gzip.decompress(packed).splitlines()][:30]
best, first = {}, 0.0
for kernel in ("auto", "int8"):
    target, tokenizer, _ = load_target("smollm2-135m", kernel=kernel)
    texts = [program["prompt"] + program["canonical_solution"] for program in programs]
    for problem in problems:
        turns = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": problem["answer"]},
        ]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    surprise, count, best[kernel] = 0.0, 0, []
    for text in texts:
        tokens = torch.tensor(tokenizer(text)["input_ids"][:400])
        shape = chain(len(tokens))[None], torch.tensor([len(tokens)])
        logits, _ = target.forward(target.new_cache(1, 512), [0], tokens[None], *shape, ())
        laws = logits[0, :-1].log_softmax(-1)
        surprise -= float(laws.gather(1, tokens[1:, None]).sum())
        count += len(laws)
        best[kernel] += logits[0].argmax(-1).tolist()
    perplexity = math.exp(surprise / count)
    first = first or perplexity
    same = sum(a == b for a, b in zip(best[kernel], best["auto"], strict=True)) / len(best[kernel])
    print(
        f"{target.kernel}: perplexity {perplexity:.3f} ({perplexity / first - 1:+.2%}), likeliest token the same {same:.1%}"
    )
