"""Exported drafters in llama.cpp's server beside our own engine: the same texts, as many passes and
as many accepted drafts.

    LLAMA_SERVER=BINARY python recipes/llama_cpp_drafts.py TARGET.gguf FOLDER [DRAFT ...]

TARGET.gguf is the target in float32, as llama.cpp's own converter writes it;
recipes/llama_cpp_dflash.sh makes it and builds the server. FOLDER is where the drafters are
exported to. Without DRAFT: the shipped one, plain, and DFlash 2 and DSpark drafters with random
heads on its network. Both sides draft whole blocks greedily and with the draft network unrounded:
theirs in float32, ours in float64.
"""

import argparse
import shlex
from pathlib import Path

from engines import llama_server
from same_drafts import ours, tau, with_random_heads

from flashdraft import DFlashDraftModel, SamplingParams, load
from flashdraft.bench.report import print_table
from flashdraft.export.run import export_draft
from flashdraft.loading import shipped

RANDOM = ("selector", "markov")  # DFlash 2 and DSpark


def drafters(folder, target):
    """Folders of all three formats on the shipped drafter's network."""
    plain = folder / "v1"
    network = DFlashDraftModel.from_pretrained(shipped("dflash", target))
    network.save_pretrained(plain, plain=True)
    made = [plain]
    for head in RANDOM:
        made.append(with_random_heads("dflash", target, folder / head, head))
    return made


def row_of(draft, served, own, answers):
    """Texts, passes and accepted drafts of all questions, ours and theirs."""
    num_equal = 0
    for (tokens, _), answer in zip(own, answers, strict=True):
        num_equal += tokens == list(answer.tokens)
    passes = [len(lengths) for _, lengths in own]
    their_passes = [answer.figures["target_passes"] for answer in answers]
    taus = [tau(lengths) for _, lengths in own]
    their_taus = [answer.tau for answer in answers]
    return [
        f"{Path(draft).name} ({served})",
        f"{num_equal} of {len(own)}",
        "yes" if passes == their_passes else "no",
        f"{sum(taus) / len(taus):.3f}",
        f"{sum(their_taus) / len(their_taus):.3f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("drafts", nargs="*")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="of the drafter's file")
    options = parser.parse_args()

    options.folder.mkdir(parents=True, exist_ok=True)
    plain = load(options.target, draft="autoregressive", kernel="float32")
    rows = []
    for draft in options.drafts or drafters(options.folder, options.target):
        out = options.folder / f"{Path(draft).name}-gguf"
        exported = export_draft(str(draft), "llamacpp", out, options.target, dtype=options.dtype)
        for loss in exported.losses:
            print(f"lost: {loss}")
        print(shlex.join(exported.command), flush=True)
        *_, kind, _, most = exported.command

        prompts, own, _ = ours(draft, options.target, options.tokens, dtype="float64")
        method = llama_server(f"{options.gguf}+{out / 'draft.gguf'}+{most}+{kind}", plain)
        params = [SamplingParams(max_new_tokens=options.tokens)] * len(prompts)
        rows.append(row_of(draft, kind, own, method(prompts, params)))
    print_table(["drafter", "same texts", "same passes", "tau, ours", "llama.cpp"], rows)


if __name__ == "__main__":
    main()
