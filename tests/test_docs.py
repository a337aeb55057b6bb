"""The documentation's tables, of equations and of pains, name code and tests that there are."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vml_ldm import bundled_model

ROOT = Path(__file__).resolve().parents[1]


def lines_of(name: str) -> list[list[str]]:
    """The cells of a table in docs/, without its head."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in lines[1:]]


EQUATIONS, PAINS = lines_of("equations.md"), lines_of("pains.md")


@pytest.mark.parametrize(("table", "columns"), [(EQUATIONS, 5), (PAINS, 4)])
def test_every_line_is_whole(table: list[list[str]], columns: int) -> None:
    assert len(table) > 10 and all(len(cells) == columns and all(cells) for cells in table)
    assert all(re.fullmatch("`[^`]+`( `[^`]+`)*", cells[-1]) for cells in table)


@pytest.mark.parametrize("code", [cells[3].strip("`") for cells in EQUATIONS])
def test_the_code_exists_and_is_documented(code: str) -> None:
    module, name = code.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name).__doc__


@pytest.mark.parametrize("test", [test for cells in EQUATIONS + PAINS for test in re.findall("`([^`]+)`", cells[-1])])
def test_the_test_exists(test: str) -> None:
    file, function = test.split("::")
    assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in ("inpainting.md", "restoration.md", "extending.md", "memory.md", "callbacks.md")
    ),
]


def blocks_of(page: Path) -> list[str]:
    """A page's Python, in its order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def offline(code: str) -> str:
    """The code with the bundled checkpoint and its small decoder in place of a hub's, on a CPU, with few steps."""
    for model, here in (
        ('"stable-diffusion-v1-5/stable-diffusion-v1-5"', "bundled"),
        ('"madebyollin/taesd"', "bundled, subfolder='gradient_vae'"),
    ):
        code = code.replace(model, here)
    code = code.replace(".float16", ".float32").replace('"cuda"', '"cpu"')
    return re.sub(r"\bpipe\(", "pipe(num_inference_steps=4, prompt=", code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_line_of_python_runs(page: Path, tmp_path: Path, monkeypatch) -> None:
    """All blocks of a page, one after the other, with the files that they name."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name, size in (("photo.png", 128), ("small.png", 32)):
        Image.new("RGB", (size, size), (200, 80, 60)).save(name)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 80, 80))
    mask.save("mask.png")
    thumbnail = Image.new("RGB", (32, 32), (90, 160, 70))
    scope = {"bundled": bundled_model(), "folder": bundled_model(), "thumbnail": thumbnail, "mask": mask}
    scope["photo"] = Image.new("RGB", (128, 128), (200, 80, 60))
    blocks = blocks_of(page)
    assert blocks
    if page.name != "README.md":  # guides go on where the README ends
        exec("from vml_ldm import VMLInpaintPipeline", scope)
    for code in blocks:
        exec(compile(offline(code), page.name, "exec"), scope)
    assert scope.get("image", scope.get("pipe")) is not None


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every link and picture in docs/ is there."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "inpainting" / "index.html").is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_the_roots_pages_link_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


WALK = re.findall(
    r"^\|[^|]+\| `([^`]+\.py)` `([^`]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M
)


@pytest.mark.parametrize(("file", "name"), WALK)
def test_the_walk_through_a_call_names_what_there_is(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        (tree,) = (node for node in tree.body if getattr(node, "name", None) == part)


def test_the_walk_is_whole() -> None:
    assert len(WALK) == 14


DEFAULTS = [
    (value, module, name)
    for values, places in re.findall(
        r"^\|[^|]+\| (`[^|]+`) \| (`[^|]+`) \|", (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8"), re.M
    )
    for value, place in zip(re.findall("`([^`]+)`", values), re.findall("`([^`]+)`", places), strict=True)
    for module, _, name in [(places.strip("`").split("`")[0].rpartition(".")[0], *place.rpartition(".")[1:])]
]


@pytest.mark.parametrize(("value", "module", "name"), DEFAULTS)
def test_the_page_of_defaults_has_the_code_s_numbers(value: str, module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) == ast.literal_eval(value)


def test_the_page_of_defaults_is_whole() -> None:
    assert len(DEFAULTS) == 25
