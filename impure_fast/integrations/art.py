"""The purifier as a preprocessor of the Adversarial Robustness Toolbox.

    defence = ARTPurifier(imp.load("impure_tiny"))
    PyTorchClassifier(network, loss, shape, classes, clip_values=(0, 1), preprocessing=(mean, std),
                      preprocessing_defences=defence)

ART normalises after the defence, so mean and std belong in ``preprocessing`` and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputTypeError, needs_extra
from ..purify import PurifiedClassifier

with needs_extra("The ART adapter", "art"):
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch


class ARTPurifier(PreprocessorPyTorch):
    """Purification in [0, 1] units, differentiable: ART's attacks see the exact gradient, not an estimate.

    mode, seed, clamp, image_step, feature_step (options): as in ``PurifiedClassifier``.
    device_type: "cpu" or "gpu", as ART has it; the purifier is moved there.

    ART hands ``predict`` the whole array at once; the purifier batches it itself, by image, so that the split changes
    nothing.  Raises InputTypeError for images that are no floats, which ART would let pass.
    """

    params = ["mode", "seed"]

    def __init__(
        self,
        purifier: nn.Module,
        *,
        mode: str = "random",
        seed: int | None = None,
        device_type: str = "gpu",
        apply_fit: bool = False,
        apply_predict: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(device_type=device_type, is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.mode, self.seed = mode, seed
        purifier = purifier.to(self.device).eval()
        unit: dict[str, Any] = dict(mean=(0, 0, 0), std=(1, 1, 1))
        self.pipeline = PurifiedClassifier(nn.Identity(), purifier, mode=mode, seed=seed, **unit, **options)

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """x: [N, 3, H, W] float in [0, 1] -> (purified, y)."""
        if not x.is_floating_point():
            raise InputTypeError(f"images have dtype {x.dtype}; give ART float32 arrays in [0, 1].")
        # numpy's doubles would meet the purifier's own type inside; the result goes back as it came.
        return self.pipeline.purify(x.to(torch.float32)).to(x.dtype), y
