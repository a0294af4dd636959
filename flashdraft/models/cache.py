"""The slot cache: fixed slots for keys and values, and a length per row.

Rollback is a smaller integer. Whatever lies beyond a row's length is garbage: nobody may read it, and the next pass
overwrites it. A chain that was accepted in part only grows the length by the accepted tokens; a tree also moves the
slots of the kept path into place. Knows nothing of tokens, models or who proposed what.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.process import INTS

__all__ = ["SLOT_STEP", "SlotCache", "round_up"]

SLOT_STEP = 64  # slots come, and are read, in multiples of this


def round_up(slots: int) -> int:
    return -(-slots // SLOT_STEP) * SLOT_STEP


class SlotCache:
    """Keys and values of `num_layers` layers for `rows` rows of at least `slots` slots each.

    A layer's tensors are made at its first write, so that every layer may have its own number of heads and head size:
    keys[layer], values[layer]: [rows, heads, slots, head_dim]. blocked: keys are [rows, heads, slots / 64, head_dim, 64], as
    the C++ kernels read them. static: who reads it is compiled anew for every size, so it grows as seldom as it can.
    """

    def __init__(
        self, num_layers: int, rows: int, slots: int, *, blocked: bool = False, static: bool = False
    ) -> None:
        self.num_layers, self.rows, self.slots, self.blocked = (
            num_layers,
            rows,
            round_up(slots),
            blocked,
        )
        self.static = static
        self.lengths = [0] * rows
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.addresses: Any = None  # the kernels' own, until a tensor moves

    @property
    def nbytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None
        )

    def reserve(self, slots: int, rows: int = 0, *, later: int = 0) -> None:
        """Make room for at least `slots` slots a row, and for `rows` rows; what is stored stays.

        later: so many more may be asked for; only a static cache makes room for them now.

        Slots double, so that a long text moves its keys and values seldom; one layer at a time is there twice.
        """
        if self.static:
            slots += later
        if slots <= self.slots and rows <= self.rows:
            return
        more_slots = 0
        if slots > self.slots:
            more_slots = round_up(max(slots, 2 * self.slots)) - self.slots
        more_rows = max(rows - self.rows, 0)

        self.slots += more_slots
        self.rows += more_rows
        self.lengths = self.lengths + [0] * more_rows
        margins = (
            0,
            0,
            0,
            more_slots,
            0,
            0,
            0,
            more_rows,
        )  # before and after: head_dim, slots, heads, rows
        blocks = (0, 0, 0, 0, 0, more_slots // SLOT_STEP, 0, 0, 0, more_rows)
        for index in range(self.num_layers):
            keys, values = self.keys[index], self.values[index]
            if keys is None or values is None:
                continue
            self.keys[index] = F.pad(keys, blocks if self.blocked else margins)
            self.values[index] = F.pad(values, margins)
        self.addresses = None

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer; made to fit `like` [..., heads, n, head_dim] at the first call."""
        keys, values = self.keys[index], self.values[index]
        if keys is None or values is None:
            shape = (self.rows, like.shape[-3], self.slots, like.shape[-1])
            blocks = (
                (*shape[:2], self.slots // SLOT_STEP, shape[3], SLOT_STEP)
                if self.blocked
                else shape
            )
            keys, values = like.new_zeros(blocks), like.new_zeros(shape)
            self.keys[index], self.values[index] = keys, values
        return keys, values

    def write(self, index: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Store [heads, n, head_dim] behind the row's length, which stays."""
        all_keys, all_values = self.layer(index, keys)
        slots = self.lengths[row] + torch.arange(keys.shape[1], **INTS)
        all_values[row][:, slots] = values
        if self.blocked:
            all_keys[row][:, slots // SLOT_STEP, :, slots % SLOT_STEP] = keys.transpose(0, 1)
        else:
            all_keys[row][:, slots] = keys

    @torch.inference_mode()  # the tensors were made in it; elsewhere they may not be written
    def keep(self, row: int, path: Sequence[int]) -> None:
        """Commit the nodes of `path` (indices into what was written last, in ascending order); the rest is forgotten."""
        start = self.lengths[row]
        if list(path) != list(range(len(path))):
            to, source = start + torch.arange(len(path), **INTS), start + torch.tensor(path, **INTS)
            for tensor in (*([] if self.blocked else self.keys), *self.values):
                if tensor is not None:
                    tensor[row][:, to] = tensor[row][:, source]
            for tensor in self.keys if self.blocked else []:
                if tensor is not None:
                    moved = tensor[row][:, source // SLOT_STEP, :, source % SLOT_STEP]
                    tensor[row][:, to // SLOT_STEP, :, to % SLOT_STEP] = moved
        self.lengths[row] = start + len(path)

    def free(self, row: int) -> None:
        self.lengths[row] = 0

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Zeros instead of garbage: what is not finite reaches other texts through a mask, since 0 * NaN is NaN."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                tensor[row].zero_()
