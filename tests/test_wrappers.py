"""Models that also see or hear, as targets: the language model in their folder computes on text
what the whole does; and Gemma 4's language model after rejected drafts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, MIXED, SHAPE, VOCAB, WINDOW, tiny_model
from safetensors.torch import load_file, save_file
from test_target import CLOSE, FAR, Faults, worst_after_all
from toy_eagle3 import published
from toy_folders import letter_tokenizer, save_target
from toy_training import one_line_and_hint
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    BambaConfig,
    CLIPConfig,
    CLIPModel,
    Gemma4TextConfig,
)

import flashdraft
import flashdraft.hub
import flashdraft.models.packed
import flashdraft.wrappers
from flashdraft.errors import FlashDraftError, UnsupportedTarget
from flashdraft.loading import load_target
from flashdraft.models.hf import CHECKED, RUNNING, HFTarget
from flashdraft.models.lean import LeanTarget
from flashdraft.models.packed import StoredConfig
from flashdraft.models.target import Target
from flashdraft.pretrained import Source, read_their_config
from flashdraft.wrappers import WRAPPERS

TEXT = list(range(10, 36))  # no token that stands for a picture
LAYERS = tuple(range(SHAPE["num_hidden_layers"] + 1))
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_EYES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": SHAPE["hidden_size"],
    "patch_size": 4,
    "spatial_merge_size": 1,
}
QWEN: dict[str, Any] = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
THREE_AXES = {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [1, 1, 2]}
GATED: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": {**THREE_AXES, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
}


def wrapper(eyes: dict[str, Any], text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"vision_config": eyes, "text_config": {**SHAPE, **text}, **more}


KINDS: dict[str, dict[str, Any]] = {
    "gemma3": wrapper(EYES, MIXED, mm_tokens_per_image=4),
    "gemma4": wrapper(
        {**EYES, "num_key_value_heads": 2, "head_dim": 8},
        {
            **MIXED,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCAB,
        },
        audio_config=None,
        image_token_id=5,
    ),
    "idefics3": wrapper(EYES, {"model_type": "llama"}, image_token_id=5, scale_factor=1),
    "internvl": wrapper(
        {**EYES, "image_size": [8, 8], "patch_size": [4, 4]},
        {"model_type": "qwen2"},
        image_token_id=5,
    ),
    "lfm2_vl": wrapper(
        EYES,
        {
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
        },
        image_token_id=5,
        downsample_factor=1,
    ),
    "llava": wrapper(
        {**EYES, "model_type": "clip_vision_model"}, {"model_type": "llama"}, image_token_index=5
    ),
    "llava_next": wrapper(
        {**EYES, "model_type": "clip_vision_model"}, {"model_type": "llama"}, image_token_index=5
    ),
    "llava_onevision": wrapper(
        {**EYES, "model_type": "siglip_vision_model"}, {"model_type": "qwen2"}, image_token_index=5
    ),
    "mistral3": wrapper(
        {**EYES, "model_type": "pixtral", "head_dim": 8},
        {"model_type": "mistral", "sliding_window": None},
        image_token_index=5,
    ),
    "qwen2_vl": wrapper(
        {
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": SHAPE["hidden_size"],
            "num_heads": 2,
            "patch_size": 4,
            "mlp_ratio": 1,
        },
        {"rope_parameters": THREE_AXES},
        **QWEN,
    ),
    "qwen2_5_vl": wrapper(
        {**QWEN_EYES, "fullatt_block_indexes": [0], "window_size": 8},
        {"rope_parameters": THREE_AXES},
        **QWEN,
    ),
    "qwen3_5": wrapper(
        {**QWEN_EYES, "num_position_embeddings": 4, "deepstack_visual_indexes": []}, GATED, **QWEN
    ),
    "qwen3_5_moe": wrapper(
        {**QWEN_EYES, "num_position_embeddings": 4, "deepstack_visual_indexes": []},
        {
            **GATED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        **QWEN,
    ),
    "qwen3_vl": wrapper(
        {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
        {"head_dim": 8, "rope_parameters": THREE_AXES},
        **QWEN,
    ),
    "qwen3_vl_moe": wrapper(
        {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
        {
            "head_dim": 8,
            "rope_parameters": THREE_AXES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        **QWEN,
    ),
    "smolvlm": wrapper(EYES, {"model_type": "llama"}, image_token_id=5, scale_factor=1),
}


def whole(kind: str, **changes: Any) -> Any:
    """A random wrapper, eyes included."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**KINDS[kind], **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def saved(folder: Path, kind: str, **changes: Any) -> tuple[Path, Any]:
    model = whole(kind, **changes)
    save_target(folder, model=model)
    if kind == "qwen3_vl_moe":  # published folders hold experts the other way round
        change_tensors(folder, lambda name, t: (name, t.mT if "experts." in name else t))
    return folder, model


