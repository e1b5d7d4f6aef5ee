"""Small networks shared by the tests; no test needs a network, a GPU or shipped weights."""

import contextlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that asks the hub fails at once

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: Triton's kernels then run on the CPU

from impure_fast import IMPure, IMPureConfig, zoo
from impure_fast.checkpoints import save_safetensors

torch.backends.cudnn.allow_tf32 = False  # fp32 is compared as fp32

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, a hundredfold on a busy machine

SMALL = IMPureConfig(
    image_size=24,
    patch_size=4,
    embed_dim=32,
    depth=2,
    num_heads=4,
    decoder_embed_dim=24,
    decoder_depth=2,
    decoder_num_heads=3,
    out_indices=(0,),
    tile_size=24,
    tile_stride=16,
)


def small_config(**overrides):
    """SMALL with other fields."""
    return IMPureConfig.from_dict({**SMALL.to_dict(), **overrides})


def small_model(seed=0, **overrides):
    """A network of SMALL in which every weight is random, biases, norms and tokens too; eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = IMPure(small_config(**overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def random_images(*shape, seed=0, dtype=torch.float32):
    """Uniform noise in [0, 1] of any shape; uint8 in 0..255."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    return torch.rand(shape, generator=generator).to(dtype)


@contextlib.contextmanager
def global_generator_untouched():
    """Fails if the block draws from torch's global CPU generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"


@pytest.fixture
def hub():
    """huggingface_hub, or a skip."""
    return pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file with a network of one block each, small enough for a test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = zoo.create_model("impure_tiny", depth=1, decoder_depth=1, out_indices=(0,))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_safetensors(path, model.state_dict(), model.config)
    return str(path)


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of the command line."""
    from impure_fast import cli

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        return (ended.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def purify(run, weights):
    """``impure-fast purify`` with the small network and seed 1."""
    return lambda *arguments: run("purify", *arguments, "--model", weights, "--seed", 1)


@pytest.fixture
def photos(tmp_path):
    """A folder with two pictures and a sub-folder with one."""
    folder = tmp_path / "photos"
    for i, name in enumerate(("a.png", "b.jpg", "sub/c.webp")):
        picture(folder / name, seed=i)
    return folder


def picture(path, seed=0, height=20, width=24, channels=3):
    """Write a picture of noise; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(values.squeeze()).save(path)
    return path


def files(folder):
    """Relative paths of all files below a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
