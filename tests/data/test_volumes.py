"""Reading volumes, what may be wrong with them, and cutting slices."""

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthrepro.data.volumes import average, cut_axially, inside, majority, read_image, read_labels, read_pair
from synthrepro.errors import UserError

TABLE = {0: 0, 4: 1, 9: 2}


@pytest.fixture
def block() -> np.ndarray:
    """(X, Y, Z) = (20, 24, 16) with a marker far right, a brighter one far forward, the brightest far up."""
    data = np.zeros((20, 24, 16), dtype=np.int16)
    data[4:16, 4:20, 4:12] = 10
    data[15, 12, 8], data[10, 19, 8], data[10, 12, 11] = 20, 30, 40
    return data


@pytest.mark.parametrize("axes", ["LAS", "RAS", "LIA", "PSR", "SLP"])
@pytest.mark.parametrize("suffix", ["nii.gz", "nii", "mgz"])
def test_every_orientation_in_the_file_reads_upright(
    tmp_path: Path, block: np.ndarray, write_volume: Callable, axes: str, suffix: str
):
    volume = read_image(write_volume(tmp_path / f"scan.{suffix}", block, axes, voxel=2.0))
    assert volume.planes.shape == (16, 24, 20)
    assert volume.planes.dtype == np.float32
    assert volume.voxel == (2.0, 2.0, 2.0)
    plane, row, column = (np.argwhere(volume.planes == value)[0] for value in (40, 30, 20))
    assert plane[0] == 11  # up is the last plane
    assert row[1] == 24 - 1 - 19  # forward is the first row
    assert column[2] == 15  # right is the last column


def test_a_flat_slice_has_right_first_and_up_first_in_the_file(tmp_path: Path):
    for shape in ((6, 8, 1), (6, 8)):
        data = np.zeros((6, 8), dtype=np.float32)
        data[5, 1] = (
            1  # at the end of an axis that runs to the left: leftmost; near the beginning of one that runs down
        )
        path = tmp_path / f"slice{len(shape)}.nii.gz"
        nib.save(nib.Nifti1Image(data.reshape(shape), np.eye(4)), path)
        volume = read_image(path, flat=True)
        assert volume.planes.shape == (1, 8, 6)
        assert np.argwhere(volume.planes).tolist() == [[0, 1, 0]]


def test_labels_are_translated(tmp_path: Path, write_volume: Callable):
    data = np.zeros((4, 4, 4), dtype=np.int16)
    data[0], data[1] = 4, 9
    for dtype in (np.int16, np.float32, np.uint8):
        volume = read_labels(write_volume(tmp_path / "labels.nii.gz", data.astype(dtype)), TABLE)
        assert volume.planes.dtype == np.uint8
        assert np.bincount(volume.planes.flatten()).tolist() == [32, 16, 16]


# ----- what may be wrong


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = nib.load(path)
    data = change(np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(data, image.affine), path)


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        changed = data.astype(np.float32 if isinstance(value, float) else data.dtype)
        changed[1, 1, 1] = value
        return changed

    return change


BROKEN_FILE = [
    (lambda path: path.unlink(), "is missing"),
    (truncate, "cannot be read"),
    (lambda path: path.write_bytes(b""), "cannot be read"),
    (lambda path: path.write_bytes(gzip.compress(b"no scan at all" * 100)), "cannot be read"),
    (lambda path: path.write_text("no archive"), "cannot be read"),
    (lambda path: rewrite(path, lambda data: np.stack([data, data], -1)), "three|3 axes"),
    (lambda path: rewrite(path, lambda data: data[:, :, 0]), "3 axes"),
    (lambda path: rewrite(path, with_value(float("nan"))), "not finite"),
    (lambda path: rewrite(path, with_value(float("inf"))), "not finite"),
]


@pytest.mark.parametrize(("damage", "reason"), BROKEN_FILE)
@pytest.mark.parametrize("read", [read_image, lambda path: read_labels(path, TABLE)], ids=["image", "labels"])
def test_a_broken_file_is_named_with_the_reason(
    tmp_path: Path, write_volume: Callable, read: Callable, damage: Callable, reason: str
):
    data = np.random.default_rng(0).choice([0, 4, 9], (20, 20, 20)).astype(np.int16)
    path = write_volume(tmp_path / "file.nii.gz", data)
    read(path)
    damage(path)
    with pytest.raises(UserError, match=reason) as error:
        read(path)
    assert str(path) in str(error.value)


