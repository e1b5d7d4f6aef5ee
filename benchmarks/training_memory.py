"""What each memory policy keeps for backward, and what a training step then costs, against the reference path.

    python -m benchmarks.training_memory --json benchmarks/results/training-memory-cpu.json
    python -m benchmarks.training_memory --device cuda --batch 32 --json training-memory-cuda.json

Bytes are those autograd keeps between forward and backward with the pixel loss, weights left out, counted on fake
tensors.  Every row's gradients are first compared with the reference path's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from impure_fast import Draws, IMPure, backend, create_model
from impure_fast.errors import Error
from impure_fast.images import write_text
from impure_fast.memory import POLICIES
from impure_fast.training.losses import pixel_loss
from impure_fast.training.plan import count_kept

from .runner import available, board, machine, positive

attention = import_module("impure_fast.ops.reconstruction_attention")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "autocast": torch.float32}
# Of the whole gradient's norm; bf16 rounds every product.
PARITY = {"bfloat16": 5e-2, "float32": 1e-4, "autocast": 5e-2}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, chunks: int) -> tuple[Tensor, None]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))  # the reference path never takes the shared form
    return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2), None


@contextlib.contextmanager
def reference(sdpa: bool) -> Iterator[None]:
    """The reference path; sdpa: also where it takes plain products of its own accord (bf16 on a CPU)."""
    spec = replace(attention.SPEC, reference=_sdpa) if sdpa else attention.SPEC
    with mock.patch.object(attention, "SPEC", spec), backend("reference"):
        yield


PROVIDERS: dict[str, tuple[str, Callable[[], contextlib.AbstractContextManager[None]]]] = {
    "reference, SDPA": ("all", lambda: reference(sdpa=True)),
    "reference": ("all", lambda: reference(sdpa=False)),
    **{policy: (policy, lambda: backend("auto")) for policy in POLICIES},
}


@dataclass
class Case:
    """One network and batch; ``loss(provider)`` runs a forward pass."""

    model: IMPure
    images: Tensor
    draws: Draws
    dtype: str

    @classmethod
    def make(cls, model: str, batch: int, dtype: str, device: str) -> Case:
        torch.manual_seed(0)
        network = create_model(model).to(device, DTYPES[dtype]).train()
        side = min(network.config.tile_size, network.config.image_size)
        images = torch.rand(batch, 3, side, side).to(device, DTYPES[dtype])
        draws = Draws.sample(network.config, images.shape, 0, training=True, device=device)
        return cls(network, images, draws, dtype)

    def loss(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == "autocast"):
            prediction, _ = self.model.reconstruct(images, self.draws)
        return pixel_loss(self.model, prediction, images)

    def kept(self) -> int:
        weights = [*self.model.parameters(), *self.model.buffers()]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            images = torch.empty(self.images.shape, dtype=self.images.dtype, device=self.images.device)
            with count_kept({}, [*weights, *map(mode.from_tensor, weights), images]) as counted:
                self.loss(images)
        return sum(counted.values())

    def step(self) -> float:
        """Seconds of forward and backward: of the processor on a CPU, of the clock on a GPU."""
        self.model.zero_grad(set_to_none=True)
        gpu = self.images.is_cuda
        clock = time.perf_counter if gpu else time.process_time
        began = clock()
        self.loss(self.images).backward()
        if gpu:
            torch.cuda.synchronize()
        return clock() - began

    def gradients(self) -> Tensor:
        self.step()
        return torch.cat([p.grad.float().flatten() for p in self.model.parameters() if p.grad is not None])


def measure(case: Case, rounds: int, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """One row a provider; rounds: interleaved steps to time, 0 for bytes alone.  keep: given the rows as they grow.

    A provider whose gradients are wrong has ``why_not`` and no time.
    """
    rows, times, wanted = [], {name: [] for name in PROVIDERS}, None
    for name, (policy, context) in PROVIDERS.items():
        case.model.kept = POLICIES[policy]
        row: dict[str, Any] = {"provider": name, "kept_bytes": 0}
        with context():
            row["kept_bytes"] = case.kept()
            row["kept_ratio"] = round(row["kept_bytes"] / (rows[0] if rows else row)["kept_bytes"], 4)
            if rounds:
                gradients = case.gradients().cpu()  # not beside the step whose memory is counted
                wanted = gradients if wanted is None else wanted
                row["gradient_error"] = float((gradients - wanted).norm() / wanted.norm())
                if not row["gradient_error"] <= PARITY[case.dtype]:
                    row["why_not"] = "Its gradients differ, so it is not timed."
                elif case.images.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                    case.step()
                    row |= {"peak_allocated_bytes": torch.cuda.max_memory_allocated(), **board("cuda")}
        rows.append(row)
        keep(rows)
    right = [row["provider"] for row in rows if "why_not" not in row]
    for _ in range(rounds):
        for name in right:
            policy, context = PROVIDERS[name]
            case.model.kept = POLICIES[policy]
            with context():
                times[name].append(case.step())
    for row in rows if rounds else ():
        if row["provider"] not in right:
            continue
        pairs = zip(times[row["provider"]], times["reference"], strict=True)
        row["step_seconds"] = round(statistics.median(times[row["provider"]]), 4)
        row["step_ratio"] = round(statistics.median(own / base for own, base in pairs), 3)
        row["images_per_second"] = round(len(case.images) / row["step_seconds"], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="impure_base_patch16_224")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="autocast: fp32 weights, bf16 products")
    parser.add_argument("--device", type=available, default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="steps to time; 0 counts bytes alone")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = {"model": options.model, "batch": options.batch, "dtype": options.dtype, "loss": "pixel"}
    common |= {"rounds": options.rounds, "machine": machine(options.device)}
    try:
        case = Case.make(options.model, options.batch, options.dtype, options.device)
    except Error as error:
        parser.exit(2, f"{error}\n")

    def keep(rows: list[dict[str, Any]]) -> None:
        if options.json:
            dated = [{**common, **row, "date": time.strftime("%Y-%m-%d")} for row in rows]
            write_text(options.json, json.dumps(dated, indent=1) + "\n")

    rows = measure(case, options.rounds, keep)
    keep(rows)
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
