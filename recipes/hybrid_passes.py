"""Passes of a target with running states, and calls of its mixers, by how often drafts are right.

    python recipes/hybrid_passes.py [FAMILY]     (default qwen3_next; granitemoehybrid, lfm2)

A toy of the family with random weights, in float64; chains of a block of 8 nodes, every draft right
with the same probability; the engine as it is, greedy. What a pass costs is the weights that it
reads: attention, MLPs and experts are read once a pass, a mixer's own weights once a call. By the
tokens that a mixer may read at a time before its state has to move (`merged`); 0: it moves at once.

The last rows leave states as a whole read left them, rejected drafts included, and cut keys and
values only, as transformers' Cache.crop does: their texts are wrong, and the recipe fails where
that is not so, or where another row's text is not the plain one.
"""

import random
import sys
from types import SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Qwen3NextConfig,
)

import flashdraft.models.cache
from flashdraft.bench.report import print_table
from flashdraft.decoding.text import TextDecoder
from flashdraft.decoding.tree import chain
from flashdraft.engine import Engine, Request
from flashdraft.models.cache import Running
from flashdraft.models.hf import HFTarget
from flashdraft.models.states import mixers_of
from flashdraft.types import Drafter, Proposal, SamplingParams

NUM_TOKENS = 120
BLOCK = 8
TEXTS = 4
CHANCES = (0.5, 0.8, 0.9)
MERGED = (0, 24, 32, 48)
VOCAB = 256
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2}
LINEAR = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
CONFIGS = {
    "qwen3_next": lambda: Qwen3NextConfig(
        **SHAPE,
        **EXPERTS,
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **SHAPE,
        **EXPERTS,
        **LINEAR,
        num_local_experts=4,
        shared_intermediate_size=32,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
    ),
    "lfm2": lambda: Lfm2Config(
        **SHAPE,
        layer_types=["conv", "conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    ),
}


class Guesses(Drafter):
    """Knows the text, and is right about a token with a given chance."""

    name = "guesses"

    def __init__(self, text, chance):
        self.text = text
        self.chance = chance
        self.luck = random.Random(1)

    def propose(self, rows, max_nodes):
        (history,) = rows.histories
        tokens = [history[-1]]
        for token in self.text[len(history) : len(history) + min(BLOCK, max_nodes) - 1]:
            is_right = self.luck.random() < self.chance
            tokens.append(token if is_right else (token + 1) % VOCAB)
        count = len(tokens)
        return Proposal(torch.tensor([tokens]), chain(count)[None], torch.tensor([count]))

    def observe(self, rows, tokens, features):
        pass

    def end(self, rows):
        pass


class LeftBehindAll(Running):
    """The fault: a state stays where the whole read left it."""

    def keep(self, path):
        end = self.inputs_end
        super().keep(path)
        if end is not None:
            self.moved(end)


def toy(family):
    """A random model whose likeliest tokens change from place to place."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20.0)
    return model.double().eval()


def plain(model, prompt):
    """The model's own greedy text, every token from a pass over all before it."""
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            logits = model(torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
    return text


def counted(model):
    """Calls and tokens of the first mixer, which is as all others, from now on."""
    counts = SimpleNamespace(calls=0, tokens=0)
    module = mixers_of(model)[0]
    stock = type(module).forward

    def forward(**given):
        counts.calls += 1
        counts.tokens += given["hidden_states"].shape[:2].numel()
        return stock(module, **given)

    module.forward = forward
    return counts


def run(target, text, num_prompt, chance):
    """Passes, tokens read, and where the text leaves the plain one, if it does."""
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "")
    engine = Engine(target, Guesses(text, chance))
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    request = Request(text[:num_prompt], params, TextDecoder(tokenizer))
    engine.submit(request)
    while engine.has_work:
        engine.step()

    stats = request.stats
    wrong = [place for place in range(len(text)) if request.history[place] != text[place]]
    first_wrong = wrong[0] - num_prompt if wrong else None
    return stats.target_passes, stats.target_passes + stats.num_drafted, first_wrong


def row(name, target, counts, texts, chance):
    """Means over the texts."""
    counts.calls = counts.tokens = 0
    passes = read = 0
    wrong = []
    for text in texts:
        own_passes, own_read, first_wrong = run(target, text, len(text) - NUM_TOKENS, chance)
        passes += own_passes
        read += own_read
        wrong.append(first_wrong)
    cells = [passes, read, counts.calls, counts.tokens]
    means = [f"{cell / len(texts):.0f}" for cell in cells]
    places = [place for place in wrong if place is not None]
    is_plain = not places
    return [name, f"{chance}", *means, "plain" if is_plain else f"wrong from {places}"], is_plain


def main():
    family = sys.argv[1] if len(sys.argv) > 1 else "qwen3_next"
    model = toy(family)
    target = HFTarget(model, family)
    prompts = [[3 + (11 * i + 7 * seed) % 200 for i in range(8)] for seed in range(TEXTS)]
    texts = [plain(model, prompt) for prompt in prompts]
    counts = counted(model)

    rows = []
    sound = True
    for merged in MERGED:
        target.merged_tokens = merged
        for chance in CHANCES:
            cells, is_plain = row(f"merged {merged}", target, counts, texts, chance)
            rows.append(cells)
            sound = sound and is_plain

    flashdraft.models.cache.Running = LeftBehindAll
    for chance in CHANCES:
        cells, is_plain = row("fault: states left", target, counts, texts, chance)
        rows.append(cells)
        sound = sound and not is_plain

    columns = ["", "right", "passes", "tokens read", "mixer calls", "mixer tokens", "text"]
    print_table([f"{family} {columns[0]}".strip(), *columns[1:]], rows)
    if not sound:
        sys.exit("a text is not what it should be")


if __name__ == "__main__":
    main()
