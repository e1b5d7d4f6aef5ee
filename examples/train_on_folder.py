"""Train a purifier on a folder of photographs, then purify one of them with it.

python examples/train_on_folder.py FOLDER RUN [STEPS]

As commands, but for the small settings below (a JSON file for --config):
             impure-fast data FOLDER -o RUN/photographs.npz
             impure-fast train --data RUN/photographs.npz -o RUN --steps STEPS
             impure-fast purify FOLDER/first.jpg -o RUN/first.png --model RUN/model.safetensors
A run that was stopped goes on by the same command.  The shipped weights' own recipes: impure_fast/training/recipes.
"""

import sys
from pathlib import Path

import torch

import impure_fast as imp
from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite
from impure_fast.images import find_images, jpeg_bytes, read_image, write_image, write_packed
from impure_fast.training.config import TrainConfig
from impure_fast.training.loop import train

folder, run, steps = sys.argv[1], Path(sys.argv[2]), int([*sys.argv, "20"][3])
files = find_images([folder], recursive=True)
packed = run / "photographs.npz"
if not packed.exists():
    jpegs = [jpeg_bytes(file, quality=92) for file, _ in files]
    write_packed(packed, jpegs, [-1] * len(files), [str(name) for _, name in files])

config = TrainConfig(
    steps=steps,
    batch=2,
    crop=64,  # one tile of impure_tiny; larger ones are cut into tiles
    view=96,
    pairs=4 * len(files),  # views, each with an adversarial twin made before the first step
    held_out=0,
    warmup=5,
    save_every=10,
)
classifier = Normalised(efficientnet_lite(0), LITE0_MEAN, LITE0_STD)  # what is attacked, and whose features guide
train(config, packed, run, classifier, progress=lambda phase, done, total, figures: print(phase, done, total, figures))

picture = torch.from_numpy(read_image(files[0][0]).rgb).permute(2, 0, 1)  # uint8 [3, H, W]
purified = imp.load(run / "model.safetensors").purify(picture, seed=0)
write_image(run / "first.png", purified.permute(1, 2, 0).contiguous().numpy())
