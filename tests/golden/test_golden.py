"""The network agrees with the authors' released code, checkpoint by checkpoint (SPEC section 9)."""

from pathlib import Path

import pytest
import torch

from .compare import compare
from .factory import GoldenModel, golden_model

FOLDER = Path(__file__).parent
RUNS = {
    "fp32": {"dtype": torch.float32},
    "fp64": {"dtype": torch.float64},
    "fp32-own-tables": {"dtype": torch.float32, "drop_tables": True},
}
# vector: comparisons it holds in fp32, so that a checkpoint cannot drop out unnoticed
VECTORS = {
    "p1": 21,  # released setting, evaluation, every checkpoint
    "p2": 21,  # the same in training: offsets, steps per image and chunk
    "p9a": 22,  # training mode, pixel loss, gradients
    "p10": 35,  # released widths at 224 pixels, from seeds
    "p11a": 16,  # guided loss with mixing, gradients
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("vector", VECTORS)
def test_network_agrees_with_the_released_code(vector, run):
    rows = compare(FOLDER / f"{vector}.npz", golden_model, **RUNS[run])
    assert [str(row) for row in rows if row.failed] == []
    assert len(rows) >= VECTORS[vector]


MISTAKES = {
    "restore-for-order": lambda given: {**given, "ids_shuffle": given["ids_shuffle"].argsort(dim=1)},
    "feature-noise-of-next-image": lambda given: {**given, "feat_noise": given["feat_noise"].roll(1, dims=1)},
    "image-step-one-too-far": lambda given: {**given, "img_t": given["img_t"] + 1},
    "rows-for-columns": lambda given: {**given, "pos_x": given["pos_y"], "pos_y": given["pos_x"]},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_comparison_catches_a_deliberate_mistake(mistake):
    class Mistaken(GoldenModel):
        def reconstruct(self, images, given):
            return super().reconstruct(images, MISTAKES[mistake](given))

    rows = compare(FOLDER / "p2.npz", Mistaken)
    assert any(row.failed and row.what == "purified" for row in rows)


def test_comparison_fails_on_missing_and_on_nan_outputs():
    class Empty(GoldenModel):
        def reconstruct(self, images, given):
            full = super().reconstruct(images, given)
            return {"purified": full["purified"] * float("nan")}

    failed = [row.what for row in compare(FOLDER / "p1.npz", Empty) if row.failed]
    assert failed == ["pred_raw (missing)", "purified"]
