"""Purification training: clean targets, adversarial or noisy inputs, pixel + guided feature loss.

Every batch and every draw is a function of (seed, step), so a run that was cut goes on exactly where
its last checkpoint stood.  Under torchrun or ``accelerate launch`` each process takes an equal share of every batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..checkpoints import load_state, read_safetensors, save_safetensors
from ..classifiers import Normalised
from ..config import IMPureConfig
from ..draws import Draws, MixDraws
from ..errors import CheckpointError, ConfigError, Error, needs_extra
from ..images import write_atomically, write_text
from ..memory import kept_by
from ..model import IMPure
from ..philox import ATTACK, uniform
from .config import FROZEN, TrainConfig
from .data import Batches, PackedImages, Pairs, adversarial_pairs, stored_pairs
from .guide import Guide
from .losses import guided_loss, lpips_network, pixel_loss

if TYPE_CHECKING:
    from accelerate import Accelerator

MAY_CHANGE = ("memory", "tensorboard", "workers")  # in a run that goes on: they change no result

Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass
class Networks:
    """The purifier, and the frozen networks by which it is judged and attacked; None where the config has no use."""

    model: IMPure
    guide: Guide | None
    lpips: nn.Module | None
    attacked: nn.Module | None

    @classmethod
    def make(
        cls, config: TrainConfig, classifier: nn.Module, device: str = "cpu", guide: nn.Module | None = None
    ) -> Networks:
        """The purifier as the run begins with it; ``classifier`` is attacked, and is the guide where none is given."""
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = IMPure(config.model_config)
        if config.init is not None:
            load_state(model, read_safetensors(config.init)[1], config.init)
        model.kept = kept_by(config.memory)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN.get(config.freeze, ())))
        model, classifier = model.to(device).train(), classifier.to(device)
        seen = (guide or classifier).to(device)
        nodes = [f"network.{node}" if isinstance(seen, Normalised) else node for node in config.guide_nodes]
        lpips = lpips_network(config.lpips_trunk).to(device) if config.lpips else None
        judge = Guide(seen, nodes, config.at(0).crop) if nodes else None
        return cls(model, judge, lpips, classifier if config.attack_steps else None)

    def judges(self) -> dict[str, nn.Module]:
        """{"guide": module, "lpips": module}, those that there are."""
        found = {"guide": self.guide.network if self.guide else None, "lpips": self.lpips}
        return {name: module for name, module in found.items() if module is not None}


class Objective(nn.Module):
    """All that is trained, with its loss as the forward pass: what DDP and FSDP wrap.

    The frozen networks are no part of its state.
    """

    _no_split_modules = ("Block",)  # accelerate shards these one by one
    log_scales: nn.Parameter | None

    def __init__(self, networks: Networks, config: TrainConfig) -> None:
        super().__init__()
        self.networks, self.model = networks, networks.model
        terms = 1 + len(config.guide_nodes) + (config.lpips > 0)
        scales = nn.Parameter(networks.model.cls_token.new_zeros(terms)) if config.learned_weights else None
        self.register_parameter("log_scales", scales)

    def forward(self, config: TrainConfig, *batch: Any) -> dict[str, Tensor]:
        """{"loss": to be minimised, and detached: every term, and its learned weight if there is one}.

        batch: as ``step_losses`` takes it.
        """
        terms = step_losses(self.networks, config, *batch)
        values = torch.stack(list(terms.values()))
        figures = {name: value.detach() for name, value in terms.items()}
        if self.log_scales is not None:
            weights = (-self.log_scales).exp()
            figures |= {f"{name}_weight": weight for name, weight in zip(terms, weights.detach(), strict=True)}
            values = values * weights + self.log_scales
        return {"loss": values.sum(), **figures}

    def purify(self, images: Tensor, **options: Any) -> Tensor:
        """``IMPure.purify``; FSDP gathers the weights for it as for the forward pass."""
        return self.model.purify(images, **options)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then ``cycles`` times cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = config.cycles * (step - config.warmup) / max(1, config.steps - config.warmup)
    done -= min(int(done), config.cycles - 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with decay on tensors of more than one axis and none on the others (SPEC section 6)."""
    with needs_extra("Training", "train"):
        from timm.optim import param_groups_weight_decay
    kind: Any = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        with needs_extra("optimizer='adamw8bit'", "train"):
            from torchao.optim import AdamW8bit
        kind = AdamW8bit
    return kind(param_groups_weight_decay(model, config.weight_decay)[::-1], lr=config.lr, betas=(0.9, 0.95))


def to_tiles(pictures: Tensor, tile: int) -> Tensor:
    """[N, 3, n*t, m*t] -> [N*n*m, 3, t, t]."""
    return F.unfold(pictures, tile, stride=tile).transpose(1, 2).reshape(-1, 3, tile, tile)


