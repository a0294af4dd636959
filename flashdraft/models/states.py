"""Layers with a running state, read so that a rejected draft leaves no trace in them.

A linear attention or a convolution is a *mixer* of tokens, as attention is, but what it keeps of a
text is one state, which stands behind all that it has read. What a mixer is given at a kept node
depends on kept tokens only, so it is final: those inputs are kept (`cache.Running`), and the next
read of the row runs the mixer's own stock forward over them first, from the state behind the tokens
before, and then over the new nodes. Everything else in the model, whose weights are most of it,
sees each token once.

- A tree is read as its paths from the root to the leaves, each from the row's state.
- Paths of different lengths are padded on the right: that changes no output of theirs, but their
  last state. So a row's state is only moved over tokens without padding.
- A few kept tokens may wait longer: while they and the new nodes are at most `MERGED` tokens, one
  call reads both, and the state moves on when that becomes too long.
- The last tokens of a long text are a call of their own: so the row can be cut behind each of them,
  as those want it that begin with the same prompt.

Knows caches and the interface of transformers' caches to running states (5.23, 5.24). Does not know
families, attention, or what is drafted.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.models.cache import TAIL, Running, StateCache, States
from flashdraft.process import INTS

__all__ = ["MERGED", "Walk", "mixers_of", "walked"]

MERGED = 32  # two published blocks; docs/concepts.md has what it saves and costs

_ASKED = "update_conv_state"  # of a cache, by every mixer

_Stock = Callable[[Tensor, "_MixerCache"], Tensor]
_Facts = tuple[tuple[int, bool], ...]


def mixers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that keep a running state: their forward asks a cache for it.

    Transformers before 5.20 or so asked in other words; there none is found.
    """
    mixers = []
    for module in model.modules():
        own = inspect.unwrap(type(module).forward)
        code = getattr(own, "__code__", None)
        if hasattr(module, "layer_idx") and code is not None and _ASKED in code.co_names:
            mixers.append(module)
    return mixers


# ---- one read ------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Paths that one call of a mixer reads."""

    places: list[int]  # the row of each path, by its place in the read
    inputs: Tensor  # where those of each lie [paths, width], padded on the right
    whole: dict[int, int]  # by place: the row's only path, where it is as long as the width
    has_tail: bool  # whether all are, and long


class _Plan(NamedTuple):
    """How rows are read whose mixer has so many tokens waiting."""

    groups: list[_Group]
    outputs: Tensor  # where each node's output lies in those of all groups [rows * nodes]

    def to(self, device: torch.device) -> "_Plan":
        groups = []
        for group in self.groups:
            groups.append(group._replace(inputs=group.inputs.to(device)))
        return _Plan(groups, self.outputs.to(device))


