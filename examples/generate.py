"""One answer, then a stream whose drafted parts are marked.

python examples/generate.py "Why is the sky blue?" --max-new-tokens 64
"""

import argparse

import flashdraft

parser = argparse.ArgumentParser(description="Generate an answer, then stream it.")
parser.add_argument("prompt", nargs="?", default="Why is the sky blue?")
parser.add_argument("--max-new-tokens", type=int, default=64)
options = parser.parse_args()

model = flashdraft.load("smollm2-135m")  # its drafter is found by itself

result = model.generate(options.prompt, max_new_tokens=options.max_new_tokens)
print(result.text)
print(f"-> {result.stats.num_tokens} tokens in {result.stats.target_passes} passes of the target\n")

# The same text as it comes. What stands in brackets was drafted, and accepted by the target.
for chunk in model.stream(options.prompt, max_new_tokens=options.max_new_tokens):
    for piece in chunk.pieces:
        print(f"[{piece.text}]" if piece.drafted else piece.text, end="", flush=True)
    if chunk.result is not None:
        print(f"\n-> tau {chunk.result.stats.tau:.2f}")
        assert chunk.result.text == result.text
