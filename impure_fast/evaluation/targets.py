"""Classifiers to attack and pictures to attack them on, both by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..classifiers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LITE0_MEAN,
    LITE0_STD,
    LITE_SIZES,
    CifarResNet,
    Normalised,
    efficientnet_lite,
)
from ..errors import InputError, MissingExtraError, MissingFileError, needs_extra
from ..images import Labelled, PackedImages, Pixels, decode, find_images, read_image, read_shard, shards_of
from ..purify import to_float

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def digest(*parts: nn.Module | Tensor) -> str:
    """Sixteen hex digits over modules (form, parameters, all buffers) and tensors."""
    found = hashlib.sha256()
    for part in parts:
        tensors: dict[str, Tensor] = {"": part} if isinstance(part, Tensor) else {}
        if isinstance(part, nn.Module):
            found.update(str(part).encode())
            tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}  # normalisation is not stored
        for name, tensor in tensors.items():
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


@dataclass
class Target:
    """A classifier with its preprocessing.

    model: [N, 3, S, S] in [0, 1] -> logits, normalisation inside; eval mode, frozen.
    side: S; None takes pictures as they are.  resize: short side before the centre crop; None squashes to S x S.
    pad: side to which the purifier's input is padded with black, right and bottom, and cropped back; 0 for none.
    enlarge: side after the authors' pad-and-resize (SPEC 7); 0 pads a seventh of S each side and goes back to S.
    """

    name: str
    model: nn.Module
    side: int | None = None
    resize: int | None = None
    filter: Image.Resampling = BICUBIC
    pad: int = 0
    enlarge: int = 0
    device: str = "cpu"

    def to(self, device: str) -> Target:
        """Move the model; ``Defence.pipeline`` follows."""
        self.model.to(device)
        self.device = device
        return self

    def prepare(self, rgb: Pixels) -> Pixels:
        """[H, W, 3] -> [S, S, 3]; a picture that already has this size stays as it is."""
        s = self.side
        if s is None or rgb.shape[:2] == (s, s):
            return rgb
        image = Image.fromarray(rgb)
        if self.resize is None:
            return np.asarray(image.resize((s, s), self.filter))
        scale = self.resize / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), self.filter)
        left, top = (image.width - s) // 2, (image.height - s) // 2
        return np.asarray(image.crop((left, top, left + s, top + s)))

    def pad_and_resize(self, images: Tensor) -> Tensor:
        """The input transformation that the authors' evaluation puts before the classifier, bilinear, no antialias."""
        side = images.shape[-1]
        if self.enlarge:
            return F.interpolate(images, (self.enlarge, self.enlarge), mode="bilinear")
        return F.interpolate(F.pad(images, [side // 7] * 4), (side, side), mode="bilinear")


# The authors' three (SPEC 7): name, padded side, enlarged side; weights and preprocessing are the library's default.
AUTHORS = {
    "resnet101_v2": ("torchvision:resnet101", 0, 0),
    "inceptionv3_v1": ("torchvision:inception_v3", 320, 331),
    "inceptionresnetv2_v1": ("timm:inception_resnet_v2.tf_in1k", 320, 331),
}


def load_target(name: str, pretrained: bool = True) -> Target:
    """A classifier by name: "lite0" to "lite2" (packaged weights), "cifar_resnet20" and other depths (a file
    needed), one of AUTHORS, a timm or torchvision name ("timm:NAME" and "torchvision:NAME" where both have it), or an
    own module "package.module:factory", whose factory returns a module from images in [0, 1] to logits and may give
    it an attribute ``side``.  "NAME=FILE" loads a state dict (safetensors, or .pth read as data only) in place of a
    download.

    pretrained: False leaves random weights.  Raises InputError, MissingFileError or MissingExtraError.
    """
    name, _, file = name.partition("=")
    where, pad, enlarge = AUTHORS.get(name, (name, 0, 0))
    library, _, inner = where.rpartition(":")
    if lite := re.fullmatch("lite([012])", name):
        network = efficientnet_lite(int(lite[1]))
        target = Target(name, Normalised(network, LITE0_MEAN, LITE0_STD), LITE_SIZES[int(lite[1])])
    elif depth := re.fullmatch(r"cifar_resnet(\d+)", name):
        if pretrained and not file:
            raise MissingFileError(f"{name} comes without weights: name a file of them ({name}=FILE).")
        network = CifarResNet(int(depth[1]))
        target = Target(name, Normalised(network, IMAGENET_MEAN, IMAGENET_STD), 32)
    elif library not in ("", "timm", "torchvision"):
        target = _own(name)
    else:
        pretrained = pretrained and not file
        build = _timm if library == "timm" or (not library and _knows_timm(inner)) else _torchvision
        try:
            target = build(name, inner, pretrained)
        except (OSError, RuntimeError) as error:  # a download that fails
            raise MissingFileError(
                f"The weights of {name} cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]}); "
                f"give a file of them: {name}=FILE."
            ) from error
        target.pad, target.enlarge = pad, enlarge
    if file:
        _load_weights(target.model, Path(file))
    target.model.eval().requires_grad_(False)
    return target


def _own(name: str) -> Target:
    module, _, factory = name.rpartition(":")
    try:
        model = getattr(import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}: {error}; wanted package.module:factory that can be imported from here.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} gives a {type(model).__name__}; wanted a torch module from [0, 1] images to logits.")
    side = getattr(model, "side", None)
    return Target(name, model, side)


def _knows_timm(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)


def _timm(name: str, inner: str, pretrained: bool) -> Target:
    with needs_extra(name, "timm"):
        import timm
        from timm.data import resolve_model_data_config
    if not timm.is_model(inner):
        raise InputError(f"timm knows no model {inner!r}; timm.list_models() names them.")
    model = timm.create_model(inner, pretrained=pretrained)
    cfg = resolve_model_data_config(model)
    side = cfg["input_size"][-1]
    filter = BICUBIC if cfg["interpolation"] == "bicubic" else BILINEAR
    return Target(name, Normalised(model, cfg["mean"], cfg["std"]), side, int(side / cfg["crop_pct"]), filter)


def _torchvision(name: str, inner: str, pretrained: bool) -> Target:
    try:
        from torchvision.models import get_model, get_model_weights, list_models
    except ImportError as error:
        raise MissingExtraError(f"{name} needs torchvision: pip install torchvision.") from error
    if inner not in list_models():
        raise InputError(
            f"There is no classifier {name!r}: it is neither lite0 to lite2, nor one of {', '.join(AUTHORS)}, nor a "
            "name of timm or torchvision, nor package.module:factory."
        )
    chosen = get_model_weights(inner).DEFAULT
    # init_weights=False: torchvision's truncated normals for this one take half a minute.
    options: dict[str, Any] = {"init_weights": False} if inner == "inception_v3" and not pretrained else {}
    model = get_model(inner, weights=chosen if pretrained else None, **options)
    if hasattr(model, "transform_input"):
        model.transform_input = True  # what its weights were trained with; torchvision sets it only on a download
    t = chosen.transforms()
    filter = BICUBIC if t.interpolation.value == "bicubic" else BILINEAR
    return Target(name, Normalised(model, tuple(t.mean), tuple(t.std)), t.crop_size[0], t.resize_size[0], filter)


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; NAME=FILE wants a state dict.")
    network = model.network if isinstance(model, Normalised) else model
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # torch and safetensors raise many kinds for a foreign file
        raise InputError(f"{path} does not hold weights of this classifier: {str(error).splitlines()[0]}") from error


@dataclass
class Pictures:
    """uint8 [n, S, S, 3] as the classifier takes them, labels [n], names; adversarial: the same, from shards."""

    clean: Pixels
    labels: Tensor
    names: list[str]
    adversarial: Pixels | None = None

    @property
    def images(self) -> Tensor:
        """[n, 3, S, S] float32 in [0, 1]."""
        return to_float(self.clean)


def load_pictures(path: str | Path, prepare: Callable[[Pixels], Pixels], count: int) -> Pictures:
    """The first ``count`` of ``labelled`` as a classifier takes them; prepare: ``Target.prepare``."""
    found = labelled(path, count)
    clean = [prepare(picture.rgb()) for picture in found]
    adversarial = [picture.adversarial() for picture in found if picture.adversarial]
    if 0 < len(adversarial) < len(found):
        raise InputError(f"{path}: {len(found) - len(adversarial)} of {len(found)} pictures have no adv.png.")
    sizes = {picture.shape[:2] for picture in clean}
    if len(sizes) > 1:
        raise InputError(f"{path} holds pictures of several sizes, and this classifier does not say its own.")
    if wrong := {picture.shape[:2] for picture in adversarial} - sizes:
        raise InputError(f"{path}: adversarial pictures of {wrong.pop()} do not fit this classifier.")
    labels = torch.tensor([picture.label for picture in found])
    names = [picture.name for picture in found]
    return Pictures(np.stack(clean), labels, names, np.stack(adversarial) if adversarial else None)


def labelled(path: str | Path, count: int) -> list[Labelled]:
    """The first ``count`` labelled pictures of a packed npz, of a tar shard or a folder of them (KEY.adv.png,
    KEY.clean.jpg, KEY.cls), or of a folder with a sub-folder for each class, in an order that is always the same.

    Class folders have the labels of ``class_labels``.  A folder's pictures are shuffled with a fixed seed, so that a
    prefix is no single class.
    Raises MissingFileError or InputError.
    """
    path = Path(path)
    if path.suffix == ".npz":
        packed = PackedImages(path)
        which = [i for i in range(len(packed)) if packed.labels[i] >= 0][:count]
        found = [
            Labelled(str(i), int(packed.labels[i]), partial(packed.__getitem__, i), partial(packed.jpeg, i))
            for i in which
        ]
    elif shards := ([path] if path.suffix == ".tar" else shards_of(path)):
        found = list(islice(_from_shards(shards), count))
    else:
        found = _from_folder(path, count)
    if not found:
        raise InputError(f"{path} holds no labelled pictures.")
    return found


def _from_shards(shards: Sequence[Path]) -> Iterator[Labelled]:
    for shard in shards:
        for key, parts in read_shard(shard):
            clean = next((parts[name] for name in ("clean", "jpg", "jpeg", "png", "webp") if name in parts), None)
            if clean is None or not parts.get("cls", b"").strip().isdigit():
                raise InputError(
                    f"{shard}: {key} has {sorted(parts)}; wanted a picture (jpg, png, webp; or clean.jpg with adv.png) "
                    "and its class's number (cls)."
                )
            adversarial = partial(decode, parts["adv"]) if "adv" in parts else None
            yield Labelled(key, int(parts["cls"]), partial(decode, clean), partial(bytes, clean), adversarial)


def class_labels(folders: Iterable[str]) -> dict[str, int]:
    """{class folder: label}.  All numbers, or all ImageNet synsets (n01440764), name their class; else sorted order.

    Raises InputError for a synset that ImageNet-1k does not have.
    """
    names = sorted(folders)
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return {name: place for place, name in enumerate(names)}
    with needs_extra("A folder named by a synset", "timm"):
        from timm.data import ImageNetInfo
    synsets = ImageNetInfo().label_names()
    if unknown := sorted(set(names) - set(synsets)):
        raise InputError(f"ImageNet-1k has no class {', '.join(unknown)}: name all folders by its synsets, or none.")
    return {name: synsets.index(name) for name in names}


def _rgb(path: Path) -> Pixels:
    return read_image(path).rgb


def _from_folder(path: Path, count: int) -> list[Labelled]:
    if not path.is_dir():
        raise MissingFileError(f"{path} is no packed npz, no shard and no folder.")
    files = [(file, rel) for file, rel in find_images([path], recursive=True) if len(rel.parts) > 1]
    label = class_labels({relative.parts[0] for _, relative in files})
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:count]]
    return [Labelled(rel.as_posix(), label[rel.parts[0]], partial(_rgb, file), file.read_bytes) for file, rel in chosen]
