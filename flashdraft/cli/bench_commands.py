"""The commands that measure, from `bench` to `roofline`: thin functions over flashdraft.bench."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flashdraft.bench.profile import calibrate
from flashdraft.bench.profile import profile as measure
from flashdraft.bench.report import print_table, show
from flashdraft.bench.roofline import RooflineConfig, named, predict, shape, verdict
from flashdraft.bench.run import BenchConfig, run_bench, run_peers
from flashdraft.bench.tasks import TASKS, read_ids, write_tasks
from flashdraft.cli.commands import KERNEL_HELP, TARGET_HELP, Out
from flashdraft.errors import InvalidParameter
from flashdraft.files import output_folder
from flashdraft.loading import KERNELS, MOST_NODES
from flashdraft.process import is_terminal
from flashdraft.types import COUNTS, Allowed

MAIN_TASKS = ["gsm8k", "humaneval", "mt_bench"]
_NODES = Allowed(1, MOST_NODES)


def bench(config: BenchConfig) -> None:
    run_bench(config, quiet=not is_terminal(sys.stderr))
    show(config.out)


def report(
    results: Annotated[list[Path], Argument(help="files that `flashdraft bench` wrote")],
    base: Annotated[
        str | None,
        Option(help="method that ratios are to; by default plain decoding with the same kernel"),
    ] = None,
) -> None:
    for number, path in enumerate(results):
        print("\n" * bool(number), end="")
        show(path, base)


def plot(
    results: Annotated[list[Path], Argument(help="files that `flashdraft bench` wrote")],
    out: Annotated[Path, Option(help="folder of report.md, report.html and the pictures")],
) -> None:
    try:
        pictures = import_module("flashdraft.bench.plot")
    except ImportError as error:
        raise InvalidParameter(
            f"pictures need matplotlib: {error}", hint="pip install 'flashdraft[plot]'"
        ) from None
    print(*pictures.draw(results, out), sep="\n")


def peers(
    config: BenchConfig,
    gguf: Annotated[
        list[Path],
        Option(help="the target's weights for llama.cpp and OpenVINO; may be given several times"),
    ] = [],  # noqa: B006
    engines: Annotated[Path, Option(help="file whose functions run other engines")] = Path(
        "recipes/engines.py"
    ),
) -> None:
    output_folder(config.out.with_suffix(""))  # where the pictures go
    files = run_peers(config, gguf, engines)
    report(files)
    plot(files, config.out.with_suffix(""))


def tasks(
    out: Out,
    data: Annotated[
        Path | None,
        Option(envvar="FLASHDRAFT_DATA", help="folder of the public data sets; else the hub"),
    ] = None,
    ids: Annotated[Path, Option(help="entry numbers of every set")] = Path(
        "recipes/bench_ids.json"
    ),
    first: Annotated[int | None, Option(help="only each set's first ones"), COUNTS] = None,
    task: Annotated[list[str], Option(help=f"of {', '.join(TASKS)}; several times")] = MAIN_TASKS,
) -> None:
    print(f"{write_tasks(data, out, read_ids(ids), tasks=task, first=first)} prompts in {out}")


def profile(
    target: Annotated[str, Option(help=TARGET_HELP)] = "smollm2-135m",
    draft: Annotated[
        str, Option(help="drafter's folder or hub id; auto: the shipped one, or an untrained one")
    ] = "auto",
    nodes: Annotated[
        list[int], Option(help="nodes per step; may be given several times"), _NODES
    ] = [1, 8],  # noqa: B006
    context: Annotated[int, Option(help="tokens read before"), COUNTS] = 256,
    steps: Annotated[int, Option(help="steps measured; medians are shown"), COUNTS] = 20,
    kernel: Annotated[str, Option(help=KERNEL_HELP), Allowed(choices=KERNELS)] = "auto",
) -> None:
    times, held = [], []
    for count in nodes:
        one = measure(target, draft=draft, nodes=count, context=context, steps=steps, kernel=kernel)
        parts = one.milliseconds | {"step": sum(one.milliseconds.values())}
        times += [
            [str(count), part, f"{ms:.2f}", f"{ms / parts['step']:.0%}"]
            for part, ms in parts.items()
        ]
        held += [[str(count), name, f"{nbytes / 1e6:.1f}"] for name, nbytes in one.nbytes.items()]
    print_table(["nodes", "part", "ms", "share"], times)
    print()
    print_table(["nodes", "memory", "MB"], held)


def roofline(
    target: Annotated[str, Argument(help=f"{TARGET_HELP}, or qwen3-8b and its like")],
    config: RooflineConfig,
) -> None:
    cells, rows = (
        [],
        predict(
            shape(target),
            config,
            calibrate(config.weights) if config.device == "this" else named(config),
        ),
    )
    for row in rows:
        best = "best" * (row.gain == max(each.gain for each in rows if each.drafter == row.drafter))
        figures = f"{1000 * row.draft:.2f} {1000 * row.verify:.2f} {row.tau:.2f} {row.speed:.1f} {row.gain:.2f}".split()
        cells.append([row.drafter, str(row.block), *figures, best])
    print_table(
        ["drafter", "block", "draft ms", "target ms", "tau", "tokens/s", "to plain", ""], cells
    )
    print(f"\n{verdict(rows)}")