def change_tensors(folder: Path, change: Callable[[str, Any], tuple[str, Any]]) -> None:
    path = folder / "model.safetensors"
    changed = [change(name, tensor) for name, tensor in load_file(path).items()]
    tensors = {name: tensor.contiguous() for name, tensor in changed}
    save_file(tensors, path, metadata={"format": "pt"})


def off_by(target: Target, model: Any) -> float:
    """How far the logits and all features of a text are from the whole model's, in its standard
    deviations.
    """
    raw: list[torch.Tensor] = []
    last = model.get_decoder().layers[-1]
    hook = last.register_forward_hook(lambda _module, _inputs, out: raw.append(out))
    with torch.no_grad():
        own = model(input_ids=torch.tensor([TEXT]), output_hidden_states=True, use_cache=False)
    hook.remove()
    out = raw[0][0] if isinstance(raw[0], tuple) else raw[0]
    states = [*own.hidden_states[1:-1], out, own.hidden_states[-1]]
    wanted = torch.cat([state[0] for state in states], dim=-1)

    logits, features = target.prefill(target.new_cache(1, 64), 0, torch.tensor(TEXT), LAYERS)
    assert features is not None
    of_logits = (logits - own.logits[0, -1]).abs().max() / own.logits.std()
    of_features = (features - wanted).abs().max() / wanted.std()
    return max(float(of_logits), float(of_features))


def read(folder: Path) -> Target:
    return load_target(str(folder), kernel="transformers").target


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_computes_on_text_what_the_whole_does(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path, kind)
    target = read(folder)
    assert off_by(target, model) < 1e-4
    assert target.config.model_type in (*CHECKED, *RUNNING)
    assert target.nbytes < sum(p.nbytes for p in model.parameters())  # no eyes


def test_every_wrapper_that_is_read_is_checked() -> None:
    assert set(WRAPPERS) == set(KINDS)


