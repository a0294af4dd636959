"""What the image side promises, measured on whole images of the digits model.

    python recipes/image_laws.py all --work FOLDER [--processes 2]

rounds      exact mode, 100 steps, guidance off and 3: rounds of an image, one image a call
images      2,000 whole images a set: plain against plain, exact and unverified drafts
acceptance  drafted steps by predicted acceptance, in 20 bins: how many of them stood
tolerance   50 steps of DDIM and DPM++ 2M: rounds, and how far from the sequential image

Measurements are small files in FOLDER: started again, it goes on where it was. At the end come a
table, FOLDER/laws.json, and pictures, FOLDER/*.svg. Costs are flat: a batch costs what a row costs.
"""

import argparse
import hashlib
import json
import os
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file

import flashdraft
from flashdraft.bench.image_sets import frechet_spread, mmd_spread
from flashdraft.bench.judge import Judge
from flashdraft.bench.report import print_table
from flashdraft.diffusion import sampler
from flashdraft.diffusion.coupling import SMALLEST, Coupled, acceptance
from flashdraft.diffusion.learned import LearnedDraft
from flashdraft.diffusion.models import builtin_draft, eta_of, load_pipe, with_scheduler
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.diffusion.transitions import transitions
from flashdraft.files import check_facts, write_file, write_tensors
from flashdraft.provenance import provenance

ASSETS = Path(flashdraft.__file__).with_name("assets")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("", "thin", "thick")
SLANTS = ("", "upright", "slanted")

LAWS = ("rounds", "images", "acceptance", "tolerance")
STEPS = 100  # of exact mode
SHORT = 50  # of tolerance mode
GUIDANCES = (1.0, 3.0)
ALONE = 64  # images that are made one a call
TOGETHER = 50  # images that are made in one call
BLOCK = 8  # steps of a block where images are made together
SETS = ("plain A", "plain B", "frozen", "learned", "unverified")
SWAPS = 500
BINS = 20
ENOUGH = 5000  # decisions of a bin
FEW_STEPS = (6, 8, 12, 16, 24)  # fill the bins of low acceptance
ROUNDS_OF_FEW = 40  # the most times that they are gone through
TOLS = (0.001, 0.002, 0.005, 0.01, 0.02)
FEWER = (10, 20, 25, 40)  # steps of the sampler alone: divisors of its 1,000
STILL = {"ddim": "DDIM", "dpm++": "DPM++ 2M"}


# ---- one process ---------------------------------------------------------------------------------


