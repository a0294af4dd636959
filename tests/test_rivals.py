"""EAGLE-3 and Medusa: decoding against slow definitions, texts against plain decoding, files,
training.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, VOCAB, admit, requests_of, run, tiny_target
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_folders import letter_tokenizer, save_target
from toy_training import one_line_and_hint

from flashdraft.decoding.control import Control
from flashdraft.engine import Engine
from flashdraft.errors import CheckpointError, DraftMismatch, InvalidParameter
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.read import read_draft
from flashdraft.formats.written import config_of, json_of
from flashdraft.generate import Model
from flashdraft.loading import NETWORKS, load
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel, fused_layers
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.models.target import Target
from flashdraft.train.batch import make_batch
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, Sample, write_features
from flashdraft.train.initialise import copied_from_target, draft_config, random_weights
from flashdraft.train.passes import Pass
from flashdraft.train.trainer import Trainer
from flashdraft.types import Rows, SamplingParams

METHODS = ("eagle3", "medusa")
ALL = (*METHODS, "draft_model")
PROMPTS = ((5, 9, 31), tuple(range(3, 40)), (7, 7, 12, 50, 3, 22, 17, 8, 40, 41, 9), (33,))
GREEDY = SamplingParams(max_new_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=30, ignore_eos=True, temperature=1.3, top_p=0.9, seed=11)


def the_target() -> Target:
    return tiny_target("llama", lean=True)


@cache
def network(method: str, **changes: Any) -> Any:
    """A random network whose drafts depend on everything it reads, of three features where its
    method reads several.
    """
    config = replace(draft_config(the_target(), method=method), **changes)
    model = NETWORKS[method](
        replace(config, target_layer_ids=(0, 1, 2)) if method == "eagle3" else config
    )
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.requires_grad_(False).eval()


def features_of(tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
    target = the_target()
    _, features = target.prefill(target.new_cache(1, 64), 0, torch.tensor(tokens), layers)
    assert features is not None
    return features


def rows_of(history: Sequence[int]) -> Rows:
    return Rows([0], [list(history)], [GREEDY], [1])


def drafts(
    method: str, history: Sequence[int], *, pieces: int = 3, max_nodes: int = 99, **options: Any
) -> Any:
    """What a fresh drafter proposes behind `history`, which it observed in pieces."""
    drafter = network(method).drafters(the_target())(**options)
    seen = features_of(history[:-1], drafter.layers)
    for part in torch.arange(len(history) - 1).tensor_split(pieces):
        if len(part):
            drafter.observe(rows_of(history), [torch.tensor(history)[part]], [seen[part]])
    return drafter.propose(rows_of(history), max_nodes)


# The definition of EAGLE-3, one pair and one head at a time. `fault` plants one of the mistakes
# that implementations make.

FAULTS = (
    "the pair's token is one too early",
    "the two norms are swapped",
    "the drafted state is normed before it is fed back",
    "the residual is the normed state",
    "a drafted pair does not see the pairs before it",
)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


def rotated(x: Tensor, position: int) -> Tensor:
    """x: [heads, head_dim]"""
    half, out = x.shape[-1] // 2, x.clone()
    for i in range(half):
        angle = position / 10000.0 ** (i / half)
        first, second = x[:, i], x[:, i + half]
        out[:, i] = first * math.cos(angle) - second * math.sin(angle)
        out[:, i + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def chain_by_definition(
    history: Sequence[int], depth: int, fault: str = ""
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities."""
    model, target, layer = network("eagle3"), the_target(), network("eagle3").midlayer
    d, heads = model.config.head_dim, model.config.num_attention_heads
    fused = [
        g @ model.fc.weight.double().T
        for g in features_of(history[:-1], model.config.target_layer_ids)
    ]
    early = fault == "the pair's token is one too early"
    known = list(history) if not early else [history[0], *history[:-1]]
    pairs = list(zip(known[1:], fused, strict=True))  # token t + 1 beside g_t
    keys, values, found, scores_found = [], [], list[int](), list[float]()
    for step in range(len(pairs) - 1 + depth):
        token, state = pairs[step]
        names = (
            ("hidden_norm", "input_layernorm")
            if fault == "the two norms are swapped"
            else ("input_layernorm", "hidden_norm")
        )
        embedded = target.embed(torch.tensor([token]))[0]
        both = torch.cat(
            (
                rms(embedded, getattr(layer, names[0]).weight),
                rms(state, getattr(layer, names[1]).weight),
            )
        )
        attention = layer.self_attn
        q, k, v = (
            (both @ linear.weight.double().T).view(-1, d)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys.append(rotated(k, step))
        values.append(v)
        if step < len(pairs) - 1 and len(pairs) < len(history) + len(found):
            continue  # of what was read only the last pair drafts
        first = step if fault == "a drafted pair does not see the pairs before it" and found else 0
        outputs = []
        for head in range(heads):
            group = head // (heads // len(k))
            scores = torch.stack(
                [rotated(q, step)[head] @ key[group] for key in keys[first:]]
            ) / math.sqrt(d)
            outputs.append(
                scores.softmax(0) @ torch.stack([value[group] for value in values[first:]])
            )
        base = (
            rms(state, layer.hidden_norm.weight)
            if fault == "the residual is the normed state"
            else state
        )
        x = base + torch.cat(outputs) @ layer.self_attn.o_proj.weight.double().T
        y = rms(x, layer.post_attention_layernorm.weight)
        gate, up = (
            y @ linear.weight.double().T for linear in (layer.mlp.gate_proj, layer.mlp.up_proj)
        )
        x = x + (gate * torch.sigmoid(gate) * up) @ layer.mlp.down_proj.weight.double().T
        law = target.lm_head(rms(x, model.norm.weight)).log_softmax(-1)
        found.append(int(law.argmax()))
        scores_found.append(float(law.max()))
        pairs.append(
            (
                found[-1],
                rms(x, model.norm.weight)
                if fault == "the drafted state is normed before it is fed back"
                else x,
            )
        )
    return found[:depth], scores_found[:depth]


def test_eagle3_chain_equals_its_definition() -> None:
    for history in PROMPTS[:3]:
        for pieces in (1, 3):
            proposal = drafts("eagle3", history, pieces=pieces)
            tokens, scores = chain_by_definition(history, 5)
            assert proposal.tokens[0, 1:].tolist() == tokens
            assert proposal.scores[0, 1:].tolist() == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_changes_the_chain(fault: str) -> None:
    for history in PROMPTS[:3]:
        assert chain_by_definition(history, 5, fault)[1] != pytest.approx(
            chain_by_definition(history, 5)[1], rel=1e-3
        )


@pytest.mark.parametrize(
    ("switch", "definition"),
    [
        ("norm_before_residual", "the residual is the normed state"),
        ("norm_output", "the drafted state is normed before it is fed back"),
    ],
)
def test_switch_of_eagle3_is_obeyed(switch: str, definition: str) -> None:
    """Each is what would be a mistake without it."""
    model = network("eagle3", **{switch: True})
    for history in PROMPTS[:3]:
        drafter = model.drafters(the_target())()
        drafter.observe(
            rows_of(history),
            [torch.tensor(history[:-1])],
            [features_of(history[:-1], drafter.layers)],
        )
        proposal = drafter.propose(rows_of(history), 99)
        tokens, scores = chain_by_definition(history, 5, definition)
        assert proposal.tokens[0, 1:].tolist() == tokens
        assert proposal.scores[0, 1:].tolist() == pytest.approx(scores, rel=1e-4)


def test_eagle3_tree_has_the_likeliest_paths_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a beam as wide as the vocabulary nothing is missed: all paths of two tokens, scored by
    chains that are fed them.
    """
    monkeypatch.setattr("flashdraft.methods.eagle3._BEAM", VOCAB)
    history, nodes = PROMPTS[2], 20
    whole = 1 + VOCAB + VOCAB**2
    joints = path_scores(drafts("eagle3", history, tree_nodes=whole, block_size=3, max_nodes=whole))
    assert len(joints) == VOCAB + VOCAB**2
    assert sum(
        math.exp(score) for path, score in joints.items() if len(path) == 1
    ) == pytest.approx(1.0)
    narrow = path_scores(drafts("eagle3", history, tree_nodes=nodes, block_size=3))
    assert sorted(narrow.values()) == pytest.approx(sorted(joints.values())[1 - nodes :])
    chain = path_scores(drafts("eagle3", history, block_size=3))
    for path, score in (narrow | chain).items():
        assert score == pytest.approx(joints[path])


def path_scores(proposal: Any) -> dict[tuple[int, ...], float]:
    """By path from the anchor: the sum of its nodes' scores."""
    paths: dict[int, tuple[int, ...]] = {0: ()}
    joints = {(): 0.0}
    tokens, parents, scores = (
        t[0].tolist() for t in (proposal.tokens, proposal.parents, proposal.scores)
    )
    for node in range(1, int(proposal.sizes[0])):
        paths[node] = (*paths[parents[node]], tokens[node])
        joints[paths[node]] = joints[paths[parents[node]]] + scores[node]
    del joints[()]
    return joints


def test_medusa_heads_equal_their_definition() -> None:
    model, target = network("medusa"), the_target()
    for history in PROMPTS[:3]:
        state = features_of(history[:-1], (target.num_layers,))[-1]
        expected = []
        for head in model.heads:
            x = head.weight.double() @ state + head.bias.double()
            expected.append(int(target.lm_head(state + x * torch.sigmoid(x)).argmax()))
        assert drafts("medusa", history).tokens[0, 1:].tolist() == expected


def test_medusa_tree_is_static_and_holds_the_chain() -> None:
    shapes = {
        tuple(drafts("medusa", history, tree_nodes=14).parents[0].tolist())
        for history in PROMPTS[:3]
    }
    assert len(shapes) == 1
    tree, chain = drafts("medusa", PROMPTS[1], tree_nodes=14), drafts("medusa", PROMPTS[1])
    edges = dict(
        zip(
            zip(tree.parents[0].tolist(), tree.tokens[0].tolist(), strict=True),
            range(14),
            strict=True,
        )
    )
    node = 0
    for token in chain.tokens[0, 1:].tolist():
        node = edges[node, token]


# Losslessness.


def texts(
    drafter: Any, params: SamplingParams, *, max_rows: int, adaptive: Control | None = None
) -> list[tuple[int, ...]]:
    """Every text, in order; rows join and leave where there are fewer of them than prompts."""
    engine = Engine(the_target(), drafter, max_rows=max_rows)
    engine.control = adaptive
    return [
        result.tokens
        for result in run(engine, requests_of(PROMPTS, [params] * len(PROMPTS), {EOS}))
    ]


@cache
def plain(params: SamplingParams) -> list[tuple[int, ...]]:
    return texts(Autoregressive(), params, max_rows=1)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("tree_nodes", [None, 12])
@pytest.mark.parametrize("method", METHODS)
def test_text_equals_plain_text(method: str, tree_nodes: int | None, adaptive: bool) -> None:
    make = network(method).drafters(the_target())
    for params, max_rows in product((GREEDY, SAMPLED), (1, 2, 4)):
        control = Control({1: 1.0, 2: 1.01, 64: 1.5}) if adaptive else None
        assert texts(
            make(tree_nodes=tree_nodes), params, max_rows=max_rows, adaptive=control
        ) == plain(params)


@pytest.mark.parametrize("method", METHODS)
def test_drafts_while_decoding_are_those_of_a_fresh_drafter(method: str) -> None:
    """A rejected draft leaves no trace, and a second request none of the first."""
    drafter = network(method).drafters(the_target())(tree_nodes=9)
    engine = Engine(the_target(), drafter, max_rows=1)
    for request in requests_of(PROMPTS[:2], [GREEDY] * 2, {EOS}):
        admit(engine, request)
        for _ in range(4):
            engine.step()
            (request,) = engine.running.values()
            got, fresh = (
                drafter.propose(rows_of(request.history), 9),
                drafts(method, request.history, tree_nodes=9, max_nodes=9),
            )
            assert got.tokens.tolist() == fresh.tokens.tolist()
            torch.testing.assert_close(got.scores, fresh.scores, rtol=0, atol=1e-5)
        engine.cancel(request.index)


@pytest.mark.parametrize("limit", [1, 8, 22, 40])
def test_eagle3_beyond_its_trained_positions_drafts_on(
    limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As one with more positions does, and says so once."""
    made = network("eagle3", max_position_embeddings=limit).drafters(the_target())
    assert texts(made(), GREEDY, max_rows=4) == plain(GREEDY)
    said = (
        f"the drafter was not trained from position {limit} on: it drafts on, "
        "and may be accepted less"
    )
    assert [record.getMessage() for record in caplog.records] == [said]
    history = PROMPTS[1]
    short, long = made(), network("eagle3").drafters(the_target())()
    for drafter in (short, long):
        drafter.observe(
            rows_of(history),
            [torch.tensor(history[:-1])],
            [features_of(history[:-1], drafter.layers)],
        )
    assert torch.equal(
        short.propose(rows_of(history), 9).tokens, long.propose(rows_of(history), 9).tokens
    )


# Files.


def published(folder: Path, *, pickled: bool = False, **changes: Any) -> Path:
    """An EAGLE-3 folder as SafeAILab or SpecForge publish it: no word of the target's depth, an
    lm_head of its own.
    """
    model = network("eagle3")
    tokens = torch.arange(3, 43)
    model = Eagle3DraftModel(model.config)
    model.load_state_dict(network("eagle3").state_dict())
    model.reduce_vocabulary(tokens)
    model.extras["lm_head.weight"] = the_target().head_weight(tokens).float()
    model.config = replace(model.config, dtype="float32")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("flashdraft_config", "eagle_config", "eagle_aux_hidden_state_layer_ids"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config | changes))
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle3", "LlamaForCausalLM"])
def test_published_eagle3_folder_loads(tmp_path: Path, architecture: str, pickled: bool) -> None:
    model = Eagle3DraftModel.from_pretrained(
        published(tmp_path, pickled=pickled, architectures=[architecture])
    )
    assert (
        model.config.target_layer_ids,
        model.config.num_target_layers,
        model.config.draft_vocab_size,
    ) == ((), 0, 40)
    assert fused_layers(40) == (1, 19, 36)
    made = model.drafters(deep_target())
    assert made.args[0].config.target_layer_ids == fused_layers(8) == (1, 3, 4)


def deep_target() -> Target:
    """The same target, as if it were deep enough for three layers."""
    target = copy.copy(the_target())
    target.num_layers = 8
    return target


UNFIT: dict[str, dict[str, Any]] = {
    "none named, of a target that has not three": {},
    "embeddings and the last layer": {"eagle_aux_hidden_state_layer_ids": [1, 2, 5]},
}


@pytest.mark.parametrize("case", UNFIT)
def test_layers_that_a_target_has_not_are_refused(tmp_path: Path, case: str) -> None:
    model = Eagle3DraftModel.from_pretrained(published(tmp_path, **UNFIT[case]))
    with pytest.raises(DraftMismatch) as error:
        model.drafters(the_target())()
    assert "the draft reads the outputs of 3 layers" in error.value.args[0]


STRANGE: dict[str, tuple[Any, str]] = {
    "code": (Path("a"), "holds more than tensors"),
    "list": ([torch.zeros(2)], "is no dictionary of tensors"),
    "number": ({"fc.weight": 3}, "is no dictionary of tensors"),
    "wrapped": ({"state_dict": {"fc.weight": torch.zeros(2)}}, "is no dictionary of tensors"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_pickle_of_something_else_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, cause = STRANGE[case]
    torch.save(content, published(tmp_path, pickled=True) / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        Eagle3DraftModel.from_pretrained(tmp_path)
    assert cause in error.value.args[0]
    assert "weights_only" not in str(error.value)  # torch recommends to run the code


IDS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "of hidden_states, at the top": ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, (0, 2, 3)),
    "of outputs, in eagle_config": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}},
        (0, 2, 3),
    ),
    "of hidden_states, in eagle_config": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}},
        (0, 2, 3),
    ),
    "both, which agree": (
        {
            "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]},
        },
        (0, 2, 3),
    ),
}


@pytest.mark.parametrize("case", IDS)
def test_layers_of_a_published_eagle3_folder_are_those_that_it_means(
    tmp_path: Path, case: str
) -> None:
    changes, layers = IDS[case]
    made = Eagle3DraftModel.from_pretrained(published(tmp_path, **changes)).drafters(the_target())
    assert made.args[0].config.target_layer_ids == layers
    assert made().layers == layers


@pytest.mark.parametrize("place", ["top", "eagle_config"])
def test_switches_of_a_published_eagle3_folder_are_read(tmp_path: Path, place: str) -> None:
    switches = {"norm_before_residual": True, "norm_output": True}
    model = Eagle3DraftModel.from_pretrained(
        published(tmp_path, **(switches if place == "top" else {place: switches}))
    )
    assert (model.config.norm_before_residual, model.config.norm_output) == (True, True)
    again = config_of(json_of(model.config), "here")
    assert (again.norm_before_residual, again.norm_output) == (True, True)
    bare = Eagle3DraftModel.from_pretrained(published(tmp_path / "bare"))
    assert (bare.config.norm_before_residual, bare.config.norm_output) == (False, False)


def test_tied_head_of_eagle3_is_its_own_embedding(tmp_path: Path) -> None:
    folder = published(tmp_path, tie_word_embeddings=True)
    tensors, written = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    kept = {name: t for name, t in tensors.items() if name not in ("lm_head.weight", "d2t", "t2d")}
    table = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(4))
    hidden = torch.randn(3, 32, dtype=torch.float64)
    written["draft_vocab_size"] = VOCAB
    (folder / "config.json").write_text(json.dumps(written))
    save_file({**kept, "embed_tokens.weight": table}, folder / "model.safetensors")
    packed = Eagle3DraftModel.from_pretrained(folder).drafters(deep_target()).args[0]
    assert torch.allclose(packed.logits(hidden), hidden @ table.double().T)
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        Eagle3DraftModel.from_pretrained(folder)
    assert "tie_word_embeddings is true" in one_line_and_hint(error)


@pytest.mark.parametrize("method", ALL)
def test_our_folder_is_read_back_as_it_was_written(tmp_path: Path, method: str) -> None:
    model = NETWORKS[method](replace(network(method).config, dtype="float32"))
    model.load_state_dict(network(method).state_dict())
    model.reduce_vocabulary(torch.arange(3, 50))  # a draft model drafts all tokens even so
    model.save_pretrained(tmp_path)
    again = NETWORKS[method].from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    drafted = texts(again.drafters(the_target())(), GREEDY, max_rows=2)
    assert drafted == plain(GREEDY)
    if method == "eagle3":
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["architectures"] == ["LlamaForCausalLMEagle3"]
        key = "eagle_aux_hidden_state_layer_ids"
        assert stored["eagle_config"][key] == [0, 1, 2]  # outputs, as SGLang reads them
        assert stored[key] == [1, 2, 3]  # of hidden_states, as vLLM does


def test_folders_that_do_not_fit_are_refused_in_a_line(tmp_path: Path) -> None:
    folder = published(tmp_path / "eagle3")
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(folder)
    assert "is a drafter of eagle3, not of dflash" in one_line_and_hint(error)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError) as error:
        read_draft(folder)
    assert "damaged" in one_line_and_hint(error)
    half = published(tmp_path / "half", pickled=True) / "pytorch_model.bin"
    half.write_bytes(half.read_bytes()[:900])
    with pytest.raises(CheckpointError) as error:
        read_draft(half.parent)
    assert "damaged" in one_line_and_hint(error)
    wide = MedusaDraftModel(replace(network("medusa").config, hidden_size=48))
    with pytest.raises(DraftMismatch) as mismatch:
        wide.drafters(the_target())
    assert "hidden size 48" in one_line_and_hint(mismatch)


# Training.


def served_and_trained(method: str, shift: int = 0) -> tuple[list[int], list[int]]:
    """The chain drafted behind token 12 of a text, and what training's pass guesses there when its
    labels are that chain.
    """
    history = list(PROMPTS[1][:13])
    chain = drafts(method, history).tokens[0].tolist()
    tokens = [*history, *chain[1:], 5]
    model = network(method)
    features = features_of(tokens, model.config.target_layer_ids).roll(shift, 0)
    batch = make_batch(
        [(0, Sample(torch.tensor(tokens), features.float(), 12))], model.config, 99, 0
    )
    at = batch.positions[1][:: model.config.block_size].tolist().index(12)
    states = Pass(model, lambda ids: the_target().embed(ids).float())(batch).view(
        -1, model.config.block_size, 32
    )[at]
    return chain[1:], the_target().lm_head(states[1:].double()).argmax(-1).tolist()


def test_draft_model_is_the_target_where_it_has_all_of_its_layers(tmp_path: Path) -> None:
    """Cut without leaving anything out, it guesses every token;
    without its last layer it does not.
    """
    target = save_target(tmp_path / "target")
    lm = load(target, draft="autoregressive")
    taus = []
    for count in (4, 3):
        network = copied_from_target(
            draft_config(lm.target, method="draft_model", num_layers=count), str(target), None, 0
        )
        drafting = replace(lm, new_drafter=partial(network.drafters(lm.target), block_size=4))
        params = SamplingParams(max_new_tokens=33, ignore_eos=True)
        drafted, expected = (
            drafting.generate("hello there", params),
            lm.generate("hello there", params),
        )
        assert drafted.tokens == expected.tokens
        taus.append(drafted.stats.tau)
    assert taus[0] == 4.0
    assert taus[1] < 3.0
    with pytest.raises(InvalidParameter):
        network.drafters(lm.target)(tree_nodes=8)


@pytest.mark.parametrize("method", METHODS)
def test_trained_pass_guesses_what_is_served(method: str) -> None:
    served, trained = served_and_trained(method)
    assert trained == served
    served, trained = served_and_trained(method, shift=1)  # features one token late
    assert trained != served


@pytest.mark.parametrize("method", ALL)
def test_rival_overfits_and_is_accepted(tmp_path: Path, method: str) -> None:
    target = tiny_target("llama", dtype=torch.float32)
    lm = Model(target, letter_tokenizer(), Autoregressive, eos=frozenset({EOS}), max_rows=8)
    texts = [
        "hello there",
        "a",
        "what is it?",
        "zebra",
        "Quick brown fox",
        "numbers",
        "no",
        "Why not?",
    ]
    answers = lm.generate(texts, max_new_tokens=24, ignore_eos=True)
    rows = [
        {"prompt": p, "response": a.text, "tokens": a.tokens}
        for p, a in zip(texts, answers, strict=True)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = draft_config(
        target, method=method, block_size=2 if method == "draft_model" else 4, num_layers=2
    )
    layers = tuple(sorted({*config.target_layer_ids, 0, 4}))  # more than one method reads
    write_features(
        lm,
        [tmp_path / "answers.jsonl"],
        tmp_path / "features",
        layers=layers,
        max_length=64,
        quiet=True,
    )
    settings = TrainConfig(
        steps=120,
        sequences=8,
        anchors=24,
        lr=1e-2,
        weight_decay=0.0,
        vocab=0,
        precision="fp32",
        eval_every=120,
    )
    trainer = Trainer(
        random_weights(config, 0), lm, FeatureSet(tmp_path / "features"), tmp_path / "run", settings
    )

    def tau() -> float:
        drafting = replace(lm, new_drafter=trainer.model.eval().drafters(target))
        drafted = drafting.generate(texts, max_new_tokens=24, ignore_eos=True)
        assert [one.tokens for one in drafted] == [one.tokens for one in answers]
        return float(sum(one.stats.tau for one in drafted) / len(drafted))

    untrained = tau()
    trainer.run(texts, quiet=True)
    assert tau() > untrained * (
        1.3 if method == "medusa" else 1.8
    )  # the heads alone cannot learn the answers by heart
    assert trainer.flops == trainer.flops_a_step * 120 > 0
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert method in card
    assert type(NETWORKS[method].from_pretrained(tmp_path / "run" / "best")) is NETWORKS[method]


@pytest.mark.parametrize("method", ALL)
def test_shape_of_a_rival_is_fixed(method: str) -> None:
    config = draft_config(the_target(), method=method)
    assert isinstance(config, DraftConfig)
    assert config.target_layer_ids == {"medusa": (4,), "eagle3": (2,), "draft_model": ()}[method]
    with pytest.raises(InvalidParameter):
        draft_config(the_target(), method=method, block_size=1)
