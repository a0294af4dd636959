"""Our exported folder in z-lab's own package beside our own engine: the same texts, the same
acceptance, pass by pass.

    pip install --no-deps dflash==0.1.0
    python recipes/authors_dflash.py FOLDER [--draft dflash] [--target smollm2-135m]

FOLDER is where the drafter is exported to; with --random-heads it becomes a DFlash 2 drafter with
random convolutions and a random selector before that. Both run greedily on a CPU, in whole blocks
and with the draft network unrounded: theirs in float32, ours in float64. Their timer, which waits
for a GPU, is replaced.
"""

import argparse
import json
from pathlib import Path

import torch
from dflash.model import DFlash2DraftModel, DFlashDraftModel, dflash_generate
from same_drafts import ours, show, with_random_heads
from transformers import AutoModelForCausalLM

from flashdraft import hub
from flashdraft.export.run import export_draft


def theirs(folder, target, prompts, num_tokens, eos):
    """(tokens, tokens of every pass) of each prompt, by their code."""
    torch.cuda.synchronize = lambda *_: None  # all that their timer wants
    model = AutoModelForCausalLM.from_pretrained(hub.resolve(target), dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_second = config["architectures"] == ["DFlash2DraftModel"]
    kind = DFlash2DraftModel if is_second else DFlashDraftModel
    draft = kind.from_pretrained(folder, dtype=torch.float32)
    found = []
    for ids in prompts:
        told = dflash_generate(
            draft.eval(),
            model.eval(),
            torch.tensor([ids]),
            num_tokens,
            sorted(eos),
            return_stats=True,
        )
        tokens = told.output_ids[0, len(ids) :].tolist()
        found.append((tokens, told.acceptance_lengths))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draft", default="dflash")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float64", help="of our side")
    parser.add_argument("--random-heads", action="store_true", help="a DFlash 2 drafter")
    options = parser.parse_args()

    draft = options.draft
    if options.random_heads:
        heads = options.folder.with_name(f"{options.folder.name}-heads")
        draft = str(with_random_heads(draft, options.target, heads, "selector"))
    exported = export_draft(draft, "zlab", options.folder, options.target)
    for loss in exported.losses:
        print(f"lost: {loss}")

    prompts, own, eos = ours(options.folder, options.target, options.tokens, dtype=options.dtype)
    others = theirs(options.folder, options.target, prompts, options.tokens, eos)
    show("theirs", own, others)


if __name__ == "__main__":
    main()
