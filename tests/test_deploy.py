"""What operators are given holds: files parse, units verify, every metric and option that a page or
a dashboard names is there, and the page's table of memory is what the caches take.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import toy_server
import yaml
from conftest import tiny_target

from flashdraft import hub

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "flashdraft.service").read_text(encoding="utf-8")
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))


@functools.cache
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cache_bytes", ROOT / "recipes/cache_bytes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Memory.


def test_the_table_of_capacity_is_what_the_recipe_prints() -> None:
    for line in recipe().table(recipe().known()):
        assert line in PAGE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_formula_is_what_a_cache_takes(family: str, dtype: torch.dtype, number: int) -> None:
    target = tiny_target(family, lean=True, dtype=dtype)
    cache = target.new_cache(2, 64)
    target.prefill(cache, 0, torch.tensor([3, 4, 5]), ())
    layers = recipe().Layers(count=4, num_kv_heads=2, head_dim=8)
    assert cache.nbytes == 2 * 64 * layers.bytes_per_token(number)


def test_a_drafters_layers_are_read_from_its_folder() -> None:
    folder = hub.builtin_draft("smollm2-135m")
    assert recipe().of_drafter(str(folder)) == recipe().known()[0].drafter


# The client.


def clients() -> list[tuple[str, str]]:
    found = []
    for name in ("README.md", "docs/serving.md"):
        page = (ROOT / name).read_text(encoding="utf-8")
        for code in re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S):
            if "openai" in code:
                found.append((name, code))
    return found


def test_clients_of_the_pages_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As they are printed, with the address and the name of the server that is here."""
    with toy_server.running() as toy:
        for name, code in clients():
            here = code.replace("http://127.0.0.1:8000", toy.url)
            here = here.replace('"smollm2-135m"', f'"{toy_server.NAME}"')
            exec(compile(here, name, "exec"), {})
    told = capsys.readouterr().out
    assert "tokens were drafted\n" in told
    assert told.endswith(" tokens\n")
    assert [name for name, _ in clients()] == ["docs/serving.md"]


# Metrics and options.


def expressions() -> list[str]:
    found = []
    for panel in DASHBOARD["panels"]:
        found += [target["expr"] for target in panel["targets"]]
    for variable in DASHBOARD["templating"]["list"]:
        found.append(str(variable["query"]))
    return found


def metrics_in(text: str) -> set[str]:
    """Series by the names that they have in /metrics, without what a histogram adds to its own."""
    names = set(re.findall(r"\bflashdraft_\w+", text))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def exported() -> set[str]:
    from flashdraft.serve.metrics import Metrics

    names = set()
    for family in Metrics().registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        names.add(family.name + suffix)
    return names


def test_every_metric_of_the_dashboard_is_exported() -> None:
    named = metrics_in("\n".join(expressions()))
    assert len(named) >= 12
    assert named <= exported()


def test_the_page_names_every_metric_and_no_other() -> None:
    assert metrics_in(PAGE) == exported()


def test_a_metric_that_is_not_there_is_caught() -> None:
    assert not metrics_in("rate(flashdraft_request_total[5m])") <= exported()
    assert metrics_in("flashdraft_request_seconds_bucket") <= exported()


def test_the_page_names_every_option_with_its_default() -> None:
    from flashdraft.cli.options import ModelOptions
    from flashdraft.serve.options import ServeOptions

    table = PAGE.split("## Options")[1].split("## Capacity")[0]
    named = set(re.findall(r"`--([\w-]+)`", table.split("\n\n")[1]))
    known = {field.name.replace("_", "-"): field for field in fields(ServeOptions)}
    assert named == known.keys() | {
        field.name.replace("_", "-") for field in fields(ModelOptions) if field.metadata
    }

    for name, field in known.items():
        told = re.search(rf"^\| `--{name}` \| (.*?) \|", table, re.M)
        assert told is not None
        default = told[1].strip("`")
        if type(field.default) in (int, float):
            assert float(default) == field.default
        elif isinstance(field.default, str):
            assert default == field.default


