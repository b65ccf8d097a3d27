"""The task `brain-labelmaps`, on a small tree of its layout."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from synthrepro.data import brain_labelmaps, brain_oasis
from synthrepro.data.brain_labelmaps import FREESURFER, STRUCTURES
from synthrepro.data.brain_oasis import CLASSES, UNLABELLED
from synthrepro.errors import UserError

NUMBERS = {1: 2, 2: 42, 3: 43, 4: 10, 5: 50, 6: 12, 7: 52, 8: 17, 9: 54, 10: 8, 11: 46, 12: 16, 13: 24}
SMALL = {"size": (36, 32), "spacing": 5.0, "slices": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, head: Callable, write_volume: Callable) -> Path:
    root = tmp_path_factory.mktemp("data") / "brain-labelmaps"
    for i, path in enumerate(brain_labelmaps.files(root)):
        labels = head(zoom=0.94 + i / 100).labels(NUMBERS).astype(np.float32 if i % 2 else np.int32)
        labels[:, :, -3:] = 507  # the rest of the head, far from the brain
        write_volume(path, labels, axes="LIA")
    return root


def test_there_are_maps_only_with_the_classes_of_brain_oasis(folder: Path):
    task = brain_labelmaps.load(brain_labelmaps.Options(**SMALL), folder)
    assert task.classes == CLASSES
    assert set(task.splits) == {"maps"}
    maps = task.splits["maps"]
    assert maps.images.shape == (72, 0, 36, 32)
    assert maps.labels.shape == (72, 36, 32)
    assert maps.labels.dtype == torch.int64
    assert maps.individuals == tuple(f"training_seg_{i:02d}" for i in range(1, 13))
    assert set(maps.labels.unique().tolist()) == set(range(UNLABELLED + 1))


def test_maps_are_those_of_brain_oasis_for_the_same_head(
    folder: Path, tmp_path: Path, head: Callable, write_volume: Callable
):
    """The two tasks look alike at a head: same way up, same place, same classes."""
    numbers = {1: 44, 2: 101, 3: 52, 4: 60, 5: 37, 6: 58, 7: 55, 8: 48, 9: 31, 10: 38, 11: 41, 12: 35}
    for path in brain_oasis.files(tmp_path):
        person = head(zoom=0.94)
        write_volume(path, person.scan if path.name.endswith("SS.nii.gz") else person.labels(numbers))
    expected = brain_oasis.load(brain_oasis.Options(**SMALL), tmp_path).splits["maps"].take(["1036"])
    maps = brain_labelmaps.load(brain_labelmaps.Options(**SMALL), folder).splits["maps"].take(["training_seg_01"])
    assert (maps.labels == expected.labels).float().mean() > 0.99
    for label in maps.labels:
        if 9 in label:
            assert (label == 9).nonzero()[:, 1].min() > 16  # the amygdala is on the right only


def test_the_tables_give_left_and_right_one_class():
    assert set(FREESURFER.values()) == set(range(UNLABELLED + 1))
    for left, right in [(2, 41), (3, 42), (4, 43), (5, 44), (7, 46), (8, 47), (26, 58), (28, 60), (30, 62), (31, 63)]:
        assert FREESURFER[left] == FREESURFER[right]
    for left in range(10, 14):
        assert FREESURFER[left] == FREESURFER[left + 39]
    assert FREESURFER[24] == UNLABELLED
    assert all(value == 0 for number, value in STRUCTURES.items() if number >= 500)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read"),
    ],
)
def test_a_wrong_file_is_named_alike_by_check_and_load(folder: Path, tmp_path: Path, damage: Callable, reason: str):
    brain_labelmaps.check(folder)
    copy = tmp_path / "brain-labelmaps"
    shutil.copytree(folder, copy)
    damage(copy / "training_seg_03.nii.gz")
    for action in (brain_labelmaps.check, lambda root: brain_labelmaps.load(brain_labelmaps.Options(**SMALL), root)):
        with pytest.raises(UserError, match=rf"training_seg_03\.nii\.gz {reason}"):
            action(copy)


def test_an_unknown_label_is_named(folder: Path, tmp_path: Path, write_volume: Callable):
    copy = tmp_path / "brain-labelmaps"
    shutil.copytree(folder, copy)
    write_volume(copy / "training_seg_12.nii.gz", np.full((9, 9, 9), 501, dtype=np.int32))
    with pytest.raises(UserError, match=r"training_seg_12\.nii\.gz holds the label 501"):
        brain_labelmaps.check(copy)
