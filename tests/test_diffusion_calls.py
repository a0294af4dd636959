"""A UNet's call, asked again of other points: what goes with a row goes with it, and what cannot
be told by rows is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashdraft.diffusion.calls import Call
from flashdraft.errors import InvalidParameter

PLACES = [2, 0, 2, 1, 1]
ROWS = [2, 0, 2, 1, 1, 5, 3, 5, 4, 4]  # of two branches of three images


def numbered(*shape: int) -> Tensor:
    """[6, ...]: every row is full of its number."""
    rows = torch.arange(6.0).view(6, *[1] * len(shape))
    return rows.expand(6, *shape).clone()


def asked_again(**conditions: Any) -> dict[str, Any]:
    """The conditions of other points, and `sample`."""
    got: dict[str, Any] = {}

    def own(sample: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        got.update(kwargs, sample=sample, timestep=timestep)
        return (sample[:, :4],)

    sample = torch.cat([torch.zeros(6, 4, 2, 2), numbered(5, 2, 2)], dim=1)
    call = Call.bound(own, sample, torch.tensor(7), **conditions)
    output = call.of_points(PLACES, 3, torch.ones(5, 4, 2, 2), torch.arange(5))
    assert output.shape == (2, 5, 4, 2, 2)
    return got


def test_every_condition_of_a_row_goes_with_its_points() -> None:
    got = asked_again(
        encoder_hidden_states=numbered(3, 4),
        class_labels=numbered(),
        added_cond_kwargs={
            "text_embeds": numbered(4),
            "time_ids": numbered(6),
            "image_embeds": [numbered(1, 4), numbered(2, 4)],  # of two IP-Adapters
        },
        cross_attention_kwargs={
            "scale": 0.5,
            "gligen": {"boxes": numbered(2, 4)},
            "ip_adapter_masks": [torch.ones(1, 2, 4, 4)],
        },
    )
    added, attention = got["added_cond_kwargs"], got["cross_attention_kwargs"]
    tensors = [got["encoder_hidden_states"], got["class_labels"], attention["gligen"]["boxes"]]
    tensors += [added["text_embeds"], added["time_ids"], *added["image_embeds"]]
    for one in tensors:
        assert one.flatten(1).float().mean(1).tolist() == ROWS if one.dim() > 1 else True
    assert got["class_labels"].tolist() == ROWS
    assert got["sample"][:, 4:].flatten(1).mean(1).tolist() == ROWS  # a mask's channels
    assert got["timestep"].tolist() == [*range(5)] * 2
    assert attention["scale"] == 0.5
    assert attention["ip_adapter_masks"][0].shape == (1, 2, 4, 4)


def test_a_mask_for_all_rows_stays_one_where_there_is_one_row() -> None:
    def own(sample: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        assert kwargs["cross_attention_kwargs"]["ip_adapter_masks"][0].shape == (1, 2, 4, 4)
        assert kwargs["encoder_hidden_states"].shape == (3, 8, 16)
        return (sample,)

    masks = {"ip_adapter_masks": [torch.ones(1, 2, 4, 4)]}
    text = torch.zeros(1, 8, 16)
    latents = torch.zeros(1, 4, 2, 2)
    call = Call.bound(own, latents, 7, text, cross_attention_kwargs=masks)
    call.of_points([0, 0, 0], 1, torch.ones(3, 4, 2, 2), torch.arange(3))


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"mid_block_additional_residual": torch.zeros(6, 4)}, "mid_block_additional_residual"),
        ({"cross_attention_kwargs": {"style": [torch.zeros(2)]}}, "style"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_has_no_known_rows_is_refused_by_name(conditions: Any, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        asked_again(**{"encoder_hidden_states": numbered(8, 16)} | conditions)


def test_images_at_different_steps_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="different steps"):
        Call.bound(print, torch.zeros(2, 4, 2, 2), torch.tensor([5, 4]), torch.zeros(2, 8, 16))


@pytest.mark.parametrize("how", ["text", "text in place", "mask", "adapter", "scale"])
def test_a_changed_condition_is_seen(how: str) -> None:
    def call(**changed: Any) -> Call:
        asked: dict[str, Any] = {
            "sample": torch.zeros(2, 9, 2, 2),
            "timestep": 7,
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"image_embeds": [torch.zeros(2, 1, 4)]},
            "cross_attention_kwargs": {"scale": 0.5},
        }
        return Call(print, asked | changed)

    text = torch.zeros(2, 8, 16)
    kept = call()
    kept.keep(4)
    assert call().is_like(kept, 4)
    moved = torch.zeros(2, 9, 2, 2)
    moved[:, :4] = 1.0  # the point itself is no condition
    assert call(sample=moved).is_like(kept, 4)
    changed: dict[str, Any] = {
        "text": {"encoder_hidden_states": text + 1},
        "text in place": {},
        "mask": {"sample": torch.ones(2, 9, 2, 2)},
        "adapter": {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 4)]}},
        "scale": {"cross_attention_kwargs": {"scale": 0.6}},
    }[how]
    if how == "text in place":
        text += 1
    assert not call(**changed).is_like(kept, 4)