def test_an_uncompressed_file_cut_short_is_named(tmp_path: Path, write_volume: Callable, block: np.ndarray):
    for suffix in ("nii", "mgz"):
        path = write_volume(tmp_path / f"file.{suffix}", block)
        truncate(path)
        with pytest.raises(UserError, match=f"file.{suffix} cannot be read"):
            read_image(path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "label 5"),
        (10, "label 10"),
        (-1, "label -1"),
        (20000, "label 20000"),
        (4.5, "whole numbers"),
        (1e30, "label"),
    ],
)
def test_a_label_map_holds_known_whole_numbers_only(tmp_path: Path, write_volume: Callable, value: float, reason: str):
    data = np.full((4, 4, 4), 4, dtype=np.int16)
    path = write_volume(tmp_path / "labels.nii.gz", data)
    rewrite(path, with_value(value))
    with pytest.raises(UserError, match=rf"labels\.nii\.gz.*{reason}"):
        read_labels(path, TABLE)


def test_a_file_without_a_brain_is_named(tmp_path: Path, write_volume: Callable):
    path = write_volume(tmp_path / "empty.nii.gz", np.zeros((4, 4, 4), dtype=np.int16))
    with pytest.raises(UserError, match=r"empty\.nii\.gz holds no value above 0"):
        read_image(path)
    with pytest.raises(UserError, match=r"empty\.nii\.gz labels nothing"):
        read_labels(path, TABLE)


def test_the_halves_of_a_pair_must_both_be_there_and_fit(tmp_path: Path, write_volume: Callable):
    data = np.full((4, 5, 6), 4, dtype=np.int16)
    scan, labels = write_volume(tmp_path / "scan.nii.gz", data), tmp_path / "labels.nii.gz"
    with pytest.raises(UserError, match=r"labels\.nii\.gz is missing, though its other half scan\.nii\.gz"):
        read_pair(scan, labels, TABLE)
    write_volume(labels, data[:, :4])
    with pytest.raises(UserError, match=r"labels\.nii\.gz has 4 x 4 x 6 voxels .* scan\.nii\.gz has 4 x 5 x 6"):
        read_pair(scan, labels, TABLE)
    write_volume(labels, data, voxel=4.9)
    with pytest.raises(UserError, match=r"labels\.nii\.gz and its image scan\.nii\.gz lie at different places"):
        read_pair(scan, labels, TABLE)
    write_volume(labels, data, axes="PSR")  # other axes in the file, same place in the world
    image, map_ = read_pair(scan, labels, TABLE)
    assert image.planes.shape == map_.planes.shape
    scan.unlink()
    with pytest.raises(UserError, match=r"scan\.nii\.gz is missing, though"):
        read_pair(scan, labels, TABLE)


# ----- slices


def ball(shape: tuple[int, int, int] = (60, 70, 64), middle: tuple[int, int, int] = (30, 33, 31)) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1) - np.array(middle)
    return (grid**2).sum(-1) <= 25**2


def test_pixels_as_large_as_voxels_are_voxels():
    brain = ball()
    values = np.random.default_rng(0).random(brain.shape, dtype=np.float32) * brain
    cut = cut_axially(brain, (1, 1, 1), (52, 52), 1.0, 5, (0.1, 0.9))
    for heights, plane in zip(cut.planes, average(values, cut), strict=True):
        (z,) = np.flatnonzero(heights)
        np.testing.assert_array_equal(plane, values[z, 33 - 25 : 33 + 27, 31 - 25 : 31 + 27])


def test_larger_pixels_are_means_of_the_voxels_they_cover():
    brain = ball()
    values = np.random.default_rng(0).random(brain.shape, dtype=np.float32)
    cut = cut_axially(brain, (1, 1, 1), (18, 16), 3.0, 4, (0.1, 0.9))
    rows, columns = (np.flatnonzero(weights[0])[0] for weights in (cut.rows, cut.columns))
    for heights, plane in zip(cut.planes, average(values, cut), strict=True):
        covered = np.flatnonzero(heights)
        assert len(covered) == 3
        part = torch.from_numpy(values[covered, rows : rows + 54, columns : columns + 48]).mean(0)
        torch.testing.assert_close(plane, F.avg_pool2d(part[None], 3)[0])


@pytest.mark.parametrize(("voxel", "spacing"), [((1, 1, 1), 2.5), ((2, 1.5, 1.2), 3.0), ((5, 5, 5), 3.0)])
def test_a_constant_stays_constant_whatever_voxel_and_pixel(voxel: tuple[float, float, float], spacing: float):
    cut = cut_axially(ball(), voxel, (6, 5), spacing, 3, (0.3, 0.7))
    torch.testing.assert_close(average(np.full((60, 70, 64), 7.0), cut), torch.full((3, 6, 5), 7.0))


