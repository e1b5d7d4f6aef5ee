"""How far an operator may be from the truth, derived from the noise floor of the reference in the same dtype.

max |got - truth| <= factor * max |reference - truth| + floor * max |truth|       (truth in fp64)
"""

import torch

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
FACTOR = 2.0
# Units of the dtype's eps, for where the reference happens to be exact.
FLOOR = {
    "normalise_rows": 4.0,
    "noise": 0.0,
    "order": 0.0,
    "patch_mask": 2.0,
    "patch_mix": 0.0,
    "patch_assemble": 2.0,
    "reconstruction_attention": 4.0,
}


def allowed(operator, dtype, reference, truth):
    """Largest absolute error allowed.  reference: the reference's own result in ``dtype``."""
    own = float((reference.double() - truth).abs().max()) if truth.numel() else 0.0
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    if truth.numel() and scale < 1e-12:  # zero but for the rounding of fp64, which differs by processor
        scale = 1.0
    if dtype == torch.float64:
        scale *= 16  # the truth is the reference itself, and has as many rounding errors
    return FACTOR * own + FLOOR[operator] * EPS[dtype] * scale


def assert_near(operator, got, reference, truth):
    """Fail unless ``got`` has the reference's shape and dtype, is finite, and is near the truth."""
    assert (got.shape, got.dtype) == (reference.shape, reference.dtype)
    error = float((got.double() - truth).abs().max()) if got.numel() else 0.0
    assert error <= (limit := allowed(operator, got.dtype, reference, truth)), f"error {error:.3g}, allowed {limit:.3g}"
