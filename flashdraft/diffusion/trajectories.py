"""What a pipeline's own sampler does, kept for the training of a draft.

One shard a batch of images: the points, the clean latents that the target predicted there, the
noises that were drawn and the target's features. A folder whose recording was broken off goes on
with the shards that are missing; another pipe, schedule or list of prompts is refused. Read slice
by slice: a folder may be larger than memory.

Knows pipelines and files. Does not know drafts' networks.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.diffusion.drafts import Block, Past
from flashdraft.diffusion.learned import Identity, feature_channels, identity_of
from flashdraft.diffusion.models import eta_of, set_steps
from flashdraft.diffusion.options import RecordOptions
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.diffusion.sampler import Image
from flashdraft.diffusion.transitions import Transitions, transitions
from flashdraft.errors import DataError, InvalidParameter, first_line
from flashdraft.files import (
    check_facts,
    locked,
    output_folder,
    parse_json,
    write_file,
    write_tensors,
)
from flashdraft.train.config import full_disk_named

__all__ = ["Trajectories", "check_recorded", "record"]

_NOTE = "recorded.json"
_TENSORS = ("points", "clean", "noises", "features")


class _Watching:
    """A draft that drafts nothing, and for which the target's features are kept."""

    name = "watching"
    needs_features = True

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        raise NotImplementedError("blocks of one step have no draft")


# ---- recording -----------------------------------------------------------------------------------


def record(
    pipe: Any, prompts: Sequence[str], out: Path, options: RecordOptions, *, quiet: bool = False
) -> None:
    """One image a prompt into the folder `out`, each of its own seed.

    Raises InvalidParameter for a pipe or scheduler that is not known, and for a folder of something
    else; DataError for a folder of other facts, or no prompts; FlashDraftError for a full disk.
    """
    if not prompts:
        raise DataError("there are no prompts to record", hint="give some")
    SpeculativeDiffusion(pipe, draft=_Watching())  # or it says what is wrong with the pipe
    feature_channels(pipe.unet)
    set_steps(pipe.scheduler, options.steps)
    out = check_recorded(out)
    facts = _facts(pipe, prompts, options)
    with locked(out):
        _check_begun(out, facts)
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / _NOTE, json.dumps(facts, indent=1).encode())

        starts = range(0, len(prompts), options.batch)
        with Progress(disable=quiet) as bar:
            for number, start in enumerate(bar.track(starts, description="record")):
                shard = _shard(out, number)
                if shard.exists():
                    continue
                some = prompts[start : start + options.batch]
                tensors = _recorded(pipe, some, start, options)
                with full_disk_named(out, f"`{shard}`"):
                    write_tensors(shard, tensors)


def check_recorded(out: Path) -> Path:
    """The real folder, which is new, empty or recorded. Raises InvalidParameter."""
    folder = output_folder(out)
    is_foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / _NOTE).is_file()
    if is_foreign:
        got = f"`{out}` was not written by `flashdraft image-record`"
        raise InvalidParameter(got, hint="name another folder")
    return folder


def _check_begun(out: Path, facts: dict[str, object]) -> None:
    if (out / _NOTE).exists():
        hint = "name another folder, or record as it was begun"
        check_facts(out, _noted(out), facts, hint)


def _noted(folder: Path) -> dict[str, Any]:
    path = folder / _NOTE
    try:
        noted = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(noted, dict) and {"pipe", "scheduler", "options"} <= noted.keys():
            return noted
    except (OSError, ValueError):
        pass
    got = f"`{path}` was not written by `flashdraft image-record`"
    raise InvalidParameter(got, hint="name another folder")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _recorded(
    pipe: Any, prompts: Sequence[str], start: int, options: RecordOptions
) -> dict[str, Tensor]:
    """Tensors [images, steps, ...]. start: number of the first image."""
    watched: dict[str, list[list[Tensor]]] = {}
    for name in _TENSORS:
        watched[name] = [[] for _ in prompts]

    def watch(place: int, image: Image, step: int, point: Tensor) -> None:
        past = image.past
        assert past is not None
        assert past.features is not None
        watched["points"][place].append(point)
        watched["clean"][place].append(past.said.clean)
        watched["noises"][place].append(image.noise_of(step))
        watched["features"][place].append(past.features.half())

    generators = []
    for place in range(len(prompts)):
        generators.append(torch.Generator("cpu").manual_seed(options.seed + start + place))
    asked: dict[str, object] = {"guidance_scale": options.guidance, "output_type": "latent"}
    eta = eta_of(pipe.scheduler, options.eta)
    if eta is not None:
        asked["eta"] = eta
    with SpeculativeDiffusion(pipe, draft=_Watching(), block=1) as own:
        own.watch = watch
        own(list(prompts), num_inference_steps=options.steps, generator=generators, **asked)
    stacked = {}
    for name, by_image in watched.items():
        stacked[name] = torch.stack([torch.stack(steps) for steps in by_image]).cpu()
    return stacked


