"""The site: it names what there is, its figures are their files', and it builds without a warning."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import impure_fast

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]


def module(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_api_page_has_every_public_name():
    page = (DOCS / "explained" / "api.md").read_text()
    described = set(re.findall(r":: impure_fast\.([\w.]+)$", page, re.MULTILINE))
    assert {*impure_fast.__all__} - {"Error"} <= described and "errors" in described
    assert {f"ops.{name}" for name in impure_fast.ops.__all__} <= described


def test_the_extras_are_those_of_the_package():
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = ", table, re.MULTILINE)
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (DOCS / "get-started.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(rows))) == set(extras)


def test_every_example_is_shown():
    shown = set(re.findall(r"literalinclude} \.\./examples/(\w+\.py)", (DOCS / "examples.md").read_text()))
    assert shown == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in [*PAGES, ROOT / ".ci" / "run", *(ROOT / ".github" / "workflows").glob("*.yml")]:
        named = re.findall(r"(?:`|run: |^)make ([a-z-]+)", path.read_text(), re.MULTILINE)
        assert set(named) <= targets, path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_or_linked_exist(path):
    folders = r"impure_fast|benchmarks|docs|tests|examples|csrc|kernels|\.github"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", path.read_text()):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!https:)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_the_drawing_is_what_its_script_draws():
    assert (DOCS / "algorithm.svg").read_text() == module("algorithm").draw(), "python docs/algorithm.py"


def test_docstrings_become_lists_paragraphs_and_literal_blocks():
    text = (
        "Do it.\n\n    model.purify(x)\n\nimages: [N, 3, H, W]; of the\n    usual kind.\nseed, streams: as *there*,\n"
        "in prose.\nRaises InputError of proj_.\n"
    )
    lines = text.splitlines()
    module("conf").docstring_as_rst(None, "function", "f", None, None, lines)
    assert [line for line in lines if line] == [
        *("Do it.", "::", "    model.purify(x)"),
        *("* **images**: [N, 3, H, W]; of the", "  usual kind."),
        *(r"* **seed, streams**: as \*there\*,", "  in prose."),
        r"Raises InputError of proj\_.",
    ]


def test_the_newcomer_s_time_is_the_one_that_was_measured():
    figures = json.loads((ROOT / "benchmarks" / "results" / "newcomer.json").read_text())
    page = " ".join((DOCS / "get-started.md").read_text().split())
    for name, clock in (("seconds", "seconds of the clock"), ("processor_seconds", "seconds of a processor")):
        first, second, third = (f"{value:.0f}" for value in figures[name].values())
        assert f"{sum(figures[name].values()):.0f} {clock} ({first}, {second} and {third})" in page
    assert f"`make newcomer`, {figures['date']}, {figures['machine']}" in page
    assert figures["picture"] in page
    assert all(command in (DOCS / "get-started.md").read_text().splitlines() for command in figures["seconds"])


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_outside(tmp_path):
    pytest.importorskip("furo", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"([^\"]*)\"", page.read_text())
        assert loaded and not [x for x in loaded if re.match(r"(https?:)?//", x)], page.name
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style