class Walk:
    """One read of some rows' trees, layer by layer through the mixers.

    parents: [rows, nodes]; sizes: of the trees, without padding [rows].
    merged: tokens that a mixer reads at a time, rather than move its state over those that wait.
    """

    def __init__(
        self,
        cache: StateCache,
        rows: Sequence[int],
        parents: Tensor,
        sizes: Tensor,
        merged: int = MERGED,
    ) -> None:
        self.cache = cache
        self.rows = list(rows)
        self.merged = merged
        self.width = parents.shape[1]
        self.sizes: list[int] = sizes.tolist()
        self.paths: list[list[list[int]]] = []
        for own, size in zip(parents.tolist(), self.sizes, strict=True):
            self.paths.append(_paths(own[:size]))
        # Layers are mostly alike, and lie on few devices: each gets its indices once a read.
        self._plans: dict[tuple[_Facts, torch.device], _Plan] = {}

    def mix(self, stock: _Stock, layer: int, nodes: Tensor) -> Tensor:
        """What the mixer gives at every node. nodes: its inputs [rows, nodes, hidden].

        stock: its own forward, of inputs and a cache.
        """
        rows = [self.cache.running(row, layer) for row in self.rows]
        self._move_on(stock, rows)

        parts = []
        for own in rows:
            if own.waiting is not None:
                parts.append(own.waiting)
        inputs = torch.cat([*parts, nodes.flatten(0, 1)])
        plan = self._plan(rows, nodes.device)
        for place, (own, size) in enumerate(zip(rows, self.sizes, strict=True)):
            own.was_read(nodes[place, :size])

        given = []
        for group in plan.groups:
            reads = inputs[group.inputs]
            states = [rows[place].state for place in group.places]
            outputs, near, after = _read(stock, reads, states, group.has_tail)
            given.append(outputs.flatten(0, 1))
            for place, path in group.whole.items():
                rows[place].inputs_end = after.behind(path)
                if group.has_tail:
                    rows[place].inputs_near = near.behind(path)
        mixed = torch.cat(given)[plan.outputs]
        return mixed.view(*nodes.shape[:2], -1)

    def _move_on(self, stock: _Stock, rows: Sequence[Running]) -> None:
        """Let states stand behind what waits, where the new nodes would make that too long."""
        late: dict[tuple[int, bool], list[Running]] = {}  # a state moves over no padding
        for own, paths in zip(rows, self.paths, strict=True):
            own.settle()
            longest = max(map(len, paths))
            if own.num_waiting > 0 and own.num_waiting + longest > self.merged:
                late.setdefault((own.num_waiting, own.state is None), []).append(own)

        for some in late.values():
            waiting = []
            for own in some:
                assert own.waiting is not None
                waiting.append(own.waiting)
            after = _MixerCache([own.state for own in some])
            stock(torch.stack(waiting), after)
            for path, own in enumerate(some):
                own.moved(after.behind(path))

    def _plan(self, rows: Sequence[Running], device: torch.device) -> _Plan:
        facts = tuple((own.num_waiting, own.state is None) for own in rows)
        known = facts, device
        if known not in self._plans:
            self._plans[known] = self._planned(facts).to(device)
        return self._plans[known]

    def _planned(self, facts: _Facts) -> _Plan:
        """facts: how many tokens wait in each row, and whether it has no state.

        The inputs lie one after the other: first what waits of every row, then the nodes of every
        row. Rows without a state are not read beside those that have one, nor long texts beside
        shorter ones.
        """
        first_node = sum(count for count, _ in facts)
        together: dict[tuple[bool, int], list[tuple[int, list[int]]]] = {}
        start = 0
        for place, (count, is_new) in enumerate(facts):
            waiting = range(start, start + count)
            start += count
            behind = first_node + place * self.width
            for path in self.paths[place]:
                whole = [*waiting, *(behind + node for node in path)]
                length = len(whole) if len(whole) > self.merged else 0
                together.setdefault((is_new, length), []).append((place, whole))

        groups = []
        outputs = [0] * (len(facts) * self.width)
        start = 0
        for some in together.values():
            group = self._group(some)
            width = group.inputs.shape[1]
            for _, whole in some:
                for offset, where in enumerate(whole):
                    if where >= first_node:
                        outputs[where - first_node] = start + offset
                start += width
            groups.append(group)

        for place, size in enumerate(self.sizes):
            root = place * self.width
            for padding in range(root + size, root + self.width):
                # Nobody reads it, but what is no number in another row would come into this one.
                outputs[padding] = outputs[root]
        return _Plan(groups, torch.tensor(outputs, **INTS))

    def _group(self, paths: Sequence[tuple[int, list[int]]]) -> _Group:
        """paths: the row's place, and where its inputs lie, of each."""
        width = max(len(whole) for _, whole in paths)
        places = []
        inputs = []
        unpadded = {}
        for number, (place, whole) in enumerate(paths):
            padding = [whole[-1]] * (width - len(whole))
            places.append(place)
            inputs.append(whole + padding)
            if len(self.paths[place]) == 1 and not padding:
                unpadded[place] = number
        is_long = width > max(self.merged, TAIL)
        has_tail = is_long and len(unpadded) == len(paths)
        return _Group(places, torch.tensor(inputs, **INTS), unpadded, has_tail)


