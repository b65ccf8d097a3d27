"""The task `hippocampus` on small folders in both layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from synthrepro.data import hippocampus
from synthrepro.data.hippocampus import Options, fit
from synthrepro.errors import UserError

SMALL = {"size": (24, 32), "subjects": (3, 1, 2), "slices": 2}


def volume(seed: int, write: Callable, image: Path, labels: Path, axes: str = "RAS") -> None:
    """Axes to the right, forward and up: anterior in front, both parts at the same places from left to right."""
    classes = np.zeros((12, 20, 16), dtype=np.uint8)
    classes[3:10, 10:14, 2:6] = 1
    classes[5:11, 6:10, 2:6] = 2
    bright = np.random.default_rng(seed).normal(100 + 50 * seed, 5, classes.shape)
    bright[:, 18:, :] += 300  # in front
    bright[..., 14:] -= 300  # above
    write(image, (bright * (1 + seed)).astype(np.float32), axes=axes, voxel=1.0)
    write(labels, classes, axes=axes, voxel=1.0)


@pytest.fixture
def genseg(tmp_path: Path, write_volume: Callable) -> Path:
    for i in range(1, 8):
        part = tmp_path / "genseg" / ("train" if i < 5 else "val")
        name = f"hippocampus_{i:03d}.nii.gz"
        volume(i, write_volume, part / "t2" / name, part / "t1" / name, axes="RAS" if i % 2 else "LPS")
    return tmp_path / "genseg"


@pytest.fixture
def decathlon(tmp_path: Path, write_volume: Callable) -> Path:
    root = tmp_path / "decathlon"
    for i in range(1, 8):
        name = f"hippocampus_{i:03d}.nii.gz"
        volume(i, write_volume, root / "imagesTr" / name, root / "labelsTr" / name)
    (root / "imagesTr" / "._hippocampus_001.nii.gz").write_bytes(b"as in the archive")
    return root


def test_slices_are_sagittal_upright_and_of_one_scale(genseg: Path):
    task = hippocampus.load(Options(**SMALL), genseg)
    assert task.classes == ("background", "anterior", "posterior")
    for split in task.splits.values():
        assert split.images.shape[1:] == (1, 24, 32)
        assert split.images.min() == 0
        assert split.images.max() == 1
        for image, label in zip(split.images[:, 0], split.labels, strict=True):
            front, back = ((label == k).nonzero().float().mean(0) for k in (1, 2))
            assert front[1] < back[1], "anterior in front, on the left"
            assert (label == 1).sum() == (label == 2).sum() == 16
            assert front[0] == back[0] == 15.5, "below"  # rows 10 to 13 of 16, after 4 of padding
            assert image[8:20, 6:8].mean() > image[8:20, 8:26].mean(), "bright in front"
            assert image[4:6].mean() < image[8:20].mean(), "dark above"
            assert (image[:4] == 0).all()
            assert (image[:, 26:] == 0).all()


def test_the_volumes_of_val_test(genseg: Path):
    splits = hippocampus.load(Options(**SMALL), genseg).splits
    individuals = {name: set(split.individuals) for name, split in splits.items()}
    assert {name: len(names) for name, names in individuals.items()} == {"train": 3, "validation": 1, "test": 2}
    assert individuals["test"] < {f"hippocampus_{i:03d}" for i in (5, 6, 7)}
    assert not individuals["train"] & individuals["validation"]
    assert all(splits["train"].subjects.count(name) == 2 for name in individuals["train"])
    with pytest.raises(UserError, match=r"option 'subjects': 4 for test are asked for, but only 3 are there"):
        hippocampus.load(Options(**{**SMALL, "subjects": (3, 1, 4)}), genseg)


def test_the_decathlons_volumes_are_drawn(decathlon: Path):
    tests = set()
    for seed in range(6):
        splits = hippocampus.load(Options(**SMALL, seed=seed), decathlon).splits
        everybody = [name for split in splits.values() for name in split.individuals]
        assert len(set(everybody)) == len(everybody) == 6
        tests |= {splits["test"].individuals}
    assert len(tests) > 1
    assert len(hippocampus.files(decathlon)) == 14


def test_slices_lie_where_both_parts_are(genseg: Path):
    pair = hippocampus.pairs_of(genseg)["train"][0]
    assert len(hippocampus.slices_of(pair, Options(slices=5))) == 5
    with pytest.raises(UserError, match=r"t1/hippocampus_001\.nii\.gz has 5 sagittal slices with both parts .* but 6"):
        hippocampus.slices_of(pair, Options(slices=6))


@pytest.mark.parametrize("layout", ["genseg", "decathlon"])
def test_the_unlabelled_are_all_slices_of_the_volumes_that_train(layout: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(layout)
    without, splits = (hippocampus.load(Options(**SMALL, unlabelled=flag), folder).splits for flag in (False, True))
    pool, train = splits["unlabelled"], splits["train"]
    assert [*without] == ["train", "validation", "test"]
    assert all(torch.equal(without[name].images, splits[name].images) for name in without)
    assert pool.individuals == train.individuals, "nobody who validates or tests"
    assert pool.images.shape == (3 * 12, 1, 24, 32), "12 from left to right, of which 5 have both parts"
    assert pool.images.dtype == torch.float32
    assert pool.labels.shape == (3 * 12, 24, 32)
    assert pool.labels.dtype == torch.int64
    assert (pool.labels == -1).all()
    for image, subject in zip(train.images, train.subjects, strict=True):
        assert any(torch.equal(image, other) for other in pool.take([subject]).images), "on the same scale"


def test_planes_are_cut_or_padded_around_the_middle():
    plane = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(fit(plane, (3, 4)), plane)
    assert torch.equal(fit(plane, (1, 2)), plane[:, 1:2, 1:3])
    padded = fit(plane, (5, 4))
    assert torch.equal(padded[:, 1:4], plane)
    assert padded[:, 0].sum() == padded[:, 4].sum() == 0


def test_what_is_wrong_is_named(genseg: Path, write_volume: Callable):
    hippocampus.check(genseg)
    labels = genseg / "train" / "t1" / "hippocampus_002.nii.gz"
    write_volume(labels, np.full((12, 20, 16), 3, dtype=np.uint8), voxel=1.0)
    with pytest.raises(UserError, match=r"t1/hippocampus_002\.nii\.gz holds the label 3"):
        hippocampus.check(genseg)
    write_volume(labels, np.ones((12, 20, 15), dtype=np.uint8), voxel=1.0)
    with pytest.raises(UserError, match=r"hippocampus_002\.nii\.gz has 12 x 20 x 15 voxels but its image"):
        hippocampus.check(genseg)
    labels.unlink()
    with pytest.raises(UserError, match=r"t2/hippocampus_002\.nii\.gz has no mask in .*t1"):
        hippocampus.check(genseg)
    pair = hippocampus.volumes(genseg / "val" / "t2", genseg / "val" / "t1")[0]
    write_volume(pair.image, np.ones((12, 20, 16), dtype=np.float32), axes="RAS", voxel=1.0)
    with pytest.raises(UserError, match=r"t2/hippocampus_005\.nii\.gz has almost the same value everywhere"):
        hippocampus.slices_of(pair, Options(**SMALL))
    (genseg / "imagesTr").mkdir()
    with pytest.raises(UserError, match=r"holds both train/ and imagesTr/: put one of the two layouts there"):
        hippocampus.pairs_of(genseg)
    with pytest.raises(UserError, match=r"holds neither train/ nor imagesTr/"):
        hippocampus.pairs_of(genseg / "val")
    with pytest.raises(UserError, match=r"labelsTr holds no file like hippocampus_001"):
        hippocampus.volumes(genseg / "val" / "t2", genseg / "labelsTr")
