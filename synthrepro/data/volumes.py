"""Volumes in files: reading and checking them, and cutting axial slices out of them.

Whatever the orientation in the file, a volume comes as axial planes from below, rows from front to back, columns from
left to right. Whatever is wrong with a file is a `UserError` that names it, in checking as in loading.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage
from torch import Tensor

from synthrepro.errors import UserError

CLOSING = 3.0  # mm; half the side of the cube that closes the labels of a brain
ADVICE = "get the file again from where the task's card says"


@dataclass(frozen=True)
class Volume:
    """A scan or a label map.

    Attributes:
        planes: (Z, R, C) axial planes from below, rows from front to back, columns from left to right.
        voxel: its size along planes, rows and columns, mm.
        affine: (4, 4) of the file's axes once they point right, forward and up.
        path: where it was read.
    """

    planes: np.ndarray
    voxel: tuple[float, float, float]
    affine: np.ndarray
    path: Path


def read_image(path: Path, flat: bool = False) -> Volume:
    """Read a scan as float32.

    Args:
        flat: the file holds one coronal slice of 1 mm in a template's space, first axis from right to left, second
            from top to bottom; it becomes the one plane of a volume.

    Raises:
        UserError: the file is missing or cannot be read to its end, is not 3-D (2-D, if `flat`), holds values that are
            not finite or none above 0.
    """
    volume = _read(path, flat)
    if not volume.planes.max() > 0:
        raise UserError(f"{path} holds no value above 0, hence no brain: {ADVICE}.")
    return Volume(volume.planes.astype(np.float32, copy=False), volume.voxel, volume.affine, path)


def read_labels(path: Path, table: Mapping[int, int], flat: bool = False) -> Volume:
    """Read a label map and translate it.

    Args:
        table: value in the file -> class, 0 to 255.
        flat: see `read_image`.

    Returns:
        Planes of uint8.

    Raises:
        UserError: as `read_image`, and for values that are no integers, are not in `table` or all become 0.
    """
    volume = _read(path, flat)
    values = volume.planes
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        raise UserError(f"{path} holds values that are not whole numbers, so it is no label map: {ADVICE}.")
    known = np.full(max(table) + 1, -1, dtype=np.int16)
    known[list(table)] = list(table.values())
    for extreme in (int(values.min()), int(values.max())):
        if not 0 <= extreme < len(known):
            raise UserError(_unknown(path, extreme))
    values = values.astype(np.intp) if values.dtype.kind == "f" else values
    classes = known[values]
    if (classes < 0).any():
        raise UserError(_unknown(path, int(values[classes < 0].min())))
    if not classes.any():
        raise UserError(f"{path} labels nothing: {ADVICE}.")
    return Volume(classes.astype(np.uint8), volume.voxel, volume.affine, path)


def read_pair(image: Path, labels: Path, table: Mapping[int, int], flat: bool = False) -> tuple[Volume, Volume]:
    """Read a scan and its label map, which must have the same voxels.

    Raises:
        UserError: see `read_image` and `read_labels`; half of the pair is missing; shapes or affines differ.
    """
    for path, other in ((image, labels), (labels, image)):
        if not path.is_file() and other.is_file():
            raise UserError(f"{path} is missing, though its other half {other.name} is there: {ADVICE}.")
    scan, map_ = read_image(image, flat), read_labels(labels, table, flat)
    if scan.planes.shape != map_.planes.shape:
        shapes = [" x ".join(str(n) for n in reversed(volume.planes.shape)) for volume in (map_, scan)]
        raise UserError(f"{labels} has {shapes[0]} voxels but its image {image.name} has {shapes[1]}: {ADVICE}.")
    if not np.allclose(scan.affine, map_.affine, atol=1e-2):
        raise UserError(f"{labels} and its image {image.name} lie at different places (their affines): {ADVICE}.")
    return scan, map_


def _unknown(path: Path, value: int) -> str:
    return f"{path} holds the label {value}, which stands for no structure this task knows: {ADVICE}."


def _read(path: Path, flat: bool) -> Volume:
    if not path.is_file():
        raise UserError(f"{path} is missing: {ADVICE}.")
    axes = 2 if flat else 3
    try:
        image: Any = nib.load(path)
        shape = image.shape[:2] if flat and image.shape[2:] == (1,) else image.shape
        if len(shape) == axes:
            image = image if flat else nib.as_closest_canonical(image)
            data = np.asanyarray(image.dataobj)
            affine = np.asarray(image.affine)
            sizes = [float(size) for size in image.header.get_zooms()[:axes]]
    except (OSError, EOFError, ValueError, OverflowError, ImageFileError, HeaderDataError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): {ADVICE}.") from error
    if len(shape) != axes:
        raise UserError(f"{path} has the shape {tuple(shape)}, but {axes} axes are needed: {ADVICE}.")
    if not min(sizes) > 0:
        raise UserError(f"{path} says that a side of its voxels measures {min(sizes):g} mm: {ADVICE}.")
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise UserError(f"{path} holds values that are not finite (NaN or infinity): {ADVICE}.")
    if flat:
        return Volume(data.reshape(shape).T[None, :, ::-1], (1.0, sizes[1], sizes[0]), affine, path)
    return Volume(data.transpose(2, 1, 0)[:, ::-1], (sizes[2], sizes[1], sizes[0]), affine, path)


def inside(labelled: np.ndarray, voxel: tuple[float, float, float]) -> np.ndarray:
    """What lies inside a brain of which only some tissue is labelled: sulci, vessels, meninges.

    A morphological closing with a cube of twice `CLOSING` a side bridges the sulci; holes that are left are filled.

    Args:
        labelled: (Z, R, C) bool.
    """
    reach = [max(1, round(CLOSING / size)) for size in voxel]
    cube = [2 * r + 1 for r in reach]
    padded = np.pad(labelled.astype(np.uint8), [(r, r) for r in reach])
    closed = ndimage.minimum_filter(ndimage.maximum_filter(padded, cube), cube)  # separable, unlike binary_closing
    if len(labelled) == 1:
        closed = closed[reach[0], None]  # a plane of its own has neither above nor below
    parts, _ = ndimage.label(closed == 0)
    filled = parts != parts[0, 0, 0]  # what hangs together with the corner is outside, the rest hole or brain
    return filled[reach[0] if len(filled) > 1 else 0 :][: len(labelled), reach[1] : -reach[1], reach[2] : -reach[2]]


@dataclass(frozen=True)
class Cut:
    """Which voxels the pixels of S slices cover: every row of a matrix holds the share of a pixel in each voxel.

    Attributes:
        planes, rows, columns: (S, Z), (H, R), (W, C); a row sums to one, or to less where the volume ends.
        heights: (S,) of the slices' middle above the middle of the brain, mm.
    """

    planes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    heights: np.ndarray


def cut_axially(
    brain: np.ndarray,
    voxel: tuple[float, float, float],
    size: tuple[int, int],
    spacing: float,
    slices: int,
    span: tuple[float, float],
) -> Cut:
    """Axial slices through a brain, spread evenly over a part of its height, each with the brain in its middle.

    Slices are `round(spacing)` mm thick. The middle in the plane is that of the box around the whole brain, so it is
    one for all slices. Pixels begin at voxel edges: where they are as large as voxels they are voxels.

    Args:
        brain: (Z, R, C) bool.
        size: rows and columns; spacing: side of a pixel, mm.
        span: fractions of the brain's height, from its lowest plane to its highest, between which slices lie.
    """

    def edge(place: np.ndarray) -> np.ndarray:
        return np.floor(place + 0.5)  # np.round would go to even numbers, hence depend on where the brain lies

    boxes = []
    for axis in range(3):
        where = np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis})))
        boxes.append((where[0], where[-1] + 1))

    def weights(axis: int, starts: np.ndarray, length: float) -> np.ndarray:
        edges = np.arange(brain.shape[axis]) * voxel[axis]
        overlap = np.minimum(starts[:, None] + length, edges + voxel[axis]) - np.maximum(starts[:, None], edges)
        return (overlap.clip(0) / length).astype(np.float32)

    def pixels(axis: int, count: int) -> np.ndarray:
        middle = sum(boxes[axis]) / 2 * voxel[axis]
        first = edge((middle - count * spacing / 2) / voxel[axis]) * voxel[axis]
        return weights(axis, first + np.arange(count) * spacing, spacing)

    thickness = max(1, round(spacing))
    low, high = boxes[0]
    at = span[0] + (span[1] - span[0]) * (np.arange(slices) + 0.5) / slices
    starts = edge(low + (high - low) * at - thickness / voxel[0] / 2) * voxel[0]
    heights = starts + thickness / 2 - (low + high) / 2 * voxel[0]
    return Cut(weights(0, starts, thickness), pixels(1, size[0]), pixels(2, size[1]), heights)


def average(planes: np.ndarray, cut: Cut) -> Tensor:
    """Mean over what each pixel covers; beyond the volume's border lies zero.

    Args:
        planes: (Z, R, C), of which only those in the slices are looked at.

    Returns:
        (S, H, W) float32.
    """
    result = []
    for weights in cut.planes:
        covered = np.flatnonzero(weights)
        plane = np.tensordot(weights[covered], planes[covered].astype(np.float32), 1)  # (R, C)
        result.append(cut.rows @ plane @ cut.columns.T)
    return torch.from_numpy(np.stack(result))


def majority(planes: np.ndarray, cut: Cut, classes: int) -> Tensor:
    """The class that fills most of a pixel; of equals the lowest.

    The value `classes` means tissue inside the brain that has no class. It votes together with the background 0, and
    a pixel that the two win goes to the larger of them. So classes are what they would be without that value.

    Args:
        planes: (Z, R, C) uint8, 0 to `classes`.

    Returns:
        (S, H, W) int64, 0 to `classes`.
    """
    result = []
    for weights in cut.planes:
        covered = np.flatnonzero(weights)
        shares = np.zeros((classes + 1, *planes.shape[1:]), dtype=np.float32)
        for weight, plane in zip(weights[covered], planes[covered], strict=True):
            np.put_along_axis(
                shares, plane[None], np.take_along_axis(shares, plane[None].astype(np.intp), 0) + weight, 0
            )
        shares = cut.rows @ shares @ cut.columns.T  # (classes + 1, H, W)
        beyond = 1 - shares.sum(axis=0)  # beyond the volume's border lies background
        background, unlabelled = shares[0] + beyond, shares[classes]
        shares[0] = background + unlabelled
        winner = shares[:classes].round(5).argmax(axis=0)  # rounded, else equals would differ by rounding errors
        result.append(np.where((winner == 0) & (unlabelled > background + 1e-5), classes, winner))
    return torch.from_numpy(np.stack(result).astype(np.int64))