@pytest.mark.parametrize("kind", ["mistral3", "internvl", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_a_llama_shaped_language_model_runs_on_our_decoder(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path, kind)
    target = load_target(str(folder), kernel="torch").target
    assert isinstance(target, LeanTarget)
    assert off_by(target, model) < 1e-3


@pytest.mark.parametrize("fault", ["experts", "axes"])
def test_planted_faults_make_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    kind = {"experts": "qwen3_vl_moe", "axes": "qwen3_vl"}[fault]
    folder, model = saved(tmp_path, kind)
    if fault == "experts":
        plain = {**flashdraft.wrappers._SAME, "qwen3_vl_moe_text": ("qwen3_moe", {})}
        monkeypatch.setattr(flashdraft.wrappers, "_SAME", plain)
    else:
        monkeypatch.setattr(flashdraft.wrappers, "_plain_rope", lambda rope: {})
    assert off_by(read(folder), model) > 0.05


@pytest.mark.parametrize(
    ("kind", "prefix", "head"),
    [
        ("llava", "model.language_model.", "lm_head."),
        ("llava", "language_model.model.", "language_model.lm_head."),
        ("qwen3_vl", "model.language_model.", "lm_head."),
        ("qwen2_5_vl", "model.language_model.", "lm_head."),
    ],
)
def test_older_and_newer_names_of_tensors_are_read(
    tmp_path: Path, kind: str, prefix: str, head: str
) -> None:
    folder, model = saved(tmp_path, kind)

    def renamed(name: str, tensor: Any) -> tuple[str, Any]:
        if name.endswith("lm_head.weight"):
            return f"{head}weight", tensor
        for old in ("language_model.model.", "model.language_model.", "model."):
            is_of_text = name.startswith(old) and "visual" not in name
            if is_of_text:
                return prefix + name.removeprefix(old), tensor
        return name, tensor

    change_tensors(folder, renamed)
    assert off_by(read(folder), model) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_the_wrapper_says_whether_the_head_is_the_embedding(tmp_path: Path, tied: bool) -> None:
    folder, model = saved(tmp_path, "qwen2_5_vl", tie_word_embeddings=tied)
    held = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in held) == (not tied)
    target = read(folder)
    assert off_by(target, model) < 1e-4
    embedding = target.embedding_rows(torch.arange(VOCAB))
    assert torch.equal(target.head_weight(torch.arange(VOCAB)), embedding) == tied


def test_text_is_written_with_drafts_and_ends_as_the_language_model_says(tmp_path: Path) -> None:
    config = {**KINDS["mistral3"]["text_config"], "eos_token_id": 40}
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(
        CONFIG_MAPPING["mistral3"](**{**KINDS["mistral3"], "text_config": config})
    )
    folder = save_target(tmp_path / "target", model=model.float(), chat=False)
    (folder / "generation_config.json").unlink(missing_ok=True)
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))

    loaded = load_target(str(folder), kernel="torch")
    assert {40, EOS} <= loaded.eos
    assert loaded.tokenizer.chat_template == template
    plain = flashdraft.load(folder, draft="autoregressive", kernel="torch")
    drafted = flashdraft.load(folder, draft="prompt_lookup", kernel="torch")
    own = flashdraft.load(folder, draft=folder, kernel="torch")  # a draft LM, inside a wrapper
    for prompt in ("abcabcabc", "Hello"):
        text = plain.generate(prompt, max_new_tokens=20).text
        assert drafted.generate(prompt, max_new_tokens=20).text == text
        assert own.generate(prompt, max_new_tokens=20).text == text


def test_a_drafter_made_for_the_wrapper_fits_its_language_model(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "target", "mistral3")
    verifier = {"architectures": ["Mistral3ForConditionalGeneration"], "name_or_path": "some/model"}
    draft = published(
        tmp_path / "draft",
        "speculators, a Llama's layer",
        eagle_aux_hidden_state_layer_ids=[1, 2, 4],
        speculators_config={"algorithm": "eagle3", "verifier": verifier},
    )
    plain = flashdraft.load(folder, draft="autoregressive", kernel="torch")
    drafted = flashdraft.load(folder, draft=draft, kernel="torch")
    text = plain.generate("Hello there", max_new_tokens=20, ignore_eos=True).text
    assert drafted.generate("Hello there", max_new_tokens=20, ignore_eos=True).text == text


def test_weights_stay_in_the_type_that_the_wrapper_names(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, "smolvlm")
    model.bfloat16().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert read(folder).kernel == "transformers bfloat16"


def test_a_language_model_that_was_packed_is_read_again_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernels in flashdraft.hub.cache_dir().glob("step-*.so"):
        shutil.copy2(kernels, tmp_path / kernels.name)
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(flashdraft.models.packed, "_LEAST", 0)
    config = CONFIG_MAPPING["llava"](**KINDS["llava"])
    config.text_config.head_dim = 16  # what the kernels take
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config).float()
    folder = save_target(tmp_path / "target", model=model)
    first, second = (load_target(str(folder), kernel="compact").target for _ in range(2))
    kept = [isinstance(target.config, StoredConfig) for target in (first, second)]
    assert kept == [False, True]
    logits = [
        target.prefill(target.new_cache(1, 64), 0, torch.tensor(TEXT), ())[0]
        for target in (first, second)
    ]
    assert torch.equal(*logits)


def test_the_config_of_a_wrapper_s_folder_is_the_language_model_s(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "qwen3_vl")
    config = read_their_config(Source("x", folder))
    assert config.model_type == "qwen3"
    assert config.hidden_size == SHAPE["hidden_size"]
    assert LeanTarget.fits(config)


# --- What is refused


