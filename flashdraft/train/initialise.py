"""The first weights of a draft network: random, or copied from the target's last layers.

A copy starts with the target's own attention keys: fc passes the last feature through, so that the
context's keys and values are those of the copied layer, and the draft's norms take over the scale
that the target's heads had. A new sequential head changes nothing yet. Does not know how a network
is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flashdraft import hub
from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.parse import spread_layers
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.weights import MASK_ROW
from flashdraft.formats.written import config_of
from flashdraft.loading import NETWORKS
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.network import DraftNetwork
from flashdraft.models.heads import TRAINED_HEADS
from flashdraft.models.layers import ROPE_TYPES
from flashdraft.models.target import Target
from flashdraft.process import FLOATS, INTS, undisturbed
from flashdraft.train.config import Json
from flashdraft.train.features import Sample
from flashdraft.types import require
from flashdraft.wrappers import text_names

__all__ = [
    "HEAD_RANKS",
    "PLAIN_COPY",
    "Head",
    "check_trained",
    "copied_from_target",
    "draft_config",
    "draft_only",
    "layers_read",
    "left_behind",
    "random_weights",
    "taken_from",
    "with_head",
]

MASK_TOKENS = {"smollm2-135m": 16}  # unused ids of the built-in targets' vocabularies
HEAD_RANKS = {"swiglu": 64, "selector": 256, "markov": 256}  # of new heads; published, but swiglu's
_CONV_TAPS = 2  # of DFlash 2's published convolutions
_CONV_GROUP = 16
_BLOCKS = {"dflash": 4, "eagle3": 6, "medusa": 5, "draft_model": 2}
_SHAPE = (  # of the target's config, that the draft network takes over
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)
_COPIED = ("proj.weight", "layernorm.weight")  # of a layer
_SANDWICH = ("pre_feedforward_layernorm.weight", "post_mlp_layernorm.weight")
_SHAPED = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "attention_bias",
    "final_logit_softcapping",
)
_TAKEN = {  # fields that a network has from the drafter that it starts from
    "dflash": (*_SHAPED, "causal", "conv_kernel_size", "conv_group_size"),
    "eagle3": (
        *_SHAPED,
        "norm_before_residual",
        "norm_output",
        "norm_before_fc",
        "fc_norm",
        "qk_norm",
    ),
}
PLAIN_COPY = "DFlashDraftModel.from_pretrained(folder).save_pretrained(other, plain=True)"
Head = tuple[str, int]  # kind and rank of a sequential head


# The shape.


def draft_config(
    target: Target,
    *,
    num_layers: int = 3,
    block_size: int | None = None,
    num_features: int = 5,
    mask_token_id: int | None = None,
    method: str = "dflash",
) -> DraftConfig:
    """A draft network of the target's own width and heads, for any family.

    It reads `num_features` of the target's layers. Raises InvalidParameter for a bad shape.
    mask_token_id: one that the target never reads or writes; needed unless built in.
    method: of eagle3 and medusa only the block size is free.
    """
    total = target.num_layers
    if block_size is None:
        block_size = _BLOCKS[method]
    if method in ("eagle3", "medusa"):
        num_layers = 1
    mask = _mask_token(target, method, mask_token_id)
    sizes = "2 or more: the anchor and at least one mask"
    require(block_size >= 2, "block_size", block_size, sizes)
    depths = f"from 1 to {total}, as in `{target.name}`"
    require(1 <= num_layers <= total, "num_layers", num_layers, depths)

    config: Json = target.config.to_dict()
    # The rotary scaling that goes with the length in the file says what it means.
    written_length = int(target.config.max_position_embeddings)
    special = {
        "mask_token_id": mask,
        "target_layer_ids": layers_read(total, method, num_features),
    }
    draft: Json = {
        **_shape(config),
        "num_hidden_layers": num_layers,
        "num_target_layers": total,
        "block_size": block_size,
        "dflash_config": special,
        "vocab_size": target.vocab_size,
        "max_position_embeddings": min(target.context_length, written_length),
        "rope_parameters": _rope(config),
    }
    return replace(config_of(draft, target.name), method=method)


def _mask_token(target: Target, method: str, wanted: int | None) -> int:
    """Raises InvalidParameter where none is known, or one is no token of the target's."""
    if method != "dflash":
        return 0  # none of the others has masks
    mask = MASK_TOKENS.get(target.name) if wanted is None else wanted
    if mask is None or not 0 <= mask < target.vocab_size:
        unused = f"an id below {target.vocab_size} that `{target.name}` never reads or writes"
        raise InvalidParameter(f"mask_token_id is {mask}", hint=f"give --mask-token-id: {unused}")
    return mask


