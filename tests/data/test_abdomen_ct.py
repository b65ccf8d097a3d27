"""The task `abdomen-ct` on a small folder in its layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from synthrepro.data import abdomen_ct, check_task, fingerprint, load_task
from synthrepro.data.abdomen_ct import COLOURS, Options
from synthrepro.errors import UserError

COUNTS = {"size": (64, 64), "patients": (2, 1, 1)}
SLICES = {"10001": (458, 1), "10002": (46, 145, 226), "10003": (7,), "10004": (20, 100)}


def mask(place: int = 0) -> np.ndarray:
    """A square of 64 x 64 for each organ, one after another from left to right."""
    values = np.zeros((512, 512, 3), dtype=np.uint8)
    for organ in (1, 2, 3):
        values[128:192, 128 * organ + place : 128 * organ + place + 64] = COLOURS[organ]
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_picture: Callable) -> Path:
    root = tmp_path_factory.mktemp("abdomen")
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
    for k, (patient, numbers) in enumerate(SLICES.items()):
        for i, number in enumerate(numbers):
            picture = noise.copy()
            picture[:256] = number % 256  # tells the slices apart
            folder = root / f"annotator{1 + (k + i) % 3}"
            save_picture(folder / "images" / f"{patient}_{number}.png", picture)
            save_picture(folder / "masks" / f"{patient}_{number}.png", mask())
    (root / "README.txt").write_text("beside them")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil, as links."""
    root = tmp_path / "abdomen-ct"
    for path in made.glob("annotator*/*/*.png"):
        link = root / path.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return root


def test_patients_are_divided_with_all_of_their_slices(made: Path):
    task = abdomen_ct.load(Options(**COUNTS), made)
    assert task.classes == ("background", "pancreas", "kidney", "liver")
    assert {name: len(split.individuals) for name, split in task.splits.items()} == {
        "train": 2, "validation": 1, "test": 1,
    }  # fmt: skip
    everybody = [patient for split in task.splits.values() for patient in split.subjects]
    assert sorted(everybody) == sorted(patient for patient, numbers in SLICES.items() for _ in numbers)
    parts = [split.individuals for split in task.splits.values()]
    assert sorted(patient for part in parts for patient in part) == sorted(SLICES), "nobody is in two"
    assert len({fingerprint(abdomen_ct.load(Options(**COUNTS, seed=seed), made)) for seed in range(4)}) > 1
    for seed in range(3):
        few, many = (
            abdomen_ct.load(Options(size=(8, 8), patients=counts, seed=seed), made).splits["test"].subjects
            for counts in ((1, 0, 1), (2, 1, 1))
        )
        assert few == many, "who tests does not depend on the others"


def test_slices_and_labels_have_their_values_sizes_and_order(made: Path):
    splits = abdomen_ct.load(Options(**COUNTS), made).splits
    grey: dict[str, list[float]] = {}
    for split in splits.values():
        assert split.images.shape[1:] == (1, 64, 64)
        assert split.images.dtype == torch.float32
        assert split.images.min() >= 0
        assert split.images.max() <= 1
        assert split.labels.dtype == torch.int64
        for image, label, patient in zip(split.images, split.labels, split.subjects, strict=True):
            grey.setdefault(patient, []).append(round(float(image[0, 0, 0]) * 255))
            expected = torch.zeros(64, 64, dtype=torch.int64)
            for organ in (1, 2, 3):
                expected[16:24, 16 * organ : 16 * organ + 8] = organ
            assert torch.equal(label, expected)
    assert grey == {patient: sorted(numbers, key=int) for patient, numbers in SLICES.items()} | {
        "10001": [1, 458 % 256]
    }


def test_at_full_size_nothing_is_changed(made: Path):
    pair = abdomen_ct.pairs_of(made)["curvas"][0]
    sample = abdomen_ct.read_sample(pair, (512, 512))
    values, classes = abdomen_ct.read_slice(pair)
    assert torch.allclose(sample.image[0], torch.from_numpy(values), atol=1e-6)
    assert np.array_equal(sample.label.numpy(), classes)