def from_tiles(tiles: Tensor, pictures: int, side: int) -> Tensor:
    """The inverse of ``to_tiles`` for square pictures."""
    columns = tiles.reshape(pictures, -1, 3 * tiles.shape[-1] ** 2).transpose(1, 2)
    return F.fold(columns, side, tiles.shape[-1], stride=tiles.shape[-1])


def draw(
    config: TrainConfig, network: IMPureConfig, places: Sequence[int], step: int, device: torch.device | str = "cpu"
) -> tuple[Draws, list[MixDraws] | None]:
    """The randomness of the pictures at these places of a batch."""
    n, seed, count = len(places), config.seed << 32 | step, (config.crop // config.tile) ** 2
    shape = (n * count, 3, config.tile, config.tile)
    own = torch.tensor(places)
    streams = (own[:, None] * count + torch.arange(count)).flatten()
    draws = Draws.sample(network, shape, seed, streams, training=True, device=device)
    if not config.mix_chunks:
        return draws, None
    tokens = (config.crop // network.patch_size) ** 2
    return draws, [MixDraws.sample(tokens, n, seed, own, config.mix_chunks, device=device)]


def step_losses(
    networks: Networks,
    config: TrainConfig,
    images: Tensor,
    clean: Tensor,
    draws: Draws,
    mixing: list[MixDraws] | None,
) -> dict[str, Tensor]:
    """Loss terms of pictures.  images, clean: [n, 3, crop, crop] in [0, 1]; draws, mixing: from ``draw``."""
    model = networks.model
    tiles = to_tiles(images, config.tile)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        prediction, _ = model.reconstruct(tiles, draws)
    prediction = from_tiles(prediction.float(), len(images), config.crop)
    terms = {"pix": config.pixel_weight * pixel_loss(model, prediction, images, clean)}
    if networks.guide is not None:
        terms |= guided_loss(model, prediction, images, clean, [networks.guide], [config.guide_weights], mixing)
    if networks.lpips is not None:
        distance = networks.lpips(model.unnormalise(prediction), clean, normalize=True)  # [n, 1, 1, 1]
        terms["lpips_loss"] = config.lpips * distance.mean()
    return terms


def attack(
    objective: Objective, config: TrainConfig, images: Tensor, clean: Tensor, step: int, places: Sequence[int]
) -> Tensor:
    """PGD on pictures through purifier and classifier, away from the classifier's decision on the clean ones.

    SPEC section 6, ``adv_train``: a start anywhere in the ball, fresh draws at every gradient.  Own code, because what
    happens to a picture must not depend on those beside it.
    """
    classifier = objective.networks.attacked
    assert classifier is not None
    with torch.no_grad():
        labels = classifier(clean).argmax(dim=1)
    eps, key = config.attack_eps, config.seed << 32 | step
    streams = torch.tensor(places, device=images.device)
    start = uniform(key, streams, ATTACK, images[0].numel()).view_as(images)
    attacked = images + eps * (2 * start - 1)
    for t in range(config.attack_steps):
        attacked = attacked.detach().requires_grad_()
        seed = key + (1 + t << 44)  # none of the step's own draws
        purified = objective.purify(attacked, seed=seed, streams=streams, clamp=False, check=False)
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(purified), labels, reduction="sum"), attacked)
        attacked = attacked.detach() + config.attack_step_size * gradient.sign()
        attacked = torch.clamp(attacked, images - eps, images + eps).clamp(0, 1)
    return attacked