def test_the_page_names_every_route_and_field() -> None:
    from flashdraft.serve.app import ROUTES
    from flashdraft.serve.page import PAGE_PATHS
    from flashdraft.serve.protocol import ChatBody, CompletionBody

    section = PAGE.split("## Endpoints and fields")[1].split("## Options")[0]
    routes, table = section.strip().split("\n\n")[:2]
    for route in ROUTES - set(PAGE_PATHS) - {"/"}:
        assert f"{route}`" in routes, route

    taken = [line for line in table.splitlines() if not line.startswith("| refused")]
    named = {name.split(".")[0] for name in re.findall(r"`([\w.]+)`", "\n".join(taken))}
    known = ChatBody.model_fields.keys() | CompletionBody.model_fields.keys()
    assert named - {"content"} == known - {"model", "messages", "prompt"}


# Files.


def test_the_dashboard_has_what_grafana_wants() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            assert 'job=~"$job",instance=~"$instance"' in expression


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))


def test_prometheus_is_told_the_route_and_a_file_with_a_key() -> None:
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    (scrape,) = config["scrape_configs"]
    assert scrape["metrics_path"] == "/metrics"
    assert scrape["authorization"]["type"] == "Bearer"
    assert "credentials" not in scrape["authorization"]  # no key in the file itself
    assert scrape["authorization"]["credentials_file"].startswith("/")


def test_the_image_runs_without_root_a_key_or_a_registrys_name() -> None:
    steps = [line.split()[0] for line in DOCKERFILE.splitlines() if re.match(r"[A-Z]+ ", line)]
    last = steps[len(steps) - steps[::-1].index("FROM") :]
    assert last.index("USER") < last.index("ENTRYPOINT")
    assert last.count("HEALTHCHECK") == 1
    assert "USER flashdraft" in DOCKERFILE
    assert "/health" in DOCKERFILE
    assert not re.search(r"^(ENV|ARG) .*KEY", DOCKERFILE, re.M)
    assert "://" not in DOCKERFILE.replace("http://127.0.0.1:8000/health", "")
    assert not re.search(r"^FROM \S*/", DOCKERFILE, re.M)


def test_the_image_is_built_of_files_that_are_there() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[1] == "*"
    kept = [line[1:] for line in ignore if line.startswith("!")]
    for name in kept:
        assert (ROOT / name).exists(), name
    assert {"flashdraft", "pyproject.toml", "setup.py", "constraints.txt", "README.md"} <= set(kept)


def options_of(command: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w-]*", command))


def test_image_and_unit_use_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from flashdraft.cli import main

    assert main(["serve", "--help"]) == 0
    told = capsys.readouterr().out
    entry = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)
    start = re.findall(r"^ExecStart=(.*)$", UNIT, re.M)
    assert len(entry) == len(start) == 1
    assert json.loads(entry[0])[:2] == ["flashdraft", "serve"]
    for option in options_of(entry[0]) | options_of(start[0]):
        assert option in told


def test_the_unit_gives_it_time_to_drain() -> None:
    stop = int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M)[0])
    drain = int(re.findall(r"--drain-timeout (\d+)", UNIT)[0])
    assert stop >= drain + 10
    for line in ("KillSignal=SIGTERM", "NoNewPrivileges=yes", "ProtectSystem=strict"):
        assert f"\n{line}\n" in UNIT
    assert "DynamicUser=yes" in UNIT
    assert "FLASHDRAFT_API_KEY=" not in UNIT.replace("(FLASHDRAFT_API_KEY=...)", "")


def verified(unit: Path, text: str) -> str:
    """What systemd says of a unit, whose program is one that is there."""
    unit.write_text(text.replace("/opt/flashdraft/bin/flashdraft", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "flashdraft.service"
    assert verified(unit, UNIT) == ""
    assert "gently" in verified(unit, UNIT.replace("KillMode=mixed", "KillMode=gently"))
