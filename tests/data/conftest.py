"""A small brain, and scans of it in files, and pictures with masks, for the readers of real data."""

from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

VOXEL, SIDE = 5.0, 40  # mm and voxels: a box of 200 mm
MIDDLE = np.array([100.0, 100.0, 100.0])  # mm
INTENSITY = (0, 1000, 600, 200, 800, 650, 700, 900, 600, 580, 550, 950, 850, 250)  # of the classes and of what has none

# (class, middle in mm from the brain's middle to the right, forward and up, half axes in mm)
PARTS = (
    (2, (0, 0, 0), (65, 80, 65)),
    (1, (0, 0, 0), (52, 67, 52)),
    (10, (0, -35, -45), (45, 32, 22)),
    (11, (0, -35, -45), (25, 18, 12)),
    (12, (0, -5, -45), (13, 13, 25)),
    (3, (0, 0, 15), (16, 40, 12)),
    (4, (0, -25, 0), (15, 15, 10)),  # behind
    (5, (0, 35, 0), (15, 12, 10)),  # in front
    (6, (-32, 10, 0), (9, 14, 9)),
    (7, (-18, 8, 0), (6, 10, 8)),
    (8, (28, -12, -8), (8, 14, 8)),
    (9, (32, 12, -8), (9, 9, 9)),  # on the right only
)


class Head:
    """Its label map (values of `brain_oasis.CLASSES`, and one more for a sulcus) and its T1-weighted scan.

    Arrays are (X, Y, Z), axes to the right, forward and up.
    """

    def __init__(self, seed: int = 0, zoom: float = 1.0) -> None:
        centres = (np.arange(SIDE) + 0.5) * VOXEL
        grid = np.stack(np.meshgrid(centres, centres, centres, indexing="ij"), axis=-1) - MIDDLE
        self.classes = np.zeros((SIDE,) * 3, dtype=np.int16)
        for value, middle, axes in PARTS:
            within = (((grid / zoom - np.array(middle)) / np.array(axes)) ** 2).sum(-1) <= 1
            self.classes[within] = value
        sulcus = (np.abs(grid[..., 0]) < VOXEL) & (grid[..., 2] > 0) & (self.classes == 2)  # between the hemispheres
        self.classes[sulcus] = 13
        noise = np.random.default_rng(seed).normal(0, 8, self.classes.shape)
        self.scan = np.where(self.classes > 0, np.array(INTENSITY)[self.classes] + noise, 0).round().astype(np.int16)

    def labels(self, numbers: Mapping[int, int]) -> np.ndarray:
        """The label map in the numbers of a layout, class -> number; what has none is 0."""
        table = np.zeros(14, dtype=np.int16)
        for value, number in numbers.items():
            table[value] = number
        return table[self.classes]


def write(path: Path, data: np.ndarray, axes: str = "LAS", voxel: float = VOXEL) -> Path:
    """Write an array whose axes point right, forward and up, with other axes in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([voxel, voxel, voxel, 1.0])
    kind = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    image = nib.Nifti1Image(data, affine).as_reoriented(
        ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))
    )
    nib.save(kind(np.asarray(image.dataobj), image.affine), path)
    return path


@pytest.fixture(scope="session")
def head() -> Callable[..., Head]:
    return Head


@pytest.fixture(scope="session")
def write_volume() -> Callable[..., Path]:
    return write


# ----- pictures and masks


def save(path: Path, values: np.ndarray) -> Path:
    """Write (H, W) or (H, W, C) as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def save_case(image: Path, *masks: Path, shape: tuple[int, int] = (24, 32), value: int = 255, seed: int = 0) -> None:
    """Write a picture of coloured noise, and masks with a square of 8 x 8 each, one after another on the diagonal."""
    save(image, np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))
    for k, path in enumerate(masks):
        mask = np.zeros(shape, dtype=np.uint8)
        mask[8 * k : 8 * k + 8, 8 * k : 8 * k + 8] = value
        save(path, mask)


@pytest.fixture(scope="session")
def save_picture() -> Callable[..., Path]:
    return save


@pytest.fixture(scope="session")
def save_pair() -> Callable[..., None]:
    return save_case
