"""The task `breast-us` on a small folder in its layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from synthrepro.data import breast_us, check_task, load_task
from synthrepro.data.breast_us import Options
from synthrepro.errors import UserError

COUNTS = {"size": (12, 16), "subjects": (3, 1, 4)}


@pytest.fixture
def folder(tmp_path: Path, save_pair: Callable) -> Path:
    root = tmp_path / "breast-us"
    for i in range(1, 6):
        for kind in ("benign", "malignant", "normal"):
            path = root / "BUSI" / kind / f"{kind} ({i}).png"
            save_pair(path, path.with_name(f"{path.stem}_mask.png"), shape=(24 + i, 32), seed=i)
    busi = root / "BUSI" / "benign"
    save_pair(busi / "benign (2).png", *(busi / f"benign (2)_mask{end}.png" for end in ("", "_1")), shape=(24, 32))
    save_pair(busi / "other.png", busi / "benign (4)_mask_1.png", shape=(9, 9))  # as published
    for name in ("bus_0001-l", "bus_0001-r", "bus_0002-s"):
        mask = root / "BUS-BRA" / "Masks" / name.replace("bus", "mask")
        save_pair(root / "BUS-BRA" / "Images" / f"{name}.png", mask.with_suffix(".png"))
    return root


def test_busi_is_divided_and_bus_bra_is_a_test_set(folder: Path):
    task = load_task("breast-us", root=folder.parent, **COUNTS)
    assert task.classes == ("background", "lesion")
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 3, "validation": 1, "test": 4, "test-bus-bra": 3,
    }  # fmt: skip
    subjects = [subject for name in ("train", "validation", "test") for subject in task.splits[name].subjects]
    assert len({*subjects}) == 8
    assert not [subject for subject in subjects if "normal" in subject]
    assert task.splits["test-bus-bra"].subjects == ("bus_0001", "bus_0001", "bus_0002")
    images, labels = task.splits["train"].images, task.splits["train"].labels
    assert images.shape == (3, 1, 12, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) == {0, 1}


def test_two_masks_of_a_picture_are_united_and_the_misfit_is_left_out(folder: Path):
    found = {pair.subject: pair for pair in breast_us.pairs_of(folder)["busi"]}
    assert len(found) == 9
    assert "benign (4)" not in found
    assert [path.name for path in found["benign (2)"].masks] == ["benign (2)_mask.png", "benign (2)_mask_1.png"]
    assert len(found["malignant (4)"].masks) == 1


def test_bus_bra_with_coloured_masks_under_the_names_of_the_images(folder: Path, save_picture: Callable):
    other = folder.parent / "other" / "breast-us"
    other.mkdir(parents=True)
    (folder / "BUSI").rename(other / "BUSI")
    for k, name in enumerate(("benign_0804-s", "2-malignant_0213-r", "malignant_0213-l")):
        mask = np.zeros((16, 16, 3), dtype=np.uint8)
        mask[4:12, 4:12, k % 2] = 255
        picture = np.tile(np.arange(16, dtype=np.uint8), (16, 1))
        save_picture(other / "BUS-BRA" / "images" / f"{name}.png", picture)
        save_picture(other / "BUS-BRA" / "masks" / f"{name}.png", mask)
    split = breast_us.load(Options(**COUNTS), other).splits["test-bus-bra"]
    assert sorted(split.subjects) == ["bus_0213", "bus_0213", "bus_0804"]
    assert (split.labels.sum((1, 2)) == 6 * 8).all()


def test_without_bus_bra_there_is_no_such_test_set(folder: Path):
    (folder / "BUS-BRA").rename(folder / "later")
    assert [*breast_us.load(Options(**COUNTS), folder).splits] == ["train", "validation", "test"]


def test_the_report_counts_files_and_names_what_is_wrong(folder: Path):
    report = check_task("breast-us", root=folder.parent)
    assert report.problem is None
    assert len(report.present) == 9 * 2 + 1 + 3 * 2
    mask = folder / "BUSI" / "malignant" / "malignant (3)_mask.png"
    mask.rename(folder / "away.png")
    report = check_task("breast-us", root=folder.parent)
    assert report.missing == (folder,)
    assert "malignant (3).png has no mask in" in report.problem
    with pytest.raises(UserError, match=r"malignant \(3\)\.png has no mask"):
        breast_us.load(Options(**COUNTS), folder)
    assert "BUSI/benign is missing" in check_task("breast-us", root=folder / "nowhere").problem


def test_more_subjects_than_there_are_is_an_error_of_the_option(folder: Path):
    with pytest.raises(UserError, match=r"Task breast-us, option 'subjects': 30 for test \+ 8 .* only 9 are there"):
        load_task("breast-us", root=folder.parent)
    with pytest.raises(UserError, match=r"Task breast-us, option 'subjects\.0'"):
        load_task("breast-us", root=folder.parent, subjects=(0, 1, 1))
