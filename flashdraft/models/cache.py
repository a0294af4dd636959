"""The slot cache: fixed slots for keys and values, and a length per row.

Rollback is a smaller integer. Whatever lies beyond a row's length is garbage: nobody may read it,
and the next pass overwrites it. A chain that was accepted in part only grows the length by the
accepted tokens; a tree also moves the slots of the kept path into place. A row that begins as
another one did takes over what that one holds.

On the CPU large tensors lie in maps of memory: what was never written takes no room, and a row can
give its room back. So a server may have slots for the longest text in every row and pay for the
tokens that there are.

A layer with a running state (a linear attention, a convolution) has nothing that could be cut: its
state stands behind all that it has read. There the cache keeps a state that stands behind kept
tokens only, and the layer's own inputs of the tokens behind it, which wait until the state moves on
over them (`states` says how).

Knows nothing of tokens, models or who proposed what.
"""

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdraft.process import INTS

__all__ = ["SLOT_STEP", "TAIL", "Running", "SlotCache", "StateCache", "States", "round_up"]

SLOT_STEP = 64  # slots come, and are read, in multiples of this
_BLOCKED_DIMS = 5  # of keys that lie in blocks
_LARGE = 2**20  # bytes from which on a tensor lies in a map of its own
TAIL = 8  # tokens of a long text whose inputs are kept although the state behind them is known

