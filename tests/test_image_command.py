"""`flashdraft image`: pictures that appear whole or not at all, figures that are told, sheets that
can be read, and slips that show two lines and leave no file.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from toy_diffusion import SCHEDULE, toy_pipe

from flashdraft.cli import main, pictures
from flashdraft.diffusion import drawing, models
from flashdraft.diffusion.drawing import Drawn
from flashdraft.diffusion.pipeline import SpeculativeDiffusion, Stats
from flashdraft.diffusion.sheet import SheetRow, contact_sheet, enlarged

Run = Callable[[str], tuple[int, str, str]]
WORDS = ["abc", "xyz"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: `toy`, `pndm` with Stable Diffusion's own scheduler, `nan` with a damaged UNet."""
    folder = tmp_path_factory.mktemp("models")
    pipe = toy_pipe(tmp_path_factory.mktemp("tokenizer"))
    pipe.save_pretrained(folder / "toy")
    (folder / "toy" / "words.json").write_text(json.dumps(WORDS))
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SCHEDULE)
    pipe.save_pretrained(folder / "pndm")
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    pipe.save_pretrained(folder / "nan")
    return folder


@pytest.fixture
def run(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """`image LINE` in an empty folder; a model is one of `folders`, by default `toy`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(folders / "cache"))

    def run(line: str) -> tuple[int, str, str]:
        words = shlex.split(line)
        if "--model" in words:
            place = words.index("--model") + 1
            words[place] = str(folders / words[place])
        else:
            words += ["--model", str(folders / "toy")]
        status = main(["image", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def table_of(out: str) -> list[dict[str, str]]:
    """The rows of the table that was printed, two spaces between its columns."""
    lines = [line for line in out.splitlines() if "  " in line]
    head, *rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


# ---- pictures ------------------------------------------------------------------------------------


def test_a_picture_is_written_and_its_figures_are_told(run: Run, tmp_path: Path) -> None:
    status, out, err = run("abc --out one.png --steps 12 --block 4 --scheduler ddpm")
    assert (status, err) == (0, "")
    assert out.startswith("DDPM, exact mode, draft frozen-x0\n")
    (row,) = table_of(out)
    assert (row["picture"], row["seed"], row["steps"]) == ("one.png", "0", "12")
    assert int(row["rounds"]) < 12
    assert int(row["rows"]) > 2 * int(row["rounds"])  # two branches of guidance
    assert 0 < float(row["accepted"]) <= 1
    assert 0 < float(row["predicted"]) <= 1
    assert float(row["seconds"]) > 0
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (256, 256)  # 16, enlarged
    note = json.loads((tmp_path / "one.png.run.json").read_text())
    assert note["options"]["steps"] == 12
    assert note["taken"]["rounds"] == int(row["rounds"])


def test_tolerance_mode_takes_ddim_and_tells_the_defect(run: Run) -> None:
    status, out, err = run("abc --out one.png --steps 12 --mode tolerance --tol 0.5 --block 6")
    assert (status, err) == (0, "")
    assert out.startswith("DDIM with eta 0, tolerance mode, draft extrapolated\n")
    (row,) = table_of(out)
    assert int(row["rounds"]) < 12
    assert float(row["defect"]) > 0


def test_a_seed_makes_its_picture_alone_and_among_others(run: Run, tmp_path: Path) -> None:
    assert run("abc --out many.png --steps 4 --count 3 --seed 5 --scale 1 --block 2")[0] == 0
    assert run("abc --out one.png --steps 4 --seed 7 --scale 1 --block 2")[0] == 0
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["many-1.png", "many-2.png", "many-3.png", "one.png"]
    one = (tmp_path / "one.png").read_bytes()
    assert (tmp_path / "many-3.png").read_bytes() == one
    assert (tmp_path / "many-2.png").read_bytes() != one
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (16, 16)


def test_size_negative_prompt_and_number_format_are_taken(run: Run, tmp_path: Path) -> None:
    line = "abc --out a.png --steps 2 --size 32x16 --negative xyz --dtype bfloat16 --scale 1"
    assert run(line)[0] == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (32, 16)
    assert run("abc --out b.png --steps 2 --size 32x16 --dtype bfloat16 --scale 1")[0] == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_words_that_the_model_does_not_know_are_named(run: Run) -> None:
    status, _, err = run("'ABC b 7' --out one.png --steps 2")
    assert status == 0
    assert err == "note: this model does not know `b`, `7`; its words are:\n      abc xyz\n"


def test_the_built_in_model_knows_its_words(run: Run) -> None:
    """Its name is no folder where the command runs."""
    pipe = models.load_pipe("digits")
    assert models.known_words(pipe)[-1] == "nine"
    assert drawing.unknown_words(pipe, "a thick 7") == ["7"]


def test_a_model_without_a_list_of_words_knows_any(run: Run) -> None:
    status, _, err = run("cat --out one.png --steps 2 --model pndm --scheduler ddim")
    assert (status, err) == (0, "")


def test_nothing_drafted_and_a_blackened_picture_are_said(
    capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    from flashdraft.cli.image import ImageOptions

    picture = Image.new("RGB", (8, 8))
    drawn = Drawn(3, picture, Stats(exact=True, steps=100, rounds=100), is_hidden=True)
    drawn.stats.measuring = 0.5
    told = pictures._Told()
    told.add(Path("one.png"), drawn)
    told.show(ImageOptions())
    said = capsys.readouterr()
    assert "--block N" in said.out
    assert "0.50 s more for measuring" in said.out
    assert "seed 3" in said.err
    told.show(ImageOptions(block="1"))
    assert "--block" not in capsys.readouterr().out


# ---- contact sheets ------------------------------------------------------------------------------


def test_a_contact_sheet_shows_all_ways_at_equal_seeds(run: Run, tmp_path: Path) -> None:
    status, out, err = run("abc --out sheet.png --compare --steps 8 --count 2 --tol 0.5")
    assert (status, err) == (0, "")
    rows = table_of(out)
    names = ["plain, eta 1", "exact", "plain, eta 0", "tolerance", "fewer steps"]
    assert [row["way"] for row in rows] == names
    plain, exact, _, tolerance, fewer = rows
    assert float(plain["rounds"]) == 8 > float(exact["rounds"])
    assert int(fewer["steps"]) == round(float(tolerance["rounds"])) < 8
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 112
        assert sheet.height > 5 * 112
    assert [path.name for path in tmp_path.glob("*.png")] == ["sheet.png"]


def test_equal_seeds_begin_with_equal_noise(folders: Path) -> None:
    """With a tolerance of 0 the drafted row is the plain one, and says that nothing is off."""
    pipe = models.load_pipe(str(folders / "toy"), scheduler="ddim")
    asked = drawing.Asked("abc", steps=6, guidance=3.0)
    drawing.check_asked(pipe, asked)
    exact = SpeculativeDiffusion(pipe, block=3)
    tolerant = SpeculativeDiffusion(pipe, mode="tolerance", tol=0.0, block=3)
    ways = drawing.compare(exact, tolerant, asked, [4, 5])
    by_name = {way.name: way for way in ways}
    assert by_name["tolerance"].error == pytest.approx(0.0, abs=1e-3)
    assert by_name["plain, eta 0"].error is None
    assert [drawn.seed for drawn in by_name["exact"].drawn] == [4, 5]


def test_a_sheet_enlarges_small_pictures_and_shrinks_large_ones() -> None:
    small = Image.new("L", (32, 32), 255)
    assert enlarged(small, 100).size == (128, 128)
    assert enlarged(small, 10) is small
    wide = contact_sheet("t", ["a"], [SheetRow("row", ["note"], [Image.new("RGB", (1024, 512))])])
    narrow = contact_sheet("t", ["a"], [SheetRow("row", ["note"], [small])])
    assert wide.width - narrow.width == 256 - 128
    assert wide.height - narrow.height == 0


def test_words_that_do_not_fit_on_a_sheet_are_shortened() -> None:
    pictures = [Image.new("L", (32, 32))]
    row = SheetRow("a very long name of a row " * 4, ["and a longer note " * 9], pictures)
    sheet = contact_sheet("a title " * 40, ["a"], [row])
    left_of_picture = sheet.crop((226, 96, 239, 224))
    assert left_of_picture.getcolors() == [(13 * 128, (255, 255, 255))]


# ---- files ---------------------------------------------------------------------------------------


def test_only_own_pictures_are_written_over(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(b"somebody's")
    status, _, err = run("abc --out one.png --steps 2")
    assert status == 1
    assert "was not written by" in err
    assert path.read_bytes() == b"somebody's"

    path.unlink()
    assert run("abc --out one.png --steps 2")[0] == 0
    first = path.read_bytes()
    assert run("abc --out one.png --steps 2 --seed 1")[0] == 0
    assert path.read_bytes() != first

    path.write_bytes(first)  # as an editor would
    status, _, err = run("abc --out one.png --steps 2")
    assert status == 1
    assert "was changed since" in err
    assert path.read_bytes() == first


def test_a_folder_that_is_not_there_is_made(run: Run, tmp_path: Path) -> None:
    assert run("abc --out new/folder/one.png --steps 2")[0] == 0
    assert (tmp_path / "new" / "folder" / "one.png").is_file()


# ---- slips ---------------------------------------------------------------------------------------

SLIPS = [
    ("abc --out one.png --steps 0", "steps is 0", "--steps must be"),
    ("abc --out one.png --steps 5000", "steps is 5000", "1000 or fewer"),
    ("abc --out one.jpg", "would be a PNG", "one.png"),
    ("abc --out .", "would be a PNG", ".png"),
    ("abc --out one.png --seed -1", "seed is -1", "--seed must be"),
    ("abc --out one.png --count 100000", "count is 100000", "from 1 to 1000"),
    ("'' --out one.png", "the prompt is empty", "what to draw"),
    ("' ' --out one.png", "the prompt is empty", "what to draw"),
    ("'abcdefgh' --out one.png", "10 tokens", "abc xyz"),
    ("abc --negative abcdefgh --out one.png", "10 tokens", "abc xyz"),
    ("abc --negative abc --guidance 1 --out one.png", "no effect", "guidance"),
    ("abc --out one.png --model nowhere", "nowhere", "model_index.json"),
    ("abc --out one.png --scheduler pndm", "scheduler is 'pndm'", "euler-a"),
    ("abc --out one.png --model pndm", "PNDMScheduler", "--scheduler ddim"),
    ("abc --out one.png --scheduler dpm++", "no noise", "--mode tolerance"),
    ("abc --out one.png --scheduler ddim --eta 0", "no noise", "--eta 1"),
    ("abc --out one.png --mode tolerance --scheduler ddpm", "draws noise", "--eta 0"),
    ("abc --out one.png --mode tolerance --eta 0.5", "draws noise", "--eta 0"),
    ("abc --out one.png --scheduler ddpm --eta 1", "eta is 1.0", "ddim"),
    ("abc --out one.png --mode fast", "mode is 'fast'", "tolerance"),
    ("abc --out one.png --tol 0.1", "exact mode has none", "--mode tolerance"),
    ("abc --out one.png --block 0", "block is '0'", "--block is auto"),
    ("abc --out one.png --block 3 --costs flat", "costs is flat", "one of the two"),
    ("abc --out one.png --draft nonsense", "draft is 'nonsense'", "--draft is one of"),
    ("abc --out one.png --draft learned", "no learned draft", "frozen-x0"),
    ("abc --out one.png --size 20", "size is 20x20", "multiples of 8"),
    ("abc --out one.png --size big", "size is 'big'", "768x512"),
    ("abc --out one.png --device tpu", "device is 'tpu'", "cuda"),
    ("abc --out one.png --dtype int8", "dtype is 'int8'", "bfloat16"),
    ("abc --out one.png --compare --mode tolerance", "shows both", "--mode"),
    ("abc --out one.png --compare --scheduler ddpm", "DDIM", "--scheduler"),
    ("abc --out one.png --compare --count 17", "17 columns", "16 or fewer"),
    ("abc --out one.png --compare --steps 1", "a single step of DDIM", "--steps must be 2"),
    ("abc --out one.png --device meta", "device is 'meta'", "holds numbers"),
    ("abc --out one.png --model nan --scheduler ddim", "NaN", "the UNet's weights"),
    ("abc --out one.png --model nan --scheduler ddim --dtype float16", "NaN", "bfloat16"),
]


@pytest.mark.parametrize(("line", "named", "helps"), SLIPS, ids=[line for line, *_ in SLIPS])
def test_a_slip_is_two_lines_and_leaves_no_file(
    run: Run, tmp_path: Path, line: str, named: str, helps: str
) -> None:
    status, out, err = run(line)
    lines = err.splitlines()
    assert (status, out) == (1, "")
    assert [text.split(":")[0] for text in lines] == ["error", "hint"], err
    assert named in lines[0]
    assert helps in lines[1]
    assert not list(tmp_path.iterdir())


def test_a_model_that_starts_from_a_picture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    toy_pipe(tmp_path, "image").save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    assert main(["image", "abc", "--out", "one.png", "--model", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "does not draw from a text alone" in err
    assert not (tmp_path / "one.png").exists()


def test_without_the_extra_one_line_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(models, "import_module", missing)
    status, _, err = run("abc --out one.png")
    assert status == 1
    assert err == "error: images need diffusers\nhint: pip install 'flashdraft[image]'\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_no_memory_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise error

    monkeypatch.setattr(drawing.SpeculativeDiffusion, "__call__", full)
    status, _, err = run("abc --out one.png --steps 2 --scheduler ddpm")
    assert status == 1
    assert "has no memory" in err
    assert "--size" in err
