"""Matrix products of the engine, weights packed once: x W^T + b, then GELU or onto a residual.

On a CPU they run on oneDNN through torch (fp32, bf16, int8), elsewhere and where oneDNN is missing on torch's own
products.  int8: weights per output channel, activations per tensor; fp8 (e4m3): both per tensor.  The scales of
activations are fixed by calibration, so that an image's result never depends on its neighbours in the batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import normalise_rows


def onednn_missing() -> str:
    """Why torch's oneDNN products cannot be used here, or ""; they are private operators, so they are asked for."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without it"
    wanted = {"mkldnn": ("_linear_pointwise", "_reorder_linear_weight"), "onednn": ("qlinear_pointwise",)}
    names = [f"{space}::{name}" for space, ops in wanted.items() for name in ops]
    missing = [name for name in names if not hasattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1])]
    return f"this torch has no {', '.join(missing)}" if missing else ""


class Product(Protocol):
    """y = x W^T + b for x [..., in] -> [..., out].

    takes, scale, zero: the dtype of x that needs no conversion; of integers, what they stand for: (x - zero) * scale.
    """

    takes: torch.dtype
    scale: float
    zero: int

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, into: Any = None) -> Tensor:
        """gelu: apply the exact GELU; residual: [..., out], added; into: the product that alone reads the result."""
        ...


class Plain:
    """torch's own products, on any device."""

    scale, zero = 1.0, 0

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias, self.takes = weight, bias, weight.dtype

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, into: Any = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if gelu:
            return F.gelu(y)
        return y if residual is None else y.add_(residual)


class Observed(Plain):
    """A plain product that keeps the range of all it is given: calibration."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight, bias)
        self.low = self.high = 0.0

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        low, high = (float(v) for v in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        return super().__call__(x, **options)


class OneDnn:
    """oneDNN on a CPU, fp32 or bf16 as the weight is; GELU and residual inside the product."""

    scale, zero = 1.0, 0

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias, self.takes = bias, weight.dtype

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, into: Any = None) -> Tensor:
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu" if gelu else "none", [], "none")


class OneDnnInt8:
    """oneDNN on a CPU in 8-bit integers.  observed: what calibration saw of its input; dtype: of its output."""

    takes = torch.uint8

    def __init__(self, observed: Observed, dtype: torch.dtype) -> None:
        weight = observed.weight.float()
        self.scale = max(observed.high - observed.low, 1e-8) / 255
        self.zero = round(-observed.low / self.scale)
        # Without VNNI oneDNN sums pairs of products in 16 bits: half the range, so that none saturates.
        most = 127 if torch.cpu._is_vnni_supported() else 63
        self.weight_scale = weight.abs().amax(dim=1).clamp(min=1e-12) / most
        whole = (weight / self.weight_scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(whole, None)
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int64)
        self.bias, self.dtype = observed.bias.float(), dtype

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, into: Any = None) -> Tensor:
        if x.dtype != torch.uint8:
            x = normalise_rows(x, scale=self.scale, zero=self.zero, dtype=torch.uint8)
        given = (x.contiguous(), self.scale, self.zero, self.weight, self.weight_scale, self.weight_zero)
        if residual is not None:
            residual = residual.contiguous()  # strides would be overlooked
            return torch.ops.onednn.qlinear_pointwise.binary(
                *given, residual, self.bias, 1.0, 0, self.dtype, 1.0, 0, "add", 1.0, "none", [], ""
            )
        scale, zero, dtype = (1.0, 0, self.dtype) if into is None else (into.scale, into.zero, torch.uint8)
        name, form = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.onednn.qlinear_pointwise(*given, self.bias, scale, zero, dtype, name, [], form)


class Fp8:
    """torch's product of 8-bit floats (e4m3) on a GPU, summed in fp32, its result in bf16; widths in sixteens.

    observed: what calibration saw of its input; larger values saturate.
    """

    takes, scale, zero = torch.bfloat16, 1.0, 0

    def __init__(self, observed: Observed) -> None:
        weight = observed.weight.float()
        most = torch.finfo(torch.float8_e4m3fn).max
        self.input_scale = weight.new_tensor(max(-observed.low, observed.high, 1e-8) / most)
        self.weight_scale = weight.abs().amax().clamp(min=1e-12) / most
        self.weight = (weight / self.weight_scale).to(torch.float8_e4m3fn).t()  # [in, out], columns whole
        self.bias, self.most = observed.bias.to(torch.bfloat16), most

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, into: Any = None) -> Tensor:
        rows = (x.flatten(0, -2) / self.input_scale).clamp(-self.most, self.most).to(torch.float8_e4m3fn)
        scales = self.input_scale, self.weight_scale
        options: dict[str, Any] = dict(bias=self.bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        y = torch._scaled_mm(rows, self.weight, *scales, **options).unflatten(0, x.shape[:-1])
        if gelu:
            return F.gelu(y)
        return y if residual is None else y.add_(residual)