# What a layer with a running state keeps of a row, by kind ("conv", "recurrent") and number. Nobody
# writes into these tensors: rows that begin alike share them.
States = dict[tuple[str, int], Tensor]


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
        self._maps: dict[int, mmap.mmap] = {}  # by the identity of the tensor that lies in it
        # What a reader of every layer's keys and values has prepared; void when a tensor moves.
        self.addresses: Sequence[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, written or not."""
        return self._slots_nbytes()

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot of a row in all layers that were written so far."""
        return self._slots_nbytes() // (self.rows * self.slots)

    @property
    def row_nbytes(self) -> int:
        """Bytes that a row may take beside its slots, as far as is known."""
        return 0

    def _slots_nbytes(self) -> int:
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

        more_slots = self.slots
        if slots > self.slots:
            more_slots = round_up(max(slots, 2 * self.slots))
        more_rows = max(rows, self.rows)

        self.addresses = None
        try:
            self._resize(more_rows, more_slots)
        except BaseException:  # no memory, say: what has grown is cut back
            self._resize(self.rows, self.slots)
            self._forget_maps()
            raise
        self.lengths = self.lengths + [0] * (more_rows - self.rows)
        self.rows = more_rows
        self.slots = more_slots

    def _forget_maps(self) -> None:
        """Those of tensors that are gone."""
        known = {id(tensor) for tensor in self._tensors()}
        for tensor_id in self._maps.keys() - known:
            del self._maps[tensor_id]

    def _resize(self, rows: int, slots: int) -> None:
        """Give every layer tensors of this size."""
        for index in range(self.num_layers):
            self.keys[index] = self._resized(self.keys[index], rows, slots)
            self.values[index] = self._resized(self.values[index], rows, slots)

    def _resized(self, tensor: Tensor | None, rows: int, slots: int) -> Tensor | None:
        """What is held of [rows, heads, slots or blocks of slots, ...], zeros behind it."""
        if tensor is None:
            return None
        is_blocked = tensor.ndim == _BLOCKED_DIMS
        old_rows, heads, old_places, *inner = tensor.shape
        places = slots // SLOT_STEP if is_blocked else slots
        if (rows, places) == (old_rows, old_places):
            return tensor

        resized = self._zeros(tensor, rows, heads, places, *inner)
        for row, length in enumerate(self.lengths):
            held = round_up(length) // SLOT_STEP if is_blocked else length
            resized[row, :, :held] = tensor[row, :, :held]
        self._maps.pop(id(tensor), None)
        return resized

    def _zeros(self, like: Tensor, *shape: int) -> Tensor:
        """Zeros of this shape; large ones on the CPU in a map of their own."""
        nbytes = math.prod(shape) * like.element_size()
        if nbytes < _LARGE or like.device.type != "cpu" or self.static:
            return like.new_zeros(*shape)

        room = _map(nbytes)
        tensor = torch.frombuffer(room, dtype=like.dtype).view(*shape)
        self._maps[id(tensor)] = room
        return tensor

    def layer(
        self, index: int, like: Tensor, values_like: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer.

        Made at the first call, to fit `like` [..., heads, n, head_dim]; values_like: the same of
        values that have a size of their own (latents).
        """
        keys = self.keys[index]
        values = self.values[index]
        if keys is not None and values is not None:
            return keys, values

        heads = like.shape[-3]
        head_dim = like.shape[-1]
        if self.blocked:
            blocks = self.slots // SLOT_STEP
            keys = self._zeros(like, self.rows, heads, blocks, head_dim, SLOT_STEP)
        else:
            keys = self._zeros(like, self.rows, heads, self.slots, head_dim)
        if values_like is None:
            values_like = like
        heads = values_like.shape[-3]
        head_dim = values_like.shape[-1]
        values = self._zeros(values_like, self.rows, heads, self.slots, head_dim)
        self.keys[index] = keys
        self.values[index] = values
        return keys, values

    def write(self, index: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Store [heads, n, head_dim] behind the row's length, which stays."""
        all_keys, all_values = self.layer(index, keys, values)
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

    def can_give(self, source: int, count: int) -> int:
        """How many of a row's tokens another one can begin with: the first `count`, or fewer."""
        return min(count, self.lengths[source])

    @torch.inference_mode()
    def take(self, row: int, source: int, count: int) -> None:
        """Let `row` begin with the first `count` tokens that row `source`, maybe itself, holds."""
        assert count == self.can_give(source, count), "a row cannot give more than it holds"
        if row != source and count > 0:
            for tensor in self._tensors():
                held = round_up(count) // SLOT_STEP if tensor.ndim == _BLOCKED_DIMS else count
                tensor[row, :, :held] = tensor[source, :, :held]
        self.lengths[row] = count

    def resume(self, row: int, source: int, count: int) -> int:
        """`take` as many of these tokens as the source holds; returns how many."""
        self.reserve(0, rows=max(row, source) + 1)
        held = self.can_give(source, count)
        self.take(row, source, held)
        return held

    def free(self, row: int) -> None:
        self.lengths[row] = 0

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Zeros instead of garbage.

        What is not finite would reach other texts through a mask, since 0 * NaN is NaN.
        """
        for tensor in self._tensors():
            flat = tensor[row].view(-1)
            pages = self._give_back(tensor, row)
            if sys.platform != "linux":  # elsewhere pages may come back as they were
                pages = slice(0, 0)
            flat[: pages.start].zero_()
            flat[pages.stop :].zero_()

    def give_back(self, row: int) -> None:
        """Return the room of a row that is free to the system, where it lies in maps."""
        assert self.lengths[row] == 0, "the row is not free"
        for tensor in self._tensors():
            self._give_back(tensor, row)

    def _give_back(self, tensor: Tensor, row: int) -> slice:
        """Return the pages that lie within a row; which of its numbers these hold."""
        room = self._maps.get(id(tensor))
        if room is None or not hasattr(room, "madvise"):
            return slice(0, 0)
        size = tensor.element_size()
        nbytes = tensor[row].numel() * size
        start = row * nbytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end <= first:
            return slice(0, 0)
        room.madvise(mmap.MADV_DONTNEED, first, end - first)
        return slice((first - start) // size, (end - start) // size)

    def _tensors(self) -> list[Tensor]:
        """Every layer's keys, then every layer's values, of the layers that were written."""
        return [tensor for tensor in self.keys + self.values if tensor is not None]


@dataclass
class Running:
    """What a row holds in one layer with a running state.

    The tokens that were kept are those that `state` stands behind, and those of `waiting`.
    """

    state: States | None = None  # None: it stands at the text's begin
    waiting: Tensor | None = None  # the layer's inputs [n, hidden] of the tokens kept since
    end: States | None = None  # behind those, too, if that is known
    inputs: Tensor | None = None  # of the last read's nodes [nodes, hidden]
    inputs_end: States | None = None  # behind `waiting` and all those nodes, if they are a chain
    inputs_near: States | None = None  # behind all of them but TAIL, if they are a long chain

    @property
    def num_waiting(self) -> int:
        return 0 if self.waiting is None else len(self.waiting)

    def settle(self) -> None:
        """Let the state stand behind all tokens that were kept, where that costs nothing."""
        if self.end is not None:
            self.moved(self.end)

    def moved(self, state: States) -> None:
        """Here is the state behind what waits."""
        self.state = state
        self.waiting = None
        self.end = None

    def was_read(self, inputs: Tensor) -> None:
        """The layer reads these nodes; nothing of what was read before is kept any more."""
        self.inputs = inputs
        self.inputs_end = None
        self.inputs_near = None

    def keep(self, path: Sequence[int]) -> None:
        """The nodes of this path were kept, and no others of the last read."""
        assert self.inputs is not None, "a path is kept of what was not read"
        is_whole = len(path) == len(self.inputs)
        if is_whole and self.inputs_near is not None:
            self.moved(self.inputs_near)
            self.waiting = self.inputs[-TAIL:].clone()  # it does not keep the others' room
        else:
            is_first = list(path) == list(range(len(path)))  # a slice asks a GPU for no indices
            own = self.inputs[: len(path)] if is_first else self.inputs[list(path)]
            before = [] if self.waiting is None else [self.waiting]
            self.waiting = torch.cat([*before, own])  # it does not keep the others' room
        self.end = self.inputs_end if is_whole else None
        self.inputs = None
        self.inputs_end = None
        self.inputs_near = None

    def without_last(self, count: int) -> "Running":
        """The same of a row that ends `count` tokens earlier: no more than wait here."""
        if count == 0:
            return Running(self.state, self.waiting, self.end)
        assert self.waiting is not None, "a state cannot be cut"
        left = len(self.waiting) - count
        return Running(self.state, self.waiting[:left] if left > 0 else None)

    @property
    def nbytes(self) -> int:
        total = 0
        for states in (self.state, self.end, self.inputs_end, self.inputs_near):
            total += _states_nbytes(states)
        for inputs in (self.waiting, self.inputs):
            if inputs is not None:
                total += inputs.nbytes
        return total

    def most_nbytes(self, num_tokens: int) -> int:
        """Bytes that it may come to: the states before and behind what waits, and the inputs of so
        many tokens that wait or are read. A convolution's are far more than its states."""
        of_states = max(map(_states_nbytes, (self.state, self.end, self.inputs_end)))
        inputs = self.inputs if self.waiting is None else self.waiting
        if inputs is None or len(inputs) == 0:
            return 2 * of_states
        return 2 * of_states + max(num_tokens, len(inputs)) * inputs[0].nbytes


class StateCache(SlotCache):
    """A slot cache, and beside it the running states of the layers that have one.

    A state stands behind kept tokens only. A read leaves the layer's inputs here, and `keep` says
    which of them stand: they wait, and the next read lets the state move on over them. As long as
    they wait a row can be cut behind any of them, and nowhere else.
    """

    def __init__(self, num_layers: int, rows: int, slots: int, *, most_waiting: int = TAIL) -> None:
        """most_waiting: tokens of a row that may wait until its states move on over them."""
        super().__init__(num_layers, rows, slots)
        self.most_waiting = max(most_waiting, TAIL)
        self._running: dict[int, dict[int, Running]] = {}  # by row and layer
        self._row_nbytes = 0

    def running(self, row: int, layer: int) -> Running:
        """Of a layer that a read comes through."""
        return self._running.setdefault(row, {}).setdefault(layer, Running())

    @property
    def nbytes(self) -> int:
        total = self._slots_nbytes()
        for row in self._running:
            total += self._nbytes_of(row)
        return total

    @property
    def row_nbytes(self) -> int:
        return self._row_nbytes

    def _nbytes_of(self, row: int) -> int:
        """Of the row's states and inputs."""
        return sum(own.nbytes for own in self._running.get(row, {}).values())

    def keep(self, row: int, path: Sequence[int]) -> None:
        super().keep(row, path)
        for own in self._running.get(row, {}).values():
            own.keep(path)

    def can_give(self, source: int, count: int) -> int:
        """Nothing, where that would be less than its state stands behind."""
        count = super().can_give(source, count)
        by_layer = self._running.get(source, {})
        num_waiting = min((own.num_waiting for own in by_layer.values()), default=0)
        return count if count >= self.lengths[source] - num_waiting else 0

    def take(self, row: int, source: int, count: int) -> None:
        num_lost = self.lengths[source] - count
        super().take(row, source, count)
        taken = {}
        if count > 0:
            for layer, own in self._running.get(source, {}).items():
                taken[layer] = own.without_last(num_lost)
        self._running[row] = taken

    def free(self, row: int) -> None:
        super().free(row)
        most = 0
        for own in self._running.pop(row, {}).values():
            most += own.most_nbytes(self.most_waiting)
        self._row_nbytes = max(self._row_nbytes, most)


def _states_nbytes(states: States | None) -> int:
    return sum(tensor.nbytes for tensor in (states or {}).values())


def _map(nbytes: int) -> mmap.mmap:
    """Zeros that take no room until they are written, and only this process sees."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
