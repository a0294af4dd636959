"""Pictures and a report of results files, made of nothing but those files, so that they can be
made again.

Every file is a section of its own: what was measured in two processes does not stand in one
picture. Knows matplotlib; does not know models.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashdraft.bench.image_report import (
    IMAGE_COLUMNS,
    image_origin,
    image_settings,
    is_image,
    read_images,
    summarise_images,
)
from flashdraft.bench.load_report import (
    LOAD_COLUMNS,
    LoadSummary,
    is_load,
    load_origin,
    read_load,
    summarise_load,
)
from flashdraft.bench.plot_image import Drawing, image_pictures
from flashdraft.bench.report import (
    COLUMNS,
    Header,
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
_LOOK = json.loads((_ASSETS / "plot.json").read_text(encoding="utf-8"))
_LABELS: dict[str, list[str]] = _LOOK["labels"]  # of the pictures in order: title, axes' labels
_LOAD_LABELS: dict[str, list[str]] = _LOOK["load_labels"]  # the same of a load test
_COLOURS: dict[str, str] = _LOOK["colours"]  # of methods in every picture, and of a step's parts
_OTHERS: list[str] = _LOOK["others"]  # colours of methods that have none of their own
_TINTS: dict[str, float] = _LOOK["tints"]  # how much lighter a kernel makes a method's colour

Values = dict[Any, float]  # a bar's parts by name ("": it has one), or a curve's points
Panel = dict[str, Values]  # by method
Panels = dict[str, Panel]  # by title


def draw(files: Sequence[Path], out: Path) -> list[Path]:
    """Write report.md, report.html and all pictures into the folder `out`; returns what it wrote.

    Raises InvalidParameter for two results files of one name, and for a file of another's that
    lies there under one of these names.
    """
    folder = output_folder(out)
    _check_names(files)
    report = _Report()
    for path in files:
        report.add(path)

    contents = report.contents()
    facts = {"results": list(map(str, files))}
    write_own(folder / "report", contents, "plot", facts)
    return [out / name for name in contents]


def _check_names(files: Sequence[Path]) -> None:
    counts = Counter(path.stem for path in files)
    for name, count in counts.items():
        if count > 1:
            raise InvalidParameter(
                f"two results files are called `{name}`",
                hint="rename one: pictures have its name",
            )


class _Report:
    """A report in the making: the same sections as Markdown and HTML, and the pictures."""

    def __init__(self) -> None:
        self.markdown = ["# Benchmark"]
        self.html: list[str] = []
        self.pictures: dict[str, str] = {}  # SVG by file name

    def add(self, path: Path) -> None:
        """A results file's section: where it comes from, a table for each setting, pictures."""
        if is_load(path):
            self._add_load(path)
            return
        if is_image(path):
            self._add_images(path)
            return
        header, lines = read_results(path)
        self._add_head(path.stem, origin(header))
        for setting, own in settings(lines).items():
            if setting:
                self.markdown.append(f"### {setting}")
                self.html.append(f"<h3>{escape(setting)}</h3>")
            self._add_table(COLUMNS, [row.cells for row in summarise(own)])
        self._add_pictures(path.stem, _pictures(header, lines))

    def _add_load(self, path: Path) -> None:
        """The same of a load test, which has one table."""
        header, lines = read_load(path)
        rows = summarise_load(lines)
        self._add_head(path.stem, load_origin(header))
        self._add_table(LOAD_COLUMNS, [row.cells for row in rows])
        self._add_pictures(path.stem, _load_pictures(header, rows))

    def _add_images(self, path: Path) -> None:
        """The same of images, with a table for every number of steps."""
        results = read_images(path)
        self._add_head(path.stem, image_origin(results.header))
        for setting, own in image_settings(summarise_images(results)).items():
            self.markdown.append(f"### {setting}")
            self.html.append(f"<h3>{escape(setting)}</h3>")
            self._add_table(IMAGE_COLUMNS, [row.cells for row in own])
        self._add_pictures(path.stem, image_pictures(results))

    def _add_head(self, name: str, origin: Sequence[str]) -> None:
        facts = "\n".join(origin)
        self.markdown.append(f"## {name}")
        self.markdown.append(f"```\n{facts}\n```")
        self.html.append(f"<h2>{escape(name)}</h2><pre>{escape(facts)}</pre>")

    def _add_table(self, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        self.markdown.append(_markdown_table(columns, cells))
        self.html.append(_html_table(columns, cells))

    def _add_pictures(self, name: str, pictures: Iterable[Drawing]) -> None:
        for picture in pictures:
            file = f"{name}-{picture.name}.svg"
            self.pictures[file] = picture.svg
            self.markdown.append(f"![{picture.title}]({file})")
            element = picture.svg[picture.svg.index("<svg") :]  # without the head of an XML file
            self.html.append(f"<figure>{element}</figure>")

    def contents(self) -> dict[str, bytes]:
        """All files by name."""
        template = (_ASSETS / "report.html").read_text(encoding="utf-8")
        texts = self.pictures | {
            "report.md": "\n\n".join(self.markdown) + "\n",
            "report.html": template.replace("{sections}", "\n".join(self.html)),
        }
        return {name: text.encode() for name, text in texts.items()}


def _markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    alignment = ["---"] * 2 + ["--:"] * (len(columns) - 2)  # names left, numbers right
    rows = [columns, alignment, *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _html_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = _html_row(columns, "th")
    for row in cells:
        rows += _html_row(row, "td")
    return f"<table>{rows}</table>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    row = "<tr>"
    for cell in cells:
        row += f"<{tag}>{escape(cell)}</{tag}>"
    return row


# --- figures ------------------------------------------------------------------------------------


def _pictures(header: Header, lines: Sequence[Line]) -> Iterator[Drawing]:
    """Those that the lines have figures for."""
    by_setting = settings(lines)
    panels = _panels_by_task(by_setting)
    panels["acceptance"] = _panels_by_setting(by_setting, _accepted)
    panels["batch"] = _panels_by_setting(_by_setting_of_any_batch(lines), _rates)
    panels["step"] = _panels_by_setting(by_setting, _step_parts)

    about = _about(header)
    for name, labels in _LABELS.items():
        own = panels[name]
        if any(own.values()):
            tasks = len(own) // len(by_setting)
            columns = tasks if 1 < tasks < 6 else 4  # a setting's tasks in a row of their own
            yield Drawing(name, labels[0], _svg(own, labels, about, columns))


def _load_pictures(header: Header, rows: Sequence[LoadSummary]) -> Iterator[Drawing]:
    """Throughput, waiting times and ratios over the number of streams, a curve for every mode."""
    panels = _load_panels(rows)
    about = f"{header['model']}, {header['config']['max_new_tokens']} tokens an answer at most"
    for name, labels in _LOAD_LABELS.items():
        own = {title: panel for title, panel in panels[name].items() if panel}
        if own:
            yield Drawing(name, labels[0], _svg(own, labels, about))


def _load_panels(rows: Sequence[LoadSummary]) -> dict[str, Panels]:
    """By picture; what is not known has no point."""
    columns = {
        "throughput": {"": "tokens_per_second"},
        "first": {"median": "first", "95th percentile": "first_p95"},
        "token": {"median": "token", "95th percentile": "token_p95"},
        "ratio": {"lower bound, 95 %": "lower", "mean": "ratio", "upper bound, 95 %": "upper"},
    }
    pictures: dict[str, Panels] = {}
    for name, by_title in columns.items():
        pictures[name] = {}
        for title, column in by_title.items():
            pictures[name][title] = _load_panel(rows, column)
    return pictures


def _load_panel(rows: Sequence[LoadSummary], column: str) -> Panel:
    panel: Panel = {}
    for row in rows:
        value = getattr(row, column)
        if value is not None:
            panel.setdefault(row.drafting, {})[row.streams] = value
    return panel


def _about(header: Header) -> str:
    """The line below a picture: what was measured, and on what."""
    facts = []
    config = header.get("config")
    if config:
        facts.append(f"target {config['target']}")
        facts.append(f"max_new_tokens {config['max_new_tokens']}")
    facts.append(header["device"])
    return " · ".join(facts)


def _panels_by_task(by_setting: Mapping[str, Sequence[Line]]) -> dict[str, Panels]:
    """Of the pictures `speedup` and `tau`, a panel for every task in every setting."""
    speedup: Panels = {}
    tau: Panels = {}
    for setting, lines in by_setting.items():
        by_task = grouped(summarise(lines), lambda row: row.task)
        for task, rows in by_task.items():
            title = f"{task}\n{setting}".strip()
            speedup[title] = {}
            tau[title] = {}
            for row in rows:
                tau[title][row.method] = {"": row.tau}
                if row.ratio:
                    speedup[title][row.method] = {"": row.ratio}
    return {"speedup": speedup, "tau": tau}


def _panels_by_setting(
    by_setting: Mapping[str, Sequence[Line]], values_of: Callable[[Sequence[Line]], Values]
) -> Panels:
    """A panel for every setting: what `values_of` makes of a method's lines, if it is anything."""
    panels: Panels = {}
    for setting, lines in by_setting.items():
        panels[setting] = {}
        for method, own in grouped(lines, lambda line: line["method"]).items():
            values = values_of(own)
            if values:
                panels[setting][method] = values
    return panels


def _by_setting_of_any_batch(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines by their settings but the batch size, which stands as `rows` in them."""
    moved = []
    for line in lines:
        moved.append(line | {"max_rows": None, "rows": line.get("max_rows")})
    return settings(moved)


def _accepted(lines: Sequence[Line]) -> Values:
    """The acceptance by position."""
    steps: list[int] = []
    for line in lines:
        steps += line.get("accepted_lengths", ())
    return dict(enumerate(acceptance(steps), 1))


def _rates(lines: Sequence[Line]) -> Values:
    """Median tokens/s by batch size, where there are several."""
    by_size = grouped(lines, lambda line: line["rows"])
    if len(by_size) < 2:
        return {}
    rates: Values = {}
    for size in sorted(by_size):
        rates[size] = median(line["batch_tokens_per_second"] for line in by_size[size])
    return rates


def _step_parts(lines: Sequence[Line]) -> Values:
    """Mean milliseconds of a step by part, over the lines that tell them."""
    telling = [line for line in lines if "parts" in line]
    passes = sum(line.get("target_passes", 0) for line in telling)
    if not passes:
        return {}
    milliseconds: Values = {}
    for part in ("draft", "target", "host"):
        seconds = sum(line["parts"].get(part, 0.0) for line in telling)
        milliseconds[part] = 1000 * seconds / passes
    return milliseconds


# --- drawing ------------------------------------------------------------------------------------


def _svg(panels: Panels, labels: Sequence[str], about: str, columns: int = 4) -> str:
    """Panels on one scale, as bars or, with two axes' labels behind the title, as curves.

    The same figures give the same text.
    """
    is_bars = len(labels) == 2
    methods = _all_names(panels.values())
    columns = min(len(panels), columns)
    rows = math.ceil(len(panels) / columns)
    width = 2.4 + max(2.2 * columns, 5.0)
    row_height = 0.75 + 0.27 * len(methods) if is_bars else 3.2
    with matplotlib.rc_context(fname=_ASSETS / "plot.mplstyle"):
        figure = Figure(figsize=(width, 0.8 + rows * row_height))
        figure.suptitle(labels[0], x=0.01, ha="left")
        figure.supxlabel(about, x=0.01, ha="left", fontsize=8, color="#5b6570")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        axes: list[Axes] = list(grid.flat)

        for axis, (title, panel) in zip(axes, panels.items(), strict=False):
            in_order = {method: panel[method] for method in methods if method in panel}
            if is_bars:
                _draw_bars(axis, in_order, methods)
            else:
                _draw_curves(axis, in_order)
            axis.set(title=title, xlabel=labels[1])
            axis.tick_params(labelbottom=True)
        if is_bars:
            axes[0].set(xlim=(0, 1.18 * axes[0].get_xlim()[1]))  # room for the sums
        else:
            axes[0].set(ylabel=labels[2], ylim=(0, None))
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        _draw_legend(figure, axes)

        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _all_names(several: Iterable[Mapping[str, object]]) -> list[str]:
    """The keys of all, each once, in the order in which they first come."""
    names: dict[str, None] = {}
    for one in several:
        names |= dict.fromkeys(one)
    return list(names)


def _draw_bars(axis: Axes, panel: Panel, methods: Sequence[str]) -> None:
    """Lying bars from the top down, a place for each of all methods, with their sums at the end.

    One part is in its method's colour, several are in their own.
    """
    places = [methods.index(method) for method in panel]
    ends = [0.0] * len(panel)
    for part in _all_names(panel.values()):
        widths = [bar.get(part, 0.0) for bar in panel.values()]
        colours = [_colour(method) for method in panel]
        if part:
            colours = [_colour(part)] * len(panel)
        label = part if part else None
        bars = axis.barh(places, widths, 0.7, ends, color=colours, label=label)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]

    if panel:
        sums = [f"{end:.2f}" if end < 10 else f"{end:.1f}" for end in ends]
        axis.bar_label(bars, sums, padding=3, fontsize=8)
    axis.set_yticks(range(len(methods)), methods)
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")


def _draw_curves(axis: Axes, panel: Panel) -> None:
    for method, points in panel.items():
        xs = list(points)
        ys = list(points.values())
        axis.plot(xs, ys, color=_colour(method), label=method)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels; none where nothing has a label."""
    handles: dict[str, Artist] = {}
    for axis in axes:
        own, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, own, strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")


def _colour(name: str) -> tuple[float, ...]:
    """Of a method, METHOD or METHOD:KERNEL, or of a step's part; the same in every picture."""
    kind, _, kernel = name.partition(":")
    colour = _COLOURS.get(kind)
    if colour is None:
        colour = _OTHERS[crc32(kind.encode()) % len(_OTHERS)]
    tint = _TINTS.get(kernel, 0.0)
    return tuple(channel + (1 - channel) * tint for channel in to_rgb(colour))
