"""Methods side by side: every prompt by every method in turn, in one process, a line of results
for each answer.

The wall clock runs from token ids to text, alike for all methods. The methods take turns at going
first, settings (temperature, batch size, threads) take turns prompt by prompt, and every ratio is
made of two answers to the same prompt in the same repeat and setting, so that a machine's drift
hits both.

Knows prompts, turns and what a line of results holds. Does not know how a method runs.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product, zip_longest
from pathlib import Path
from statistics import fmean
from typing import IO, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from flashdraft.bench.config import THEIRS, BenchConfig, Setting, is_ours
from flashdraft.bench.methods import Loaded, load_methods
from flashdraft.bench.peers import Answer, Figures, Method, joined
from flashdraft.bench.report import grouped
from flashdraft.bench.tasks import BenchPrompt, named, read_prompts
from flashdraft.engine import check
from flashdraft.errors import InvalidParameter
from flashdraft.files import locked, output_file
from flashdraft.generate import Model, Prompt
from flashdraft.process import threads_set
from flashdraft.provenance import provenance

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["BenchConfig", "acceptance", "results_file", "run_bench"]

_REST = 0.3  # seconds between methods beside other engines, whose threads may still spin


class _Unit(NamedTuple):
    """Prompts of one task that are decoded together, once by every method."""

    repeat: int
    rotation: int  # by so many places the methods' order is turned
    setting: Setting
    prompts: list[BenchPrompt]

    @property
    def task(self) -> str:
        return self.prompts[0].task

    @property
    def first_number(self) -> int:
        return self.prompts[0].number


def run_bench(config: BenchConfig, *, quiet: bool = False) -> int:
    """Write the header and one line per prompt, method, repeat and setting to config.out.

    Returns the number of answers. Everything that can be refused is refused before the file
    appears; it grows prompt by prompt.
    """
    prompts = read_prompts(config.prompts)
    if config.out.is_file() and config.out.stat().st_size:
        raise InvalidParameter(
            f"`{config.out}` exists", hint="name another file; results are not overwritten"
        )
    out = output_file(config.out, inputs=[config.prompts])

    threads = config.threads[0] if config.threads else None
    with threads_set(threads):
        return _measure(config, prompts, out, quiet)


def _measure(config: BenchConfig, prompts: list[BenchPrompt], out: Path, quiet: bool) -> int:
    loaded = load_methods(config)
    _check_lengths(config, prompts, loaded.model)
    _warm_up(config, prompts[0], loaded)

    plan = _plan(config, prompts)
    header = provenance() | {"config": asdict(config)} | loaded.facts
    header["answers"] = _num_answers(config, plan)
    header["prompts_sha256"] = hashlib.sha256(config.prompts.read_bytes()).hexdigest()

    count = 0
    progress = track(plan, "bench", console=Console(stderr=True), disable=quiet)
    with locked(out), results_file(out) as file:
        file.write(json.dumps({"header": header}, default=str) + "\n")
        for unit in progress:
            for line in _lines(config, loaded, unit):
                file.write(json.dumps(line) + "\n")
                count += 1
            file.flush()
    return count


def _check_lengths(config: BenchConfig, prompts: Sequence[BenchPrompt], model: Model) -> None:
    """Raises ContextLengthError or InvalidPrompt, with its place, for a prompt that does not fit.

    Later turns are looked at with answers before them that are as long as they may become.
    """
    params = config.params(0, 0.0)
    for prompt in prompts:
        num_turns = min(len(prompt.turns), config.turns)
        for turn in range(num_turns):
            with named(prompt.place):
                tokens = model.encode(_talk(prompt, [""] * turn))
                longest_answers = [0] * (turn * config.max_new_tokens)
                check(model.target, model.request(tokens + longest_answers, params))


def _warm_up(config: BenchConfig, prompt: BenchPrompt, loaded: Loaded) -> None:
    """Answer a little by every method: first calls build kernels."""
    short = replace(config.params(0, 0.0), max_new_tokens=min(8, config.max_new_tokens))
    for method in loaded.methods.values():
        method([loaded.model.encode(prompt.asked)], [short])


@contextmanager
def results_file(out: Path) -> Iterator[IO[str]]:
    """The results file, new or empty; if not one answer came of it, it is gone as it was."""
    was_there = out.exists()
    try:
        with out.open("w" if was_there else "x", encoding="utf-8") as file:
            yield file
    except BaseException:
        holds_no_answer = len(out.read_bytes().splitlines()) <= 1  # at most the header
        if holds_no_answer and was_there:
            out.write_bytes(b"")
        elif holds_no_answer:
            out.unlink()
        raise


# --- which prompts, when, by whom ---------------------------------------------------------------


def _plan(config: BenchConfig, prompts: Sequence[BenchPrompt]) -> list[_Unit]:
    """What is measured, in order: a repeat's settings go through the prompts side by side.

    A setting's units are counted for the rotation, so that every method goes first in each setting.
    """
    threads = config.threads or (torch.get_num_threads(),)
    units = []
    for numbers in product(config.temperature, config.max_rows, threads):
        setting = Setting(*numbers)
        for rotation, group in enumerate(_groups(prompts, setting.max_rows)):
            units.append(_Unit(0, rotation, setting, group))
    units.sort(key=lambda unit: unit.first_number)

    plan = []
    for repeat in range(config.repeats):
        for unit in units:
            plan.append(unit._replace(repeat=repeat, rotation=repeat + unit.rotation))
    return plan


def _groups(prompts: Sequence[BenchPrompt], size: int) -> list[list[BenchPrompt]]:
    """So many prompts of one task each, ordered by where their first ones stand in the file."""
    groups = []
    for task in grouped(prompts, lambda prompt: prompt.task).values():
        for start in range(0, len(task), size):
            groups.append(task[start : start + size])
    return sorted(groups, key=lambda group: group[0].number)


def _asked_of(name: str, config: BenchConfig, prompts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """Those of a unit's prompts that a method is asked; transformers' loops may be asked fewer."""
    most = config.transformers_prompts
    if most is None or config.specs[name].kind not in THEIRS:
        return list(prompts)
    return [prompt for prompt in prompts if prompt.rank < most]


def _num_answers(config: BenchConfig, plan: Sequence[_Unit]) -> int:
    count = 0
    for unit in plan:
        for name in config.specs:
            count += len(_asked_of(name, config, unit.prompts))
    return count


# --- answers ------------------------------------------------------------------------------------


def _lines(config: BenchConfig, loaded: Loaded, unit: _Unit) -> Iterator[Figures]:
    """The lines of results of one unit; every method has answered before the first one comes."""
    answers = _answers(config, loaded, unit)
    for name, own in answers.items():
        spec = config.specs[name]
        plain = "autoregressive"
        if spec.variant and is_ours(spec):
            plain = f"autoregressive:{spec.variant}"

        # others draw by other generators, and drawn drafts keep the distribution, not the text
        draws_alike = is_ours(spec) and name not in loaded.drawn
        is_comparable = unit.setting.temperature == 0 or draws_alike
        compared = answers.get(plain, {}) if is_comparable else {}
        for number, answer in own.items():
            line: Figures = {
                "task": unit.task,
                "prompt": number,
                "method": name,
                "repeat": unit.repeat,
            }
            line |= unit.setting._asdict()
            line["plain"] = plain
            yield line | _figures(answer, compared.get(number))


def _answers(config: BenchConfig, loaded: Loaded, unit: _Unit) -> dict[str, dict[int, Answer]]:
    """By method and number of the prompt, in the order in which the methods took their turns."""
    torch.set_num_threads(unit.setting.threads)
    rests = any(spec.is_engine for spec in config.specs.values())
    names = list(loaded.methods)
    first = unit.rotation % len(names)
    answers: dict[str, dict[int, Answer]] = {}
    for name in names[first:] + names[:first]:
        prompts = _asked_of(name, config, unit.prompts)
        if not prompts:
            continue
        if rests:
            time.sleep(_REST)
        method = loaded.methods[name]
        found = _ask(method, loaded.model, prompts, config, unit.setting.temperature)
        answers[name] = {}
        for prompt, answer in zip(prompts, found, strict=True):
            answers[name][prompt.number] = answer
    return answers


def _ask(
    method: Method,
    model: Model,
    prompts: Sequence[BenchPrompt],
    config: BenchConfig,
    temperature: float,
) -> list[Answer]:
    """The answers to prompts that are decoded together.

    Every turn after the first one follows the method's own answers.
    """
    found: list[list[Answer]] = [[] for _ in prompts]  # by prompt and turn
    seconds = 0.0
    for turn in range(config.turns):
        live = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        if not live:
            break

        asked = []
        params = []
        for i in live:
            texts = [_text_of(answer, model) for answer in found[i]]
            asked.append(model.encode(_talk(prompts[i], texts)))
            params.append(config.params(prompts[i].number, temperature))

        started = time.perf_counter()
        answers = method(asked, params)
        seconds += time.perf_counter() - started
        for i, tokens, answer in zip(live, asked, answers, strict=True):
            own = {"turns": 1, "num_prompt_tokens": len(tokens)}
            found[i].append(replace(answer, figures=answer.figures | own))

    whole = [joined(turns) for turns in found]
    rate = sum(len(answer.tokens) for answer in whole) / seconds
    together = {"batch_tokens_per_second": rate}
    return [replace(answer, figures=answer.figures | together) for answer in whole]


def _talk(prompt: BenchPrompt, answers: Sequence[str]) -> Prompt:
    """What is asked behind the answers to the turns before: the text alone, or the talk so far."""
    if not answers:
        return prompt.asked

    talk = list(prompt.earlier)
    for question, answer in zip(prompt.turns, answers, strict=False):
        talk.append({"role": "user", "content": question})
        talk.append({"role": "assistant", "content": answer})
    question = prompt.turns[len(answers)]
    talk.append({"role": "user", "content": question})
    return talk


def _text_of(answer: Answer, model: Model) -> str:
    text: str = model.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    return text


# --- what a line tells --------------------------------------------------------------------------


def acceptance(steps: Sequence[int]) -> list[float]:
    """By draft position from 1: the share of steps that committed it.

    steps: tokens of each, the target's own one included.
    """
    shares = []
    for position in range(1, max(steps, default=1)):
        shares.append(fmean(count > position for count in steps))
    return shares


def _figures(answer: Answer, plain: Answer | None) -> Figures:
    """What an answer is and cost, in the order of the results file.

    `shares`: of the steps' time after the first token. `peak_memory`: the most bytes that the
    whole process ever held. `identical`: whether the tokens are those of plain decoding, and
    `first_difference`: the first index where they are not; null: not compared.
    """
    count = len(answer.tokens)
    steps = answer.steps
    num_turns = answer.figures["turns"]
    figures: Figures = {
        "num_tokens": count,
        "seconds": answer.seconds,
        "decode_seconds": answer.decode_seconds,
        "tau": answer.tau,
    }
    figures |= answer.figures
    figures["accepted_lengths"] = steps
    figures["acceptance"] = acceptance(steps)
    figures["target_passes"] = len(steps)
    figures["time_to_first_token"] = (answer.seconds - answer.decode_seconds) / num_turns
    figures["tokens_per_second"] = count / answer.seconds
    figures["decode_tokens_per_second"] = None
    if steps and answer.decode_seconds:
        figures["decode_tokens_per_second"] = sum(steps) / answer.decode_seconds
    figures["peak_memory"] = _peak_memory()
    figures["shares"] = _shares(answer.figures.get("parts", {}))

    figures["identical"] = None
    figures["first_difference"] = None
    if plain is not None:
        difference = _first_difference(answer.tokens, plain.tokens)
        figures["identical"] = difference is None
        figures["first_difference"] = difference
    return figures


def _shares(seconds: dict[str, float]) -> dict[str, float]:
    """Of the parts of a step, in their time; the prompt's own part is left out."""
    parts = dict(seconds)
    parts.pop("prefill", None)
    total = sum(parts.values())
    return {part: spent / total for part, spent in parts.items()}


def _first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The first index where they differ; one that ends sooner differs there."""
    for index, (token, other) in enumerate(zip_longest(tokens, others)):
        if token != other:
            return index
    return None


def _peak_memory() -> int | None:
    """Bytes; None where the system does not tell."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
