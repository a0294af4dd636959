"""A record by a JSON schema: always valid, and the tokens that the schema forces cost no passes.

python examples/structured.py "Anna Berg is 34, teaches in Oslo, and is married."
"""

import argparse
import json

import flashdraft
from flashdraft import Grammar, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 30},
        "is_married": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "is_married"],
    "additionalProperties": False,
}

parser = argparse.ArgumentParser(description="Make a record of a sentence about a person.")
parser.add_argument("sentence", nargs="?", default="Anna Berg is 34, teaches in Oslo, is married.")
parser.add_argument("--max-new-tokens", type=int, default=96)
options = parser.parse_args()

model = flashdraft.load("smollm2-135m")
grammar = Grammar.json_schema(model.tokenizer, SCHEMA)
params = SamplingParams(max_new_tokens=options.max_new_tokens, logits_processor=grammar)
result = model.generate(f"Write a JSON record of this person: {options.sentence}", params)
print(result.text)

if result.finish_reason == "stop":
    assert list(json.loads(result.text)) == SCHEMA["required"]
passes = 1 + result.stats.target_passes
print(f"{len(result.tokens)} tokens in {passes} passes of the target")