def gradients(
    objective: Objective,
    config: TrainConfig,
    batch: tuple[Tensor, Tensor],
    step: int,
    first: int = 0,
    wrapped: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Add the gradients of a batch, or of the share that begins with picture ``first``; returns its mean figures.

    batch: inputs and clean pictures, [n, 3, crop, crop] each; wrapped: ``objective`` as accelerate prepared it.
    """
    sums: dict[str, Tensor] = {}
    size = len(batch[0]) // config.accumulate
    for part in range(config.accumulate):
        images, clean = (x[part * size : (part + 1) * size] for x in batch)
        places = list(range(first + part * size, first + (part + 1) * size))
        if objective.networks.attacked is not None:
            images = torch.cat((images, attack(objective, config, images, clean, step, places)))
            clean = torch.cat((clean, clean))
            places += [config.batch + place for place in places]
        draws = draw(config, objective.model.config, places, step, images.device)
        last = part + 1 == config.accumulate
        # DDP averages once a step; FSDP each time, and holds shards of gradients alone.
        with contextlib.nullcontext() if last else getattr(wrapped, "no_sync", contextlib.nullcontext)():
            figures = (wrapped or objective)(config, images, clean, *draws)
            (figures["loss"] / config.accumulate).backward()
        for name, value in figures.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.accumulate
    return sums


def _outlive(worker: int) -> None:
    """A loader's process leaves SIGTERM to the training process: a group that is ended gets it everywhere."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Stop:
    """Turns SIGTERM and SIGINT into a flag, so that the loop can save and leave."""

    def __enter__(self) -> _Stop:
        self.wanted = False
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, *_: Any) -> None:
        self.wanted = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def train(
    config: TrainConfig,
    data: str | Path,
    output: str | Path,
    classifier: nn.Module,
    progress: Progress = lambda phase, done, total, figures: None,
    device: str = "cpu",
    guide: nn.Module | None = None,
) -> bool:
    """Train, or go on with the run in ``output``; returns whether it reached its last step.

    data: packed npz, or a folder of pairs (``data.stored_pairs``).
    classifier, guide: networks from images in [0, 1], as the config names them; no guide: the classifier.
    progress(phase, done, total, figures) is called with the phases "pairs" and "train".
    Writes output/: config.json, pairs/, checkpoint.pt, log.jsonl, model.safetensors, curves.png.
    Raises Error where the loss or its gradient is not finite or ``output`` holds a run of another config.
    """
    output = Path(output)
    accelerator = _accelerator(device)
    rank, world = accelerator.process_index, accelerator.num_processes
    device = device if world == 1 else str(accelerator.device)
    if odd := [n for n in config.batches if n % (world * config.accumulate)]:
        raise ConfigError(f"batch={odd[0]}: must be a multiple of {world} processes x accumulate={config.accumulate}.")
    if accelerator.is_fsdp2 and config.optimizer == "adamw8bit":
        raise ConfigError("optimizer='adamw8bit': FSDP shards moments already; use adamw with it, or DDP.")
    if config.freeze and config.init is None:
        raise ConfigError(f"freeze={config.freeze!r}: needs init, a file of the weights that are to stay.")
    pairs = _prepare(config, data, output, classifier, progress, accelerator, device)
    objective = Objective(Networks.make(config, classifier, device, guide), config)
    wrapped, optimizer = accelerator.prepare(objective, make_optimizer(objective, config))
    register_fsdp_forward_method(objective, "purify")  # which does nothing to other modules
    start, average = _restore(output / "checkpoint.pt", objective, optimizer)
    log = _Log(output, start, config.tensorboard) if rank == 0 else None
    options: dict[str, Any] = dict(sampler=range(start, config.steps), batch_size=None, generator=torch.Generator())
    options |= dict(num_workers=config.workers, multiprocessing_context="fork" if config.workers else None)
    options |= dict(worker_init_fn=_outlive)
    loader = DataLoader(Batches(pairs, config, rank, world), pin_memory=device.startswith("cuda"), **options)
    with _Stop() as stop:
        loaded = iter(loader)  # here, so that Ctrl-C does not end its workers
        for step in range(start, config.steps):
            began, rate, now = time.perf_counter(), learning_rate(config, step), config.at(step)
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate
            keys, dirty, clean = next(loaded)
            optimizer.zero_grad()
            batch = dirty.to(device, non_blocking=True), clean.to(device, non_blocking=True)
            terms = gradients(objective, now, batch, step, rank * len(dirty), wrapped)
            terms["stopping"] = terms["loss"].new_tensor(float(stop.wanted))
            means = accelerator.reduce(torch.stack(list(terms.values())), "mean").tolist()
            figures = dict(zip(terms, means, strict=True))
            stopping = figures.pop("stopping") > 0
            norm = accelerator.clip_grad_norm_(objective.parameters(), config.clip or math.inf)
            figures["grad_norm"] = _whole(norm).item()
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(figures[name])]:
                raise Error(f"The {bad[0]} is {figures[bad[0]]} at step {step}, pairs {keys}: {figures}.")
            optimizer.step()
            if config.ema:
                weights = {name: p.detach() for name, p in objective.model.named_parameters()}
                if average:
                    get_ema_multi_avg_fn(config.ema)(list(average.values()), list(weights.values()), 0)
                else:
                    average = {name: p.clone() for name, p in weights.items()}
            figures |= {"lr": rate, "pictures_per_second": now.batch / (time.perf_counter() - began)}
            if log is not None:
                log.write(step, figures)
                progress("train", step + 1, config.steps, figures)
            if stopping or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                _save(output, step + 1, objective, optimizer, average, rank)
            if stopping:
                return False
    return True