class Bench:
    """The pipe and what judges its images; one a process."""

    def __init__(self, model, learned):
        self.pipe = load_pipe(model)
        self.learned = learned
        self.judge = Judge.from_pretrained(ASSETS / "digits-judge")

    def use(self, scheduler):
        """One of the names of flashdraft.diffusion.models."""
        self.pipe = with_scheduler(self.pipe, scheduler)

    def draft(self, name):
        return self.learned if name == "learned" else "frozen-x0"

    def asked(self, places, steps, guidance, seed):
        """What a call of the pipe is asked for these images of all."""
        generators = [torch.Generator().manual_seed(seed + place) for place in places]
        return {
            "prompt": [caption(place) for place in places],
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "generator": generators,
            "output_type": "latent",
        }

    @torch.no_grad()
    def pictures(self, latents):
        """[n, channels, h, w] in [0, 1]."""
        vae = self.pipe.vae
        made = vae.decode(latents / vae.config.scaling_factor).sample
        return (made / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def judged(self, places, latents):
        """Features [n, features], and whether the picture shows the digit that was asked for."""
        pictures = self.pictures(latents)
        named = self.judge.named(pictures)
        agrees = [name == DIGITS[place % 10] for name, place in zip(named, places, strict=True)]
        return self.judge(pictures), torch.tensor(agrees)


def caption(place):
    """Of an image: digits in turn, and in turn with all that is said of them."""
    turn = place // 10
    words = [WEIGHTS[turn % 3], SLANTS[turn // 3 % 3], DIGITS[place % 10]]
    words = [word for word in words if word]
    return " ".join(["a", *words] if len(words) > 1 else words)


bench = None  # of this process


def start(model, learned):
    global bench
    torch.set_num_threads(1)
    bench = Bench(model, learned)


def run(job):
    """Measure one file's worth."""
    path, kind, given = job
    KINDS[kind](path, **given)


def keep(path, held):
    write_file(path, json.dumps(held).encode())


class Workers:
    """Processes that measure; they start when there is something to do."""

    def __init__(self, options):
        self.options = options
        self.pool = None

    def measured(self, jobs):
        """The files of these jobs; those that are not there are made."""
        todo = [job for job in jobs if not job[0].exists()]
        if todo and self.pool is None:
            settings = (self.options.model, self.options.learned)
            context = get_context("spawn")
            self.pool = context.Pool(self.options.processes, start, settings)
        if todo:
            done = self.pool.imap_unordered(run, todo)
            name = todo[0][0].name.rpartition("-")[0]
            for _ in track(done, name, total=len(todo), console=Console(stderr=True)):
                pass
        return [job[0] for job in jobs]

    def close(self):
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()


# ---- rounds --------------------------------------------------------------------------------------


def alone(path, draft, guidance, first, count):
    """Images that are made one a call, in exact mode."""
    bench.use("ddpm")
    fast = SpeculativeDiffusion(bench.pipe, draft=bench.draft(draft), costs="flat")
    lines = []
    for place in range(first, first + count):
        fast(**bench.asked([place], STEPS, guidance, seed=0))
        stats = fast.last_stats
        line = {"rounds": stats.rounds, "rows": stats.rows, "seconds": stats.seconds}
        line |= {"drafted": stats.drafted, "accepted": stats.accepted}
        line["predicted"] = stats.predicted
        lines.append(line)
    keep(path, lines)


def rounds_law(workers):
    options = workers.options
    work = options.work
    rows = []
    for draft in drafts(options):
        for guidance in GUIDANCES:
            jobs = []
            half = ALONE // 2
            for first in (0, half):
                path = work / f"rounds-{draft}-{guidance:g}-{first}.json"
                given = {"draft": draft, "guidance": guidance, "first": first, "count": half}
                jobs.append((path, "alone", given))
            lines = []
            for path in workers.measured(jobs):
                lines += json.loads(path.read_text())
            rows.append({"draft": draft, "guidance": guidance} | rounds_of(lines))
    cells = []
    for row in rows:
        guidance = "off" if row["guidance"] == 1 else f"{row['guidance']:g}"
        numbers = [f"{row[name]:.1f}" for name in ("rounds", "rows")]
        ratio = f"{row['reduction']:.2f} ± {row['error']:.2f}"
        shares = [f"{row[name]:.3f}" for name in ("accepted", "predicted")]
        cells.append([row["draft"], guidance, ratio, *numbers, *shares])
    print(f"\nExact mode, DDPM, {STEPS} steps, {ALONE} images, one a call, flat costs")
    head = ["draft", "guidance", "times fewer rounds", "rounds", "rows", "accepted", "predicted"]
    print_table(head, cells)
    return rows


def rounds_of(lines):
    """Means over images. error: of the reduction, one standard error."""
    count = len(lines)
    rounds = torch.tensor([line["rounds"] for line in lines], dtype=torch.float64)
    drafted = sum(line["drafted"] for line in lines)
    weighed = sum(line["predicted"] * line["drafted"] for line in lines)
    mean = float(rounds.mean())
    reduction = STEPS / mean
    return {
        "images": count,
        "rounds": mean,
        "rounds_by_image": rounds.int().tolist(),
        "rows": sum(line["rows"] for line in lines) / count,
        "reduction": reduction,
        "error": reduction * float(rounds.std()) / mean / count**0.5,
        "accepted": sum(line["accepted"] for line in lines) / drafted,
        "predicted": weighed / drafted,
    }


# ---- whole images --------------------------------------------------------------------------------


def together(path, name, first):
    """A batch of one of SETS: latents, features, and what became of drafted steps."""
    bench.use("ddpm")
    places = range(first, first + TOGETHER)
    asked = bench.asked(places, STEPS, 1.0, seed=1_000_000 * (1 + SETS.index(name)))
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    if name.startswith("plain"):
        latents = bench.pipe(**asked).images
    else:
        fast = SpeculativeDiffusion(bench.pipe, draft=bench.draft(name), block=BLOCK)
        with everything_stands(name == "unverified"):
            latents = fast(**asked).images
        stats = fast.last_stats
        if name == "unverified" and stats.accepted < stats.drafted:
            raise RuntimeError("a draft was refused: the planted fault is not in")
        bins = binned(stats, STEPS)
    features, agrees = bench.judged(places, latents)
    write_tensors(path, {"latents": latents, "features": features, "agrees": agrees, "bins": bins})


@contextmanager
def everything_stands(wanted):
    """The planted fault: no draft is refused."""
    coupled = sampler.couple

    def accept(noise, draft_mean, target_mean, deviation, uniforms):
        wide = deviation.view(-1, *[1] * (noise.dim() - 1)).to(noise)
        sample = (draft_mean + wide * noise).to(target_mean.dtype)
        return Coupled(sample, torch.ones_like(uniforms, dtype=torch.bool))

    if wanted:
        sampler.couple = accept
    try:
        yield
    finally:
        sampler.couple = coupled


def jobs_of_images(options):
    work = options.work
    jobs = {}
    for name in SETS:
        if name == "learned" and options.learned is None:
            continue
        jobs[name] = []
        for first in range(0, options.images, TOGETHER):
            path = work / f"images-{name.replace(' ', '-')}-{first:05d}.safetensors"
            jobs[name].append((path, "together", {"name": name, "first": first}))
    return jobs


def images_law(workers):
    options = workers.options
    work = options.work
    """The set `plain A` against all others."""
    held = {}
    for name, jobs in jobs_of_images(options).items():
        shards = [load_file(path) for path in workers.measured(jobs)]
        held[name] = {}
        for key in ("latents", "features", "agrees"):
            held[name][key] = torch.cat([shard[key] for shard in shards])
    base = held["plain A"]
    found = {}
    cells = []
    spreads = {}
    for name, own in held.items():
        found[name] = {"agreement": float(own["agrees"].double().mean())}
        told = [name, str(options.images), f"{found[name]['agreement']:.1%}"]
        if name == "plain A":
            cells.append([*told, *["-"] * 6])
            continue
        spreads[name] = {
            "Frechet distance, judge's features": frechet_spread(
                base["features"], own["features"], swaps=SWAPS
            ),
            "MMD, judge's features": mmd_spread(base["features"], own["features"], swaps=SWAPS),
            "MMD, latents": mmd_spread(base["latents"], own["latents"], swaps=SWAPS),
        }
        for kind, spread in spreads[name].items():
            plain = spreads["plain B"][kind]
            limit = plain.quantile(0.99)
            found[name][kind] = {
                "value": spread.value,
                "chance": spread.chance,
                "plain_median": plain.quantile(0.5),
                "plain_99": limit,
                "plain_most": plain.quantile(1.0),
                "within": spread.value <= limit,
            }
            told += [f"{spread.value / limit:.2f}", f"{spread.chance:.3f}"]
        cells.append(told)
    print(f"\nWhole images, {STEPS} steps, guidance off, blocks of {BLOCK}, against plain A.")
    print(f"x: the distance, times the 99 % bound of plain against plain ({SWAPS} swaps of pairs);")
    print("p: the chance of sets of one law to be so far apart")
    head = ["set", "images", "agreement", "Frechet x", "p", "MMD x", "p", "MMD latents x", "p"]
    print_table(head, cells)
    draw_images(work, spreads)
    return found


# ---- acceptance ----------------------------------------------------------------------------------


def binned(stats, steps):
    """Drafted steps by predicted acceptance, [BINS, 3]: how many, their chances summed, how many
    stood. A step without noise has no chance: it is left out."""
    scheduler = bench.pipe.scheduler
    scheduler.set_timesteps(steps)
    is_random = transitions(scheduler).deviation >= SMALLEST
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    for one in stats.decisions:
        if is_random[one.step]:
            place = min(int(one.predicted * BINS), BINS - 1)
            bins[place] += torch.tensor([1.0, one.predicted, one.stood], dtype=torch.float64)
    return bins


def few_steps(path, steps, number):
    """A batch of images of few steps, for the decisions alone."""
    bench.use("ddpm")
    fast = SpeculativeDiffusion(bench.pipe, block=2)
    places = range(number * 2 * TOGETHER, (number + 1) * 2 * TOGETHER)
    fast(**bench.asked(places, steps, 1.0, seed=50_000_000 + steps * 1_000_000))
    write_tensors(path, {"bins": binned(fast.last_stats, steps)})


def acceptance_law(workers):
    options = workers.options
    work = options.work
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    for name, jobs in jobs_of_images(options).items():
        if name in ("frozen", "learned"):
            for path in workers.measured(jobs):
                bins += load_file(path)["bins"]
    number = 0
    while bins[:, 0].min() < ENOUGH and number < ROUNDS_OF_FEW:
        jobs = []
        for steps in FEW_STEPS:
            path = work / f"acceptance-{steps}-{number:03d}.safetensors"
            jobs.append((path, "few_steps", {"steps": steps, "number": number}))
        for path in workers.measured(jobs):
            bins += load_file(path)["bins"]
        number += 1
    rows = []
    for place, (count, chances, stood) in enumerate(bins.tolist()):
        measured_share, predicted = stood / max(count, 1), chances / max(count, 1)
        row = {"from": place / BINS, "to": (place + 1) / BINS, "decisions": int(count)}
        row |= {"predicted": predicted, "measured": measured_share}
        rows.append(row | {"error": (predicted * (1 - predicted) / max(count, 1)) ** 0.5})
    cells = []
    for row in rows:
        numbers = [f"{row[name]:.4f}" for name in ("predicted", "measured")]
        gap = f"{row['measured'] - row['predicted']:+.4f}"
        name = f"{row['from']:.2f} to {row['to']:.2f}"
        cells.append([name, "", str(row["decisions"]), *numbers, gap, f"{row['error']:.4f}"])
    print("\nDrafted steps by the acceptance that 2 Phi(-delta / 2) predicts")
    print_table(["bin", "", "decisions", "predicted", "stood", "gap", "standard error"], cells)
    furthest = max(abs(row["measured"] - row["predicted"]) for row in rows)
    fewest = min(row["decisions"] for row in rows)
    print(f"largest gap {furthest:.4f}, fewest decisions {fewest}")
    draw_acceptance(work, rows)
    return {"bins": rows, "largest_gap": furthest, "fewest_decisions": fewest}


# ---- tolerance -----------------------------------------------------------------------------------


def still(path, scheduler, guidance, first, count):
    """Images of a sampler without noise: sequential, with fewer steps, and by tolerance mode."""
    bench.use(scheduler)
    pipe = bench.pipe
    eta = eta_of(pipe.scheduler, None, is_exact=False)
    extra = {} if eta is None else {"eta": eta}
    fasts = {}
    for tol in TOLS:
        fasts[tol] = SpeculativeDiffusion(pipe, mode="tolerance", tol=tol, costs="flat")
    lines = []
    for place in range(first, first + count):
        asked = bench.asked([place], SHORT, guidance, seed=0) | extra
        whole = pipe(**asked).images
        for steps in FEWER:
            asked = bench.asked([place], steps, guidance, seed=0) | extra
            gap = relative(pipe(**asked).images, whole)
            lines.append({"way": "fewer", "setting": steps, "rounds": steps, "gap": gap})
        for tol, fast in fasts.items():
            asked = bench.asked([place], SHORT, guidance, seed=0) | extra
            gap = relative(fast(**asked).images, whole)
            stats = fast.last_stats
            line = {"way": "tolerance", "setting": tol, "rounds": stats.rounds, "gap": gap}
            lines.append(line | {"rows": stats.rows, "defect": stats.defects[0]})
    keep(path, lines)


def relative(latents, others):
    return float((latents - others).norm() / others.norm())


def tolerance_law(workers):
    options = workers.options
    work = options.work
    found = {}
    cells = []
    for scheduler, name in STILL.items():
        for guidance in GUIDANCES:
            jobs = []
            quarter = ALONE // 4
            for first in range(0, ALONE, quarter):
                path = work / f"tolerance-{scheduler}-{guidance:g}-{first}.json"
                given = {"scheduler": scheduler, "guidance": guidance}
                jobs.append((path, "still", given | {"first": first, "count": quarter}))
            lines = []
            for path in workers.measured(jobs):
                lines += json.loads(path.read_text())
            rows = still_rows(lines)
            found[f"{name}, guidance {guidance:g}"] = rows
            told = "off" if guidance == 1 else f"{guidance:g}"
            for row in rows:
                sign = "tol" if row["way"] == "tolerance" else "steps"
                cell = [name, told, f"{sign} {row['setting']:g}", f"{row['rounds']:.1f}"]
                cell += [f"{SHORT / row['rounds']:.2f}", f"{row['gap']:.2%}"]
                cells.append([*cell, f"{row['defect']:.4f}" if row["defect"] is not None else "-"])
    print(f"\nTolerance mode, {SHORT} steps, {ALONE} images, one a call, flat costs.")
    print("L2: of the latents, relative to those of all steps one by one with the same seed")
    head = ["sampler", "guidance", "", "rounds", "times fewer", "L2", "summed defect"]
    print_table(head, cells)
    draw_tolerance(work, found)
    return found


def still_rows(lines):
    """Means over images, by way and setting."""
    rows = []
    for way, settings in (("fewer", FEWER), ("tolerance", TOLS)):
        for setting in settings:
            own = [line for line in lines if (line["way"], line["setting"]) == (way, setting)]
            row = {"way": way, "setting": setting, "images": len(own), "defect": None}
            for name in ("rounds", "gap", "rows", "defect"):
                if name in own[0]:
                    row[name] = sum(line[name] for line in own) / len(own)
            rows.append(row)
    return rows


# ---- pictures ------------------------------------------------------------------------------------

COLOURS = {"frozen": "#1f6fd6", "learned": "#2c9a4b", "unverified": "#c0392b", "plain B": "#8c939c"}
DARK = "#3d4650"


@contextmanager
def drawn(path, columns, title, about):
    """Axes in a row, with room for a legend beside them; written when done."""
    with matplotlib.rc_context(fname=ASSETS / "plot.mplstyle"):
        figure = Figure(figsize=(2.4 + 3.2 * columns, 3.6))
        figure.suptitle(title, x=0.01, ha="left")
        figure.supxlabel(about, x=0.01, ha="left", fontsize=8, color="#5b6570")
        yield figure.subplots(1, columns, squeeze=False)[0]
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_images(work, spreads):
    """How far sets are from plain A, beside how far plain is from plain."""
    kinds = list(spreads["plain B"])
    about = f"digits model, DDPM, {STEPS} steps, guidance off; grey: {SWAPS} swaps of plain sets"
    title = "Whole images: distance from the plain sampler's"
    with drawn(work / "image-sets.svg", len(kinds), title, about) as axes:
        for axis, kind in zip(axes, kinds, strict=True):
            plain = spreads["plain B"][kind].swapped.numpy()
            axis.hist(plain, 30, color="#c9ced4", label="plain, swapped")
            axis.xaxis.set_major_locator(MaxNLocator(4))
            for name, own in spreads.items():
                colour = COLOURS[name]
                axis.axvline(own[kind].value, color=colour, label=name, linewidth=1.6, marker="")
            axis.set(title=kind, xlabel="distance")
            axis.set_yticks([])
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside right upper")


def draw_acceptance(work, rows):
    about = f"digits model, DDPM, {sum(row['decisions'] for row in rows):,} drafted steps"
    title = "Drafted steps that stood, and what the formula says"
    with drawn(work / "image-acceptance.svg", 2, title, about) as axes:
        curve, gaps = axes
        full = [row for row in rows if row["decisions"]]
        predicted = torch.tensor([row["predicted"] for row in full], dtype=torch.float64)
        stood = [row["measured"] for row in full]
        apart = torch.special.erfinv(1 - predicted) * 8**0.5
        line = torch.linspace(0, float(apart.max()) * 1.05, 200, dtype=torch.float64)
        curve.plot(line, acceptance(line), "-", marker="", color="#8c939c", label="2 Φ(-δ/2)")
        curve.plot(apart, stood, "o", color="#1f6fd6", label="measured, 20 bins")
        curve.set(xlabel="δ: distance of the means, in deviations", ylim=(0, 1.02))
        curve.set(ylabel="share that stood", xlim=(0, None))
        curve.legend(loc="upper right")
        errors = [2 * row["error"] for row in full]
        apart_by = [row["measured"] - row["predicted"] for row in full]
        gaps.axhspan(-0.03, 0.03, color="#eef1f4")
        gaps.axhline(0, color="#8c939c", linewidth=1, marker="")
        gaps.errorbar(predicted, apart_by, errors, fmt="o", color="#1f6fd6", linewidth=1)
        gaps.set(xlabel="predicted acceptance", ylabel="measured - predicted")
        gaps.set(ylim=(-0.045, 0.045), xlim=(0, 1), title="two standard errors; band: 0.03")


def draw_tolerance(work, found):
    about = f"digits model, {SHORT} steps, {ALONE} images, one a call"
    title = f"Rounds, and how far from the {SHORT}-step image of the same seed"
    looks = {
        ("fewer", "1"): ("#8c939c", "--", "fewer steps"),
        ("fewer", "3"): ("#3d4650", "--", "fewer steps, guidance 3"),
        ("tolerance", "1"): ("#1f6fd6", "-", "tolerance mode"),
        ("tolerance", "3"): ("#f28e2b", "-", "tolerance mode, guidance 3"),
    }
    with drawn(work / "image-tolerance.svg", len(STILL), title, about) as axes:
        for axis, sampler_name in zip(axes, STILL.values(), strict=True):
            for name, rows in found.items():
                if not name.startswith(sampler_name):
                    continue
                for way in ("fewer", "tolerance"):
                    colour, style, label = looks[way, name[-1]]
                    own = [row for row in rows if row["way"] == way]
                    xs = [row["rounds"] for row in own]
                    ys = [row["gap"] for row in own]
                    axis.plot(xs, ys, linestyle=style, color=colour, label=label)
            axis.set(title=sampler_name, xlabel="rounds an image", xlim=(0, None))
            axis.set(yscale="log")
            axis.yaxis.set_major_locator(FixedLocator([0.001, 0.003, 0.01, 0.03, 0.1, 0.3]))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[0].set(ylabel="relative L2 of the latents")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside right upper")


# ---- all of it -----------------------------------------------------------------------------------

KINDS = {"alone": alone, "together": together, "few_steps": few_steps, "still": still}


def drafts(options):
    return ["frozen"] if options.learned is None else ["frozen", "learned"]


def weights_of(module):
    """A digest."""
    digest = hashlib.sha256()
    for weight in module.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(model, learned):
    """What must not change between two runs into one folder."""
    pipe = load_pipe(model)
    facts = {"unet": weights_of(pipe.unet), "vae": weights_of(pipe.vae), "learned": None}
    if learned is not None:
        draft = LearnedDraft.from_pretrained(learned)
        draft.check(pipe.unet)
        facts["learned"] = weights_of(draft.model)
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("law", choices=["all", *LAWS], nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--learned", help="its draft's folder; the shipped one, if there is one")
    parser.add_argument("--images", type=int, default=2000, help="of a set")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.learned is None and builtin_draft(options.model) is not None:
        options.learned = str(builtin_draft(options.model))
    if options.learned is None:
        print("there is no learned draft: it is left out")

    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    facts = identity(options.model, options.learned) | {"images": options.images}
    noted = work / "facts.json"
    if noted.exists():
        check_facts(work, json.loads(noted.read_text()), facts, "name another folder")
    keep(noted, facts)

    laws = {"rounds": rounds_law, "images": images_law}
    laws |= {"acceptance": acceptance_law, "tolerance": tolerance_law}
    path = work / "laws.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    workers = Workers(options)
    try:
        for name in LAWS if "all" in options.law else options.law:
            began = time.perf_counter()
            found[name] = laws[name](workers)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            found["provenance"] = provenance()
            write_file(path, (json.dumps(found, indent=1) + "\n").encode())
    finally:
        workers.close()


if __name__ == "__main__":
    main()
