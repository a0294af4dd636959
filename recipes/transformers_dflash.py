"""Our exported folder in transformers' own `generate(..., speculation_type="dflash")` beside our
engine: the same texts, the same acceptance, pass by pass.

    pip install transformers==5.24.0
    python recipes/transformers_dflash.py FOLDER [--draft dflash] [--target smollm2-135m]

FOLDER is where the drafter is exported to. Both run greedily on a CPU, in whole blocks and with the
draft network unrounded: theirs in float32, ours in float64.
"""

import argparse
from pathlib import Path

import torch
import transformers
from same_drafts import cut, ours, show
from transformers import AutoModel, AutoModelForCausalLM
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

from flashdraft import hub
from flashdraft.export.run import export_draft


def theirs(folder, target, prompts, num_tokens, eos):
    """(tokens, tokens of every pass) of each prompt, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(hub.resolve(target), dtype=torch.float32).eval()
    draft = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    passes = []

    def note(generator, input_ids, scores, num_matches):
        passes.append(int(num_matches) + 1)

    DFlashTokenCandidateGenerator.update_candidate_strategy = note
    found = []
    for ids in prompts:
        passes.clear()
        answer = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            assistant_model=draft,
            speculation_type="dflash",
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=sorted(eos),
        )
        tokens = answer[0, len(ids) :].tolist()
        drafted = passes[1:]  # the first one reads the prompt, without drafts
        found.append((tokens, cut(drafted, len(tokens) - 1)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draft", default="dflash")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float64", help="of our side")
    options = parser.parse_args()

    plain = options.folder.with_name(f"{options.folder.name}-plain")
    export_draft(options.draft, "zlab", plain, options.target)  # the same network, for us
    exported = export_draft(options.draft, "transformers", options.folder, options.target)
    for loss in exported.losses:
        print(f"lost: {loss}")

    prompts, own, eos = ours(plain, options.target, options.tokens, dtype=options.dtype)
    others = theirs(options.folder, options.target, prompts, options.tokens, eos)
    show(f"transformers {transformers.__version__}", own, others)


if __name__ == "__main__":
    main()
