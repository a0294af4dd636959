"""Pictures and a report of results files, made of nothing but those files, so that they can be made again.

Every file is a section of its own: what was measured in two processes does not stand in one picture. Knows matplotlib; does not
know models.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from io import StringIO
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashdraft.bench.report import (
    COLUMNS,
    Line,
    grouped,
    origin,
    read_results,
    settings,
    summarise,
)
from flashdraft.bench.run import acceptance
from flashdraft.errors import InvalidParameter
from flashdraft.files import output_folder, write_own

__all__ = ["draw"]

_ASSETS = Path(__file__).parents[1] / "assets"
# colours of methods, one in every picture, and of a step's parts; others'; how much lighter a kernel makes a method's; of the
# pictures in their order: the title and the axes' labels
_LOOK: dict[str, Any] = json.loads((_ASSETS / "plot.json").read_text(encoding="utf-8"))
Panel = dict[str, dict[Any, float]]  # by method: a bar's parts, or a curve's points


def draw(files: Sequence[Path], out: Path) -> list[Path]:
    """Write report.md, report.html and the pictures of every results file into the folder `out`; returns what it wrote.

    Raises InvalidParameter for a file of another's that lies there under one of these names.
    """
    markdown, html, made = ["# Benchmark"], list[str](), dict[str, str]()
    folder = output_folder(out)
    for path in files:
        if sum(path.stem == other.stem for other in files) > 1:
            raise InvalidParameter(
                f"two results files are called `{path.stem}`",
                hint="rename one: pictures have its name",
            )
    for path in files:
        header, lines = read_results(path)
        facts = "\n".join(origin(header))
        markdown += [f"## {path.stem}", f"```\n{facts}\n```"]
        html += [f"<h2>{escape(path.stem)}</h2><pre>{escape(facts)}</pre>"]
        for setting, own in settings(lines).items():
            rows = [COLUMNS, *(row.cells for row in summarise(own))]
            ruled = [rows[0], ["---"] * 2 + ["--:"] * (len(COLUMNS) - 2), *rows[1:]]
            markdown += [f"### {setting}"] * bool(setting) + [
                "\n".join(f"| {' | '.join(row)} |" for row in ruled)
            ]
            cells = [[f"<td>{escape(cell)}</td>" for cell in row] for row in rows]
            table = "<tr>".join(map("".join, cells)).replace("td>", "th>", 2 * len(COLUMNS))
            html += [f"<h3>{escape(setting)}</h3>"] * bool(setting) + [
                f"<table><tr>{table}</table>"
            ]
        for name, title, svg in _pictures(header, lines):
            made[f"{path.stem}-{name}.svg"] = svg
            markdown += [f"![{title}]({path.stem}-{name}.svg)"]
            html += [f"<figure>{svg[svg.index('<svg') :]}</figure>"]
    page = (
        (_ASSETS / "report.html").read_text(encoding="utf-8").replace("{sections}", "\n".join(html))
    )
    made |= {"report.md": "\n\n".join(markdown) + "\n", "report.html": page}
    contents = {name: text.encode() for name, text in made.items()}
    write_own(folder / "report", contents, "plot", {"results": [str(path) for path in files]})
    return [out / name for name in made]


def _pictures(header: dict[str, Any], lines: list[Line]) -> Iterator[tuple[str, str, str]]:
    """Name, title and SVG of those that the lines have figures for."""
    config, named, panels = (
        header.get("config", {}),
        settings(lines),
        defaultdict[str, dict[str, Panel]](dict),
    )
    for setting, own in named.items():
        for task, rows in grouped(summarise(own), attrgetter("task")).items():
            panel = f"{task}\n{setting}".strip()
            panels["speedup"][panel] = {row.method: {"": row.ratio} for row in rows if row.ratio}
            panels["tau"][panel] = {row.method: {"": row.tau} for row in rows}
    batches = settings([line | {"max_rows": None, "rows": line.get("max_rows")} for line in lines])
    for name, groups, value in (
        ("acceptance", named, _accepted),
        ("batch", batches, _rates),
        ("step", named, _parts),
    ):
        for setting, own in groups.items():
            found = {
                method: value(those) for method, those in grouped(own, itemgetter("method")).items()
            }
            panels[name][setting] = {
                method: figures for method, figures in found.items() if figures
            }
    about = " · ".join(
        [
            *(f"{name} {config[name]}" for name in ("target", "max_new_tokens") if config),
            header["device"],
        ]
    )
    for name, labels in _LOOK["labels"].items():
        if any(panels[name].values()):
            columns = (
                each if 1 < (each := len(panels[name]) // len(named)) < 6 else 4
            )  # a setting's tasks in a row of their own
            yield name, labels[0], _svg(panels[name], labels, about, columns)


def _accepted(lines: list[Line]) -> dict[Any, float]:
    return dict(
        enumerate(
            acceptance([count for line in lines for count in line.get("accepted_lengths", ())]), 1
        )
    )


def _rates(lines: list[Line]) -> dict[Any, float]:
    sizes = grouped(lines, itemgetter("rows"))
    rates = {n: median(line["batch_tokens_per_second"] for line in sizes[n]) for n in sorted(sizes)}
    return rates if len(rates) > 1 else {}


def _parts(lines: list[Line]) -> dict[Any, float]:
    passes = sum(line.get("target_passes", 0) for line in lines if "parts" in line)
    spent = {
        part: sum(line.get("parts", {}).get(part, 0.0) for line in lines)
        for part in ("draft", "target", "host")
    }
    return {part: 1000 * seconds / passes for part, seconds in spent.items()} if passes else {}


def _svg(panels: dict[str, Panel], labels: Sequence[str], about: str, columns: int = 4) -> str:
    """Panels on one scale, as bars or, with two axes' labels behind the title, as curves. The same figures give the same text."""
    bars, columns = len(labels) == 2, min(len(panels), columns)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    rows, height = -(-len(panels) // columns), 0.75 + 0.27 * len(names) if bars else 3.2
    with matplotlib.rc_context(fname=_ASSETS / "plot.mplstyle"):
        figure = Figure(figsize=(2.4 + max(2.2 * columns, 5.0), 0.8 + rows * height))
        figure.suptitle(labels[0], x=0.01, ha="left")
        figure.supxlabel(about, x=0.01, ha="left", fontsize=8, color="#5b6570")
        axes = [*figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat]
        for axis, (name, panel) in zip(axes, panels.items(), strict=False):
            (_bars if bars else _curves)(
                axis, {method: panel[method] for method in names if method in panel}, names
            )
            axis.set(title=name, xlabel=labels[1])
            axis.tick_params(labelbottom=True)
        axes[0].set(
            **{"xlim": (0, 1.18 * axes[0].get_xlim()[1])}
            if bars
            else {"ylabel": labels[2], "ylim": (0, None)}
        )
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        legend = {
            label: handle
            for axis in axes
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if legend:
            figure.legend(legend.values(), legend.keys(), loc="outside right upper")
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _bars(axis: Axes, panel: Panel, names: list[str]) -> None:
    """Lying bars from the top down with their sums at the end; one part is in its method's colour, several are in their own."""
    places, ends = [names.index(name) for name in panel], [0.0] * len(panel)
    for part in dict.fromkeys(part for bar in panel.values() for part in bar):
        widths = [bar.get(part, 0.0) for bar in panel.values()]
        bars = axis.barh(
            places,
            widths,
            0.7,
            ends,
            color=[_colour(part or name) for name in panel],
            label=part or None,
        )
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    if panel:
        axis.bar_label(
            bars,
            [f"{end:.2f}" if end < 10 else f"{end:.1f}" for end in ends],
            padding=3,
            fontsize=8,
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")


def _curves(axis: Axes, panel: Panel, _: list[str]) -> None:
    for name, points in panel.items():
        axis.plot([*points], [*points.values()], color=_colour(name), label=name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _colour(name: str) -> tuple[float, ...]:
    kind, _, kernel = name.partition(":")
    tint, others = _LOOK["tints"].get(kernel, 0.0), _LOOK["others"]
    own = _LOOK["colours"].get(kind) or others[crc32(kind.encode()) % len(others)]
    return tuple(c + (1 - c) * tint for c in to_rgb(own))
