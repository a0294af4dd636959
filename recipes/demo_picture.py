"""A picture of what `flashdraft demo` prints, as an SVG that needs no font and no file beside it.

    python recipes/demo_picture.py --out docs/demo.svg
    python recipes/demo_picture.py --out demo.svg --speeds -- 'Write a haiku.' --temperature 0.7

The demo runs in a process of its own; what it prints is drawn, and the command is added.
Accepted drafts stand in boxes. Its speeds, which hold for one machine and one moment, are left out
unless `--speeds` asks for them.
"""

import argparse
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

QUESTION = "Write a Python function that returns the factorial of n."
OPEN, CLOSE = "⟨", "⟩"  # what the demo puts around accepted drafts where it may not use colours
COLUMNS = 78  # characters of a line; longer ones are wrapped
WIDTH, HEIGHT = 8.4, 20.0  # of a character cell, pixels
MARGIN = 20.0
TITLE = "A run of flashdraft demo: accepted drafts stand in boxes; tau; whether texts are identical"
NO_BREAK = "\u00a0"  # a space that viewers leave as wide as it is

# A dark panel with a border of its own, which stands out on a light page and on a dark one.
STYLE = """
  .panel { fill: #0d1117; stroke: #6e7681; }
  .box { fill: #1f5a32; }
  text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .plain { fill: #e6edf3; }
  .drafted { fill: #aff5b4; }
  .command { fill: #79c0ff; font-weight: bold; }
"""


class Run(NamedTuple):
    """Characters of one line that look the same."""

    text: str
    style: str  # plain, drafted or command


Line = list[Run]


def run_demo(arguments: list[str]) -> str:
    """What the demo prints when its output is no terminal."""
    command = [sys.executable, "-m", "flashdraft", "demo", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout


def without_speeds(printed: str) -> str:
    """The same without the lines that hold for one machine alone."""
    kept = []
    for line in printed.splitlines():
        is_speed = re.search(r"\d tokens/s$", line) or re.match(r"ratio +\d", line)
        if not is_speed:
            kept.append(line)
    return "\n".join(kept)


def lines_of(printed: str) -> list[Line]:
    """The printed text as lines of runs; a draft of two lines is marked in both."""
    lines: list[Line] = []
    style = "plain"
    for text in printed.splitlines():
        line: Line = []
        for part in re.split(f"([{OPEN}{CLOSE}])", text):
            if part == OPEN:
                style = "drafted"
            elif part == CLOSE:
                style = "plain"
            elif part:
                line.append(Run(part, style))
        lines.append(line)
    return lines


def wrapped(line: Line) -> list[Line]:
    """One line as several of at most COLUMNS characters, broken at spaces."""
    text = "".join(run.text for run in line)
    styles = [run.style for run in line for _ in run.text]
    if len(text) <= COLUMNS:
        return [line]

    parts: list[Line] = []
    end = 0
    for piece in textwrap.wrap(text, COLUMNS, break_on_hyphens=False):
        start = text.index(piece, end)
        end = start + len(piece)
        parts.append(_runs(piece, styles[start:end]))
    return parts


def _runs(text: str, styles: list[str]) -> Line:
    line: Line = []
    for character, style in zip(text, styles, strict=True):
        if line and line[-1].style == style:
            line[-1] = Run(line[-1].text + character, style)
        else:
            line.append(Run(character, style))
    return line


def drawing(command: str, printed: str) -> str:
    """The SVG of a command and of what it printed."""
    lines = [[Run(f"$ {command}", "command")], []]
    for line in lines_of(printed.rstrip()):
        lines += wrapped(line)
    lines = _without_repeated_blanks(lines)

    width = COLUMNS * WIDTH + 2 * MARGIN
    height = len(lines) * HEIGHT + 2 * MARGIN
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{TITLE}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="panel" x="1" y="1" width="{width - 2:g}" height="{height - 2:g}" rx="8"/>',
    ]
    for number, line in enumerate(lines):
        parts += _drawn(line, MARGIN + number * HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def _without_repeated_blanks(lines: list[Line]) -> list[Line]:
    kept: list[Line] = []
    for line in lines:
        if line or not kept or kept[-1]:
            kept.append(line)
    return kept


def _drawn(line: Line, top: float) -> list[str]:
    """Boxes first, so that no text lies under one.

    textLength keeps a run in its cells, whatever the font's width is.
    """
    boxes = []
    texts = []
    column = 0
    for run in line:
        words = run.text.strip()  # viewers differ in what they do with spaces at the ends
        before = len(run.text) - len(run.text.lstrip())
        x = MARGIN + (column + before) * WIDTH
        length = len(words) * WIDTH
        column += len(run.text)
        if not words:
            continue

        if run.style == "drafted":
            place = f'x="{x - 1:.1f}" y="{top + 1:.1f}" width="{length + 2:.1f}"'
            boxes.append(f'<rect class="box" {place} height="18" rx="3"/>')
        place = f'x="{x:.1f}" y="{top + 14.5:.1f}" textLength="{length:.1f}"'
        shown = escape(words).replace(" ", NO_BREAK)
        texts.append(f'<text class="{run.style}" {place}>{shown}</text>')
    return [*boxes, *texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "demo", nargs="*", default=[QUESTION], help="arguments of flashdraft demo, behind --"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--speeds", action="store_true", help="draw the demo's tokens/s and ratio as well"
    )
    options = parser.parse_args()

    printed = run_demo(options.demo)
    if not options.speeds:
        printed = without_speeds(printed)
    command = shlex.join(["flashdraft", "demo", *options.demo])
    options.out.write_text(drawing(command, printed), encoding="utf-8")


if __name__ == "__main__":
    main()
