"""What works with what, as tables of the README and of docs/formats.md, made of the code.

    python recipes/works_with.py

writes each table anew between its two marks; tests/test_readme.py fails where one is not what this
makes. Published drafters are listed in PUBLISHED below, from their publishers' own lists: a drafter
counts as one that loads where its format is read and its target's family is taken. None of these
files was fetched.
"""

import re
from pathlib import Path
from typing import NamedTuple

from flashdraft.formats.recognise import PUBLISHERS, TITLES
from flashdraft.models.heads import TRAINED_HEADS
from flashdraft.models.hf import CHECKED, RUNNING
from flashdraft.models.lean import FAMILIES

ROOT = Path(__file__).parents[1]
MEASURED = {  # families that pass the check at load with random weights (tests/test_families.py)
    "deepseek_v3": "Kimi K2",
    "mellum": "Mellum 2",
    "minimax_m2": "MiniMax M2",
}


class Drafter(NamedTuple):
    """A published drafter."""

    name: str  # of its target, as its publisher writes it
    kind: str  # of recognise.TITLES, or the name of a format that is not read
    family: str  # model_type of the target's language model; empty: not known


class Listed(NamedTuple):
    """A publisher's list."""

    title: str
    drafters: tuple[Drafter, ...]


def of(kind: str, family: str, *names: str) -> tuple[Drafter, ...]:
    return tuple(Drafter(name, kind, family) for name in names)


