"""Pictures of an image benchmark: rounds saved over steps, and acceptance beside its formula.

Knows matplotlib and the lines of results. Does not know the report around the pictures.
"""

import json
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from flashdraft.bench.image_report import (
    ImageSummary,
    Results,
    acceptance_bins,
    summarise_images,
)
from flashdraft.bench.report import grouped
from flashdraft.diffusion.coupling import acceptance
from flashdraft.files import Json
from flashdraft.process import DOUBLES

__all__ = ["Drawing", "image_pictures"]

_ASSETS = Path(__file__).parents[1] / "assets"
_LOOK = json.loads((_ASSETS / "plot.json").read_text(encoding="utf-8"))
# of the variants that are drawn; those whose rounds say nothing new stand in the table alone
_COLOURS: dict[str, str] = _LOOK["image_colours"]
_GREY = "#8c939c"
_FEW = 20  # decisions of a bin: with fewer it says nothing


class Drawing(NamedTuple):
    name: str
    title: str
    svg: str


def image_pictures(results: Results) -> Iterator[Drawing]:
    """Those that there are figures for."""
    rows = [row for row in summarise_images(results) if row.variant in _COLOURS]
    about = _about(results.header)
    if rows:
        title = "Sequential rounds, and speed here, over steps"
        yield Drawing("rounds", title, _rounds(rows, title, about))

    bins = {}
    for variant, own in grouped(results.lines, lambda line: line["variant"]).items():
        full = [one for one in acceptance_bins(own) if one[0] >= _FEW]
        if full and variant in _COLOURS:
            bins[variant] = full
    if bins:
        title = "Drafted steps that stood, and what the formula says"
        yield Drawing("acceptance", title, _acceptance(bins, title, about))


def _about(header: Json) -> str:
    """The line below a picture."""
    config = header["config"]
    facts = [f"{config['model']}", f"guidance {config['guidance']:g}", header["noisy"]]
    return " · ".join([*facts, f"{config['images']} images", header["device"]])


def _rounds(rows: Sequence[ImageSummary], title: str, about: str) -> str:
    with matplotlib.rc_context(fname=_ASSETS / "plot.mplstyle"):
        figure = Figure(figsize=(9.2, 4.0))
        figure.suptitle(title, x=0.01, ha="left")
        figure.supxlabel(about, x=0.01, ha="left", fontsize=8, color="#5b6570")
        left, right = figure.subplots(1, 2)
        for variant, own in grouped(rows, lambda row: row.variant).items():
            fewer = {}
            speeds = {}
            for row in own:
                fewer[row.steps] = row.fewer
                if row.speed is not None:
                    speeds[row.steps] = row.speed
            colour = _COLOURS[variant]
            left.plot(list(fewer), list(fewer.values()), color=colour, label=variant)
            right.plot(list(speeds), list(speeds.values()), color=colour)
        left.set(title="how many times fewer rounds", xlabel="steps asked for")
        right.set(title="how many times faster (median of pairs)", xlabel="steps asked for")
        all_steps = sorted({row.steps for row in rows})
        for axis in (left, right):
            _scale(axis, all_steps)
        figure.legend(loc="outside right upper")
        return _svg(figure)


def _scale(axis: Axes, steps: Sequence[int]) -> None:
    """Both axes in logarithms, with a line where nothing is gained."""
    axis.set(xscale="log", yscale="log")
    axis.axhline(1.0, color=_GREY, linewidth=1, marker="")
    axis.xaxis.set_major_locator(FixedLocator(list(steps)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    axis.yaxis.set_minor_locator(NullLocator())
    for own in (axis.xaxis, axis.yaxis):
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        own.set_major_formatter(formatter)


def _acceptance(bins: dict[str, list[tuple[int, float, float]]], title: str, about: str) -> str:
    with matplotlib.rc_context(fname=_ASSETS / "plot.mplstyle"):
        figure = Figure(figsize=(6.4, 4.0))
        figure.suptitle(title, x=0.01, ha="left")
        figure.supxlabel(about, x=0.01, ha="left", fontsize=8, color="#5b6570")
        axis = figure.subplots()
        furthest = 0.0
        for variant, own in bins.items():
            predicted = torch.tensor([one[1] for one in own], **DOUBLES).clamp(1e-9, 1 - 1e-9)
            apart = (torch.special.erfinv(1 - predicted) * 8**0.5).tolist()
            stood = [one[2] for one in own]
            furthest = max(furthest, *apart)
            axis.plot(apart, stood, "o", color=_COLOURS[variant], label=f"{variant}, measured")
        line = torch.linspace(0.0, max(1.05 * furthest, 1.0), 200, **DOUBLES)
        curve = acceptance(line).tolist()
        axis.plot(line.tolist(), curve, "-", marker="", color=_GREY, label="2 Φ(-δ/2)", zorder=1)
        axis.set(xlabel="δ: distance of the two means, in deviations", xlim=(0, None))
        axis.set(ylabel="share of drafted steps that stood", ylim=(0, 1.02))
        axis.legend()
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The same figures give the same text."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
