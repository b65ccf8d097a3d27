"""The task `skin-lesion` on a small folder in its layout."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from synthrepro.data import skin_lesion
from synthrepro.data.skin_lesion import Options
from synthrepro.errors import UserError

COUNTS = {"size": (12, 16), "subjects": (3, 0, 2)}
IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"


@pytest.fixture
def folder(tmp_path: Path, save_pair: Callable) -> Path:
    for i in range(6):
        name = f"ISIC_{i:07d}"
        save_pair(tmp_path / IMAGES / f"{name}.jpg", tmp_path / MASKS / f"{name}_segmentation.png", seed=i)
    (tmp_path / IMAGES / "ATTRIBUTION.txt").write_text("as in the archive")
    for name in ("IMD002", "IMD003"):
        case = tmp_path / "PH2Dataset" / "PH2 Dataset images" / name
        image, mask = case / f"{name}_Dermoscopic_Image" / f"{name}.bmp", case / f"{name}_lesion" / f"{name}_lesion.bmp"
        save_pair(image, mask)
        (case / f"{name}_roi").mkdir()
    return tmp_path


def test_isic_is_divided_and_ph2_is_a_test_set(folder: Path):
    splits = skin_lesion.load(Options(**COUNTS), folder).splits
    assert {name: split.images.shape for name, split in splits.items()} == {
        "train": (3, 3, 12, 16), "validation": (0, 3, 12, 16), "test": (2, 3, 12, 16), "test-ph2": (2, 3, 12, 16),
    }  # fmt: skip
    assert len({*splits["train"].subjects, *splits["test"].subjects}) == 5
    assert splits["test-ph2"].subjects == ("IMD002", "IMD003")
    assert len(skin_lesion.files(folder)) == 2 * 6 + 2 * 2
    skin_lesion.check(folder)
    shutil.rmtree(folder / "PH2Dataset")
    assert "test-ph2" not in skin_lesion.load(Options(**COUNTS), folder).splits


def test_what_is_wrong_is_named(folder: Path):
    ph2 = folder / "PH2Dataset" / "PH2 Dataset images"
    shutil.rmtree(ph2 / "IMD003" / "IMD003_lesion")
    with pytest.raises(UserError, match=r"IMD003_lesion is missing"):
        skin_lesion.load(Options(**COUNTS), folder)
    shutil.rmtree(ph2)
    with pytest.raises(UserError, match=r"PH2 Dataset images holds no folder like IMD002"):
        skin_lesion.check(folder)
    (folder / MASKS / "ISIC_0000003_segmentation.png").unlink()
    with pytest.raises(UserError, match=r"ISIC_0000003\.jpg has no mask in .*GroundTruth"):
        skin_lesion.check(folder)
