"""Imports go down only: the layers of the package, read from the source with ``ast``, and what a bare import loads."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import impure_fast

ROOT = Path(__file__).parent.parent
# A part imports itself and the rows listed before its own, never a neighbour in its row.
LAYERS = (
    ("errors",),
    ("config",),
    ("philox", "images", "kernels"),
    ("ops",),
    ("draws",),
    ("purify", "checkpoints", "memory"),
    ("model",),
    ("zoo",),
    ("timm", "attacks", "classifiers", "engine", "integrations"),
    ("evaluation",),
    ("training",),
    ("serving",),
    ("demo",),
    ("app",),
    ("cli",),
)
LAYER = {part: depth for depth, row in enumerate(LAYERS) for part in row}
# The outside packages, beside the standard library, that some parts are confined to.
OUTSIDE = {"errors": set(), "config": set(), "images": {"numpy", "PIL"}, "kernels": {"torch", "triton"}}


def modules() -> dict[str, Path]:
    """{"impure_fast.ops.patch_mix": file} of every module but the package's own lazy ``__init__``."""
    found = {}
    for folder, prefix in ((ROOT / "impure_fast", ("impure_fast",)), (ROOT / "kernels", ("impure_fast", "kernels"))):
        for path in folder.rglob("*.py"):
            parts = prefix + path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["impure_fast"]
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Full names of the modules that a module imports anywhere in its text."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner
            if len(inner) < len(node.names):
                found.add(source)
    return found - {name}


def part(name: str) -> str:
    """ "impure_fast.ops.patch_mix" -> "ops"; the package itself -> ""."""
    return (name.split(".") + [""])[1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name):
    assert part(name) in LAYER, f"{name} has no place in LAYERS"
    for target in imports(name):
        if target.split(".")[0] == "impure_fast" and part(target) != part(name):
            # The package's own __init__ reaches everything, so it stands above all but the command line.
            depth = LAYER.get(part(target), LAYER["serving"])
            assert depth < LAYER[part(name)], f"{name} imports {target}, which is not below it"


def test_no_import_cycle():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


@pytest.mark.parametrize("name", sorted(name for name in MODULES if part(name) in OUTSIDE))
def test_confined_parts_import_nothing_else(name):
    roots = {target.split(".")[0] for target in imports(name)} - sys.stdlib_module_names - {"impure_fast"}
    assert roots <= OUTSIDE[part(name)]


def test_kernels_never_import_the_package():
    for name in MODULES:
        if part(name) == "kernels":
            assert all(part(target) == "kernels" for target in imports(name) if target.startswith("impure_fast"))


@pytest.mark.parametrize("name", ["impure_fast", "impure_fast.errors", "impure_fast.config", "impure_fast.cli"])
def test_import_stays_light(name):
    heavy = ("torch", "torchvision", "timm", "triton", "numpy", "PIL", "huggingface_hub", "matplotlib")
    code = f"import sys, {name}; print(*[m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout.split(), run.stderr) == ([], "")


def test_extras_are_asked_for_where_they_are_used():
    names = ("torchvision", "timm", "torchattacks", "lpips", "skimage", "matplotlib")
    code = f"import sys; sys.modules |= dict.fromkeys({names}); import impure_fast.demo, impure_fast.evaluation.run"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_public_names_resolve_and_are_listed():
    for name in impure_fast.__all__:
        assert getattr(impure_fast, name) is not None
        assert name in dir(impure_fast)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'purifier'"):
        _ = impure_fast.purifier
