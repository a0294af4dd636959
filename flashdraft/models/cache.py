"""The slot cache: fixed slots for keys and values, and a length per row.

Rollback is a smaller integer. Whatever lies beyond a row's length is garbage: nobody may read it,
and the next pass overwrites it. A chain that was accepted in part only grows the length by the
accepted tokens; a tree also moves the slots of the kept path into place.

Knows nothing of tokens, models or who proposed what.
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
    """The next multiple of SLOT_STEP."""
    return -(-slots // SLOT_STEP) * SLOT_STEP


class SlotCache:
    """Keys and values of `num_layers` layers for `rows` rows of at least `slots` slots each.

    A layer's tensors are made at its first write, so that every layer may have its own number of
    heads and head size: keys[layer] and values[layer] are [rows, heads, slots, head_dim].
    blocked: keys are [rows, heads, slots / 64, head_dim, 64], as the C++ kernels read them.
    static: who reads it is compiled anew for every size, so it grows as seldom as it can.
    """

    def __init__(
        self, num_layers: int, rows: int, slots: int, *, blocked: bool = False, static: bool = False
    ) -> None:
        self.num_layers = num_layers
        self.rows = rows
        self.slots = round_up(slots)
        self.blocked = blocked
        self.static = static
        self.lengths = [0] * rows
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        # What a reader of every layer's keys and values has prepared; void when a tensor moves.
        self.addresses: Sequence[Any] | None = None

    @property
    def nbytes(self) -> int:
        total = 0
        for tensor in self._tensors():
            total += tensor.numel() * tensor.element_size()
        return total

    def reserve(self, slots: int, rows: int = 0, *, later: int = 0) -> None:
        """Make room for at least `slots` slots a row, and for `rows` rows; what is stored stays.

        later: so many more may be asked for; only a static cache makes room for them now.

        Slots double, so that a long text moves its keys and values seldom; one layer at a time is
        there twice.
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
        more_keys = more_slots // SLOT_STEP if self.blocked else more_slots
        for index in range(self.num_layers):
            keys = self.keys[index]
            values = self.values[index]
            if keys is None or values is None:
                continue
            self.keys[index] = _grown(keys, more_rows, more_keys)
            self.values[index] = _grown(values, more_rows, more_slots)
        self.addresses = None

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer.

        Made at the first call, to fit `like` [..., heads, n, head_dim].
        """
        keys = self.keys[index]
        values = self.values[index]
        if keys is not None and values is not None:
            return keys, values

        heads = like.shape[-3]
        head_dim = like.shape[-1]
        values = like.new_zeros(self.rows, heads, self.slots, head_dim)
        if self.blocked:
            blocks = self.slots // SLOT_STEP
            keys = like.new_zeros(self.rows, heads, blocks, head_dim, SLOT_STEP)
        else:
            keys = torch.zeros_like(values)
        self.keys[index] = keys
        self.values[index] = values
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
        """Commit the nodes of `path`; the rest is forgotten.

        path: indices into what was written last, in ascending order.
        """
        start = self.lengths[row]
        lies_in_place = list(path) == list(range(len(path)))
        if not lies_in_place:
            source = start + torch.tensor(path, **INTS)
            target = start + torch.arange(len(path), **INTS)
            self._move(row, source, target)
        self.lengths[row] = start + len(path)

    def _move(self, row: int, source: Tensor, target: Tensor) -> None:
        """Copy what a row holds in the source slots into the target slots, in every layer."""
        for values in self.values:
            if values is not None:
                values[row][:, target] = values[row][:, source]

        for keys in self.keys:
            if keys is None:
                continue
            if self.blocked:
                moved = keys[row][:, source // SLOT_STEP, :, source % SLOT_STEP]
                keys[row][:, target // SLOT_STEP, :, target % SLOT_STEP] = moved
            else:
                keys[row][:, target] = keys[row][:, source]

    def free(self, row: int) -> None:
        self.lengths[row] = 0

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Zeros instead of garbage.

        What is not finite would reach other texts through a mask, since 0 * NaN is NaN.
        """
        for tensor in self._tensors():
            tensor[row].zero_()

    def _tensors(self) -> list[Tensor]:
        """Every layer's keys, then every layer's values, of the layers that were written."""
        return [tensor for tensor in self.keys + self.values if tensor is not None]


def _grown(tensor: Tensor, more_rows: int, more_slots: int) -> Tensor:
    """[rows, heads, slots or blocks of slots, ...] with zeros behind its rows and its slots."""
    # F.pad takes zeros before and after each dimension, the last dimension first.
    inner_dims = (0, 0) * (tensor.ndim - 3)
    heads = (0, 0)
    return F.pad(tensor, (*inner_dims, 0, more_slots, *heads, 0, more_rows))
