"""A device that is not the CPU, for machines without one: tensors that say they lie elsewhere and
compute on the CPU.

An operation on tensors of both places fails as it would on a GPU. Values are right, so a whole text
can be compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = torch.device("privateuseone:0")
MOVES = ("aten.copy_.", "aten._copy_from.")  # into the first argument
COPIES = (*MOVES, "aten._to_copy.", "aten.to.")
INDEXING = (
    "aten.index.",
    "aten.index_put",
    "aten._index_put_impl_.",
    "aten._unsafe_index.",
)  # may have indices on the CPU
# The first backward pass of a process starts a thread for every device, and no fork may then train
# (those of toy_runs.forked do):
torch.ones(1, requires_grad=True).sum().backward()  # it comes while there is only the CPU
_setup_privateuseone_for_python_backend()


class _There(Tensor):
    """A tensor at DEVICE; `held` has its numbers, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        facts: Any = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        there = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **facts)
        there.held = held
        return there

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return func(args[0].cpu())  # refused for a subclass; on a GPU it copies as well
        if func in (
            Tensor.__getitem__,
            Tensor.__setitem__,
        ):  # lists and indices on the CPU go over as they do for a GPU
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (
                args[0],
                tuple(
                    torch.as_tensor(i).to(DEVICE) if isinstance(i, (list, Tensor)) else i
                    for i in at
                ),
                *args[2:],
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While it is active, DEVICE exists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@torch.inference_mode(mode=False)  # an inference tensor cannot be wrapped
@torch.no_grad()
def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = str(func), tree_leaves((args, kwargs))
    there = [t for t in leaves if isinstance(t, _There)]
    asked = next((leaf.type for leaf in leaves if isinstance(leaf, torch.device)), None)
    if there and not name.startswith(COPIES):
        checked = tree_leaves((args[0], args[2:], kwargs)) if name.startswith(INDEXING) else leaves
        if wrong := [
            t for t in checked if isinstance(t, Tensor) and not isinstance(t, _There) and t.ndim
        ]:
            raise RuntimeError(
                f"{name}: a tensor {tuple(wrong[0].shape)} on the CPU among tensors at {DEVICE}"
            )
    owners = {id(t.held): t for t in there}
    bare_args, bare_kwargs = tree_map(_bare, (args, kwargs))
    out = func(*bare_args, **bare_kwargs)
    target = asked or (
        "cpu"
        if not there or (name.startswith(MOVES) and not isinstance(args[0], _There))
        else DEVICE.type
    )
    if target == "cpu":
        return out
    return tree_map(
        lambda t: owners[id(t)] if id(t) in owners else _There(t) if isinstance(t, Tensor) else t,
        out,
    )


def _bare(leaf: Any) -> Any:
    return (
        leaf.held
        if isinstance(leaf, _There)
        else torch.device("cpu")
        if isinstance(leaf, torch.device)
        else leaf
    )


def moved(model: Any) -> Any:
    """A module whose tensors lie at DEVICE."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(
                parameter.detach().to(DEVICE), requires_grad=False
            )
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(DEVICE)
    return model