def test_beyond_the_border_lies_zero_and_background():
    brain = np.ones((10, 10, 10), dtype=bool)
    cut = cut_axially(brain, (1, 1, 1), (20, 14), 1.0, 2, (0.2, 0.8))
    image, labels = average(np.full((10, 10, 10), 3.0), cut), majority(np.ones((10, 10, 10), np.uint8), cut, 2)
    expected = torch.zeros(20, 14)
    expected[5:15, 2:12] = 1
    for plane in range(2):
        assert torch.equal(image[plane], 3 * expected)
        assert torch.equal(labels[plane], expected.long())


def test_slices_spread_evenly_over_the_span_and_hold_the_brain_in_their_middle():
    brain = ball()
    cut = cut_axially(brain, (1, 1, 1), (32, 32), 2.0, 6, (0.2, 0.8))
    places = np.array([np.flatnonzero(heights).mean() for heights in cut.planes])
    low, high = 30 - 25, 30 + 26
    assert (places > low + 0.2 * (high - low) - 1).all()
    assert (places < low + 0.8 * (high - low) + 1).all()
    assert np.ptp(np.diff(places)) <= 1
    np.testing.assert_allclose(cut.heights, places - 30, atol=0.5)
    middle = average(brain, cut)[3]
    for axis in (0, 1):
        where = np.flatnonzero(middle.sum(axis) > 0)
        assert abs((where[0] + where[-1]) / 2 - 15.5) <= 0.5


def test_slices_do_not_depend_on_where_in_the_box_the_brain_lies():
    brain = ball()
    values = np.random.default_rng(0).random(brain.shape, dtype=np.float32) * brain
    moved = [np.roll(array, (2, -4, 3), axis=(0, 1, 2)) for array in (brain, values)]
    first, second = (
        average(v, cut_axially(b, (1, 1, 1), (18, 18), 3.0, 4, (0.1, 0.9))) for b, v in ((brain, values), moved)
    )
    torch.testing.assert_close(first, second)


def test_the_class_that_fills_most_of_a_pixel_wins():
    # One pixel of 2 x 2 x 2 voxels a case; classes 0, 1, 2 and 3 for what has none.
    cases = {
        (1, 1, 1, 1, 1, 2, 2, 2): 1,
        (1, 1, 1, 1, 2, 2, 2, 2): 1,  # of equals the lowest
        (0, 0, 0, 0, 2, 2, 2, 2): 0,
        (3, 3, 3, 3, 3, 0, 0, 0): 3,
        (3, 3, 3, 0, 0, 1, 1, 1): 3,  # background and unlabelled win together, and the larger of them stands
        (3, 3, 0, 0, 0, 1, 1, 1): 0,
        (3, 3, 3, 1, 1, 1, 1, 2): 1,
    }
    for values, expected in cases.items():
        planes = np.array(values, dtype=np.uint8).reshape(2, 2, 2)
        cut = cut_axially(np.ones((2, 2, 2), bool), (1, 1, 1), (1, 1), 2.0, 1, (0, 1))
        assert majority(planes, cut, 3).item() == expected, values


def test_classes_are_what_they_would_be_without_the_extra_value():
    planes = np.random.default_rng(0).choice(5, (60, 70, 64)).astype(np.uint8)
    cut = cut_axially(ball(), (1, 1, 1), (20, 20), 3.0, 4, (0.1, 0.9))
    with_extra = majority(planes, cut, 4)
    without = majority(np.where(planes == 4, 0, planes).astype(np.uint8), cut, 4)
    assert (with_extra == 4).any()
    assert torch.equal(torch.where(with_extra == 4, 0, with_extra), without)


def test_a_brain_is_closed_over_sulci_and_holes_and_no_further():
    brain = np.zeros((40, 40, 40), dtype=bool)
    brain[8:32, 8:32, 8:32] = True
    full = brain.copy()
    assert np.array_equal(inside(brain, (1, 1, 1)), full)
    brain[20:, 19:22, 8:32] = False  # a sulcus 3 mm wide, open above
    brain[12:20, 24:31, 12:24] = False  # a cavity too wide to be closed, closed off on all sides
    assert np.array_equal(inside(brain, (1, 1, 1)), full)
    brain[:, 8:20] = False  # half a brain: what lies beyond a wide opening is outside
    assert not inside(brain, (1, 1, 1))[:, 8:16].any()


def test_a_plane_of_its_own_is_closed_in_the_plane():
    brain = np.zeros((1, 40, 40), dtype=bool)
    brain[:, 8:32, 8:32] = True
    full = brain.copy()
    brain[:, 14:28, 14:28] = False
    assert np.array_equal(inside(brain, (3, 1, 1)), full)