def test_shrinking_averages(folder: Path, save_picture: Callable):
    pair = abdomen_ct.pairs_of(folder)["curvas"][0]
    striped = np.zeros((512, 512), dtype=np.uint8)
    striped[:, ::4] = 255
    pair.image.unlink()
    save_picture(pair.image, striped)
    quarter = abdomen_ct.read_sample(pair, (128, 128)).image[0, :, 1:-1]
    assert torch.allclose(quarter, torch.tensor(0.25), atol=1e-6), (
        "the mean of four columns, not the two in their middle"
    )


def test_the_unlabelled_are_the_training_patients_without_labels(made: Path):
    without, with_ = (abdomen_ct.load(Options(**COUNTS, unlabelled=flag), made).splits for flag in (False, True))
    assert "unlabelled" not in without
    pool = with_["unlabelled"]
    assert torch.equal(pool.images, without["train"].images)
    assert pool.subjects == without["train"].subjects
    assert pool.labels.dtype == torch.int64
    assert (pool.labels == -1).all()
    assert pool.labels.shape == without["train"].labels.shape
    assert torch.equal(with_["train"].labels, without["train"].labels)


def test_the_report_counts_files(folder: Path):
    report = check_task("abdomen-ct", root=folder.parent)
    assert report.problem is None
    assert len(report.present) == 2 * sum(len(numbers) for numbers in SLICES.values())
    (folder / "annotator1" / "masks" / "10001_458.png").unlink()
    report = check_task("abdomen-ct", root=folder.parent)
    assert "annotator1/images/10001_458.png has no mask in" in report.problem
    assert "holds no folder annotator1" in check_task("abdomen-ct", root=folder).problem


def test_too_many_patients_are_an_error_of_the_option(folder: Path):
    with pytest.raises(UserError, match=r"option 'patients': 14 are asked for, but .*abdomen-ct has only 4"):
        load_task("abdomen-ct", root=folder.parent)
    with pytest.raises(UserError, match=r"Task abdomen-ct, option 'patients\.0'"):
        load_task("abdomen-ct", root=folder.parent, patients=(0, 1, 1))


def painted(values: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    values = values.copy()
    values[300, 300] = colour
    return values


PLAIN = np.arange(512 * 512).reshape(512, 512)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("masks", painted(mask(), (255, 0, 254)), r"masks/10001_458\.png has the colour \(255, 0, 254\), which stands"),
        ("masks", painted(mask(), (1, 1, 1)), r"10001_458\.png has the colour \(1, 1, 1\)"),
        ("masks", mask()[..., 0], r"masks/10001_458\.png is no RGB picture of 8 bits \(its pixels are .* kind L\)"),
        ("masks", mask()[:256], r"masks/10001_458\.png has 512 x 256 pixels instead of 512 x 512"),
        ("images", PLAIN.astype(np.uint16), r"images/10001_458\.png is no grey picture of 8 bits .* kind I;16"),
        ("images", mask(), r"images/10001_458\.png is no grey picture of 8 bits .* kind RGB"),
        ("images", PLAIN[:, :400].astype(np.uint8), r"images/10001_458\.png has 400 x 512 pixels"),
        ("images", np.zeros((512, 512), dtype=np.uint8), r"images/10001_458\.png has the same value everywhere"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    folder: Path, save_picture: Callable, kind: str, values: np.ndarray, words: str
):
    path = folder / "annotator1" / kind / "10001_458.png"
    path.unlink()
    save_picture(path, values)
    with pytest.raises(UserError, match=words):
        abdomen_ct.check(folder)
    with pytest.raises(UserError, match=words):
        abdomen_ct.load(Options(**COUNTS), folder)


def test_a_broken_file_and_one_that_is_there_twice_are_named(folder: Path):
    image = folder / "annotator2" / "images" / "10001_1.png"
    whole = image.read_bytes()
    image.unlink()
    image.write_bytes(whole[:-2000])
    with pytest.raises(UserError, match=r"annotator2/images/10001_1\.png cannot be read"):
        abdomen_ct.check(folder)
    for kind in ("images", "masks"):
        (folder / "annotator3" / kind / "10001_1.png").write_bytes(whole)
    with pytest.raises(
        UserError, match=r"annotator3/.*10001_1\.png shows the same slice as .*annotator2/.*10001_1\.png"
    ):
        abdomen_ct.check(folder)
    (folder / "annotator3" / "images" / "10001_1.png").unlink()
    with pytest.raises(UserError, match=r"annotator3/masks/10001_1\.png is a mask without a picture"):
        abdomen_ct.check(folder)
