"""A training run as its folder tells of it: the settings, the checkpoints, the model card.

A checkpoint is whole or not there: it is filled in `.tmp-save`, every file and the folder are
synced, state.json (which lists the others' sizes) comes last, and one rename puts it in place.
Older ones go only after that. Does not know how a network is trained.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import flashdraft
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.files import check_facts, output_folder, parse_json, say, write_file, write_tensors
from flashdraft.formats.config import DraftConfig
from flashdraft.types import HIGHEST, check_options, option, require

__all__ = [
    "Json",
    "TrainConfig",
    "check_run_folder",
    "full_disk_named",
    "last_checkpoint",
    "load_checkpoint",
    "model_card",
    "save_checkpoint",
    "tell_of_other_target",
]

Json = dict[str, Any]  # an object of a JSON file

_ASSETS = Path(flashdraft.__file__).with_name("assets")
_CARD = (_ASSETS / "card.md").read_text(encoding="utf-8")
_KEPT = 2  # whole checkpoints
_WRITTEN = (  # besides run.json
    "metrics.jsonl",
    "checkpoints",
    "best",
    "tensorboard",
    "vocabulary.safetensors",
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Method(NamedTuple):
    title: str
    what: str  # the network is


_METHODS = {
    "dflash": _Method(
        title="DFlash",
        what="A block-diffusion draft network (DFlash, arXiv 2602.06036).",
    ),
    "eagle3": _Method(
        title="EAGLE-3",
        what="A draft layer on fused features (EAGLE-3, arXiv 2503.01840), "
        "trained by training-time test.",
    ),
    "draft_model": _Method(
        title="Draft model",
        what="A causal LM of some layers of its target, with its embedding and lm_head "
        "(2211.17192).",
    ),
    "medusa": _Method(
        title="Medusa",
        what="Residual heads on the last state (Medusa, arXiv 2401.10774), "
        "before the target's own lm_head.",
    ),
}


_HEADS = {  # by kind of sequential head
    "swiglu": "swiglu (FlashDraft's own)",
    "selector": "DFlash 2's candidate selector",
    "markov": "DSpark's vanilla Markov head",
}


@dataclass(frozen=True)
class TrainConfig:
    """How one run trains. A default exists here once; the command line reads the help from here."""

    steps: int = option(2000, "optimizer steps", least=1, most=2**31 - 1)
    sequences: int = option(6, "sequences a micro-batch", least=1, most=1 << 16)
    accumulate: int = option(1, "micro-batches a step, on every process", least=1, most=1 << 16)
    anchors: int = option(64, "random anchors a sequence", least=1, most=2**31 - 1)
    min_context: int = option(
        0,
        "no anchor has fewer tokens before it: for a fine-tune on long contexts",
        least=0,
        most=2**31 - 1,
    )
    weights: str = option(
        "decay",
        "weight of a block's positions: decay (the paper's) or dpace",
        choices=("decay", "dpace"),
    )
    gamma: float = option(4.0, "with decay, the weight of position k is exp(-(k-1)/gamma)", above=0)
    kl: float = option(
        0.0,
        "share of the loss that is KL to the target's own law; needs features with --soft-labels",
        least=0,
        most=1,
    )
    tv: float = option(
        0.0,
        "share of the loss that is total variation to it; cross-entropy has the rest",
        least=0,
        most=1,
    )
    optimizer: str = option(
        "adamw",
        "adamw, or muon: the matrices' momentum, orthogonalised, and AdamW for the rest",
        choices=("adamw", "muon"),
    )
    lr: float = option(6e-4, "peak learning rate, on AdamW's scale", above=0)
    warmup: float = option(
        0.04, "share of the steps spent warming up, from 0 to 1", least=0, most=1
    )
    weight_decay: float = option(0.01, "weight decay of the matrices", least=0)
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    ema: float = option(
        0.0,
        "decay of the weights' moving average that is measured and kept; 0: none",
        least=0,
        below=1,
    )
    vocab: int = option(
        8192,
        "the draft vocabulary: this many commonest answer tokens; 0 takes all",
        least=0,
        most=2**31 - 1,
    )
    negatives: int = option(
        1024, "random other tokens added to that softmax at every step", least=0, most=1 << 24
    )
    precision: str = option(
        "auto", "bf16, fp32, or auto: bf16 where it is native", choices=("auto", "bf16", "fp32")
    )
    eval_every: int = option(250, "steps between measurements of tau", least=1, most=2**31 - 1)
    save_every: int = option(100, "steps between checkpoints", least=1, most=2**31 - 1)
    tracker: str = option(
        "tensorboard",
        "tensorboard, or with it: wandb, trackio",
        choices=("tensorboard", "wandb", "trackio"),
    )
    seed: int = option(
        0, "seed of the data order, the anchors and the initial weights", least=0, most=HIGHEST
    )

    def __post_init__(self) -> None:
        check_options(self)
        is_free = self.weights == "decay" or self.gamma == 4.0
        require(is_free, "gamma", self.gamma, "left out where weights is not decay")
        require(self.kl + self.tv <= 1, "kl, tv", (self.kl, self.tv), "shares of 1")


# The folder of a run.


def check_run_folder(out: Path, inputs: Sequence[Path] = ()) -> Json:
    """The run.json of the run that `out` holds; empty for a new one.

    Raises InvalidParameter where something else lies there.
    """
    folder = output_folder(out, inputs=inputs)
    path = folder / "run.json"
    hint = "name another folder with --out"
    if path.exists():
        run = _read_run(path)
        if run is None:
            got = f"`{path}` was not written by `flashdraft train`"
            raise InvalidParameter(got, hint=hint)
        return run

    for name in _WRITTEN:
        if not _is_free(folder / name):
            foreign = f"`{folder / name}` was not written by `flashdraft train`"
            raise InvalidParameter(f"{foreign}: no run.json is beside it", hint=hint)
    return {}


def _read_run(path: Path) -> Json | None:
    """A run.json; None for another file of that name."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if "flashdraft" in run["versions"] and "steps" in run["config"]:
            return dict(run)
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _is_free(path: Path) -> bool:
    """Whether nothing is lost where a run writes here.

    Nothing is there, or what an earlier version left without run.json.
    """
    if path.is_dir():
        is_empty = not any(path.iterdir())
        return is_empty or last_checkpoint(path) is not None
    if path.name == "vocabulary.safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                return set(file.keys()) == {"tokens"}
        except (OSError, SafetensorError):
            return False
    return not os.path.lexists(path)


