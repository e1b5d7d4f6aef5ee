"""The purifier for other runtimes: a ``torch.export`` program, an AOTInductor package, an ONNX model, a model
repository of NVIDIA Triton Inference Server.

All take (images float32 [N, 3, H, W] in [0, 1], seed int64, streams int64 [N]) and give the purified images, clamped;
N is free, H and W are fixed, tiles and all randomness inside: the same draws as ``model.purify``'s.  ONNX takes a seed
for each image, [N], so that a server may put requests together and every image still gets what it gets alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..draws import Draws
from ..errors import InputError, needs_extra
from ..images import write_atomically, write_text
from ..model import IMPure
from ..ops._dispatch import backend
from ..purify import Tiling, over_tiles

FORMATS = {"program": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
OPSET = 18  # the first with Col2Im, which puts tiles together

# A request of B images brings seed and streams as [B, 1], since the server wants an axis beside the batch's;
# ``reshape`` takes it away again.
TRITON_CONFIG = """\
backend: "onnxruntime"
max_batch_size: 8
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
input [
  {{ name: "images" data_type: TYPE_FP32 dims: [ 3, {height}, {width} ] }},
  {{ name: "seed" data_type: TYPE_INT64 dims: [ 1 ] reshape: {{ shape: [ ] }} }},
  {{ name: "streams" data_type: TYPE_INT64 dims: [ 1 ] reshape: {{ shape: [ ] }} }}
]
output [ {{ name: "purified" data_type: TYPE_FP32 dims: [ 3, {height}, {width} ] }} ]
"""


class _Pictures(nn.Module):
    """``model.purify`` of pictures of one size as a function of tensors alone."""

    def __init__(self, model: IMPure, height: int, width: int) -> None:
        super().__init__()
        self.model, self.tiling = model, Tiling.of(model.config, height, width)

    def forward(self, images: Tensor, seed: Tensor, streams: Tensor) -> Tensor:
        def network(tiles: Tensor, image: Tensor, place: Tensor) -> Tensor:
            ids = streams[image] + (place << 32)
            key = seed[image] if seed.ndim else seed
            return self.model(tiles, Draws.sample(self.model.config, tiles.shape, key, ids, device=tiles.device))

        return over_tiles(images, self.tiling, network, None).clamp(0, 1)


def export_program(
    model: IMPure, height: int, width: int, *, decomposed: bool = False, seeds: bool = False
) -> torch.export.ExportedProgram:
    """The program for pictures of height x width.

    decomposed: of torch's own operators alone, in the authors' order of operations; otherwise the package's operators
    stay nodes, as the backend in force chooses them, and running it needs this package imported.
    seeds: take a seed for each image, [N], in place of one for all.
    """
    if height < 1 or width < 1:
        raise InputError(f"height={height}, width={width}: must be at least 1 pixel.")
    pictures, device = _Pictures(model, height, width), model.cls_token.device
    # Two pictures: torch takes an example of one for a constant.
    seed = torch.arange(2, device=device) if seeds else torch.tensor(0, device=device)
    example = (torch.zeros(2, 3, height, width, device=device), seed, torch.arange(2, device=device))
    batch = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad(), backend("reference" if decomposed else "auto"):
        return torch.export.export(pictures, example, dynamic_shapes=(batch, batch if seeds else None, batch))


def export(
    model: IMPure, path: str | Path, height: int, width: int, *, format: str = "program", decomposed: bool = False
) -> None:
    """Write the purifier of height x width pictures to ``path``.

    format: "program" (``torch.export.load``), "aoti" (``torch._inductor.aoti_load_package``; compiled for this
    processor, and for contiguous images alone: it reads others wrongly, without a word) or "onnx" (always
    decomposed).  Raises InputError, or MissingExtraError without onnx and onnxscript.
    """
    if format not in FORMATS or Path(path).suffix != FORMATS[format]:
        wanted = ", ".join(f"{name} ({suffix})" for name, suffix in FORMATS.items())
        raise InputError(f"format={format!r}, file {path}: wanted one of {wanted}.")
    onnx = format == "onnx"
    program = export_program(model, height, width, decomposed=decomposed or onnx, seeds=onnx)
    if format == "program":
        write_atomically(path, lambda name: torch.export.save(program, name))
    elif format == "aoti":
        compile: Any = torch._inductor.aoti_compile_and_package
        write_atomically(path, lambda name: compile(program, package_path=name))
    else:
        write_atomically(path, lambda name: _to_onnx(program).save(name))


def export_triton(model: IMPure, folder: str | Path, height: int, width: int) -> None:
    """Write a model of NVIDIA Triton Inference Server: ``folder/config.pbtxt`` and ``folder/1/model.onnx``.

    folder: the model's, inside a model repository; its name is the model's name.  Raises as ``export``.
    """
    export(model, Path(folder, "1", "model.onnx"), height, width, format="onnx")
    config = TRITON_CONFIG.format(height=height, width=width)
    write_text(Path(folder, "config.pbtxt"), config)


def _to_onnx(program: torch.export.ExportedProgram) -> Any:
    with needs_extra('The format "onnx"', "onnx"):
        import onnx  # noqa: F401 (torch's exporter needs both)
        from onnxscript import opset18 as op

    def stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # TopK breaks ties by the lower index, which is what stable means.
        size: Any = op.Shape(x, start=dim, end=dim + 1)
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    table: dict[Any, Any] = {torch.ops.aten.sort.stable: stable_sort}
    return torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        output_names=["purified"],
        custom_translation_table=table,
        optimize=True,
        verbose=False,
    )
