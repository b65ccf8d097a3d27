"""The task `wound` on a small folder in its layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from synthrepro.data import wound
from synthrepro.data.wound import Options
from synthrepro.errors import UserError

COUNTS = {"size": (12, 12), "subjects": (4, 1)}


@pytest.fixture
def folder(tmp_path: Path, save_pair: Callable) -> Path:
    def put(part: str, name: str, value: int) -> None:
        image, mask = (tmp_path / part / kind / f"{name}.png" for kind in ("images", "labels"))
        save_pair(image, mask, shape=(24, 24), value=value, seed=len(name))

    for i in range(1, 8):
        put("FUSeg/train", f"{i:04d}", 255 if i > 1 else 0)  # the first without a wound
        put("FUSeg/validation", f"{i + 20:04d}", 255 if i > 2 else 0)
    for name in ("foot-ulcer-0001", "foot-ulcer1-2", "foot-ulcer-0027"):
        for copy in ("", "_1", "_2", "_3"):
            put("Medetec/train", name + copy, 1)
    put("Medetec/test", "foot-ulcer-0027", 1)
    return tmp_path


def test_the_publishers_division_holds_and_copies_are_not_read(folder: Path):
    task = wound.load(Options(**COUNTS), folder)
    splits = {name: split.subjects for name, split in task.splits.items()}
    assert {name: len(subjects) for name, subjects in splits.items()} == {
        "train": 4, "validation": 1, "test": 5, "test-medetec": 3,
    }  # fmt: skip
    assert {*splits["train"], *splits["validation"]} < {f"{i:04d}" for i in range(2, 8)}
    assert splits["test"] == tuple(f"{i:04d}" for i in range(23, 28))
    assert splits["test-medetec"] == ("foot-ulcer-0001", "foot-ulcer-0027", "foot-ulcer1-2")
    for split in task.splits.values():
        assert split.images.shape[1:] == (3, 12, 12)
        assert (split.labels.sum((1, 2)) == 16).all(), "masks of 0 and 255 and of 0 and 1"
    channels = task.splits["train"].images[0]
    assert not np.allclose(channels[0], channels[1]), "in colour"


def test_a_photograph_without_a_wound_counts_for_nobody(folder: Path):
    assert len(wound.load(Options(size=(12, 12), subjects=(6, 0)), folder).splits["train"]) == 6
    with pytest.raises(UserError, match=r"1 for validation \+ 6 for train are asked for, but only 6 with foreground"):
        wound.load(Options(size=(12, 12), subjects=(6, 1)), folder)
    with pytest.raises(UserError, match=r"but only 7 are there"):
        wound.load(Options(size=(12, 12), subjects=(7, 1)), folder)


def test_files_and_checks(folder: Path):
    assert len(wound.files(folder)) == 2 * (7 + 7 + 3)
    wound.check(folder)
    (folder / "FUSeg" / "validation" / "images" / "0023.png").unlink()
    with pytest.raises(UserError, match=r"labels/0023\.png is a mask without a picture"):
        wound.check(folder)
