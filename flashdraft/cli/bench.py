"""The commands that measure: thin functions over flashdraft.bench."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flashdraft.bench.compare import run_peers
from flashdraft.bench.config import BenchConfig
from flashdraft.bench.image_config import ImageConfig
from flashdraft.bench.image_report import is_image, show_images
from flashdraft.bench.load import LoadConfig, run_load
from flashdraft.bench.load_report import is_load, show_load
from flashdraft.bench.profile import calibrate
from flashdraft.bench.profile import profile as measure
from flashdraft.bench.report import print_table, show
from flashdraft.bench.roofline import RooflineConfig, named, predict, shape, verdict
from flashdraft.bench.run import run_bench
from flashdraft.bench.tasks import TASKS, read_ids, write_tasks
from flashdraft.cli.options import KERNEL_HELP, TARGET_HELP, Out
from flashdraft.diffusion.models import check_extra
from flashdraft.errors import InvalidParameter
from flashdraft.files import output_folder
from flashdraft.loading import KERNELS, MOST_NODES
from flashdraft.process import is_terminal
from flashdraft.types import COUNTS, Allowed

_NO_FILES: list[Path] = []
_MAIN_TASKS = ["gsm8k", "humaneval", "mt_bench"]
_FEW_AND_MANY = [1, 8]
_IDS = Path("recipes/bench_ids.json")
_ENGINES = Path("recipes/engines.py")

Results = Annotated[
    list[Path], Argument(help="files that `flashdraft bench` or `bench serve` wrote")
]


def bench(config: BenchConfig) -> None:
    """Measure methods side by side; write results, show a table.

    Examples:
        flashdraft bench --prompts speed.jsonl --out results.jsonl --repeats 3
        flashdraft bench --prompts tau.jsonl --out tau-results.jsonl --max-new-tokens 256
    """
    run_bench(config, quiet=not is_terminal(sys.stderr))
    show(config.out)


def bench_serve(
    url: Annotated[str, Argument(help="address of an OpenAI-compatible server")],
    config: LoadConfig,
) -> None:
    """Load a server with streams; write results, show a table.

    Examples:
        flashdraft bench serve http://127.0.0.1:8000 --prompts speed.jsonl --out load.jsonl
        flashdraft bench serve http://host:8000 --prompts p.jsonl --out r.jsonl --drafting none
    """
    run_load(url, config)
    show_load(config.out)


def bench_image(config: ImageConfig) -> None:
    """Measure ways to an image; write results, show tables.

    Examples:
        flashdraft bench image --out images.jsonl --steps 50,100
        flashdraft bench image --model runwayml/stable-diffusion-v1-5 --prompts p.txt --out sd.jsonl
    """
    check_extra()
    bench = import_module("flashdraft.bench.image")  # needs diffusers
    bench.run_image_bench(config)
    show_images(config.out)


def report(
    results: Results,
    base: Annotated[
        str | None,
        Option(help="method or mode that ratios are to; by default plain decoding, same kernel"),
    ] = None,
) -> None:
    """Print the tables of results files again.

    Examples:
        flashdraft report results.jsonl
        flashdraft report monday.jsonl tuesday.jsonl
    """
    for number, path in enumerate(results):
        if number > 0:
            print()
        if is_load(path):
            show_load(path, base)
        elif is_image(path):
            _refuse_base(base)
            show_images(path)
        else:
            show(path, base)


def _refuse_base(base: str | None) -> None:
    if base is not None:
        got = f"base is {base!r}, but images have their own: the sequential sampler's"
        raise InvalidParameter(got, hint="leave it out")


def plot(
    results: Results,
    out: Annotated[Path, Option(help="folder of report.md, report.html and the pictures")],
) -> None:
    """Draw results: pictures, report.md and report.html.

    Examples:
        flashdraft plot results.jsonl --out plots
        flashdraft plot tau.jsonl speed.jsonl --out plots
    """
    try:
        pictures = import_module("flashdraft.bench.plot")
    except ImportError as error:
        got = f"pictures need matplotlib: {error}"
        raise InvalidParameter(got, hint="pip install 'flashdraft[plot]'") from None
    for path in pictures.draw(results, out):
        print(path)


def peers(
    config: BenchConfig,
    gguf: Annotated[
        list[Path],
        Option(help="the target's weights for llama.cpp and OpenVINO; may be given several times"),
    ] = _NO_FILES,
    engines: Annotated[Path, Option(help="file whose functions run other engines")] = _ENGINES,
) -> None:
    """Measure other CPU engines beside ours, one by one.

    Examples:
        flashdraft peers --prompts speed.jsonl --out peers.jsonl --methods dflash,transformers
        flashdraft peers --prompts speed.jsonl --out peers.jsonl --methods dflash:int8 --gguf q.gguf
    """
    pictures = config.out.with_suffix("")
    output_folder(pictures)
    files = run_peers(config, gguf, engines)
    report(files)
    plot(files, pictures)


def tasks(
    out: Out,
    data: Annotated[
        Path | None,
        Option(envvar="FLASHDRAFT_DATA", help="folder of the public data sets; else the hub"),
    ] = None,
    ids: Annotated[Path, Option(help="entry numbers of every set")] = _IDS,
    first: Annotated[int | None, Option(help="only each set's first ones"), COUNTS] = None,
    task: Annotated[list[str], Option(help=f"of {', '.join(TASKS)}; several times")] = _MAIN_TASKS,
) -> None:
    """Write the benchmark's prompts, from a folder or the hub.

    Examples:
        flashdraft tasks --data data --out tau.jsonl
        flashdraft tasks --data data --out speed.jsonl --first 8 --task math500 --task spec_bench
    """
    count = write_tasks(data, out, read_ids(ids), tasks=task, first=first)
    print(f"{count} prompts in {out}")


def profile(
    target: Annotated[str, Option(help=TARGET_HELP)] = "smollm2-135m",
    draft: Annotated[
        str, Option(help="drafter's folder or hub id; auto: the shipped one, or an untrained one")
    ] = "auto",
    nodes: Annotated[
        list[int],
        Option(help="nodes per step; may be given several times"),
        Allowed(1, MOST_NODES),
    ] = _FEW_AND_MANY,
    context: Annotated[int, Option(help="tokens read before"), COUNTS] = 256,
    steps: Annotated[int, Option(help="steps measured; medians are shown"), COUNTS] = 20,
    kernel: Annotated[str, Option(help=KERNEL_HELP), Allowed(choices=KERNELS)] = "auto",
) -> None:
    """Show a decoding step's time by part, and the memory.

    Examples:
        flashdraft profile
        flashdraft profile --nodes 1 --nodes 4 --nodes 16 --context 1024
    """
    times = []
    memory = []
    for count in nodes:
        one = measure(target, draft=draft, nodes=count, context=context, steps=steps, kernel=kernel)
        step = sum(one.milliseconds.values())
        for part, ms in [*one.milliseconds.items(), ("step", step)]:
            times.append([str(count), part, f"{ms:.2f}", f"{ms / step:.0%}"])
        for name, nbytes in one.nbytes.items():
            memory.append([str(count), name, f"{nbytes / 1e6:.1f}"])
    print_table(["nodes", "part", "ms", "share"], times)
    print()
    print_table(["nodes", "memory", "MB"], memory)


def roofline(
    target: Annotated[str, Argument(help=f"{TARGET_HELP}, or qwen3-8b and its like")],
    config: RooflineConfig,
) -> None:
    """Predict tokens/s: is a drafter worth training, which block?

    Examples:
        flashdraft roofline smollm2-135m --weights q4 --draft-layers 3 --tau 2.5 --block-size 6
        flashdraft roofline qwen3-8b --device h200 --drafter both --tau 6.5
    """
    size = shape(target)
    device = calibrate(config.weights) if config.device == "this" else named(config)
    predictions = predict(size, config, device)
    best: dict[str, float] = {}
    for row in predictions:
        best[row.drafter] = max(row.gain, best.get(row.drafter, row.gain))

    cells = []
    for row in predictions:
        cells.append(
            [
                row.drafter,
                str(row.block),
                f"{1000 * row.draft:.2f}",
                f"{1000 * row.verify:.2f}",
                f"{row.tau:.2f}",
                f"{row.speed:.1f}",
                f"{row.gain:.2f}",
                "best" if row.gain == best[row.drafter] else "",
            ]
        )
    head = ["drafter", "block", "draft ms", "target ms", "tau", "tokens/s", "to plain", ""]
    print_table(head, cells)
    print(f"\n{verdict(predictions)}")
