"""A talk of several turns, then prompts of different lengths answered together.

python examples/chat.py "Name a fruit." "Name another one."
"""

import argparse

import flashdraft

parser = argparse.ArgumentParser(description="Talk, then answer a batch.")
parser.add_argument("turns", nargs="*", default=["Name a fruit.", "Name another one."])
parser.add_argument("--max-new-tokens", type=int, default=24)
options = parser.parse_args()

model = flashdraft.load("smollm2-135m", max_rows=3)

# A conversation is a list of turns; the model's chat template renders it.
talk = [{"role": "system", "content": "You are a friendly assistant. Answer in one sentence."}]
for turn in options.turns:
    talk.append({"role": "user", "content": turn})
    answer = model.generate(talk, max_new_tokens=options.max_new_tokens)
    talk.append({"role": "assistant", "content": answer.text})
    print(f"> {turn}\n{answer.text}\n")

# A batch: results come in the order of the prompts, each the text that its prompt has alone.
prompts = ["Name a colour.", "What is 2 + 2?", talk]
results = model.generate(prompts, max_new_tokens=options.max_new_tokens)
for result in results:
    print(f"{result.stats.num_prompt_tokens:4} prompt tokens -> {result.text!r}")
if model.target.row_exact:
    alone = model.generate(prompts[0], max_new_tokens=options.max_new_tokens)
    assert results[0].tokens == alone.tokens
