"""What a UNet is set to: whatever a callback changes of it is noticed, and nothing else is."""

from collections.abc import Callable
from typing import Any

import pytest
from diffusers.models.attention_processor import AttnProcessor
from toy_diffusion import toy_unet

from flashdraft.diffusion.calls import Settings


def some_attention(unet: Any) -> Any:
    return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1


def set_number(unet: Any) -> None:
    some_attention(unet).scale = 0.25


def set_processor(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor())


def set_in_place(unet: Any) -> None:
    unet.scaling["an adapter"] = 0.5


def set_within(unet: Any) -> None:
    unet.scales[0][1] = 0.5


def set_new(unet: Any) -> None:
    unet.up_blocks[0].s1 = 0.9  # as FreeU does


def delete(unet: Any) -> None:
    del unet.scales


def put_a_module_in(unet: Any) -> None:
    unet.add_module("another", toy_unet())


@pytest.fixture
def unet() -> Any:
    own = toy_unet()
    own.scaling = {"an adapter": 1.0}
    own.scales = [[1.0, 1.0]]
    return own


@pytest.mark.parametrize(
    "change",
    [set_number, set_processor, set_in_place, set_within, set_new, delete, put_a_module_in],
)
def test_a_change_is_noticed(change: Callable[[Any], None], unet: Any) -> None:
    settings = Settings(unet)
    assert settings.are_now()
    change(unet)
    assert not settings.are_now()
    assert Settings(unet).are_now()


def test_the_same_again_is_no_change(unet: Any) -> None:
    settings = Settings(unet)
    unet.scaling["an adapter"] = float("1.0")  # an equal number, another object
    some_attention(unet).scale = float(str(some_attention(unet).scale))
    assert settings.are_now()


def test_our_own_patches_are_none(unet: Any) -> None:
    """They are others in every context."""
    seen = []
    for _ in range(2):
        unet.__dict__["forward"] = lambda: None
        unet.__dict__["_flashdraft"] = object()
        seen.append(Settings(unet))
        assert seen[0].are_now()
