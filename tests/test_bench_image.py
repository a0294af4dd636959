"""The image benchmark on a tiny random Stable Diffusion: what a line says, the tables and pictures
made of the file alone, who judges, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from toy_diffusion import CLEAN, toy_pipe

from flashdraft.bench import image
from flashdraft.bench.image_config import VARIANTS, ImageConfig
from flashdraft.bench.image_judges import load_judges
from flashdraft.bench.image_report import acceptance_bins, read_images, summarise_images
from flashdraft.bench.image_sets import frechet, frechet_spread, mmd_spread
from flashdraft.bench.judge import Judge
from flashdraft.cli import main
from flashdraft.errors import CheckpointError, DataError, InvalidParameter

ASSETS = Path(__file__).parent.parent / "flashdraft" / "assets"
EPSILON = CLEAN | {"prediction_type": "epsilon"}
MOST = 21  # training steps of the toy: the most that it can be asked for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Stable Diffusion 1.5 comes: with PNDM, and an offset of one step."""
    folder = tmp_path_factory.mktemp("toy")
    pipe = toy_pipe(folder)
    pipe.scheduler = PNDMScheduler(num_train_timesteps=MOST, skip_prk_steps=True, **EPSILON)
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    Judge("a toy judge", ["abc", "xyz"], num_features=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("abc\nwhatever\n")
    return path


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, model: Path, judge: Path, prompts: Path
) -> Path:
    """Of all variants, but without a learned draft."""
    out = tmp_path_factory.mktemp("results") / "images.jsonl"
    asked = [*words(model, prompts, out), "--steps", f"6,{MOST}", "--features", str(judge)]
    assert main(asked) == 0
    return out


def words(model: Path, prompts: Path, out: Path) -> list[str]:
    asked = ["bench", "image", "--model", str(model), "--prompts", str(prompts)]
    return [*asked, "--out", str(out), "--images", "2", "--tol", "0", "--steps", "6"]


