"""Tables of an image benchmark's results file, made of nothing but that file.

Knows what its lines hold and which images are a pair. Does not know who wrote it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from flashdraft.bench.report import grouped, print_table
from flashdraft.errors import DataError
from flashdraft.files import Json
from flashdraft.train.rows import read_jsonl

__all__ = [
    "IMAGE_COLUMNS",
    "ImageSummary",
    "Results",
    "acceptance_bins",
    "image_origin",
    "image_settings",
    "is_image",
    "read_images",
    "show_images",
    "summarise_images",
]

Line = Json  # one image
IMAGE_COLUMNS = [
    "variant",
    "steps",
    "images",
    "rounds",
    "fewer",
    "rows",
    "seconds",
    "speed",
    "accepted",
    "predicted",
    "defect",
    "L2",
    "distance",
    "agreement",
]
_PLAIN = "plain"
_FIELDS = {"variant", "steps", "image", "taken", "rounds", "rows", "seconds", "base", "agreement"}
_FORMS = ("", "", "", ".1f", ".2f", ".1f", ".3f", ".2f", ".3f", ".3f", ".4f", ".2%", ".3g", ".3g")


class Results(NamedTuple):
    """distances: of sets of images, by steps and variant."""

    header: Json
    lines: list[Line]
    distances: dict[tuple[int, str], float | None]


class ImageSummary(NamedTuple):
    """One variant at one number of steps: means over its images; speed is a median of pairs.

    fewer: steps asked for to rounds; speed: times that of the sequential sampler of its kind.
    """

    variant: str
    steps: int
    images: int
    rounds: float
    fewer: float
    rows: float
    seconds: float
    speed: float | None
    accepted: float | None  # share of the drafted steps
    predicted: float | None  # what the formula says of the same
    defect: float | None  # summed over an image's steps
    relative_l2: float | None  # of the latents, to the sequential image of the same seed
    distance: float | None  # of the set, to plain images of other seeds
    agreement: float | None

    @property
    def cells(self) -> list[str]:
        """As IMAGE_COLUMNS want it."""
        cells = []
        for value, form in zip(self, _FORMS, strict=True):
            cells.append("-" if value is None else format(value, form))
        return cells


def is_image(path: Path) -> bool:
    """Whether a results file, or what is said to be one, was written by an image benchmark."""
    first = next(iter(read_jsonl(path)), None)
    header = first.get("header") if isinstance(first, dict) else None
    return isinstance(header, dict) and header.get("kind") == "image"


def read_images(path: Path) -> Results:
    """Raises DataError for another file."""
    rows = list(read_jsonl(path))
    refusal = DataError(
        f"`{path}` is no image benchmark's results file",
        hint="give a file that `flashdraft bench image` wrote",
    )
    if not rows or "header" not in rows[0]:
        raise refusal
    lines = []
    distances = {}
    for row in rows[1:]:
        if "set" in row:
            distances[row["steps"], row["set"]] = row["distance"]
        elif row.keys() >= _FIELDS:
            lines.append(row)
        else:
            raise refusal
    return Results(rows[0]["header"], lines, distances)


def image_origin(header: Json) -> list[str]:
    """What was measured with and on, and what the columns are."""
    config = header["config"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    facts = f"{header['device']}; {header['threads']} threads; {config['dtype']}; {versions}"
    model = f"`{config['model']}` ({header['pipe']}), guidance {config['guidance']:g}"
    samplers = f"noise: {header['noisy']}, without: {header['still']}, tol {config['tol']:g}"
    origin = [header["command"], f"{facts}; commit {header['commit']}", f"{model}; {samplers}"]
    if header["distance"] is not None:
        origin.append(f"distance: {header['distance']}, to plain images of other seeds")
    if header["agreement"] is not None:
        origin.append(f"agreement with the prompt: {header['agreement']}")
    return origin


def show_images(path: Path) -> None:
    """Print the tables of a results file, one for every number of steps."""
    results = read_images(path)
    for fact in image_origin(results.header):
        print(fact)
    for setting, own in image_settings(summarise_images(results)).items():
        print(f"\n{setting}")
        print_table(IMAGE_COLUMNS, [row.cells for row in own])


def image_settings(rows: Sequence[ImageSummary]) -> dict[str, list[ImageSummary]]:
    """The rows by what they have in common, as a title."""
    return grouped(rows, lambda row: f"{row.steps} steps")


def summarise_images(results: Results) -> list[ImageSummary]:
    """A row for every variant at every number of steps, in the order of the results."""
    images = {}
    for line in results.lines:
        images[line["steps"], line["image"], line["variant"]] = line
    order = results.header["variants"]

    rows = []
    by_steps = grouped(results.lines, lambda line: line["steps"])
    for steps in sorted(by_steps):
        by_variant = grouped(by_steps[steps], lambda line: line["variant"])
        for variant in sorted(by_variant, key=order.index):
            own = by_variant[variant]
            speeds = []
            for line in own:
                pair = images.get((steps, line["image"], line["base"]))
                if pair is not None:
                    speeds.append(pair["seconds"] / line["seconds"])
            distance = results.distances.get((steps, variant))
            rows.append(_summary(own, speeds, distance))
    return rows


def _summary(
    lines: Sequence[Line], speeds: Sequence[float], distance: float | None
) -> ImageSummary:
    steps = lines[0]["steps"]
    rounds = fmean(_column(lines, "rounds"))
    drafted = sum(_column(lines, "drafted"))
    accepted = None
    predicted = None
    if drafted:
        accepted = sum(_column(lines, "accepted")) / drafted
    told = [line for line in lines if line["predicted"] is not None]
    if drafted and told:
        predicted = sum(line["predicted"] * line["drafted"] for line in told) / drafted
    return ImageSummary(
        variant=lines[0]["variant"],
        steps=steps,
        images=len(lines),
        rounds=rounds,
        fewer=steps / rounds,
        rows=fmean(_column(lines, "rows")),
        seconds=fmean(_column(lines, "seconds")),
        speed=_known(median, speeds),
        accepted=accepted,
        predicted=predicted,
        defect=_known(fmean, _column(lines, "defect")),
        relative_l2=_known(fmean, _column(lines, "relative_l2")),
        distance=distance,
        agreement=_known(fmean, _column(lines, "agreement")),
    )


def acceptance_bins(lines: Sequence[Line]) -> list[tuple[int, float, float]]:
    """By predicted acceptance, of the bins that hold anything: drafted steps, the mean of what was
    predicted, and the share that stood."""
    sums: dict[int, list[float]] = {}
    for line in lines:
        for place, own in enumerate(line["bins"] or ()):
            held = sums.setdefault(place, [0.0, 0.0, 0.0])
            for index, value in enumerate(own):
                held[index] += value
    bins = []
    for place in sorted(sums):
        count, predicted, stood = sums[place]
        if count:
            bins.append((int(count), predicted / count, stood / count))
    return bins


def _column(lines: Sequence[Line], name: str) -> list[float]:
    """Those that are known."""
    return [line[name] for line in lines if line[name] is not None]


def _known(middle: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return middle(values) if values else None