def _facts(pipe: Any, prompts: Sequence[str], options: RecordOptions) -> dict[str, Any]:
    identity = identity_of(pipe.unet)
    weights = json.dumps(identity).encode()
    schedule = json.loads(pipe.scheduler.to_json_string())
    own = asdict(options) | {"eta": eta_of(pipe.scheduler, options.eta)}
    return {
        "pipe": {
            "name": str(getattr(pipe, "name_or_path", None) or type(pipe).__name__),
            "id": hashlib.sha256(weights).hexdigest()[:16],
        },
        "unet": identity._asdict(),
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "features": feature_channels(pipe.unet),
        "channels": pipe.unet.conv_out.out_channels,
        "scheduler": {"name": type(pipe.scheduler).__name__, "config": schedule},
        "num_images": len(prompts),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        "options": own,
    }


# ---- reading -------------------------------------------------------------------------------------


class Trajectories:
    """A recorded folder. Images are numbered in the order of its prompts."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder that is none, or not wholly recorded."""
        self.folder = folder
        if not (folder / _NOTE).is_file():
            hint = "record some first: flashdraft image-record"
            raise DataError(f"`{folder}` holds no recorded images", hint=hint)
        self.facts = _noted(folder)
        self.options = RecordOptions(**self.facts["options"])
        self.unet = Identity(**self.facts["unet"])
        count = -(-len(self) // self.options.batch)
        self._shards = []
        missing = []
        for number in range(count):
            shard = _shard(folder, number)
            self._shards.append(shard)
            if not shard.exists():
                missing.append(shard.name)
        if missing:
            got = f"`{folder}` lacks {len(missing)} of {count} shards, {missing[0]} first"
            raise DataError(got, hint="record again into this folder: it goes on")
        self.table = self._table()
        self._open: dict[int, Any] = {}  # safetensors' handles, by shard

    def __len__(self) -> int:
        count: int = self.facts["num_images"]
        return count

    @property
    def identity(self) -> str:
        """Of what was recorded, wherever it lies."""
        facts = {name: value for name, value in self.facts.items() if name != "pipe"}
        facts["pipe"] = self.facts["pipe"]["id"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, name: str, image: int, first: int, count: int = 1) -> Tensor:
        """[count, ...], float32: of this image from step `first` on, less where it ends before.

        name: points, clean, noises or features. Raises DataError for a damaged shard.
        """
        number, place = divmod(image, self.options.batch)
        shard = self._shards[number]
        try:
            if number not in self._open:
                self._open[number] = safe_open(shard, framework="pt")
            held: Tensor = self._open[number].get_slice(name)[place, first : first + count]
        except (SafetensorError, OSError, IndexError) as error:
            got = f"`{shard}` is damaged: {first_line(error)}"
            raise DataError(got, hint="remove it and record again: the rest is kept") from None
        return held.float()

    def _table(self) -> Transitions:
        import diffusers

        noted = self.facts["scheduler"]
        kind = getattr(diffusers, noted["name"], None)
        if kind is None:
            got = f"`{self.folder}` was recorded with {noted['name']}, which diffusers has not"
            raise DataError(got, hint="record with a scheduler of diffusers' own")
        scheduler = kind.from_config(noted["config"])
        scheduler.set_timesteps(self.options.steps)
        return transitions(scheduler, eta=self.options.eta or 0.0)
