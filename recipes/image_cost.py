"""Is a drafted pipe ever slower than the pipe alone, with default settings, on this machine?

    python recipes/image_cost.py [MODEL] [--steps 50 100] [--images 9] [--threads 2] [--profile]

MODEL: a diffusers folder, or nothing for the built-in digits. For every kind of sampler, guidance
and number of steps: the pipe alone and the same pipe drafted (block="auto", measured costs), image
by image in turn, in one process. The first drafted image of a kind is left out: it learns, and the
first of all measures the target's costs, which is told apart. Ratios are of medians over the
images, of wall time and of the process's own CPU time; on a busy machine the quickest image of
each kind says more.
"""

import argparse
import cProfile
import pstats
import time
from statistics import median
from typing import NamedTuple

import torch

from flashdraft.diffusion.models import load_pipe, with_scheduler
from flashdraft.diffusion.pipeline import SpeculativeDiffusion


class Kind(NamedTuple):
    """One of SCHEDULERS, its eta (None: it has none), and the mode."""

    scheduler: str
    eta: float | None
    mode: str


KINDS = {
    "ddpm": Kind("ddpm", None, "exact"),
    "ddim eta 1": Kind("ddim", 1.0, "exact"),
    "sde-dpm++ 1": Kind("sde-dpm++", None, "exact"),
    "ddim eta 0": Kind("ddim", 0.0, "tolerance"),
    "dpm++ 2m": Kind("dpm++", None, "tolerance"),
}


class Timed(NamedTuple):
    wall: float
    cpu: float


def timed(pipe, seed, steps, guidance, eta):
    """Seconds of one image's denoising, less those of measuring costs."""
    options = {} if eta is None else {"eta": eta}
    measured = 0.0
    generator = torch.Generator("cpu").manual_seed(seed)
    wall, cpu = time.perf_counter(), time.process_time()
    pipe(
        "a thick seven",
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
        **options,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if isinstance(pipe, SpeculativeDiffusion):
        measured = pipe.last_stats.measuring
    return Timed(wall - measured, cpu - measured)


def compare(pipe, name, steps, guidance, images):
    """One line: plain and drafted images in turn."""
    kind = KINDS[name]
    fast = SpeculativeDiffusion(pipe, mode=kind.mode)
    timed(pipe, 0, steps, guidance, kind.eta)
    timed(fast, 0, steps, guidance, kind.eta)
    measuring = fast.last_stats.measuring

    plain, drafted, rounds, rows = [], [], [], []
    for seed in range(1, images + 1):
        plain.append(timed(pipe, seed, steps, guidance, kind.eta))
        drafted.append(timed(fast, seed, steps, guidance, kind.eta))
        rounds.append(fast.last_stats.rounds)
        rows.append(fast.last_stats.rows)
    walls = [one.wall for one in plain], [one.wall for one in drafted]
    cpus = [one.cpu for one in plain], [one.cpu for one in drafted]
    quickest = min(cpus[1]) / min(cpus[0])
    print(
        f"{name:<12} N {steps:<4} guidance {guidance:<3g} "
        f"plain {median(walls[0]):.3f} s  drafted {median(walls[1]):.3f} s  "
        f"ratio {ratio_of(walls):.3f}  of CPU time {ratio_of(cpus):.3f}, quickest {quickest:.3f}  "
        f"rounds {median(rounds):<4g} rows {median(rows):<4g} measuring {measuring:.2f} s",
        flush=True,
    )
    return quickest


def ratio_of(seconds):
    """Drafted to plain."""
    plain, drafted = seconds
    return median(drafted) / median(plain)


def profile(pipe, steps):
    """Where the time of drafted images goes."""
    with_scheduler(pipe, "ddpm")
    fast = SpeculativeDiffusion(pipe)
    timed(fast, 0, steps, 1.0, None)
    profiler = cProfile.Profile()
    profiler.enable()
    for seed in range(3):
        timed(fast, seed, steps, 1.0, None)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--images", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    pipe = load_pipe(asked.model)
    if asked.profile:
        profile(pipe, asked.steps[0])
        return

    ratios = []
    for name, kind in KINDS.items():
        with_scheduler(pipe, kind.scheduler)
        for steps in asked.steps:
            for guidance in (1.0, 3.0):
                ratios.append(compare(pipe, name, steps, guidance, asked.images))
    print(f"worst ratio of the quickest images' CPU time {max(ratios):.3f}, of {len(ratios)}")


main()
