"""Records by a JSON schema: are all of them valid, is the text that of plain decoding, and how many
passes of the target do forced tokens save?

    python recipes/json_schema.py [TARGET] [--kernel KERNEL] [--temperature T]

20 prompts, a record of six fields each, one row at a time, every block whole (no controller).
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import statistics
import time

import torch

import flashdraft
from flashdraft import SamplingParams
from flashdraft.bench.report import print_table
from flashdraft.decoding.grammar import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 30},
        "profession": {"enum": ["teacher", "doctor", "engineer", "farmer", "baker", "pilot"]},
        "is_married": {"type": "boolean"},
        "languages": {
            "type": "array",
            "items": {"enum": ["English", "French", "German", "Spanish", "Italian"]},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "city", "profession", "is_married", "languages"],
    "additionalProperties": False,
}

PEOPLE = (
    "Anna Berg is 34, teaches in Oslo, is married, and speaks English and German.",
    "Tom Hill, a pilot of 51 from Leeds, speaks English only and lives alone.",
    "Marie Blanc bakes bread in Lyon. She is 28, single, and speaks French.",
    "Paolo Neri, 45, is an engineer in Turin, married, with Italian and English.",
    "Lucia Vega is a doctor of 39 in Madrid; she and her husband speak Spanish.",
    "Old Peter Moor, 77, farms near York and has been married for fifty years.",
    "Eva Stein, 23, has just become a teacher in Bonn. She is not married.",
    "Jean Petit is 60, a farmer close to Dijon, and a widower.",
    "Carla Rossi, 31, flies planes out of Rome and is married to a pilot.",
    "Ben Ward is 19 and bakes for a hotel in Dover.",
    "Ines Lopez, an engineer in Seville, turned 42. She is married.",
    "Max Vogel of Vienna is a doctor, 55, divorced, fluent in English and German.",
    "Chloe Martin is 26 and teaches French in London. She is single.",
    "Hans Keller, 64, still works as a baker in Basel. He is married.",
    "Rosa Conti farms olives near Bari; she is 48 and married.",
    "Adam Reed, 37, designs bridges in Boston and is engaged.",
    "Nina Sommer, a pilot of 33, lives in Munich with her wife.",
    "Luis Ortega is a teacher in Cadiz, 58, married, and speaks three languages.",
    "Emma Clark, 29, is a doctor in Bristol. She is not married.",
    "Giulia Greco, 70, was an engineer in Milan; she is a widow.",
)
ASKED = "Write a JSON record of this person: {person}"


class Unforced:
    """The same grammar, of which nobody is told what it forces."""

    def __init__(self, inner):
        self.inner = inner

    def begin(self, ends):
        return Unforced(self.inner.begin(ends))

    def then(self, token):
        return Unforced(self.inner.then(token))

    def masked(self, logits):
        return self.inner.masked(logits)

    def allows(self, token):
        return True  # as a drafter that knows no grammar

    def forced(self):
        return ()


def measured(model, hook, params):
    """The results of all prompts, one at a time, and the seconds of their steps."""
    params = dataclasses.replace(params, logits_processor=hook)
    results = []
    for number, person in enumerate(PEOPLE):
        prompt = ASKED.format(person=person)
        results.append(model.generate(prompt, params.numbered(number)))
    return results


def is_valid(text):
    try:
        record = json.loads(text)
    except ValueError:
        return False
    if not isinstance(record, dict) or list(record) != SCHEMA["required"]:
        return False

    texts = (record["name"], record["city"])
    are_short = all(isinstance(text, str) and len(text) <= 30 for text in texts)
    is_age = type(record["age"]) is int and 0 <= record["age"] <= 120
    is_known = record["profession"] in SCHEMA["properties"]["profession"]["enum"]
    is_bool = type(record["is_married"]) is bool
    spoken = record["languages"]
    known = SCHEMA["properties"]["languages"]["items"]["enum"]
    are_known = isinstance(spoken, list) and 1 <= len(spoken) <= 3 and set(spoken) <= set(known)
    return are_short and is_age and is_known and is_bool and are_known


def count_valid(results):
    return sum(is_valid(result.text) for result in results)


parser = argparse.ArgumentParser(description="Passes that forced tokens save on a JSON schema.")
parser.add_argument("target", nargs="?", default="smollm2-135m")
parser.add_argument("--kernel", default="auto")
parser.add_argument("--temperature", type=float, default=0.0)
options = parser.parse_args()

params = SamplingParams(temperature=options.temperature, max_new_tokens=200)
models = {}
for draft in ("autoregressive", "prompt_lookup", "auto"):
    models[draft] = flashdraft.load(options.target, draft=draft, kernel=options.kernel, max_rows=1)
    models[draft].adaptive = False

plain = models["autoregressive"]
began = time.perf_counter()
grammar = Grammar.json_schema(plain.tokenizer, SCHEMA)
print(f"the first grammar took {time.perf_counter() - began:.2f} s")
began = time.perf_counter()
Grammar.json_schema(plain.tokenizer, {**SCHEMA, "title": "another"})
print(f"another one {1000 * (time.perf_counter() - began):.1f} ms")

free = measured(plain, None, dataclasses.replace(params, max_new_tokens=100))
print(f"without the schema {count_valid(free)} of {len(free)} are valid")
reference = measured(plain, Unforced(grammar), params)


def cells(name, results, passes, saved):
    """A line of the table."""
    texts_equal = [one.tokens for one in results] == [one.tokens for one in reference]
    tokens = sum(result.stats.num_tokens for result in results)
    seconds = sum(result.stats.decode_seconds for result in results)
    tau = statistics.mean(result.stats.tau for result in results)
    valid = f"{count_valid(results)} of {len(results)}"
    same = "yes" if texts_equal else "NO"
    speed = f"{tokens / seconds:.0f}"
    return [name, valid, same, str(tokens), str(passes), saved, f"{tau:.2f}", speed]


rows = []
for model in models.values():
    name = model.new_drafter().name
    unforced = measured(model, Unforced(grammar), params)
    all_passes = sum(result.stats.target_passes for result in unforced)
    rows.append(cells(name, unforced, all_passes, ""))

    forced = measured(model, grammar, params)
    passes = sum(result.stats.target_passes for result in forced)
    saved = 100 * (1 - passes / all_passes)
    rows.append(cells(f"{name} + forced", forced, passes, f"{saved:.1f} %"))

head = ("method", "valid", "plain text", "tokens", "passes", "saved", "tau", "tokens/s")
print_table(head, rows)
print(
    f"{options.target}, {plain.target.kernel}, temperature {options.temperature:g}; "
    f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; "
    f"torch {torch.__version__}, llguidance {importlib.metadata.version('llguidance')}, "
    f"Python {platform.python_version()}"
)
