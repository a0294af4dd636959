"""Predicted speeds: a hand-computed pass, laws with planted faults, names, the command, and a
calibration that makes sense.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Any

import pytest
from conftest import HYBRIDS, VOCAB, tiny_model
from toy_folders import save_target

from flashdraft.bench.profile import calibrate
from flashdraft.bench.roofline import (
    FACTS,
    Device,
    RooflineConfig,
    Row,
    Shape,
    expected,
    geometric,
    named,
    predict,
    shape,
    verdict,
)
from flashdraft.cli import bench as commands
from flashdraft.cli import main
from flashdraft.errors import InvalidParameter, ModelNotFound, UnsupportedTarget

NET = Shape(layers=2, hidden=4, inner=8, heads=2, kv_heads=1, head_dim=2, vocab=10)
DEVICE = Device(
    bandwidth=100.0, rates={1: 1000.0}, weight=2.0, cached=2.0, layer=0.5, host=0.25, round=0.125
)
QWEN = shape("qwen3-8b")


def gpu(name: str = "h200", **options: Any) -> tuple[RooflineConfig, tuple[Device, Device]]:
    config = RooflineConfig(device=name, **options)
    return config, named(config)


# --- the model, by hand and by law, each with faults that must break it
# ----------------------------------------------------


def is_computed_by_hand(device: Device) -> bool:
    """Behind 3 tokens, bytes at 100/s and FLOPs at 1000/s of layers, head and attention, the root
    of their squares' sum.
    """
    one = hypot(5.76, 0.576) + hypot(0.8, 0.08) + hypot(0.64, 0.128) + 2 * 0.5 + 0.25
    many = hypot(5.76, 9.216) + hypot(0.8, 1.28) + hypot(3.04, 9.728) + 2 * 0.5 + 0.25
    return device.step(NET, 1, 1, 3) == pytest.approx(one) and device.step(
        NET, 16, 1, 3
    ) == pytest.approx(many)


def time_never_falls(device: Device) -> bool:
    """With more tokens, rows or context, and with less bandwidth or arithmetic."""
    few = device.step(QWEN, 4, 2, 100)
    more = [device.step(QWEN, *load) for load in ((5, 2, 100), (4, 3, 100), (4, 2, 101))]
    slower = (
        replace(device, bandwidth=0.9 * device.bandwidth),
        replace(device, rates={n: 0.9 * r for n, r in device.rates.items()}),
    )
    return all(
        seconds >= few for seconds in [*more, *(each.step(QWEN, 4, 2, 100) for each in slower)]
    )


class Smaller(Device):
    def part(self, nbytes: float, flops: float, tokens: float) -> float:
        return min(nbytes / self.bandwidth, flops * tokens / self.rates[1])


class BytesAlone(Device):
    def part(self, nbytes: float, flops: float, tokens: float) -> float:
        return nbytes / self.bandwidth


class Upside(Device):
    def part(self, nbytes: float, flops: float, tokens: float) -> float:
        return self.bandwidth / nbytes


def planted(kind: type[Device], device: Device) -> Device:
    return kind(**vars(device))


def test_a_pass_is_what_the_hand_computes() -> None:
    assert is_computed_by_hand(DEVICE)
    for kind in (Smaller, BytesAlone, Upside):
        assert not is_computed_by_hand(planted(kind, DEVICE))
    assert not is_computed_by_hand(replace(DEVICE, host=0.0))


@pytest.mark.parametrize("name", FACTS["devices"])
def test_time_never_falls_with_more_work_or_less_machine(name: str) -> None:
    for device in gpu(name)[1]:
        assert time_never_falls(device)
        assert not time_never_falls(planted(Upside, device))


def test_rates_are_read_between_and_beyond_the_measured_widths() -> None:
    device = replace(DEVICE, bandwidth=1e99, rates={1: 10.0, 4: 20.0})
    assert [device.part(0, 1, n) for n in (1, 2.5, 4, 8)] == pytest.approx([0.1, 0.15, 0.2, 0.4])


def test_tau_sums_the_chances_of_whole_paths() -> None:
    assert expected([0.9, 0.5], 4) == pytest.approx(1 + 0.9 + 0.45 + 0.225)
    assert expected([0.9], 1) == 1
    for tau, block in ((1.0, 2), (1.3, 4), (6.54, 16), (16.0, 16)):
        assert expected(geometric(tau, block), block) == pytest.approx(tau, rel=1e-3)


def test_a_round_is_drafting_and_verifying() -> None:
    """DFlash: one pass of two layers over the block, with fc; EAGLE-3: three of one layer, whose q,
    k and v read 8 numbers.
    """
    config = RooflineConfig(
        device="h200",
        drafter="both",
        tau=2.0,
        block_size=4,
        context=3,
        draft_layers=2,
        draft_vocab=5,
    )
    rows = {(row.drafter, row.block): row for row in predict(NET, config, (DEVICE, DEVICE))}
    small = NET._replace(vocab=5)
    assert rows["dflash", 4].draft == pytest.approx(
        DEVICE.step(small, 4, 1, 3, extra=5 * 16) + 0.125
    )
    passes = [
        DEVICE.step(small._replace(layers=1), tokens, 1, 3, extra=4 * 4 * 2)
        for tokens in (2.0, 1, 1)
    ]
    assert rows["eagle3", 4].draft == pytest.approx(sum(passes) + 0.125, rel=1e-3)
    for row in rows.values():
        assert row.verify == DEVICE.step(NET, row.block, 1, 3)
        assert row.speed == pytest.approx(row.tau / (row.draft + row.verify))
        assert row.gain == pytest.approx(row.speed * DEVICE.step(NET, 1, 1, 3))


@pytest.mark.parametrize("drafter", ["dflash", "eagle3"])
def test_a_block_of_one_is_plain_decoding(drafter: str) -> None:
    first, *others = predict(QWEN, *gpu(drafter=drafter))
    assert first[1:] == (
        1,
        0.0,
        first.verify,
        1.0,
        pytest.approx(1 / first.verify),
        pytest.approx(1.0),
    )
    assert all(row.draft > 0 for row in others)


def test_chances_by_position_replace_tau() -> None:
    never, always = (predict(QWEN, *gpu(), chances=[chance]) for chance in (0.0, 1.0))
    assert {row.tau for row in never} == {1.0}
    assert all(row.tau == row.block for row in always)
    assert all(row.gain < 1 for row in never[1:])


def test_one_launch_wins_where_launches_cost_and_many_passes_where_they_do_not() -> None:
    """The same acceptance for both: eager launches favour DFlash at long blocks, free ones
    EAGLE-3's one layer at short ones.
    """

    def leads(block: int, **free: float) -> str:
        config, on = gpu(drafter="both", block_size=16)
        rows = predict(QWEN, config, (replace(on[0], **free), replace(on[1], **free)))  # type: ignore[arg-type]
        return str(
            max((row for row in rows if row.block == block), key=lambda row: row.gain).drafter
        )

    assert leads(16) == "dflash"
    assert leads(2, layer=0.0, host=0.0, round=0.0) == "eagle3"


# --- the verdict
#


def row(block: int, tau: float, gain: float) -> Row:
    return Row("dflash", block, 1.0, 1.0, tau, 1.0, gain)


def test_the_verdict_names_the_best_block_and_the_tau_that_pays() -> None:
    good = verdict([row(1, 1.0, 1.0), row(4, 3.0, 2.0), row(8, 3.5, 1.5)])
    assert good.startswith("Worth training a drafter: dflash with block 4 gives 2.00 times")
    assert "from tau 1.80 on" in good
    assert verdict([row(1, 1.0, 1.0), row(2, 1.5, 1.1)]).startswith(
        "Not worth training a drafter: dflash with block 2"
    )
    assert verdict([row(1, 1.0, 1.0), row(2, 1.5, 0.8)]).endswith("that block never pays.")


# --- names
#


def test_shapes_come_from_names_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shape("Qwen/Qwen3-8B") == QWEN == (36, 4096, 12_288, 32, 8, 128, 151_936)
    assert shape(str(save_target(tmp_path / "toy"))) == (4, 32, 64, 4, 2, 8, VOCAB)
    tiny_model("gemma3").config.save_pretrained(tmp_path / "gemma3")
    assert shape(str(tmp_path / "gemma3")) == (4, 32, 64, 4, 2, 8, VOCAB)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").rename("qwen3-8b")  # what lies on this disk wins
    assert shape("qwen3-8b").layers == 4


def test_of_a_hub_id_the_config_alone_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert (name, list(allow_patterns)) == ("org/name", ["config.json"])
        return str(tmp_path)

    tiny_model("llama").config.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert shape("org/name").hidden == 32


def test_experts_and_other_shapes_are_refused(tmp_path: Path) -> None:
    configs = {
        "experts": tiny_model("qwen3_moe").config.to_dict(),
        "gpt2": {"n_layer": 12, "n_embd": 768},
        "told by sizes alone": {**tiny_model("llama").config.to_dict(), "mamba_d_state": 128},
    }
    for name in HYBRIDS:  # they keep no keys and values in most layers
        configs[name] = tiny_model(name).config.to_dict()
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedTarget, match=name):
            shape(str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--device h300", "device is 'h300'"),
        ("--device h200 --tau 17", "tau is 17.0"),
        ("--device h200 --tau 0.5", "tau is 0.5"),
        ("--device h200 --block-size 1", "block_size is 1"),
        ("--device h200 --weights float32", "weights is 'float32'"),
        ("--device h200 --weights int3", "weights is 'int3'"),
        ("--device h200 --drafter medusa", "drafter is 'medusa'"),
        ("--engine serving", "engine is 'serving'"),
    ],
)
def test_slip_prints_an_error_and_a_hint(
    options: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["roofline", "qwen3-8b", *options.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: {problem}\nhint: .+\n", err)


def test_unknown_model_prints_an_error_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "nowhere", "--device", "h200"]) == 1
    assert re.fullmatch(r"error: .*`nowhere`\nhint: .+\n", capsys.readouterr().err)
    with pytest.raises(ModelNotFound):
        shape("nowhere")
    with pytest.raises(InvalidParameter):
        RooflineConfig(device="nowhere")


# --- the command and this machine
# -------------------------------------------------------------------------------------------


def table_of(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[list[list[str]], str]:
    assert main(["roofline", *arguments]) == 0
    table, sentence = capsys.readouterr().out.rstrip().split("\n\n")
    return [line.split() for line in table.splitlines()[1:]], sentence


def test_command_marks_the_best_block_of_each_drafter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = str(save_target(tmp_path / "toy"))
    rows, sentence = table_of(
        [toy, "--device", "h200", "--drafter", "both", "--block-size", "6", "--tau", "3"], capsys
    )
    assert [(line[0], int(line[1])) for line in rows] == [
        (d, b) for d in ("dflash", "eagle3") for b in (1, 2, 4, 6, 8, 16)
    ]
    for drafter in ("dflash", "eagle3"):
        own = [line for line in rows if line[0] == drafter]
        marked = [line for line in own if line[-1] == "best"]
        assert len(marked) == 1
        assert float(marked[0][6]) == max(float(line[6]) for line in own)
    assert re.match(r"(Worth|Not worth) training a drafter: \w+ with block \d+ gives", sentence)


def test_command_measures_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measure(weights: str) -> tuple[Device, Device]:
        asked.append(weights)
        return DEVICE, DEVICE

    monkeypatch.setattr(commands, "calibrate", measure)
    rows, _ = table_of(["smollm2-135m", "--weights", "q4"], capsys)
    assert asked == ["q4"]
    assert float(rows[0][3]) == pytest.approx(
        1000 * DEVICE.step(shape("smollm2-135m"), 1, 1, 1024), rel=1e-3
    )


def test_calibration_is_a_machine() -> None:
    target, drafts = calibrate("q4")
    assert (target.weight, drafts.weight, target.bandwidth) == (0.625, 1.0, drafts.bandwidth)
    assert 1e8 < target.bandwidth < 1e13
    for device in (target, drafts):
        assert all(1e7 < rate < 1e15 for rate in device.rates.values())
        assert time_never_falls(replace(device, rates={1: device.rates[1]}))
    assert 0 < target.host < 0.1
    assert 0 <= target.round < 0.1


def test_no_kernels_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdraft.models.native.usable", lambda _: False)
    with pytest.raises(UnsupportedTarget, match="kernels do not run"):
        calibrate("q4")
