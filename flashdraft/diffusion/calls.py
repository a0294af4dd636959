"""What a pipe's loop asks of its UNet, and the same question of other points.

A UNet reads rows: every image once, or once for each branch of its guidance. A row of a block is an
image's row with another point and another time; what else the row was asked with (prompt, sizes,
masks, an adapter's pictures) goes with it. What cannot be told by rows is refused by name.

Knows the arguments of diffusers' UNet2DConditionModel. Does not know samplers.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashdraft.errors import InvalidParameter
from flashdraft.process import INTS

__all__ = ["Call", "Settings", "signature_of", "unsupported"]

# Of `cross_attention_kwargs`: by row; one for all rows.
_BY_ROW = ("gligen",)
_FOR_ALL = ("ip_adapter_masks",)


def unsupported(got: str) -> InvalidParameter:
    hint = "Stable Diffusion's pipelines work: text to image, image to image, inpainting, XL"
    return InvalidParameter(f"this pipe can't be drafted: {got}", hint=hint, option="pipe")


@functools.lru_cache(maxsize=32)
def signature_of(function: Callable[..., object]) -> inspect.Signature:
    """Of a function or of a class's method, looked at once: that takes longer than some steps."""
    return inspect.signature(function)


class Call:
    """One call of the UNet, for all images of the loop and all branches of guidance."""

    def __init__(self, own: Callable[..., Any], asked: Mapping[str, Any]) -> None:
        """own: the UNet's forward; asked: its arguments by name.

        Raises InvalidParameter for one that cannot be told by rows.
        """
        self.own = own
        self.sample: Tensor = asked["sample"]
        self.timestep = asked["timestep"]
        self.wants_dict: bool = asked.get("return_dict", True)
        self.conditions = dict(asked)
        for name in ("sample", "timestep", "return_dict"):
            self.conditions.pop(name, None)
        self._kept: object = None
        for name, value in self.conditions.items():
            if "residual" in name and value is not None:
                got = f"the pipe gives its UNet `{name}`: those are of one point, not of a block"
                raise unsupported(got)
        _check_attention(self.conditions.get("cross_attention_kwargs"))
        is_tensor = isinstance(self.timestep, Tensor)
        times = self.timestep.flatten().tolist() if is_tensor else [self.timestep]
        if min(times) != max(times):
            raise InvalidParameter(
                "the images of a batch are at different steps of the sampler",
                hint="a block has one schedule: draw them one by one",
                option="timestep",
            )
        self.time = float(times[0])

    @classmethod
    def bound(cls, own: Callable[..., object], *args: object, **kwargs: object) -> "Call":
        """Of a UNet's arguments as they came. Raises InvalidParameter for unknown ones."""
        from diffusers import UNet2DConditionModel

        signature = signature_of(UNet2DConditionModel.forward)
        try:
            asked = signature.bind(None, *args, **kwargs).arguments
        except TypeError as error:
            raise unsupported(f"its call of the UNet: {error}") from None
        del asked["self"]
        return cls(own, asked)

    def tensors(self) -> list[Tensor]:
        """The conditions that are one tensor."""
        tensors = []
        for value in self.conditions.values():
            if isinstance(value, Tensor):
                tensors.append(value)
        return tensors

    def as_asked(self) -> Tensor:
        """The UNet's output for the call as it is."""
        said = self.own(self.sample, self.timestep, **self.conditions, return_dict=False)
        output: Tensor = said[0]
        return output

    def of_points(
        self, places: list[int], num_images: int, points: Tensor, times: Tensor
    ) -> Tensor:
        """The outputs [branches, m, ...] for other points [m, ...] of its images."""
        branches = len(self.sample) // num_images
        places_of_rows = torch.tensor(places, **INTS)
        rows = []
        for branch in range(branches):
            rows.append(places_of_rows + branch * num_images)
        own = torch.cat(rows).to(self.sample.device)
        further = self.sample[own, points.shape[1] :]  # a mask's channels, of an inpainting UNet
        samples = torch.cat([points] * branches)
        samples = torch.cat([samples, further], dim=1)
        all_times = torch.cat([times] * branches)

        conditions = self._of_rows(own)
        said = self.own(samples, all_times, **conditions, return_dict=False)
        output: Tensor = said[0]
        return output.view(branches, len(places), *output.shape[1:])

    def _of_rows(self, own: Tensor) -> dict[str, Any]:
        """The conditions of these rows [m] of the call."""
        count = len(self.sample)

        def gathered(tensor: Tensor) -> Tensor:
            has_rows = tensor.dim() > 0 and len(tensor) == count
            return tensor[own.to(tensor.device)] if has_rows else tensor

        conditions = {}
        for name, value in self.conditions.items():
            if name != "cross_attention_kwargs" or value is None:
                conditions[name] = _mapped(value, gathered)
                continue
            options = dict(value)
            for part in _BY_ROW:
                if part in options:
                    options[part] = _mapped(options[part], gathered)
            conditions[name] = options
        return conditions

    def keep(self, num_channels: int) -> None:
        """Remembers what it was asked under, which a callback may change in place."""
        self._kept = _copied(self._under(num_channels))

    def is_like(self, kept: "Call", num_channels: int) -> bool:
        """Whether it asks under the conditions of a call that was kept."""
        if len(self.sample) != len(kept.sample):
            return False
        return _are_equal(self._under(num_channels), kept._kept)

    def _under(self, num_channels: int) -> dict[str, Any]:
        return self.conditions | {"further": self.sample[:, num_channels:]}


