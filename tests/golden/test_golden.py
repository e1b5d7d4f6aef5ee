"""The network agrees with the authors' released code, checkpoint by checkpoint (SPEC section 9)."""

from pathlib import Path

import pytest
import torch

from impure_fast import backend, can_run, last_backends
from impure_fast.memory import kept_by
from impure_fast.ops import _dispatch
from impure_fast.ops._lib import OPERATORS

from ..ops.common import device_of
from .compare import compare
from .factory import GoldenModel, golden_model

FOLDER = Path(__file__).parent
RUNS = {
    "fp32": {"dtype": torch.float32},
    "fp64": {"dtype": torch.float64},
    "fp32-own-tables": {"dtype": torch.float32, "drop_tables": True},
}
# vector: comparisons that the reference and the operators' path hold in fp32, so that none drops out unnoticed
VECTORS = {
    "p1": (21, 8),  # released setting, evaluation, every checkpoint
    "p2": (21, 8),  # the same in training: offsets, steps per image and chunk
    "p9a": (22, 21),  # training mode, pixel loss, gradients
    "p10": (35, 9),  # released widths at 224 pixels, from seeds
    "p11a": (16, 16),  # guided loss with mixing, gradients
}
NETWORK = {"patch_assemble", "patch_mask", "reconstruction_attention"}  # operators of every pass


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("vector", VECTORS)
def test_reference_agrees_with_the_released_code(vector, run):
    with backend("reference"):
        rows = compare(FOLDER / f"{vector}.npz", golden_model, **RUNS[run])
    assert [str(row) for row in rows if row.failed] == []
    assert len(rows) >= VECTORS[vector][0]


# Triton has no fp64, and its interpreter takes minutes for the 224 pixels of p10.
WISHES = [
    (vector, run, wish)
    for vector in VECTORS
    for run in ("fp32", "fp64")
    for wish in ("auto", "cpp", "triton", "cuda")
    if wish not in ("triton", "cuda") or (run == "fp32" and (wish, vector) != ("triton", "p10"))
]


@pytest.mark.parametrize(("vector", "run", "wish"), WISHES)
def test_operators_agree_with_the_released_code(vector, run, wish, monkeypatch):
    if reasons := can_run("reconstruction_attention", wish):
        pytest.skip(" ".join(reasons))
    monkeypatch.setattr(_dispatch, "_last", {})
    with backend(wish):
        rows = compare(FOLDER / f"{vector}.npz", golden_model, **RUNS[run], device=device_of(wish))
    assert [str(row) for row in rows if row.failed] == []
    assert len(rows) >= VECTORS[vector][1]
    ran = last_backends()
    assert ran.keys() >= NETWORK
    assert all(ran[name] == wish for name in ran if wish in OPERATORS[name].backends)


@pytest.mark.parametrize("policy", ["default", "tight", "minimal"])
@pytest.mark.parametrize("vector", ["p9a", "p11a"])
def test_gradients_agree_whatever_is_kept_for_them(vector, policy):
    def thrifty(config, state):
        golden = golden_model(config, state)
        golden.model.kept = kept_by(policy)
        return golden

    rows = compare(FOLDER / f"{vector}.npz", thrifty)
    assert [str(row) for row in rows if row.failed] == []
    assert len(rows) >= VECTORS[vector][1]


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
