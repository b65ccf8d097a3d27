"""The task `lung-xray` on a small folder in its layout."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from synthrepro.data import lung_xray
from synthrepro.data.lung_xray import Options
from synthrepro.data.pairs import RAW_SIDE, RAW_TOP
from synthrepro.errors import UserError

COUNTS = {"size": (24, 24), "subjects": (2, 1, 2)}


@pytest.fixture
def folder(tmp_path: Path, save_pair: Callable) -> Path:
    for i in range(1, 6):
        name, fold = f"JPC{'LN'[i % 2]}N{i:03d}", f"fold{1 + i % 2}"
        masks = (tmp_path / fold / "masks" / side / f"{name}.gif" for side in ("left lung", "right lung"))
        save_pair(tmp_path / "All247images" / f"{name}.png", *masks, shape=(24, 24), seed=i)
        save_pair(tmp_path / "All247images" / f"{name}.png", shape=(48, 48), seed=i)  # twice as fine as the masks
        save_pair(tmp_path / "x.png", tmp_path / fold / "masks" / "heart" / f"{name}.gif")
    for name in ("MCUCXR_0001_0", "MCUCXR_0108_1"):
        root = tmp_path / "MontgomerySet"
        masks = (root / "ManualMask" / side / f"{name}.png" for side in ("leftMask", "rightMask"))
        save_pair(root / "CXR_png" / f"{name}.png", *masks, shape=(24, 30))
    for i in range(1, 4):
        root = tmp_path / "ChinaSet_AllFiles"
        name = f"CHNCXR_{i:04d}_0"
        masks = (root / "mask" / f"{name}_mask.png",) if i != 2 else ()
        save_pair(root / "CXR_png" / f"{name}.png", *masks, shape=(30, 24))
    return tmp_path


def test_lungs_are_merged_and_radiographs_without_a_mask_left_out(folder: Path):
    splits = lung_xray.load(Options(**COUNTS), folder).splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 2, "validation": 1, "test": 2, "test-montgomery": 2, "test-shenzhen": 2,
    }  # fmt: skip
    together = [subject for name in ("train", "validation", "test") for subject in splits[name].subjects]
    assert len({*together}) == 5
    both = np.zeros((24, 24), dtype=int)
    both[:8, :8] = both[8:16, 8:16] = 1
    for name in ("train", "validation", "test"):
        assert splits[name].images.shape[1:] == (1, 24, 24)
        assert (splits[name].labels.numpy() == both).all()
    assert splits["test-shenzhen"].subjects == ("CHNCXR_0001_0", "CHNCXR_0003_0")
    assert len(lung_xray.files(folder)) == 3 * 5 + 3 * 2 + 2 * 2
    lung_xray.check(folder)


def test_the_sets_of_the_nlm_may_be_absent(folder: Path):
    shutil.rmtree(folder / "MontgomerySet")
    shutil.rmtree(folder / "ChinaSet_AllFiles")
    assert [*lung_xray.load(Options(**COUNTS), folder).splits] == ["train", "validation", "test"]


def test_the_published_raw_form_reads_like_its_conversion(tmp_path: Path, save_picture: Callable):
    values = np.linspace(0, RAW_TOP, RAW_SIDE).astype(">u2")[None].repeat(RAW_SIDE, 0)
    converted = (255 - values.astype(np.float32) / RAW_TOP * 255).round().astype(np.uint8)
    save_picture(tmp_path / "All247images" / "JPCLN001.png", converted)
    values.tofile(tmp_path / "All247images" / "JPCLN002.IMG")
    mask = np.zeros((RAW_SIDE // 2, RAW_SIDE // 2), dtype=np.uint8)
    mask[: RAW_SIDE // 4] = 255
    for k in (1, 2):
        for side in ("left", "right"):
            save_picture(tmp_path / f"fold{k}" / "masks" / f"{side} lung" / f"JPCLN00{k}.gif", mask)
    splits = lung_xray.load(Options(size=(16, 16), subjects=(1, 0, 1)), tmp_path).splits
    first, second = splits["train"][0], splits["test"][0]
    assert {first.subject, second.subject} == {"JPCLN001", "JPCLN002"}
    assert (first.image - second.image).abs().max() < 0.01
    assert (first.image[0, :, 0] > first.image[0, :, -1]).all(), "the greatest value is the darkest"
    assert first.label.sum() == second.label.sum() == 8 * 16


def test_what_is_wrong_is_named(folder: Path):
    (folder / "fold2" / "masks" / "right lung" / "JPCNN003.gif").unlink()
    with pytest.raises(UserError, match=r"JPCNN003\.png has no mask in .*right lung"):
        lung_xray.check(folder)
    shutil.rmtree(folder / "fold1")
    with pytest.raises(UserError, match=r"fold1/masks/left lung is missing"):
        lung_xray.check(folder)