def refused(folder: Path, said: str) -> None:
    with pytest.raises(FlashDraftError) as error:
        load_target(str(folder))
    assert said in one_line_and_hint(error)


def test_wrappers_that_nobody_checked_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_target(tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    for kind, architecture in (
        ("aria", "AriaForConditionalGeneration"),
        ("florence2", "Florence2ForConditionalGeneration"),
    ):
        written = {"model_type": kind, "architectures": [architecture], "text_config": config}
        (folder / "config.json").write_text(json.dumps(written))
        refused(folder, f"is a {kind} model, no language model")


def test_a_quantised_wrapper_is_refused_by_name(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llava")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "is a llava model, no language model")


def test_a_wrapper_whose_tensors_are_elsewhere_or_more_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llava")
    held = load_file(folder / "model.safetensors")
    save_file({**held, "language_model.model.more": torch.ones(1)}, folder / "model.safetensors")
    refused(folder, "holds the tensor model.more")
    del held["language_model.model.norm.weight"]
    save_file(held, folder / "model.safetensors")
    refused(folder, "lacks the tensor model.norm.weight")
    strange = {name.replace("language_model", "speaker"): t for name, t in held.items()}
    save_file(strange, folder / "model.safetensors")
    refused(folder, "is a llava model whose language model is not found")


def clip(folder: Path) -> Path:
    config = CLIPConfig(text_config={**EYES, "vocab_size": VOCAB}, vision_config=EYES)
    CLIPModel(config).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def hybrid(folder: Path) -> Path:
    config = BambaConfig(
        **SHAPE,
        attn_layer_indices=[1],
        mamba_d_state=8,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
    )
    return save_target(folder, model=tiny_model("", config=config, dtype=torch.float32))


UNUSABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "eyes alone": (clip, "is a clip model, no language model"),
    "running states": (hybrid, "running state"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_model_that_cannot_draft_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    make, said = UNUSABLE[case]
    target = save_target(tmp_path / "target")
    draft = make(tmp_path / "draft")
    with pytest.raises(FlashDraftError) as error:
        flashdraft.load(target, draft=draft)
    assert said in one_line_and_hint(error)


# --- Gemma 4

SCALED = {**SHAPE, **MIXED, "tie_word_embeddings": True, "global_head_dim": 16}
GEMMA4: dict[str, dict[str, Any]] = {
    "31B's kind": {  # full layers have heads of their own, whose values are their keys
        **SCALED,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1,
    },
    "E4B's kind": {  # layers have inputs of their own, and the last ones others' keys and values
        **SCALED,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCAB,
    },
    "26B-A4B's kind": {
        **SCALED,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_global_key_value_heads": 1,
        "top_k_experts": 2,
    },
}


def gemma4(case: str) -> Any:
    model = tiny_model("", config=Gemma4TextConfig(**GEMMA4[case]))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.layer_scalar.fill_(0.7)
    return model


@pytest.mark.parametrize("case", GEMMA4)
def test_gemma4_after_rejected_drafts_reads_as_plain_text(case: str) -> None:
    model = gemma4(case)
    target = HFTarget(model, "gemma4")
    assert worst_after_all(target, model) < CLOSE
    assert worst_after_all(target, model, Faults(rollback=True)) > FAR
    assert worst_after_all(target, model, Faults(move=True)) > FAR


def test_gemma4_with_its_window_left_out_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma4("E4B's kind")
    target = HFTarget(model, "gemma4")
    assert target.config.sliding_window == WINDOW
    wide = {**GEMMA4["E4B's kind"], "sliding_window": 64}
    monkeypatch.setattr(target, "config", Gemma4TextConfig(**wide))
    assert worst_after_all(target, model) > FAR


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_kv_shared_layers": 2}, "share keys and values without inputs of their own"),
        ({"use_bidirectional_attention": "all"}, "its tokens see those behind them"),
    ],
)
def test_gemma4_that_cannot_be_had_is_refused(changes: dict[str, Any], said: str) -> None:
    config = Gemma4TextConfig(**{**GEMMA4["31B's kind"], **changes})
    with pytest.raises(UnsupportedTarget, match=said):
        HFTarget(tiny_model("", config=config), "gemma4")
