"""How much memory does DDPM-Seg's training need? Features in a file, as here, and all in RAM, as in the released code.

    python benchmarks/ddpm_seg_memory.py

Prints a Markdown table: the most bytes that a process had in RAM (Linux's and macOS's count), beyond what it had before
its first image, for random features of 64 x 64 images and one MLP; and by arithmetic the bytes of the features of the
paper's 40 images. Every row is a process of its own.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from synthrepro.evidence import Context
from synthrepro.methods.ddpm.ddpm_seg import DdpmSegSettings, FeatureFile, file_bytes, train_ensemble

SIZE, DIM, IMAGES = 64, 528, (2, 10, 20, 40)
PAPER = (40, 256, 256, 8448)  # images, height, width, features of a pixel
WAYS = ("file", "RAM")


class Resident:
    """In place of a `FeatureFile`: all features in RAM in single precision."""

    def __init__(self, n: int) -> None:
        self.dim, self.features = DIM, torch.zeros(n * SIZE * SIZE, DIM)

    def write(self, image: int, features: Tensor) -> None:
        rows = SIZE * SIZE
        self.features[image * rows : (image + 1) * rows] = features.flatten(1).T

    def read(self, rows: Tensor) -> Tensor:
        return self.features[rows.long()]


def peak() -> int:
    """Most bytes that this process has had in RAM."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had in RAM
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trained(way: str, n: int, folder: Path) -> int:
    """Bytes that one epoch on n images takes."""
    settings = DdpmSegSettings(
        blocks=(0,),
        steps=(0,),
        models=1,
        lr=1e-3,
        batch=1024,
        first_epochs=1,
        patience=50,
        max_epochs=1,
        smallest=0,
        precision="float16",
    )
    before = peak()
    features = Resident(n) if way == "RAM" else FeatureFile.create(folder / "f.npy", n * SIZE**2, DIM, "float16")
    for i in range(n):
        features.write(i, torch.randn(DIM, SIZE, SIZE, generator=torch.Generator().manual_seed(i)))
    train_ensemble(features, torch.zeros(n, SIZE, SIZE, dtype=torch.int64), 2, settings, 0, Context(folder))
    return peak() - before


def measured(way: str, n: int) -> int:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, way, str(n)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    print("| images | features in single precision, MB | peak, in a file, MB | peak, in RAM, MB |")
    print("|---:|---:|---:|---:|")
    for n in IMAGES:
        values = [file_bytes(n, SIZE, SIZE, DIM, "float32"), *(measured(way, n) for way in WAYS)]
        print(f"| {n} | " + " | ".join(f"{value / 1e6:.0f}" for value in values) + " |")
    n, height, width, dim = PAPER
    one, disk, ram = (file_bytes(k, *PAPER[1:], p) for k, p in ((1, "float32"), (n, "float16"), (n, "float32")))
    print(
        f"\n{n} images of {height} x {width} with {dim} features a pixel: {disk / 1e9:.1f} GB on disk in half "
        f"precision and {one / 1e9:.1f} GB in RAM, one image at a time; all in RAM, as released, {ram / 1e9:.1f} GB."
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        with tempfile.TemporaryDirectory() as scratch:
            print(trained(sys.argv[1], int(sys.argv[2]), Path(scratch)))
    else:
        main()
