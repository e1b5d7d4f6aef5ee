"""The time a newcomer needs: from ``pip install`` of the wheel in an empty environment to a purified picture.

    python -m benchmarks.newcomer build/dist/impure_fast-*.whl PICTURE --json newcomer.json

Three commands, run for real in a fresh virtual environment outside the tree; pip's cache is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from impure_fast.demo import processor_name
from impure_fast.images import read_image, write_text

COMMANDS = (
    'pip install "impure-fast[cli]"',
    "impure-fast info",
    "impure-fast purify photograph.jpg -o purified.png",
)


def measure(wheel: Path, picture: Path) -> dict[str, Any]:
    """Seconds of each of COMMANDS, given the wheel and the picture.  Raises CalledProcessError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "env"), with_pip=True)
        commands = (
            ("pip", "install", "--quiet", "--no-cache-dir", f"impure-fast[cli] @ {wheel.resolve().as_uri()}"),
            ("impure-fast", "info"),
            ("impure-fast", "purify", str(picture.resolve()), "-o", "purified.png"),
        )
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        seconds, processor = {}, {}
        for said, command in zip(COMMANDS, commands, strict=True):
            began, spent = time.perf_counter(), _processor_time()
            call = [Path(folder, "env", "bin", command[0]), *command[1:]]
            subprocess.run(call, cwd=folder, env=outside, check=True, stdout=subprocess.DEVNULL)
            seconds[said] = round(time.perf_counter() - began, 1)
            processor[said] = round(_processor_time() - spent, 1)
            print(f"{seconds[said]:7.1f} s, of a processor {processor[said]:6.1f} s  {said}", flush=True)
        height, width, _ = read_image(Path(folder, "purified.png")).rgb.shape
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "picture": f"{width} x {height}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor_name()}, {os.cpu_count()} cores",
    }


def _processor_time() -> float:
    """Seconds of all children that have ended: unlike the clock's, these are not those of what else runs."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.newcomer", description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    figures = measure(options.wheel, options.picture)
    whole, spent = (sum(figures[name].values()) for name in ("seconds", "processor_seconds"))
    print(f"{whole:7.1f} s, of a processor {spent:6.1f} s  in all, a picture of {figures['picture']} pixels")
    if options.json:
        text = json.dumps(figures, indent=2) + "\n"
        write_text(options.json, text)


if __name__ == "__main__":
    main()
