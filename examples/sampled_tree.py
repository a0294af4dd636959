"""A tree of drafts at a temperature: the seeded text is that of plain decoding, token for token.

python examples/sampled_tree.py "Write a haiku about the sea." --max-new-tokens 48
"""

import argparse

import flashdraft
from flashdraft import SamplingParams

parser = argparse.ArgumentParser(description="Compare seeded texts with and without drafts.")
parser.add_argument("prompt", nargs="?", default="Write a haiku about the sea.")
parser.add_argument("--max-new-tokens", type=int, default=48)
options = parser.parse_args()

plain = flashdraft.load("smollm2-135m", draft="autoregressive")
chain = flashdraft.load("smollm2-135m", block_size=6)
tree = flashdraft.load("smollm2-135m", block_size=6, tree_nodes=16)

for seed in (1, 2):
    params = SamplingParams(
        temperature=0.8, top_p=0.95, seed=seed, max_new_tokens=options.max_new_tokens
    )
    own = plain.generate(options.prompt, params)
    print(f"seed {seed}: {own.text!r}")

    for name, model in (("a chain of 6", chain), ("a tree of 16", tree)):
        drafted = model.generate(options.prompt, params)
        assert drafted.tokens == own.tokens, "the text changed"
        print(f"  {name}: the same {len(own.tokens)} tokens, tau {drafted.stats.tau:.2f}")