PUBLISHED = (
    Listed(
        "DFlash v1, z-lab (README of `dflash` 0.1.0)",
        (
            *of("dflash", "qwen3", "Qwen3-4B", "Qwen3-8B"),
            *of("dflash", "qwen3_moe", "Qwen3-Coder-30B-A3B"),
            *of("dflash", "qwen3_next", "Qwen3-Coder-Next"),
            *of("dflash", "qwen3_5_text", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B"),
            *of("dflash", "qwen3_5_moe_text", "Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B"),
            *of("dflash", "qwen3_5_moe_text", "Qwen3.5-397B-A17B", "Qwen3.6-35B-A3B"),
            *of("dflash", "qwen3_5_text", "Qwen3.6-27B"),
            *of("dflash", "gemma4_text", "Gemma-4-12B", "Gemma-4-26B-A4B", "Gemma-4-31B"),
            *of("dflash", "gpt_oss", "gpt-oss-20b", "gpt-oss-120b"),
            *of("dflash", "llama", "Llama-3.1-8B"),
            *of("dflash", "minimax_m2", "MiniMax-M2.5", "MiniMax-M2.7"),
            *of("dflash", "deepseek_v3", "Kimi-K2.5", "Kimi-K2.6", "Kimi-K2.7-Code"),
            *of("dflash", "glm_moe_dsa", "GLM-5.1"),
            *of("dflash", "", "Alpamayo-1.5-10B", "Alpamayo-R1-10B"),
        ),
    ),
    Listed(
        "DFlash 2, z-lab and incoai (collection; the first two are in that README, too)",
        (
            *of("dflash2", "qwen3_5_text", "Qwen3.8-27B"),
            *of("dflash2", "muse_glimmer_text", "Muse-Glimmer-30B"),
            *of("dflash2", "qwen3_5_moe_text", "Qwen3.6-35B-A3B"),
            *of("dflash2", "qwen4_exp_text", "Qwen3.8-Flash-Next"),
            *of("dflash2", "glm5_next_text", "GLM-5.3", "GLM-5.3-Flash"),
            *of("dflash2", "minimax_m3_vl_text", "MiniMax-M3.1-Flash"),
            *of("dflash2", "", "Ornith-1.5-122B"),
        ),
    ),
    Listed(
        "speculators (RedHatAI and others)",
        (
            *of("dflash", "qwen3", "Qwen3-8B dflash"),
            *of("dflash", "qwen3_moe", "Qwen3-30B-A3B-Instruct-2507 dflash"),
            *of("dflash", "qwen3_5_moe_text", "Qwen3.5-397B-A17B dflash"),
            *of("dflash", "qwen3_5_text", "Qwen3.8-27B dflash"),
            *of("dflash", "gemma4_text", "gemma-4-31B dflash"),
            *of("dflash", "mellum", "Mellum2-12B-A2.5B dflash"),
            *of("dflash", "deepseek_v4", "DeepSeek-V4-Flash dflash"),
            *of("Laguna", "laguna", "Laguna-XS.2"),
            *of("dflash2", "qwen3", "Qwen3-4B dflash2", "Qwen3-8B dflash2"),
            *of("dflash2", "gemma4_text", "gemma-4-31B dflash2"),
            *of("dspark", "qwen3", "Qwen3-8B dspark"),
            *of("dspark", "qwen3_5_text", "Qwen3.8-27B dspark"),
            *of("dspark", "qwen3_5_moe_text", "Qwen3.6-35B-A3B dspark"),
            *of("dspark", "gemma4_text", "gemma-4-26B-A4B dspark", "gemma-4-31B dspark"),
            *of("dspark", "glm_moe_dsa", "GLM-5.2 dspark"),
            *of("dspark", "glm5_next_text", "GLM-5.3 dspark", "GLM-5.3-Flash dspark"),
            *of("P-EAGLE", "qwen3", "Qwen3-8B peagle"),
            *of("eagle3", "llama", "Llama-3.1-8B eagle3"),
            *of("eagle3", "qwen3", "Qwen3-32B eagle3"),
            *of("eagle3", "gpt_oss", "gpt-oss-20b eagle3"),
            *of("eagle3", "gemma4_text", "gemma-4-31B eagle3"),
        ),
    ),
    Listed(
        "DeepSpec (deepseek-ai)",
        (
            *of("dflash", "qwen3", "Qwen3-4B dflash", "Qwen3-8B dflash", "Qwen3-14B dflash"),
            *of("dspark", "qwen3", "Qwen3-4B dspark", "Qwen3-8B dspark", "Qwen3-14B dspark"),
            *of("eagle3", "qwen3", "Qwen3-4B eagle3", "Qwen3-8B eagle3", "Qwen3-14B eagle3"),
            *of("Gemma 4's own DSpark", "gemma4_text", "gemma-4-12B dspark"),
            *of("Gemma 4's own DSpark", "gemma4_text", "gemma-4-12B dflash"),
            *of("eagle3", "gemma4_text", "gemma-4-12B eagle3"),
            *of("dflash", "qwen4_exp_text", "Qwen3.8-Flash-Next dflash"),
        ),
    ),
)
REASONS = {  # why a family is not taken
    "": "its target is no causal LM of transformers",
    "deepseek_v4": "its features are four streams, not one",
    "glm5_next_text": "an indexer's cache that cannot be cut",
    "glm_moe_dsa": "an indexer's cache that cannot be cut",
    "laguna": "see its format",
    "minimax_m3_vl_text": "an indexer's cache that cannot be cut",
    "muse_glimmer_text": "transformers has no causal LM of its text part alone",
    "qwen4_exp_text": "states outside of mixers, and an indexer",
}


def verdict(drafter: Drafter) -> str:
    """Empty where it loads and runs, else why not."""
    if drafter.kind not in TITLES:
        return f"{drafter.kind} is not read"
    is_taken = drafter.family in (*FAMILIES, *CHECKED, *RUNNING, *MEASURED)
    return "" if is_taken else REASONS[drafter.family]


def names(families: tuple[str, ...] | list[str]) -> str:
    return ", ".join(family.removesuffix("_text") for family in families)


def targets() -> str:
    on_transformers = [family for family in CHECKED if family not in FAMILIES]
    rows = [
        ("target", "CPU", "GPU (`--device cuda`)"),
        ("---", "---", "---"),
        (
            f"{names(list(FAMILIES))} in float32, or GGUF files of them",
            "our C++ kernels: `compact`, `float32`, `int8`; texts equal bit for bit",
            "by torch (`--kernel torch`, `compiled`) or transformers' forward",
        ),
        (
            "the same in bfloat16 or float16; sizes that the kernels cannot take",
            "our decoder on torch",
            "the same",
        ),
        (
            f"{names(on_transformers)}, mistral with a sliding window",
            "transformers' forward, tested family by family",
            "transformers' forward",
        ),
        (
            f"with running states: {names(list(RUNNING))}",
            "transformers' forward, its mixers replayed over what was kept",
            "the same",
        ),
        (
            "other causal LMs of transformers, quantised ones too; models that also see",
            "transformers' forward, behind a check at load",
            "the same",
        ),
        (
            "Mamba-1, nemotron_h, zamba2, encoder-decoders, a folder's own code",
            "refused",
            "refused",
        ),
    ]
    return table(rows)


def drafters() -> str:
    rows = [
        ("drafter", "folders that are read", "trees", "trained here", "for SmolLM2-135M"),
        ("---", "---", "---", "---", "---"),
    ]
    shipped = ("dflash", "eagle3", "medusa")
    trained = {"dflash": "yes", "eagle3": "yes", "medusa": "yes"}
    for kind, head in (("dflash2", "selector"), ("dspark", "markov")):
        if head in TRAINED_HEADS:
            trained[kind] = f"`--head {head}`"
    for kind, title in TITLES.items():
        if kind == "draft_model":
            continue
        whose = ", ".join(PUBLISHERS[kind])
        if kind == "dspark":
            whose = whose.replace("DeepSpec", "DeepSpec (also its plain DFlash)")
        whether_shipped = "shipped" if kind in shipped else ""
        rows.append((title, whose, "yes", trained.get(kind, ""), whether_shipped))
    rows += [
        (
            "draft model",
            "any causal LM with the target's tokenizer",
            "chains",
            "yes, cut from the target",
            "shipped",
        ),
        ("prompt lookup", "needs none", "chains", "", ""),
        ("two of these joined by `+`", "", "as its parts", "", ""),
    ]
    return table(rows)


def published() -> str:
    """How many of each list load, and each one that does not."""
    rows = [("list", "drafters", "load and run", "not, and why"), ("---", "---", "---", "---")]
    for listed in PUBLISHED:
        why: dict[str, list[str]] = {}
        for drafter in listed.drafters:
            reason = verdict(drafter)
            if reason:
                why.setdefault(reason, []).append(drafter.name)
        missing = sum(len(those) for those in why.values())
        told = "; ".join(f"{', '.join(those)}: {reason}" for reason, those in why.items())
        count = len(listed.drafters)
        rows.append((listed.title, str(count), str(count - missing), told))
    return table(rows)


def table(rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


TABLES = {
    ("README.md", "targets"): targets,
    ("README.md", "drafters"): drafters,
    ("docs/formats.md", "published"): published,
}


def with_tables(page: str, text: str) -> str:
    """The page's text with each of its tables as it is now."""
    for (where, name), make in TABLES.items():
        if where != page:
            continue
        mark = f"<!-- {name}: python recipes/works_with.py -->\n"
        end = "<!-- end -->\n"
        pattern = re.escape(mark) + r".*?" + re.escape(end)
        made = mark + make() + end
        text, count = re.subn(pattern, lambda _, made=made: made, text, flags=re.DOTALL)
        assert count == 1, f"{page} has no place for the table of {name}"
    return text


def main() -> None:
    for page in dict.fromkeys(where for where, _ in TABLES):
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(page, text), encoding="utf-8")


if __name__ == "__main__":
    main()
