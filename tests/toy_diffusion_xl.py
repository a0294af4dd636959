"""A tiny random Stable Diffusion XL, built from configs: two text encoders, sizes as conditions."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from toy_diffusion import CLEAN, tokenizer_in
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

KINDS = {
    "text": StableDiffusionXLPipeline,
    "image": StableDiffusionXLImg2ImgPipeline,
    "inpaint": StableDiffusionXLInpaintPipeline,
}


def toy_xl_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,  # both encoders' states, side by side
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        use_linear_projection=True,
    )
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.05)
    return unet.eval()


def toy_xl_pipe(folder: Path, kind: str = "text") -> Any:
    """Quiet, without a watermark. kind: "text", "image" or "inpaint"."""
    tokenizer = tokenizer_in(folder)
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    )
    pipe = KINDS[kind](
        vae=vae.eval(),
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=toy_xl_unet(),
        scheduler=DDIMScheduler(clip_sample=False, **CLEAN),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
