"""What a pipeline's own sampler does, kept for the training of a draft.

One shard a batch of images: the points, the clean latents that the target predicted there, the
noises that were drawn and the target's hidden states. A folder whose recording was broken off goes
on with the shard that is missing; another pipe, schedule or list of prompts is refused.

Knows pipelines and files. Does not know drafts' networks.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from flashdraft.diffusion.drafts import Block, Past
from flashdraft.diffusion.learned import unet_identity
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.diffusion.sampler import Image
from flashdraft.diffusion.transitions import Transitions, transitions
from flashdraft.errors import DataError
from flashdraft.files import check_facts, output_folder, write_file, write_tensors
from flashdraft.process import is_terminal

__all__ = ["RecordOptions", "Trajectories", "record"]


@dataclass(frozen=True)
class RecordOptions:
    """steps: of the sampler; guidance: its scale; images: of a batch; seed: of the first image."""

    steps: int = 100
    guidance: float = 1.0
    eta: float | None = None
    images: int = 8
    seed: int = 0


class _Watching:
    """A draft that drafts nothing, and for which the target's hidden states are kept."""

    name = "watching"
    needs_features = True

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        raise NotImplementedError("blocks of one step have no draft")


def record(
    pipe: Any, prompts: Sequence[str], out: Path, options: RecordOptions, *, quiet: bool = False
) -> None:
    """One image a prompt into the folder `out`.

    Raises InvalidParameter for a pipe or scheduler that is not known, DataError for a folder of
    other facts.
    """
    out = output_folder(out)
    facts = _facts(pipe, prompts, options)
    noted = out / "recorded.json"
    if noted.exists():
        hint = "name another folder, or record as it was begun"
        check_facts(out, json.loads(noted.read_text(encoding="utf-8")), facts, hint)
    out.mkdir(parents=True, exist_ok=True)
    write_file(noted, json.dumps(facts, indent=2).encode())

    starts = range(0, len(prompts), options.images)
    with Progress(disable=quiet or not is_terminal(None)) as bar:
        for number in bar.track(range(len(starts)), description="record"):
            shard = out / f"shard-{number:05d}.safetensors"
            if not shard.exists():
                start = starts[number]
                some = prompts[start : start + options.images]
                write_tensors(shard, _recorded(pipe, some, start, options))


def _recorded(
    pipe: Any, prompts: Sequence[str], start: int, options: RecordOptions
) -> dict[str, Tensor]:
    """Tensors [images, steps, ...]."""
    watched: dict[str, list[list[Tensor]]] = {}
    for name in ("points", "clean", "noises", "features"):
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
    asked: dict[str, Any] = {"guidance_scale": options.guidance, "output_type": "latent"}
    if options.eta is not None:
        asked["eta"] = options.eta
    with SpeculativeDiffusion(pipe, draft=_Watching(), block=1) as own:
        own.watch = watch
        own(list(prompts), num_inference_steps=options.steps, generator=generators, **asked)
    stacked = {}
    for name, by_image in watched.items():
        stacked[name] = torch.stack([torch.stack(steps) for steps in by_image]).cpu()
    return stacked


def _facts(pipe: Any, prompts: Sequence[str], options: RecordOptions) -> dict[str, Any]:
    scheduler = {}
    for name, value in dict(pipe.scheduler.config).items():
        if not name.startswith("_"):
            scheduler[name] = value
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    return {
        "unet": unet_identity(pipe.unet),
        "features": pipe.unet.conv_out.in_channels,
        "channels": pipe.unet.conv_out.out_channels,
        "scheduler": type(pipe.scheduler).__name__,
        "schedule": scheduler,
        "prompts": digest,
        "num_prompts": len(prompts),
        "options": asdict(options),
    }


class Trajectories:
    """A recorded folder. Images are numbered in the order of its prompts."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder that is none, or not wholly recorded."""
        noted = folder / "recorded.json"
        if not noted.exists():
            raise DataError(f"`{folder}` holds no recorded images", hint="record some first")
        self.facts: dict[str, Any] = json.loads(noted.read_text(encoding="utf-8"))
        self.options = RecordOptions(**self.facts["options"])
        count = -(-self.facts["num_prompts"] // self.options.images)
        self.shards = [folder / f"shard-{number:05d}.safetensors" for number in range(count)]
        missing = [shard.name for shard in self.shards if not shard.exists()]
        if missing:
            got = f"`{folder}` lacks {len(missing)} of {count} shards, {missing[0]} first"
            raise DataError(got, hint="record again into this folder: it goes on")
        self.table = _table(self.facts)
        self._held: dict[str, Tensor] = {}

    def __len__(self) -> int:
        count: int = self.facts["num_prompts"]
        return count

    def load(self) -> dict[str, Tensor]:
        """All images' tensors, [images, steps, ...]."""
        if not self._held:
            shards = [load_file(shard) for shard in self.shards]
            for name in shards[0]:
                self._held[name] = torch.cat([shard[name] for shard in shards])
        return self._held


def _table(facts: dict[str, Any]) -> Transitions:
    import diffusers

    scheduler = getattr(diffusers, facts["scheduler"]).from_config(facts["schedule"])
    scheduler.set_timesteps(facts["options"]["steps"])
    return transitions(scheduler, eta=facts["options"]["eta"] or 0.0)
