"""Of recipes/serve_lm_eval.sh: whether two runs of lm-eval have the same scores and answers.

    python recipes/serve_lm_eval.py RUN OTHER_RUN [MODEL_FOLDER]

Prints the scores; the exit status is 1 where anything differs, or nothing is there. With a model's
folder, the run's loglikelihoods are held against transformers' in float32, too: they may differ by
what the server's kernel rounds, but not by more than FAR.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FAR = 1.0  # nats, of all tokens of an answer
CHECKED = 5  # questions


def scores(run):
    """By task and metric; what lm-eval says about itself is left out."""
    (file,) = run.rglob("results_*.json")
    found = {}
    for task, values in json.loads(file.read_text())["results"].items():
        for name, value in values.items():
            if isinstance(value, float) and "stderr" not in name:
                found[task, name] = value
    return found


def samples(run):
    """What was asked and answered, by number of the question."""
    (file,) = run.rglob("samples_*.jsonl")
    lines = map(json.loads, file.read_text().splitlines())
    return {sample["doc_id"]: sample for sample in lines}


def farthest(run, folder):
    """The largest difference of a loglikelihood to transformers'."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    most = 0.0
    for sample in list(samples(run).values())[:CHECKED]:
        pairs = zip(sample["arguments"].values(), sample["resps"], strict=True)
        for asked, ((told, _),) in pairs:
            start = len(tokenizer.encode(asked["arg_0"]))
            tokens = tokenizer.encode(asked["arg_0"] + asked["arg_1"])
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0]
            logprobs = torch.log_softmax(logits, -1)
            behind = torch.tensor(tokens[start:])
            own = logprobs[start - 1 : -1].gather(1, behind[:, None]).sum()
            most = max(most, abs(float(told) - float(own)))
    return most


def main():
    one, other = map(Path, sys.argv[1:3])
    left, right = scores(one), scores(other)
    for (task, name), value in left.items():
        print(f"{task} {name}: {value:.4f} {right[task, name]:.4f}")

    asked = samples(one)
    again = samples(other)
    same = sum(asked[number]["resps"] == again[number]["resps"] for number in asked)
    print(f"{one.name}, {other.name}: {same} of {len(asked)} answers are the same")
    is_wrong = not left or not asked or left != right or same < len(asked)
    for folder in sys.argv[3:]:
        difference = farthest(one, folder)
        print(f"loglikelihoods differ from transformers' by {difference:.4f} at most")
        is_wrong = is_wrong or difference > FAR
    sys.exit(is_wrong)


main()
