"""Who computes a problem: the backends of the package, what torch offers, the authors' code, and a file of yours.

A provider of yours is a file with one function, named as the operator and taking its tensors and options by name;
its name in the tables is that of the file.
"""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from impure_fast import Engine
from impure_fast.errors import InputError, MissingFileError
from impure_fast.ops import _dispatch
from impure_fast.ops._lib import OPERATORS
from impure_fast.ops.patch_mask import per_channel
from impure_fast.ops.reconstruction_attention import replica_rows

from .registry import Problem, first, network, reconstruct, weights

Provider = Callable[..., Any]  # the problem's inputs -> a tensor or a tuple of them
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# Of torch.compile.  freezing: weights are constants, which on a CPU alone lets it pack them.
COMPILE: dict[str, dict[str, Any]] = {
    "compile": {},
    "compile-max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True, "freezing": True},
}
BASELINES = ("reference", "sdpa*", "products", "compile*", "authors")
DEFAULT = "reference,compile,sdpa*,products,auto,cpp*,triton*,cuda*,engine,authors"


def providers(problem: Problem, wanted: str, authors: str | None = None) -> dict[str, Provider]:
    """The providers of ``problem`` that the patterns and files of ``wanted`` name (commas between).

    authors: a checkout of the authors' repository, which adds the provider "authors" to its network.
    Raises InputError for a name that no problem knows, MissingFileError for a file that is not there.
    """
    known = _network(problem, authors) if problem.preset else _operator(problem)
    taken: dict[str, Provider] = {}
    for pattern in wanted.split(","):
        if pattern.endswith(".py"):
            function, name = load(pattern, problem.op), Path(pattern).stem
            if name in NAMES:
                raise InputError(f"{pattern}: there is a provider {name!r} already; give the file another name.")
            if function:
                taken[name] = named(problem, function)
            continue
        found = fnmatch.filter(known, pattern)
        if not found and not fnmatch.filter(NAMES, pattern):
            raise InputError(f"{pattern!r} is no provider; known are {', '.join(NAMES)}, and a file (mine.py).")
        taken |= {name: known[name] for name in found}
    return taken


def load(path: str, function: str) -> Any:
    """``function`` of a Python file, or None where the file has none of that name.

    Raises MissingFileError, or InputError where the file does not run.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"There is no provider file {path}.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} does not run: {type(error).__name__}: {error}") from error
    return getattr(module, function, None)


def named(problem: Problem, function: Callable[..., Any]) -> Provider:
    """A function of keywords as a provider."""
    return lambda *inputs: function(**dict(zip(problem.names, inputs, strict=True)), **problem.options)


def _operator(problem: Problem) -> dict[str, Provider]:
    spec = OPERATORS[problem.op]

    def on(name: str, changes: dict[str, Any] | None = None) -> Provider:
        def call(*inputs: Tensor) -> Any:
            arguments = problem.arguments(inputs) if changes is None else [*inputs, *changes.values()]
            return first(_dispatch.run(spec, name, *arguments), problem.op)

        return call

    known: dict[str, Provider] = {name: on(name) for name in (*spec.backends, "auto")}

    def compiled(reference: Callable[..., Any]) -> Provider:
        return lambda *inputs: first(reference(*problem.arguments(inputs)), problem.op)

    known |= {name: compiled(call) for name, call in compilers(spec.reference).items()}
    if problem.op == "reconstruction_attention":
        chunks = problem.options["chunks"]
        known |= {"sdpa": _replicas(_sdpa, chunks), "products": _replicas(_products, chunks)}
        known |= {name: _replicas(_restricted(which), chunks) for name, which in SDPA.items()}
        if chunks:
            plain = {**problem.options, "chunks": 0}
            known |= {f"{name} on replicas": _replicas(on(name, plain), chunks) for name in spec.dtypes}
    return known


def _network(problem: Problem, authors: str | None) -> dict[str, Provider]:
    known = {name: network(problem.preset, name) for name in ("reference", "auto")}
    known |= {name: network(problem.preset, "reference", run) for name, run in compilers(reconstruct).items()}
    known["engine"] = _engine(problem.preset)
    if authors and problem.preset == "impure_base_patch16_224":
        from .authors import Authors

        known["authors"] = Authors(authors, problem.preset)
    return known


def compilers(function: Provider) -> dict[str, Provider]:
    """{name: the function under torch.compile}: whole or not at all, never in silence back to eager."""

    def compiled(options: dict[str, Any]) -> Provider:
        made: list[Provider] = []  # at the first call: the compiler's import alone takes seconds
        frozen = options.get("freezing", False)

        def call(*inputs: Tensor) -> Any:
            if made:
                return made[0](*inputs)
            import torch._inductor.config as inductor

            made.append(torch.compile(function, dynamic=False, fullgraph=True, options=options))
            with inductor.patch(freezing=frozen):  # the option alone comes after weights became inputs of the graph
                return made[0](*inputs)

        return call

    return {name: compiled(options) for name, options in COMPILE.items()}


def _engine(preset: str) -> Provider:
    """The engine in the images' precision, its pictures in the network's units.

    Its 8-bit precision claims pictures that look the same, not equal numbers: benchmarks.latency measures it.
    """
    engines: dict[tuple[torch.dtype, str], Engine] = {}

    def call(images: Tensor) -> Tensor:
        key = (images.dtype, str(images.device))
        if key not in engines:
            own = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(images.dtype, "fp32")
            engines.clear()
            engines[key] = Engine(weights(preset, torch.float32, key[1]), precision=own)
        engine = engines[key]
        c = engine.model.config
        pictures = engine.purify(images.float(), seed=0, clamp=False, check=False)
        return ((pictures - per_channel(c.mean, pictures)) / per_channel(c.std, pictures)).to(images.dtype)

    return call


def _replicas(attend: Provider, chunks: int) -> Provider:
    """Attention that knows no shared form gets every replica's rows."""
    if not chunks:
        return attend

    def call(*inputs: Tensor) -> Tensor:
        rows = replica_rows((inputs[0].shape[1] - chunks) // 2, chunks, inputs[0].device)
        return attend(*(x[:, rows].flatten(0, 1) for x in inputs)).unflatten(0, (-1, chunks))

    return call


def _sdpa(*inputs: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)


def _restricted(which: SDPBackend) -> Provider:
    def call(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(which):
            return _sdpa(*inputs)

    return call


def _products(*inputs: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1).matmul(v).transpose(1, 2)


NAMES = [
    *("reference", "auto", "cpp", "triton", "cuda", "sdpa", "products", "engine", "authors"),
    *("cpp on replicas", "triton on replicas", "cuda on replicas"),
    *SDPA,
    *COMPILE,
]
