"""Of recipes/serve_rivals.sh: our server and others on the same weights, asked by the same client.

    python recipes/serve_rivals.py PROMPTS FOLDER [--repeats 4] [--streams 1,8] [--vllm VENV]

FOLDER holds q4_1.gguf and q8_0.gguf, and LLAMA_SERVER names the binary. Ours and llama.cpp's
servers run side by side and are asked in turn; a turn whose results lie in the folder already is
not asked again. vLLM, whose idle process does not rest, is measured alone and last.
"""

import argparse
import json
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import geometric_mean, median

import torch
from serving import another, ours

from flashdraft import DFlashDraftModel, hub
from flashdraft.bench.load import LoadConfig, run_load
from flashdraft.bench.load_report import bounds, read_load, summarise_load
from flashdraft.bench.report import print_table

TOKENS = 64  # of an answer
CONTEXT = 2048  # of each of the slots
SLOTS = 8
REST = 0.5  # seconds in which another engine's threads come to rest


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def llama(options, weights):
    """llama.cpp's server on q4_1 or q8_0."""
    threads = str(torch.get_num_threads())
    port = str(free_port())
    command = [os.environ["LLAMA_SERVER"], "-m", str(options.folder / f"{weights}.gguf")]
    command += ["-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", threads, "-tb", threads]
    command += ["--cache-ram", "0", "--fit", "off", "--port", port]
    log = options.folder / f"llama-{weights}.log"
    return another(command, f"http://127.0.0.1:{port}", log)


def vllm(options, drafts):
    """vLLM's CPU build in float32, with our drafter in the plain format or without."""
    plain = options.folder / "plain"
    if not plain.exists():
        shipped = DFlashDraftModel.from_pretrained(hub.builtin_draft("smollm2-135m"))
        shipped.save_pretrained(plain, plain=True)
    port = str(free_port())
    python = str(options.vllm / "bin" / "python")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--port", port]
    command += ["--model", str(hub.resolve("smollm2-135m")), "--dtype", "float32"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS), "--enforce-eager"]
    command += ["--no-enable-prefix-caching"]
    if drafts:
        drafter = {"method": "dflash", "model": str(plain), "num_speculative_tokens": 5}
        command += ["--speculative-config", json.dumps(drafter)]
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # it would leave one core to its other code
    log = options.folder / f"vllm-{'on' if drafts else 'off'}.log"
    return another(command, f"http://127.0.0.1:{port}", log)


def cut(options, repeat):
    """A repeat's own prompts: what was asked before would be found in a prefix cache."""
    count = sum(2 * int(streams) for streams in options.streams.split(","))
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    first = repeat * count
    path = options.folder / f"prompts-{repeat}.jsonl"
    chosen = [lines[number % len(lines)] for number in range(first, first + count)]
    path.write_text("\n".join(chosen), encoding="utf-8")
    return path


def ask(options, served, name, repeat, drafting="none"):
    """One turn of a server, of all numbers of streams."""
    out = options.folder / f"{name}-{repeat}.jsonl"
    if out.exists():
        return
    unfinished = out.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    config = LoadConfig(
        cut(options, repeat),
        unfinished,
        concurrency=options.streams,
        drafting=drafting,
        repeats=1,
        max_new_tokens=TOKENS,
        ignore_eos=True,
        reuse=drafting == "none",
    )
    time.sleep(REST)
    run_load(served.url, config)
    unfinished.rename(out)


def measure(options):
    with ExitStack() as stack:
        arguments = ["--kernel", "int8", "--max-rows", SLOTS]
        our_server = stack.enter_context(ours(*arguments, log=options.folder / "ours.log"))
        others = {}
        for weights in ("q4_1", "q8_0"):
            others[weights] = stack.enter_context(llama(options, weights))
        for repeat in range(options.repeats):
            modes = "off,auto" if repeat % 2 == 0 else "auto,off"  # one turn each goes first
            ask(options, our_server, "ours", repeat, modes)
            for weights, served in others.items():
                ask(options, served, f"llama-{weights}", repeat)

    if options.vllm:
        for drafts in (False, True):
            with vllm(options, drafts) as served:
                for repeat in range(options.repeats):
                    ask(options, served, f"vllm-{'on' if drafts else 'off'}", repeat)


def rates(options):
    """(streams, server) -> tokens/s by repeat."""
    found = {}
    for path in sorted(options.folder.glob("*-*.jsonl")):
        name, _, repeat = path.stem.rpartition("-")
        if name == "prompts":
            continue
        for row in summarise_load(read_load(path)[1]):
            if row.failed:
                raise SystemExit(f"{path}: {row.failed} requests failed")
            server = name if row.drafting == "none" else f"{name} int8, {row.drafting}"
            found.setdefault((row.streams, server), {})[int(repeat)] = row.tokens_per_second
    return found


def show(options):
    """Every server, and ours to each: pairs of one repeat."""
    found = rates(options)
    rows = []
    for (streams, server), by_repeat in sorted(found.items()):
        cells = [str(streams), server, f"{median(by_repeat.values()):.1f}"]
        for mode in ("off", "auto"):
            ratios = []
            own = found.get((streams, f"ours int8, {mode}"), {})
            for repeat, rate in by_repeat.items():
                if repeat in own:
                    ratios.append(own[repeat] / rate)
            lower = bounds(ratios)
            cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "-")
            cells.append(f"{lower[0]:.2f}" if lower else "-")
        rows.append(cells)
    print_table(["streams", "server", "tokens/s", "off to it", "from", "auto to it", "from"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--vllm", type=Path, help="environment with vllm-cpu")
    options = parser.parse_args()
    measure(options)
    show(options)


if __name__ == "__main__":
    main()