def _accelerator(device: str) -> Accelerator:
    """This process among those that torchrun or ``accelerate launch`` started, if they did."""
    with needs_extra("Training", "train"):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    handlers = [
        # Unused parameters (mask_token) keep DDP from making its buckets anew after the first step: a run that goes
        # on adds up in the same order as one that was never cut.
        DistributedDataParallelKwargs(
            find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
        ),
        InitProcessGroupKwargs(timeout=timedelta(days=1)),  # the others wait while the first makes the pairs
    ]
    # The run's config alone says how the loss is computed, whatever the launcher's settings.
    options: dict[str, Any] = dict(mixed_precision="no", device_placement=False, kwargs_handlers=handlers)
    accelerator = Accelerator(cpu=device == "cpu", **options)
    kind = accelerator.distributed_type.value
    if not (accelerator.is_fsdp2 or kind in ("NO", "MULTI_CPU", "MULTI_GPU")):
        raise ConfigError(f"accelerate is configured for {kind}: choose one process, DDP or FSDP with fsdp_version 2.")
    return accelerator


def _prepare(
    config: TrainConfig,
    data: str | Path,
    output: Path,
    classifier: nn.Module,
    progress: Progress,
    accelerator: Accelerator,
    device: str,
) -> Pairs:
    """Check and write ``output``'s config, and make its pairs: the first process does, the others open them."""
    output.mkdir(parents=True, exist_ok=True)
    stored = output / "config.json"
    free = {name: getattr(config, name) for name in MAY_CHANGE}
    if stored.exists() and TrainConfig.from_file(stored, **free) != config:
        raise ConfigError(f"{output} holds a run of another config; choose another folder or repeat its options.")
    options: dict[str, Any] = dict(count=config.pairs, side=config.view, seed=config.seed)
    options["progress"] = lambda done, total: progress("pairs", done, total, {})
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            write_text(stored, json.dumps(asdict(config), indent=2) + "\n")
        if Path(data).is_dir():
            return stored_pairs(output / "pairs", data, **options)
        images = PackedImages(data)
        if len(images) <= config.held_out:
            raise ConfigError(f"held_out={config.held_out}: {data} has only {len(images)} pictures.")
        images.labels = images.labels[: len(images) - config.held_out]
        if not config.adversarial:
            options["eps"] = (0.0, 0.0)
        options["batch"] = 10 * max(1, 224 // config.view)
        return adversarial_pairs(output / "pairs", images, classifier.to(device), device=device, **options)


def _whole(x: Any) -> Any:
    """A tensor on the CPU, gathered where it is sharded; every process must ask."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()


def _placed(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of ``like``, and sharded as it is."""
    x = x.to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


def _save(
    output: Path,
    step: int,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    rank: int,
) -> None:
    from accelerate.utils import recursively_apply

    scales = {} if objective.log_scales is None else {"log_scales": objective.log_scales}
    state = {"model": objective.model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, **scales}
    state = recursively_apply(_whole, state)
    if rank == 0:
        weights = state["model"] | state["average"]
        save_safetensors(output / "model.safetensors", weights, objective.model.config, torch.float16)
        # Last: who finds the final step here may count on the weights.
        write_atomically(output / "checkpoint.pt", lambda path: torch.save({"step": step, **state}, path))
        plot_curves(output / "log.jsonl", output / "curves.png")


def _restore(path: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Tensor]]:
    """(the next step, the running average) of a checkpoint, whose other content goes where it belongs."""
    if not path.exists():
        return 0, {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = dict(objective.model.named_parameters())
        placed = [{n: _placed(x, own[n]) for n, x in state.get(part, {}).items()} for part in ("model", "average")]
        objective.model.load_state_dict(placed[0])
        if objective.log_scales is not None:
            objective.log_scales.data.copy_(_placed(state["log_scales"], objective.log_scales))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = state["optimizer"]["state"]
        for i, values in moments.items():
            shape = parameters[i].shape
            moments[i] = {n: _placed(x, parameters[i]) if x.shape == shape else x for n, x in values.items()}
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(f"{path} cannot be resumed from: {error}. Remove it to start over.") from error
    return int(state["step"]), placed[1]


class _Log:
    """One JSON line a step, and tensorboard/ if wished; what is there of ``start`` on comes from a cut run and goes."""

    def __init__(self, output: Path, start: int, tensorboard: bool) -> None:
        path, self._board = output / "log.jsonl", None
        if tensorboard:
            with needs_extra("tensorboard=True", "train"):
                from torch.utils.tensorboard import SummaryWriter
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=start)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, step: int, figures: dict[str, float]) -> None:
        rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()


def plot_curves(log: str | Path, picture: str | Path) -> None:
    """Every term of log.jsonl over the steps, smoothed, as a picture.  Does nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    if not rows:
        return
    names = [n for n in rows[-1] if n == "pix" or n.endswith("_loss") or n in ("loss", "lr")]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        smooth, xs, ys = None, [], []
        for row in rows:
            smooth = row[name] if smooth is None or name == "lr" else 0.98 * smooth + 0.02 * row[name]
            xs.append(row["step"])
            ys.append(smooth)
        axis.plot(xs, ys)
        axis.set(title=name, xlabel="step")
    write_atomically(picture, lambda path: figure.savefig(path, dpi=100, format="png"))