def _check_attention(options: Any) -> None:
    if options is None:
        return
    for name, value in options.items():
        if name not in (*_BY_ROW, *_FOR_ALL) and _has_tensors(value):
            got = f"`cross_attention_kwargs` has a tensor {name!r}, whose rows are not known"
            raise unsupported(got)


def _has_tensors(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    return any(_has_tensors(part) for _, part in _parts_of(value))


def _parts_of(value: object) -> list[tuple[Any, Any]]:
    """The entries of a dictionary, a list or a tuple, with their keys or places."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):  # of several adapters
        return list(enumerate(value))
    return []


def _mapped(value: object, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor in it changed; containers are new."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _mapped(part, function) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(part, function) for part in value]
    return value


def _copied(value: object) -> Any:
    return _mapped(value, torch.clone)


def _are_equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool(torch.equal(left, right))
    is_named = isinstance(left, dict) and isinstance(right, dict)
    is_listed = isinstance(left, list | tuple) and isinstance(right, list | tuple)
    if not is_named and not is_listed:
        return left is right or bool(left == right)
    if len(left) != len(right):
        return False
    others = dict(_parts_of(right))
    for name, part in _parts_of(left):
        if name not in others or not _are_equal(part, others[name]):
            return False
    return True


# ---- what a UNet is set to -----------------------------------------------------------------------

_NO_SETTINGS = frozenset(nn.Module().__dict__) - {"training", "_modules"} | {"_internal_dict"}
_OURS = ("forward", "_compiled_call_impl", "_flashdraft")  # patched while a context lasts


class Settings:
    """Whatever may change what a UNet says beside its weights, as it is now: adapters' scales,
    attention processors, FreeU's numbers, whether GLIGEN's layers are in.

    Looked through once; whether all is as it was is asked at every step, and takes no longer than
    one look at each value.
    """

    def __init__(self, unet: Any) -> None:
        self._seen: list[tuple[Any, object, object]] = []  # container, key, value
        self._sizes: list[tuple[Any, int]] = []
        for module in unet.modules():
            if type(module).__module__.startswith("torch.nn."):
                continue
            self._look_at(vars(module))
            processor = vars(module).get("processor")
            if processor is not None and hasattr(processor, "__dict__"):
                self._look_at(vars(processor))

    def are_now(self) -> bool:
        """Whether nothing has changed: numbers are what they were, and things the same."""
        for container, size in self._sizes:
            if len(container) != size:
                return False
        for container, key, value in self._seen:
            try:
                now = container[key]
            except (KeyError, IndexError):
                return False
            if now is not value and not _is_same_number(now, value):
                return False
        return True

    def _look_at(self, container: Any) -> None:
        """All that a dictionary, a list or a tuple holds."""
        self._sizes.append((container, len(container)))
        for key, value in _parts_of(container):
            if key in _NO_SETTINGS or key in _OURS:
                continue
            self._seen.append((container, key, value))
            if isinstance(value, dict | list | tuple):
                self._look_at(value)


def _is_same_number(left: object, right: object) -> bool:
    """A LoRA's scale is multiplied and divided again in every call, and so rounded."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6)
    is_number = isinstance(left, bool | int | str)
    return is_number and type(left) is type(right) and bool(left == right)
