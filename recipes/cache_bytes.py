"""Bytes of keys and values that one token costs, of a target and its drafter: what a row needs.

  python recipes/cache_bytes.py                                    the table of docs/serving.md
  python recipes/cache_bytes.py run/my-model --draft run/best --bytes 2 --rows 16 --context 8192

A token has a key and a value in every layer and every key/value head:

  bytes = 2 x layers x key/value heads x head size x bytes of a number

Numbers have 4 bytes on the C++ kernels and in float32, 2 in bfloat16 and float16. A drafter of
DFlash has its own layers of this kind, EAGLE-3 one, a draft model all of its own; Medusa and prompt
lookup have none.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from flashdraft.bench.roofline import shape
from flashdraft.formats.read import read_draft

GIB = 2**30


class Layers(NamedTuple):
    """What keeps keys and values."""

    count: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, number: int) -> int:
        return 2 * self.count * self.num_kv_heads * self.head_dim * number


class Case(NamedTuple):
    """One line of the table: on which numbers, and how many rows of which length."""

    name: str
    target: Layers
    drafter: Layers | None
    number: int  # bytes of one
    rows: int
    context: int


def of_target(name: str) -> Layers:
    """Of a built-in name, one of assets/roofline.json, or a folder."""
    found = shape(name)
    return Layers(found.layers, found.kv_heads, found.head_dim)


def of_drafter(folder: str | None) -> Layers | None:
    if folder is None:
        return None
    config, _ = read_draft(Path(folder))
    return Layers(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


def known() -> list[Case]:
    """The table of docs/serving.md."""
    smollm2 = of_target("smollm2-135m")
    qwen3 = of_target("qwen3-8b")
    ours = Layers(3, 3, 64)  # assets/smollm2-135m-dflash
    theirs = Layers(5, 8, 128)  # z-lab/Qwen3-8B-DFlash-b16
    return [
        Case("SmolLM2-135M and its DFlash drafter, CPU kernels", smollm2, ours, 4, 8, 8192),
        Case("SmolLM2-135M alone, CPU kernels", smollm2, None, 4, 8, 8192),
        Case("Qwen3-8B and a DFlash drafter of 5 layers, bfloat16", qwen3, theirs, 2, 8, 8192),
        Case("Qwen3-8B and a DFlash drafter of 5 layers, float32", qwen3, theirs, 4, 8, 8192),
    ]


def table(cases: list[Case]) -> list[str]:
    """In Markdown."""
    titles = (
        "target and drafter",
        "target, bytes a token",
        "drafter",
        "both, 1,000 tokens",
        "rows x context",
    )
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|"]
    for case in cases:
        of_target = case.target.bytes_per_token(case.number)
        of_drafter = case.drafter.bytes_per_token(case.number) if case.drafter else 0
        both = of_target + of_drafter
        whole = both * case.rows * case.context / GIB
        cells = [
            case.name,
            f"{of_target:,}",
            f"{of_drafter:,}",
            f"{both * 1000 / 2**20:.1f} MiB",
            f"{case.rows} x {case.context:,}: {whole:.2f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes of keys and values by token.")
    parser.add_argument("target", nargs="?", help="a name of assets/roofline.json, or a folder")
    parser.add_argument("--draft", help="the drafter's folder")
    parser.add_argument("--bytes", type=int, choices=(2, 4), default=4, help="of one number")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a row")
    asked = parser.parse_args()

    cases = known()
    if asked.target is not None:
        target = of_target(asked.target)
        drafter = of_drafter(asked.draft)
        case = Case(asked.target, target, drafter, asked.bytes, asked.rows, asked.context)
        cases = [case]
    print("\n".join(table(cases)))


if __name__ == "__main__":
    main()