def by_variant(path: Path, steps: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_images(path).lines:
        if line["steps"] == steps:
            found.setdefault(line["variant"], []).append(line)
    return found


@pytest.mark.parametrize("steps", [6, MOST])
def test_rounds_rows_and_steps_are_those_of_each_variant(results: Path, steps: int) -> None:
    lines = by_variant(results, steps)
    assert set(lines) == {*VARIANTS, "again"} - {"exact-learned"}
    for name, taken in (("plain", steps), ("half", steps // 2), ("still", steps), ("dpm++20", 20)):
        for line in lines[name]:
            assert (line["taken"], line["rounds"], line["rows"]) == (taken, taken, 2 * taken)
    for name, leader in (("matched", "exact"), ("still-matched", "tolerance")):
        for line, other in zip(lines[name], lines[leader], strict=True):
            assert line["taken"] == other["rounds"]
    for name in ("exact", "exact-auto", "tolerance", "tolerance-auto"):
        for line in lines[name]:
            assert line["taken"] == steps
            assert line["rounds"] <= steps
            assert line["rows"] >= 2 * line["rounds"]  # both branches of guidance


def test_images_of_one_seed_are_compared_where_there_is_no_noise(results: Path) -> None:
    lines = by_variant(results, 6)
    for line in lines["still"] + lines["tolerance"] + lines["tolerance-auto"]:
        assert line["relative_l2"] < 1e-5  # with tol 0
    for line in lines["still-half"] + lines["dpm++20"]:
        assert line["relative_l2"] > 1e-3
    for name in ("plain", "exact", "half", "again"):
        assert {line["relative_l2"] for line in lines[name]} == {None}


def test_only_what_a_prompt_names_is_judged(results: Path) -> None:
    for line in read_images(results).lines:
        assert (line["agreement"] is None) == (line["prompt"] == "whatever")


def test_table_is_made_of_the_file_alone(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = read_images(results)
    rows = {(row.steps, row.variant): row for row in summarise_images(read)}
    plain, exact = rows[6, "plain"], rows[6, "exact"]
    assert (plain.images, plain.rounds, plain.fewer, plain.speed) == (2, 6.0, 1.0, 1.0)
    assert exact.fewer == 6 / exact.rounds
    assert exact.distance is not None
    assert rows[6, "again"].distance is None  # what the others are compared with
    assert read.header["noisy"] == "ddim"  # instead of PNDM
    assert main(["report", str(results)]) == 0
    told = capsys.readouterr().out
    assert "Frechet distance of a toy judge's features, to plain images of other seeds" in told
    assert "FID" not in told
    assert f"{MOST} steps" in told


def test_acceptance_of_all_images_is_binned(results: Path) -> None:
    lines = by_variant(results, MOST)["exact"]
    bins = acceptance_bins(lines)
    assert sum(count for count, _, _ in bins) == sum(line["drafted"] for line in lines)
    stood = sum(count * share for count, _, share in bins)
    assert round(stood) == sum(line["accepted"] for line in lines)
    for _, predicted, share in bins:
        assert 0 <= predicted <= 1
        assert 0 <= share <= 1


def test_pictures_are_made_of_the_file_alone(results: Path, tmp_path: Path) -> None:
    assert main(["plot", str(results), "--out", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "exact-auto" in report
    assert "rounds" in (tmp_path / "images-rounds.svg").read_text()


def test_a_chosen_draft_and_scheduler_are_run(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asked = [*words(model, prompts, out), "--steps", "4", "--block", "2", "--images", "1"]
    asked += ["--scheduler", "sde-dpm++", "--variants", "plain,exact,still", "--guidance", "1"]
    assert main(asked) == 0
    header = read_images(out).header
    assert (header["noisy"], header["still"], header["distance"]) == ("sde-dpm++", "dpm++", None)
    assert {line["rows"] for line in by_variant(out, 4)["plain"]} == {4}  # no guidance


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--variants", "plain,swift"], "no variant 'swift'"),
        (["--variants", "plain,matched"], "as many steps as exact had rounds"),
        (["--variants", "plain,exact-learned"], "no learned draft"),
        (["--draft", "x/y", "--variants", "plain"], "no variant uses it"),
        (["--steps", "0"], "steps"),
        (["--steps", "5,many"], "steps"),
        (["--steps", "22"], "trained on 21"),
        (["--steps", "21", "--scheduler", "sde-dpm++"], "trained on 21"),
        (["--block", "0"], "block"),
        (["--features", "nowhere"], "no folder `nowhere`"),
        (["--scheduler", "pndm"], "scheduler"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_refusals_are_one_line(
    model: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    out = tmp_path / "out.jsonl"
    assert main([*words(model, prompts, out), *options]) in (1, 2)
    complaint = capsys.readouterr().err.splitlines()
    assert len(complaint) == 2
    assert told in complaint[0]
    assert complaint[1].startswith("hint: ")
    assert not out.exists()


def test_default_steps_are_within_the_built_in_models_schedule(tmp_path: Path) -> None:
    config = ImageConfig(out=tmp_path / "out.jsonl", features="none")
    assert max(config.numbers) == 1000
    image._Bench(config, load_judges("none", None, config.model, config.device))


def test_results_are_not_overwritten(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    assert main(words(model, prompts, out)) == 1
    assert "exists" in capsys.readouterr().err
    assert out.read_text() == "mine\n"


def test_prompts_are_needed_where_the_model_is_not_built_in(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="no prompts"):
        ImageConfig(out=tmp_path / "out.jsonl", model="owner/name")


def test_distances_without_torchmetrics_are_refused(
    model: Path,
    judge: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    out = tmp_path / "out.jsonl"
    assert main([*words(model, prompts, out), "--features", str(judge)]) == 1
    complaint = capsys.readouterr().err
    assert "need torchmetrics" in complaint
    assert "pip install 'flashdraft[image]'" in complaint


def test_another_file_is_no_results_file(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"header": {"kind": "image"}}) + '\n{"tau": 1}\n')
    with pytest.raises(DataError, match="no image benchmark"):
        read_images(path)


# ---- judges and distances ------------------------------------------------------------------------


def test_the_shipped_judge_is_small_and_knows_the_digits() -> None:
    folder = ASSETS / "digits-judge"
    judge = Judge.from_pretrained(folder)
    assert judge.asked_for("a thick seven") == "seven"
    assert judge.asked_for("seven or eight") is None
    assert judge(torch.rand(2, 3, 64, 64)).shape == (2, judge.num_features)
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
    assert (folder / "README.md").is_file()


def test_what_is_no_judge_is_refused(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no judge"):
        Judge.from_pretrained(tmp_path)
    config = json.loads((judge / "config.json").read_text()) | {"num_features": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((judge / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no judge"):
        Judge.from_pretrained(tmp_path)


class Same(torch.nn.Module):
    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


def some(seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(400, 6, dtype=torch.float64, generator=draw)


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    left, right = some(0), some(1, shift=0.2, scale=1.3)
    metric = FrechetInceptionDistance(feature=Same())
    metric.update(right, real=True)
    metric.update(left, real=False)
    assert frechet(left, right) == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize("spread", [frechet_spread, mmd_spread])
def test_sets_of_one_law_lie_within_the_spread_and_others_outside(spread: Any) -> None:
    assert spread(some(0), some(1), swaps=200).chance > 0.02
    for other in (some(2, shift=0.2), some(3, scale=0.8)):  # planted
        found = spread(some(0), other, swaps=200)
        assert found.value > found.quantile(1.0)
        assert found.chance < 0.01


def test_swapping_nothing_is_the_distance_itself() -> None:
    left, right = some(0), some(1, shift=1.0)
    both = torch.cat([left, right]).float()
    squares = torch.cdist(both, both) ** 2
    kernel = torch.exp(-squares / squares[squares > 0].median()).double()
    within = kernel[:400, :400].mean() + kernel[400:, 400:].mean()
    expected = float(within - 2 * kernel[:400, 400:].mean())
    assert mmd_spread(left, right, swaps=2).value == pytest.approx(expected, rel=1e-3)
