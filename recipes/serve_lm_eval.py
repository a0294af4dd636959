"""Of recipes/serve_lm_eval.sh: whether two runs of lm-eval have the same scores and answers.

    python recipes/serve_lm_eval.py RUN OTHER_RUN

Prints the scores; the exit status is 1 where anything differs.
"""

import json
import sys
from pathlib import Path


def scores(run):
    """By task and metric; what lm-eval says about itself is left out."""
    (file,) = run.rglob("results_*.json")
    found = {}
    for task, values in json.loads(file.read_text())["results"].items():
        for name, value in values.items():
            if isinstance(value, float) and "stderr" not in name:
                found[task, name] = value
    return found


def answers(run):
    """What the server answered, by number of the question."""
    (file,) = run.rglob("samples_*.jsonl")
    found = {}
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc_id"]] = sample["resps"]
    return found


def main():
    one, other = map(Path, sys.argv[1:])
    left, right = scores(one), scores(other)
    for (task, name), value in left.items():
        print(f"{task} {name}: {value:.4f} {right[task, name]:.4f}")

    asked = answers(one)
    again = answers(other)
    same = sum(asked[number] == again[number] for number in asked)
    print(f"{one.name}, {other.name}: {same} of {len(asked)} answers are the same")
    sys.exit(left != right or same < len(asked))


main()