def _shape(config: Json) -> Json:
    shape = {name: config[name] for name in _SHAPE if config.get(name) is not None}
    if "num_attention_heads" in shape and "hidden_size" in shape:
        num_heads = shape["num_attention_heads"]
        shape.setdefault("num_key_value_heads", num_heads)
        shape.setdefault("head_dim", shape["hidden_size"] // num_heads)
    return shape


def _rope(config: Json) -> Json:
    """The rotary parameters of the draft network: the target's, where it knows their kind."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention") or rope  # gemma3 has one set for each kind of layer
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        # The draft's positions need not be the target's.
        return {"rope_theta": rope.get("rope_theta", 10000.0)}
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def layers_read(num_target_layers: int, method: str, num_features: int) -> tuple[int, ...]:
    """The target's layers that a draft network reads, all different.

    num_features: of dflash. Raises InvalidParameter where the target has not so many.
    """
    if method == "medusa":
        return (num_target_layers,)
    if method == "draft_model":
        return ()

    most = max(num_target_layers - 3, 1)
    count = num_features
    if method == "eagle3":  # low, middle and high, all among dflash's five
        count = min(3, most)
    layers = spread_layers(num_target_layers, count) if count >= 1 else ()
    are_different = 0 < len(set(layers)) == count
    require(are_different, "num_features", count, f"from 1 to {most} for this target")
    return layers


# Random weights, and another target's drafter.


@undisturbed
@torch.random.fork_rng(devices=[])
def random_weights(config: DraftConfig, seed: int) -> DraftNetwork:
    """Of the config's method: matrices from N(0, 0.02), norms at one.

    Medusa's heads are at zero, as in its paper; what is new in DFlash changes nothing yet.
    """
    torch.default_generator.manual_seed(seed)
    model = NETWORKS[config.method](config)
    if config.method == "medusa":
        return model
    generator = torch.Generator("cpu").manual_seed(seed)
    plain = replace(config.without_heads(), conv_kernel_size=0)
    drawn = tensor_shapes(plain)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name in drawn:
            torch.nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
    return model


@undisturbed
def taken_from(config: DraftConfig, donor: DraftNetwork, seed: int) -> DraftNetwork:
    """A network for one target that starts from another one's drafter.

    It has the other one's shape, rotary positions, switches and convolutions, and where the
    vocabulary is the same its sequential head, but no confidence head; layers, features, and the
    layout and length of blocks are the config's. Every tensor of the same shape is taken, the
    others are random. Raises InvalidParameter where the width differs, or for what is not trained
    here.
    """
    theirs = donor.config
    if theirs.hidden_size != config.hidden_size:
        got = f"that drafter's layers are {theirs.hidden_size} wide, these {config.hidden_size}"
        hint = "start from a drafter of the same hidden size, or with --init target or random"
        raise InvalidParameter(got, hint=hint)
    check_trained(donor, confidence=False)

    fields = {name: getattr(theirs, name) for name in _TAKEN.get(config.method, ())}
    if fields and theirs.rope_parameters != config.rope_parameters:
        fields["rope_parameters"] = theirs.rope_parameters
        fields["max_position_embeddings"] = theirs.max_position_embeddings
    if theirs.sequential_head is not None and theirs.vocab_size == config.vocab_size:
        for name in ("draft_vocab_size", "sequential_head", "head_rank", "head_choices"):
            fields[name] = getattr(theirs, name)
    config = replace(config, **fields)
    model = random_weights(config, seed)
    if config.draft_vocab_size is not None:
        for name in {"d2t", "t2d"} & donor.extras.keys():
            model.extras[name] = donor.extras[name]

    state = model.state_dict()
    for name, tensor in donor.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            state[name].copy_(tensor)
    return model


def check_trained(model: DraftNetwork, *, confidence: bool = True) -> None:
    """Raises InvalidParameter for a drafter with parts that training would pass over; confidence:
    a confidence head is such a part.
    """
    config = model.config
    kind = config.sequential_head
    head = "" if kind in (None, *TRAINED_HEADS) else kind
    if config.confidence_head and confidence:
        head = "confidence"
    if head:
        got = f"that drafter has a {head} head, which is not trained here"
        raise InvalidParameter(got, hint=f"start from a copy without heads: {PLAIN_COPY}")

    odd = ""
    if config.method == "eagle3" and (config.num_hidden_layers > 1 or not config.fused):
        odd = "plain layers behind the first one, or no fc"
    if any(mask.window is not None for mask in config.masks):
        odd = "sliding_attention layers"
    if MASK_ROW in model.extras:
        odd = "an embedding of its own for the mask token"
    for name in ("input_embedding_scale", "output_multiplier"):
        if getattr(config, name) != 1:
            odd = f"{name} {getattr(config, name)}"
    if odd:
        got = f"the drafter has {odd}, which cannot be trained here"
        raise InvalidParameter(got, hint="start from random weights")


def left_behind(donor: DraftNetwork, config: DraftConfig, target: Target) -> Iterator[str]:
    """What `taken_from` leaves out for this target, a line each."""
    theirs = donor.config
    layers = config.target_layer_ids
    if donor.method == "dflash" and layers != theirs.target_layer_ids:
        yield f"layers {layers} of the target are read, not the {theirs.target_layer_ids}"

    head = theirs.sequential_head
    if head is not None and theirs.vocab_size != config.vocab_size:
        yield f"{config.vocab_size} tokens, not {theirs.vocab_size}: the {head} head is not that"

    if theirs.confidence_head:
        yield "drafts' laws alone tell what is likely accepted, not the confidence head"

    ids = torch.arange(target.vocab_size, **INTS)
    tables = {
        "embed_tokens.weight": target.embedding_rows(ids),
        "lm_head.weight": target.head_weight(ids),
    }
    for name, rows in tables.items():
        own = donor.extras.get(name)
        if own is None:
            continue
        used = torch.arange(len(own), **INTS)
        if name == "lm_head.weight" and "d2t" in donor.extras:
            used = used + donor.extras["d2t"].long()
        known = used < len(rows)
        is_copy = torch.allclose(own[known].to(rows), rows[used[known]], rtol=0.01, atol=1e-3)
        if not is_copy:
            yield f"the target's {name} is taken, not that"


# Sequential heads.


@undisturbed
def with_head(model: DraftNetwork, head: Head, seed: int) -> DFlashDraftModel:
    """The same network with a new sequential head, drawn by `seed`, that changes nothing yet.

    A selector comes with DFlash 2's convolutions. Raises InvalidParameter where it has a head, or
    where these do not divide its width.
    """
    assert isinstance(model, DFlashDraftModel), "only dflash has a sequential head"
    config = model.config
    held = config.sequential_head
    if held is not None:
        got = f"the drafter has a {held} head of inner size {config.head_rank} already"
        hint = f"leave out --head and --head-rank, or start from a copy without it: {PLAIN_COPY}"
        raise InvalidParameter(got, hint=hint)

    kind, rank = head
    config = replace(config, sequential_head=kind, head_rank=rank)
    if kind == "selector" and not config.conv_kernel_size:
        if config.hidden_size % _CONV_GROUP:
            got = f"a selector's convolutions have groups of {_CONV_GROUP} channels"
            hint = "give --head markov, swiglu or none"
            raise InvalidParameter(f"{got}, the drafter {config.hidden_size} channels", hint=hint)
        config = replace(config, conv_kernel_size=_CONV_TAPS, conv_group_size=_CONV_GROUP)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = DFlashDraftModel(config)
    state = made.state_dict()
    for name, tensor in model.state_dict().items():
        state[name].copy_(tensor)
    made.extras = dict(model.extras)
    return made


@undisturbed
@torch.no_grad()
def draft_only(model: DraftNetwork, tokens: Tensor | None) -> None:
    """Draft these tokens [n] alone, ascending, or all of the target's: None.

    A Markov head keeps the rows that it has for them; new ones are zero.
    """
    vocab_size = model.config.vocab_size
    head = getattr(model, "markov_head", None)
    if head is not None:
        old = head.markov_w2.weight
        ids = torch.arange(len(old), **INTS)
        if "d2t" in model.extras:
            ids = ids + model.extras["d2t"]
        by_target = old.new_zeros(vocab_size, old.shape[1])
        by_target[ids] = old
        head.markov_w2.weight = nn.Parameter(by_target if tokens is None else by_target[tokens])

    if tokens is None:
        model.extras.pop("d2t", None)
        model.extras.pop("t2d", None)
        model.config = replace(model.config, draft_vocab_size=None)
    else:
        model.reduce_vocabulary(tokens)


# The target's own layers.


@undisturbed
@torch.no_grad()
def copied_from_target(
    config: DraftConfig, target: str, sample: Sample | None, seed: int
) -> DraftNetwork:
    """Draft layers from the target's own.

    dflash wants a `sample` to calibrate the scale of queries and keys.
    """
    model = random_weights(config, seed)
    if config.method == "medusa":
        return model

    num_target_layers = config.num_target_layers
    num_layers = config.num_hidden_layers
    if config.method == "draft_model":
        num_first = (num_layers + 1) // 2
        num_last = num_layers - num_first
        first_ones = range(num_first)
        last_ones = range(num_target_layers - num_last, num_target_layers)
        model.load_state_dict(_layers_of(target, config, [*first_ones, *last_ones]))
        return model

    last_ones = range(num_target_layers - num_layers, num_target_layers)
    copied = _layers_of(target, replace(config, method="dflash"), last_ones)
    if config.method == "eagle3":
        assert isinstance(model, Eagle3DraftModel)
        _copy_into_eagle3(model, copied)
        return model
    assert isinstance(model, DFlashDraftModel)
    assert sample is not None
    _copy_into_dflash(model, copied, sample)
    return model


def _copy_into_dflash(model: DFlashDraftModel, copied: dict[str, Tensor], sample: Sample) -> None:
    """The context's keys and values become those of the target's last layers."""
    config = model.config
    hidden_size = config.hidden_size
    last = sample.features[:, -hidden_size:].float()
    rms = last.pow(2).mean(-1, keepdim=True).add(config.rms_norm_eps).sqrt()
    unit = last / rms
    model.fc.weight[:, -hidden_size:] += torch.eye(hidden_size, **FLOATS)
    for n in range(config.num_hidden_layers):
        # The context bypasses input_layernorm, so its scale moves into what reads behind it.
        norm = copied.pop(f"layers.{n}.input_layernorm.weight")
        attention = f"layers.{n}.self_attn"
        for name in ("q", "k", "v"):
            copied[f"{attention}.{name}_proj.weight"].mul_(norm)
        for name in ("q", "k"):
            weight = copied[f"{attention}.{name}_proj.weight"]
            scale = (unit @ weight.T).pow(2).mean().sqrt()
            copied[f"{attention}.{name}_norm.weight"] = scale.expand(config.head_dim)
    model.load_state_dict(copied, strict=False)


def _copy_into_eagle3(model: Eagle3DraftModel, copied: Mapping[str, Tensor]) -> None:
    """The target's last layer.

    It reads the last feature in the state's half of its input, and little of the embedding yet.
    """
    hidden_size = model.config.hidden_size
    state = model.state_dict()
    model.fc.weight[:, -hidden_size:] += torch.eye(hidden_size, **FLOATS)
    for name, weight in copied.items():
        own_name = f"midlayer.{name.removeprefix('layers.0.')}"
        if name == "norm.weight":
            own_name = name
        state[own_name][..., -weight.shape[-1] :] = weight
    state["midlayer.hidden_norm.weight"].copy_(copied["layers.0.input_layernorm.weight"])


def _layers_of(target: str, config: DraftConfig, chosen: Sequence[int]) -> dict[str, Tensor]:
    """These layers of the target in float32 under the draft's names; of a multimodal wrapper those
    of its language model.

    Raises CheckpointError where they are none of llama's form and of the draft's size, and for a
    quantised target.
    """
    folder = hub.resolve(target)
    shapes = tensor_shapes(config)
    tensors: dict[str, Tensor] = {}
    if isinstance(folder, Path):
        if hub.read_config(folder).get("quantization_config"):
            got = f"`{folder}` is quantised: its layers cannot be copied as they lie"
            raise CheckpointError(got, hint="start from --init random")
        tensors = _read_layers(folder, _draft_names(shapes, chosen))

    for name, shape in shapes.items():
        is_copied = name == "norm.weight" or name.endswith(_COPIED)
        if is_copied and (name not in tensors or tuple(tensors[name].shape) != shape):
            lacking = f"`{folder}` has no llama-shaped layers of the draft's size to copy"
            raise CheckpointError(lacking, hint="start from --init random")
    return tensors


def _draft_names(shapes: Mapping[str, object], chosen: Sequence[int]) -> dict[str, str]:
    """The target's names of the tensors to copy -> the draft's."""
    names = {"model.norm.weight": "norm.weight"}
    for name in shapes:
        if name.endswith(_COPIED):
            _, n, rest = name.split(".", 2)
            names[f"model.layers.{chosen[int(n)]}.{rest}"] = name
    return names


def _read_layers(folder: Path, draft_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Empty for layers that have norms behind their sublayers, too (Gemma): the names are llama's,
    and mean something else."""
    held: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                held[name] = path

    tensors: dict[str, Tensor] = {}
    for name, own_name in text_names(held).items():
        if own_name.startswith("model.layers.") and own_name.endswith(_SANDWICH):
            return {}
        if own_name in draft_names:
            with safe_open(held[name], framework="pt") as file:
                tensors[draft_names[own_name]] = file.get_tensor(name).float()
    return tensors