def tell_of_other_target(draft: str, target: Mapping[str, object]) -> None:
    """One line where the run beside a drafter's folder says that it was trained for another target.

    It may serve this one.
    """
    folder = Path(draft)
    if not (folder / "config.json").exists() or not (folder.parent / "run.json").exists():
        return
    try:
        run = check_run_folder(folder.parent)
        check_facts(folder, run.get("inputs", {}), {"target": target})
    except InvalidParameter:  # another's run.json
        return
    except DataError as error:
        most = "a drafter is accepted most by the target that it was trained for"
        say(f"{error.args[0]}; {most}")


# Checkpoints.


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
) -> None:
    """`groups`: name of a file -> its tensors.

    Raises FlashDraftError for a full disk; the last whole checkpoint stays.
    """
    scratch = folder / ".tmp-save"
    final = folder / f"step-{step:07d}"
    with full_disk_named(folder, f"`{final}`"):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            _fill(scratch, step, groups, state)
            _sync(scratch)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of an earlier run
            os.replace(scratch, final)
            _sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _remove_old(folder)


def _fill(
    scratch: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
) -> None:
    """The tensors' files, and state.json last."""
    for name, tensors in groups.items():
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_tensors(scratch / f"{name}.safetensors", contiguous)
    sizes = {path.name: path.stat().st_size for path in scratch.glob("*.safetensors")}
    whole_state = {**state, "step": step, "files": sizes}
    write_file(scratch / "state.json", json.dumps(whole_state).encode())


def _remove_old(folder: Path) -> None:
    """All before the last whole ones.

    They are whole, damaged, or half gone: a kill while they were removed.
    """
    whole = [path for path in sorted(folder.glob("step-*")) if _is_whole(path)]
    oldest_kept = whole[-_KEPT:][0]
    for path in folder.glob("step-*"):
        if path < oldest_kept:
            shutil.rmtree(path)


@contextmanager
def full_disk_named(folder: Path, what: str) -> Iterator[None]:
    """Turns a full disk, met while `what` is written, into a FlashDraftError.

    It names the last checkpoint of `folder`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        hint = "make room and run it again"
        last = last_checkpoint(folder)
        if last is not None:
            hint = f"{hint}: it goes on from {last.name}"
        raise FlashDraftError(f"the disk is full: {what} was not written", hint=hint) from None


def _is_full_disk(error: Exception) -> bool:
    if getattr(error, "errno", None) in _FULL:
        return True
    return any(f"os error {number})" in str(error) for number in _FULL)  # as safetensors tells it


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole one; damaged ones are passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _is_whole(path):
            return path
    return None


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], Json]:
    """What `save_checkpoint` was given: the groups and the state."""
    state: Json = json.loads((path / "state.json").read_text(encoding="utf-8"))
    groups = {}
    for name in state["files"]:
        groups[name.removesuffix(".safetensors")] = load_file(path / name)
    return groups, state


def _is_whole(path: Path) -> bool:
    try:
        sizes = parse_json((path / "state.json").read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _sync(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The model card.


def model_card(
    config: DraftConfig,
    target: str,
    run: Json,
    figures: Mapping[str, Any],
    *,
    num_samples: int,
) -> str:
    """A drafter's README.

    run: run.json; figures: `step`, `positions_seen`, `num_prompts`, `flops` and `taus`, which are
    pairs of step and measured tau.
    """
    method = _METHODS[config.method]
    masks = ""
    if config.method == "dflash":
        layout = "filled in: row k predicts the token at anchor + k"
        if config.anchor_first:
            layout = "anchor-first: row k predicts the token at anchor + k + 1"
        masks = f"; mask token {config.mask_token_id}; {layout}"
    settings = [f"{name} {value}" for name, value in run["config"].items()]
    measured = [f"| {step} | {tau:.2f} |" for step, tau in figures["taus"]]
    facts = {
        "title": method.title,
        "what": method.what,
        "target": target,
        "head": _head_told(config),
        "masks": masks,
        "layers": ", ".join(map(str, config.target_layer_ids)),
        "num_drafts": config.block_size - 1,
        "draft_vocabulary": config.draft_vocab_size or config.vocab_size,
        "num_samples": num_samples,
        "settings": ", ".join(settings),
        "measured": "\n".join(measured),
    }
    return _CARD.format_map(vars(config) | facts | dict(figures) | run["versions"] | run)


def _head_told(config: DraftConfig) -> str:
    kind = config.sequential_head
    if kind is None:
        return "none"
    told = f"{_HEADS.get(kind, kind)}, inner size {config.head_rank}"
    if kind == "selector":
        told = f"{told}, among {config.head_choices} candidates"
    if config.conv_kernel_size:
        taps = f"{config.conv_kernel_size} rows and groups of {config.conv_group_size} channels"
        told = f"{told}; convolutions along a block over {taps}"
    return told