def _paths(parents: Sequence[int]) -> list[list[int]]:
    """The paths from the root to each leaf. parents: of a tree's nodes, -1 of its root."""
    inner = set(parents)
    paths = []
    for leaf in range(len(parents)):
        if leaf in inner:
            continue
        path = []
        node = leaf
        while node >= 0:
            path.append(node)
            node = parents[node]
        paths.append(path[::-1])
    return paths


# ---- one call of a mixer -------------------------------------------------------------------------


def _read(
    stock: _Stock, reads: Tensor, states: Sequence[States | None], has_tail: bool
) -> tuple[Tensor, "_MixerCache", "_MixerCache"]:
    """The outputs of inputs [paths, n, hidden] behind these states, and the states behind them:
    behind all but the tail if there is one, and behind all."""
    near = _MixerCache(states)
    if not has_tail:
        return stock(reads, near), near, near

    outputs = stock(reads[:, :-TAIL], near)
    after = _MixerCache([near.behind(path) for path in range(len(reads))])
    of_tail = stock(reads[:, -TAIL:], after)
    return torch.cat([outputs, of_tail], dim=1), near, after


class _MixerCache:
    """The states of some paths as one mixer's cache, for one call.

    A mixer may write into what it is given, so it is given copies.
    """

    def __init__(self, states: Sequence[States | None]) -> None:
        self._states: States = {}
        self._has_past = all(states)  # or none: those would be read otherwise
        by_kind: dict[tuple[str, int], list[Tensor]] = {}
        for own in states:
            for kind, tensor in (own or {}).items():
                by_kind.setdefault(kind, []).append(tensor)
        for kind, tensors in by_kind.items():
            self._states[kind] = torch.stack(tensors)

    def behind(self, path: int) -> States:
        """A path's own state, as the mixer left it."""
        own = {}
        for kind, states in self._states.items():
            state = states[path]
            nbytes = state.numel() * state.element_size()
            lies_alone = state.untyped_storage().nbytes() == nbytes
            # A copy keeps no room of its neighbours', nor of the states before it (Mamba-2).
            own[kind] = state if lies_alone else state.clone()
        return own

    # What transformers' mixers call.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.get(("recurrent", state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> Tensor:
        """What the convolution reads [paths, channels, past and new tokens]."""
        kind = "conv", state_idx
        size = conv_kernel_size or conv_states.shape[-1]
        past = self._states.get(kind)
        if past is None:
            num_missing = max(size - conv_states.shape[-1], 0)
            read = F.pad(conv_states, (num_missing, 0))
        else:
            read = torch.cat([past, conv_states], dim=-1)
            size = past.shape[-1]
        self._states[kind] = read[..., -size:].clone()
        return read

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0
    ) -> Tensor:
        self._states["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self._has_past

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


# ---- the model's mixers, for one read ------------------------------------------------------------


@contextmanager
def walked(mixers: Sequence[nn.Module]) -> Iterator[None]:
    """While this lasts, a mixer that is given a cache with a `walk` goes that way.

    Others' passes through the model are as ever.
    """
    before = []
    for mixer in mixers:
        own = mixer.__dict__
        before.append(own.get("forward"))  # accelerate puts one there, too
        own["forward"] = partial(_forward, mixer, mixer.forward)
    try:
        yield
    finally:
        for mixer, forward in zip(mixers, before, strict=True):
            del mixer.__dict__["forward"]
            if forward is not None:
                mixer.__dict__["forward"] = forward


def _forward(
    mixer: nn.Module, stock: Callable[..., Tensor], hidden_states: Tensor, **given: object
) -> Tensor:
    found = _walk_of(given)
    if found is None:
        return stock(hidden_states=hidden_states, **given)
    name, walk = found

    def own_forward(inputs: Tensor, cache: _MixerCache) -> Tensor:
        return stock(hidden_states=inputs, **{**given, name: cache})

    layer: int = mixer.layer_idx  # type: ignore[assignment]
    return walk.mix(own_forward, layer, hidden_states)


def _walk_of(given: Mapping[str, object]) -> tuple[str, Walk] | None:
    """The walk that a mixer's cache brings, and by which name the mixer calls that: they differ."""
    for name, cache in given.items():
        walk = getattr(cache, "walk", None)
        if isinstance(walk, Walk):
            return name, walk
    return None
