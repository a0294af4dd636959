"""transformers' own loops as methods, and other engines in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import VOCAB, tiny_model
from toy_folders import ZLAB, save_target, save_zlab, zlab_tensors

from flashdraft.bench import compare
from flashdraft.bench.compare import run_peers
from flashdraft.bench.config import THEIRS, BenchConfig
from flashdraft.bench.peers import Answer, DFlashAssistant, Transformers, joined
from flashdraft.errors import ContextLengthError, DraftMismatch, FlashDraftError, UnsupportedTarget
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.types import Rows, SamplingParams

PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [9, 8, 30, 12], [20] * 9]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_target(folder / "target", dtype=torch.float64)
    save_zlab(folder / "draft")
    return folder


@pytest.fixture(scope="module")
def theirs(models: Path) -> Transformers:
    return Transformers(str(models / "target"), "float64", tuned=False)


@pytest.mark.parametrize("kind", THEIRS)
def test_greedy_text_of_every_loop_is_the_plain_one(
    models: Path, theirs: Transformers, kind: str
) -> None:
    params = [SamplingParams(max_new_tokens=24)] * len(PROMPTS)
    plain = [answer.tokens for answer in theirs.method("transformers")(PROMPTS, params)]
    found = theirs.method(kind, draft=str(models / "draft"), assistant=str(models / "target"))(
        PROMPTS, params
    )
    assert [answer.tokens for answer in found] == plain
    for answer in found:
        assert sum(answer.steps) < len(answer.tokens) <= 24
        assert 0 < answer.decode_seconds < answer.seconds
        assert (answer.tau > 1.5) == (
            kind == "transformers_assisted"
        )  # the target drafts for itself; the others' luck is small
    if kind == "transformers":
        assert {count for answer in found for count in answer.steps} == {1}


@pytest.mark.parametrize("kind", THEIRS)
def test_sampled_text_comes_with_its_seed(models: Path, theirs: Transformers, kind: str) -> None:
    method = theirs.method(kind, draft=str(models / "draft"), assistant=str(models / "target"))
    texts = [
        method(PROMPTS[:1], [SamplingParams(temperature=1.0, seed=s, max_new_tokens=12)])[0].tokens
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def drafted(
    theirs: Transformers, assistant: DFlashAssistant, prompt: list[int]
) -> list[tuple[list[int], list[int]]]:
    """(history, drafts) of every call of transformers' loop."""
    calls: list[tuple[int, list[int]]] = []

    def record(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        drafts = theirs.model.get_output_embeddings()(output.last_hidden_state[0, 1:]).argmax(-1)
        calls.append((int(given["position_ids"][0, -assistant.config.block_size]), drafts.tolist()))

    handle = assistant.register_forward_hook(record, with_kwargs=True)
    how = {"assistant_model": assistant, "speculation_type": "dflash"}
    answer = theirs._one(prompt, SamplingParams(max_new_tokens=16), how)
    handle.remove()
    return [(([*prompt, *answer.tokens])[: anchor + 1], drafts) for anchor, drafts in calls]


@pytest.mark.parametrize("fault", [None, "other features", "positions one too high"])
def test_transformers_loop_gets_the_drafts_of_our_own_drafter(
    models: Path, theirs: Transformers, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = DFlashAssistant(str(models / "draft"), theirs.target)
    if fault == "other features":
        assistant.config.target_layer_ids = [0, 2]
    if fault == "positions one too high":
        rotary = assistant.network.rotary
        monkeypatch.setattr(
            assistant.network,
            "rotary",
            lambda positions, *kind: rotary(positions + (positions >= 9), *kind),
        )
    network = PackedDraft(DFlashDraftModel.from_pretrained(str(models / "draft")), theirs.target)
    found, same = drafted(theirs, assistant, PROMPTS[0]), []
    assert len(found) > 8
    for history, drafts in found:
        drafter, cache = DFlashDrafter(network), theirs.target.new_cache(1, 64)
        rows = Rows([0], [history], [SamplingParams()], [1])
        read = torch.tensor(history[:-1])
        _, features = theirs.target.prefill(cache, 0, read, drafter.layers)
        assert features is not None
        drafter.observe(rows, [read], [features])
        same.append(drafter.propose(rows, 4).tokens[0, 1:].tolist() == drafts)
    assert all(same) == (fault is None)


def test_a_drafter_or_assistant_that_cannot_serve_is_refused(
    models: Path, theirs: Transformers, tmp_path: Path
) -> None:
    windowed = ZLAB | {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
        "use_sliding_window": True,
    }
    own = zlab_tensors() | {"embed_tokens.weight": torch.zeros(VOCAB, 32)}
    for name, options in {"windowed": {"config": windowed}, "own": {"tensors": own}}.items():
        with pytest.raises(UnsupportedTarget, match="windowed layers or an embedding of its own"):
            theirs.method("transformers_dflash", draft=str(save_zlab(tmp_path / name, **options)))
    short = save_zlab(tmp_path / "short", config=ZLAB | {"max_position_embeddings": 12})
    with pytest.raises(ContextLengthError, match="the drafter knows 12"):
        theirs.method("transformers_dflash", draft=str(short))(
            PROMPTS[:1], [SamplingParams(max_new_tokens=16)]
        )
    config = tiny_model("llama").config
    config.vocab_size = VOCAB + 3
    save_target(tmp_path / "wide", model=tiny_model("llama", config=config))
    with pytest.raises(DraftMismatch, match="has 64 tokens"):
        theirs.method("transformers_assisted", assistant=str(tmp_path / "wide"))


def test_turns_are_added_up() -> None:
    parts = [{"prefill": 0.5}, {"prefill": 0.25, "draft": 1.0}]
    turns = [
        Answer(
            (1, 2), 3.0, 1.0, (), {"parts": parts[0], "num_drafted": 2, "finish_reason": "length"}
        )
    ]
    turns += [
        Answer(
            (3, 4, 5),
            4.0,
            2.0,
            (2,),
            {"parts": parts[1], "num_drafted": 3, "finish_reason": "stop"},
        )
    ]
    whole = joined(turns)
    assert (whole.tokens, whole.seconds, whole.decode_seconds, whole.steps, whole.tau) == (
        (1, 2, 3, 4, 5),
        7.0,
        3.0,
        (1, 2),
        1.5,
    )
    assert whole.figures == {
        "parts": {"prefill": 0.75, "draft": 1.0},
        "num_drafted": 5,
        "finish_reason": "stop",
    }


def test_an_engine_may_give_lists() -> None:
    tokens: Any = [1, 2]
    steps: Any = [1]
    whole = joined([Answer(tokens, 3.0, 1.0, steps)])
    assert (whole.tokens, whole.steps) == ((1, 2), (1,))


# --- other engines
#

ENGINE = """
from flashdraft.bench.peers import Answer

def ctranslate2(argument, model):
    return lambda prompts, params: [Answer((len(argument), 3), 1.0, 0.5) for _ in params]
"""


class Inline:
    """Stands for a process; the next test starts a real one."""

    started: ClassVar[list[str]] = []

    def __init__(self, count: int, *, mp_context: Any) -> None:
        self.started.append(mp_context.get_start_method())

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, call: Any, *args: Any, **options: Any) -> Any:
        call(*args, **options)
        return SimpleNamespace(result=lambda: None)


def test_installed_engines_run_in_processes_of_their_own_and_others_are_named(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "engines.py").write_text(ENGINE)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(
        compare, "find_spec", lambda name: None if name == "openvino_genai" else object()
    )
    options = {
        "target": str(models / "target"),
        "out": tmp_path / "peers.jsonl",
        "dtype": "float64",
        "max_new_tokens": 4,
    }
    methods = "autoregressive,transformers,transformers_assisted"
    config = BenchConfig(
        tmp_path / "prompts.jsonl", methods=methods, assistant=str(models / "target"), **options
    )
    files = run_peers(config, [], tmp_path / "engines.py")
    assert files == [tmp_path / "peers-transformers.jsonl", tmp_path / "peers-ctranslate2.jsonl"]
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "llama.cpp is left out: it needs --gguf",
        "OpenVINO is left out: openvino_genai is not installed",
    ]
    lines = [[json.loads(line) for line in path.read_text().splitlines()[1:]] for path in files]
    assert [[line["method"] for line in part] for part in lines] == [
        methods.split(","), ["autoregressive", "CTranslate2 float32", "CTranslate2 int8"]
    ]  # fmt: skip
    assert Inline.started == ["spawn"] * 2
    before = [path.read_bytes() for path in files]
    assert (
        run_peers(config, [], tmp_path / "engines.py") == files
    )  # what is there is not measured again
    assert [path.read_bytes() for path in files] == before
    assert len(Inline.started) == 2


def test_a_slip_in_an_engines_process_is_our_error(models: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    options = {"target": str(models / "nowhere"), "out": tmp_path / "peers.jsonl"}
    with pytest.raises(FlashDraftError, match="nowhere") as caught:
        run_peers(
            BenchConfig(
                tmp_path / "prompts.jsonl", methods="autoregressive,transformers", **options
            ),
            [],
            tmp_path,
        )
    assert caught.value.hint
    assert not list(tmp_path.glob("peers*"))
    with pytest.raises(FlashDraftError, match="nothing to compare"):
        run_peers(
            BenchConfig(tmp_path / "prompts.jsonl", methods="transformers", **options), [], tmp_path
        )
