"""What wheel and sdist hold, and how the build answers to IMPURE_FAST_BUILD."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")


@pytest.fixture
def tree(tmp_path):
    """The source tree without native sources and without anything built."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    for name in ("impure_fast", "kernels", "tests"):
        built = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    return tmp_path


def build(tree, mode, *command):
    environment = {**os.environ, "IMPURE_FAST_BUILD": mode}
    return subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("fast", "IMPURE_FAST_BUILD=fast is not known; use one of auto, none, cpu, cuda."),
        ("cpu", "IMPURE_FAST_BUILD=cpu demands the cpu part. There is no source for it"),
    ],
)
def test_build_that_cannot_be_is_refused(tree, mode, sentence):
    run = build(tree, mode, "setup.py", "--version")
    assert run.returncode == 1
    assert sentence in run.stderr


def test_build_counts_its_compilers_where_the_system_names_no_memory(tree):
    code = 'import os, runpy, torch; del os.sysconf_names; runpy.run_path("setup.py", run_name="__main__")'
    run = build(tree, "none", "-c", code, "--version")
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tree):
    run = build(tree, "none", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    assert run.returncode == 0, run.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        report = json.loads(archive.read("impure_fast/_build.json"))
        (scripts,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    package, weights = tree / "impure_fast", tree / "impure_fast/weights"
    files = [*package.rglob("*.py"), package / "py.typed", *weights.glob("*.safetensors"), *weights.glob("*.md")]
    files += package.glob("training/recipes/*.json")
    wanted = {str(path.relative_to(tree)) for path in files}
    wanted |= {f"impure_fast/{path.relative_to(tree)}" for path in (tree / "kernels").rglob("*.py")}
    assert held == wanted | {"impure_fast/_build.json"}
    assert set(report["not_built"]) == {"cpu", "cuda", "info"}
    assert "impure-fast = impure_fast.cli:main" in scripts


@pytest.mark.slow
def test_sdist_holds_the_repository(tmp_path):
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("This is no checkout.")
    tracked = {name for name in git.stdout.splitlines() if not name.startswith(".")}
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run = build(tmp_path, "none", "-m", "build", "--sdist", "--no-isolation")
    assert run.returncode == 0, run.stderr
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in held if ".egg-info/" not in name} == tracked | {"PKG-INFO", "setup.cfg"}
