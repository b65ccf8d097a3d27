"""The task `flare22` on a small tree of volumes in its layouts."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from synthrepro.data import check_task, fingerprint, flare22, load_task
from synthrepro.data.flare22 import CLASSES, Options, Preparation, grid_of, read_scan, resample, window_of
from synthrepro.data.pairs import Pair
from synthrepro.errors import UserError

SHAPE, SPACING = (12, 14, 10), (1.0, 1.5, 2.5)  # to the right, forward and up
COUNTS = {"size": (14, 12), "cases": (2, 1, 2), "unlabelled_statistics": 3}
LABELLED, UNLABELLED = 5, 3


def scan(seed: int) -> np.ndarray:
    """HU: noise in a body, air around it, and a bone on the right, in front and above."""
    values = np.random.default_rng(seed).integers(-100, 150, SHAPE).astype(np.int16)
    values[0], values[-1] = -1000, -1000
    values[8:11, 10:13, 7:] = 700 + seed
    return values


def organs() -> np.ndarray:
    """One organ behind the other, all of them on the left."""
    values = np.zeros(SHAPE, dtype=np.uint8)
    for value in range(1, 14):
        values[2:5, value, 3:7] = value
    return values


def write(path: Path, data: np.ndarray, axes: str = "LPS", spacing: Sequence[float] = SPACING) -> Path:
    """Write an array whose axes point right, forward and up, with other axes in the file."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -40, 20, 100
    image = nib.Nifti1Image(data, affine)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(turn), path)
    return path


def tree(root: Path, images: str, labels: str, unlabelled: str, axes: Sequence[str] = ("LPS",)) -> Path:
    for i in range(LABELLED):
        case = f"FLARE22_Tr_{i + 1:04d}"
        write(root / images / f"{case}_0000.nii.gz", scan(i), axes[i % len(axes)])
        write(root / labels / f"{case}.nii.gz", organs(), axes[(i + 1) % len(axes)])
    for i in range(UNLABELLED):
        write(root / unlabelled / f"Case_{i + 1:05d}_0000.nii.gz", scan(10 + i), axes[i % len(axes)])
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    training = "Training/FLARE22_LabeledCase50"
    return tree(
        tmp_path / "flare22", f"{training}/images", f"{training}/labels", "Training/FLARE22_UnlabeledCase1-1000"
    )


# ----- the task


def test_cases_are_divided_with_all_of_their_slices(folder: Path):
    task = load_task("flare22", root=folder.parent, **COUNTS)
    assert task.classes[:3] == ("background", "liver", "right kidney")
    assert len(task.classes) == 14
    assert [*task.splits] == ["train", "validation", "test"]
    assert [len(split.individuals) for split in task.splits.values()] == [2, 1, 2]
    everybody = [case for split in task.splits.values() for case in split.individuals]
    assert sorted(everybody) == [f"FLARE22_Tr_{i:04d}" for i in range(1, 6)], "nobody is in two"
    for split in task.splits.values():
        assert split.images.shape == (10 * len(split.individuals), 1, 14, 12)
        assert split.images.dtype == torch.float32
        assert split.images.min() >= 0
        assert split.images.max() <= 1
        assert split.labels.dtype == torch.int64
        assert split.labels.unique().tolist() == [*range(14)]
        assert len(split.subjects) == len(split.labels)
    test = task.splits["test"].individuals
    assert flare22.load(Options(**{**COUNTS, "cases": (1, 0, 2)}), folder).splits["test"].individuals == test
    drawn = {flare22.load(Options(**COUNTS, seed=seed), folder).splits["test"].individuals for seed in range(5)}
    assert len(drawn) > 1
    assert len(flare22.load(Options(**{**COUNTS, "cases": (1, 0, 1)}), folder).splits["validation"]) == 0


def test_neither_the_folders_nor_the_order_of_axes_matter(folder: Path, tmp_path: Path):
    other = tree(tmp_path / "other", "imagesTr", "labelsTr", "unlabeled/part1", axes=("RAS", "PIR", "SLA"))
    options = Options(**COUNTS, unlabelled=2)
    assert fingerprint(flare22.load(options, folder)) == fingerprint(flare22.load(options, other))


def test_slices_are_the_clipped_scan_seen_from_the_feet(folder: Path):
    splits = flare22.load(Options(**COUNTS), folder).splits
    found = flare22.cases_of(folder)
    low, high = window_of(found["unlabelled"])
    for split in splits.values():
        for case in split.individuals:
            part = split.take([case])
            hu = scan(int(case[-4:]) - 1).transpose(2, 1, 0)[:, ::-1, ::-1].astype(np.float64)
            expected = (hu.clip(low, high) - low) / (high - low)
            assert np.allclose(part.images[:, 0], expected, atol=1e-6)
            assert np.array_equal(part.labels, organs().transpose(2, 1, 0)[:, ::-1, ::-1])
    image, label = splits["test"].images[9, 0], splits["test"].labels[5]
    assert image[1:4, 1:4].min() > 0.99, "bone in front, on the right of the patient, left in the picture, above"
    assert (label == 13).nonzero()[0].tolist() == [0, 7]
    assert (label == 1).nonzero()[-1].tolist() == [12, 9]


def test_the_unlabelled_are_slices_of_the_first_cases(folder: Path):
    without, with_ = (flare22.load(Options(**COUNTS, unlabelled=count), folder).splits for count in (0, 2))
    pool = with_["unlabelled"]
    assert "unlabelled" not in without
    assert all(torch.equal(without[name].images, with_[name].images) for name in without), "the same percentiles"
    assert pool.subjects == ("Case_00001",) * 10 + ("Case_00002",) * 10
    assert pool.images.shape == (20, 1, 14, 12)
    assert pool.labels.shape == (20, 14, 12)
    assert pool.labels.dtype == torch.int64
    assert (pool.labels == -1).all()
    assert pool.labels.untyped_storage().nbytes() == 8, "they take no memory"
    some = flare22.load(Options(**COUNTS, unlabelled=2, unlabelled_slices=3), folder).splits["unlabelled"]
    assert some.subjects == ("Case_00001",) * 3 + ("Case_00002",) * 3
    assert torch.equal(some.images, pool.images[[1, 5, 8, 11, 15, 18]])
    many = flare22.load(Options(**COUNTS, unlabelled=1, unlabelled_slices=99), folder).splits["unlabelled"]
    assert torch.equal(many.images, pool.images[:10])


def test_a_folder_without_unlabelled_cases_can_do_with_those_that_train(folder: Path):
    options = Options(**{**COUNTS, "unlabelled_statistics": 0})
    found = flare22.cases_of(folder)["labelled"]
    for path in folder.rglob("Case_*"):
        path.unlink()
    train = flare22.load(options, folder).splits["train"]
    low, high = window_of(case for case in found if case.subject in train.individuals)
    hu = scan(int(train.subjects[0][-4:]) - 1).transpose(2, 1, 0)[:, ::-1, ::-1].astype(np.float64)
    assert np.allclose(train.images[:10, 0], (hu.clip(low, high) - low) / (high - low), atol=1e-6)
    with pytest.raises(UserError, match=r"'unlabelled_statistics': 3 cases like Case_00001_0000\.nii\.gz .* has 0"):
        flare22.load(Options(**COUNTS), folder)
    with pytest.raises(UserError, match=r"option 'unlabelled': 1 cases like Case_00001_0000\.nii\.gz .* has 0: put"):
        flare22.load(options.model_copy(update={"unlabelled": 1}), folder)


def test_the_spacing_is_the_median_of_the_labelled_cases_if_not_given(folder: Path):
    sizes = [(1, 1.5, 2), (1, 1, 3), (2, 1, 4), (3, 2, 2), (3, 3, 2)]
    for case, spacing in zip(flare22.cases_of(folder)["labelled"], sizes, strict=True):
        write(case.image, scan(0), spacing=spacing)
        write(case.masks[0], organs(), spacing=spacing)
    by_median, given = (flare22.load(Options(**COUNTS, spacing=spacing), folder) for spacing in (None, (2.0, 1.5, 2.0)))
    assert fingerprint(by_median) == fingerprint(given)
    test = given.splits["test"]
    for case in test.individuals:
        assert test.subjects.count(case) == 10 * sizes[int(case[-4:]) - 1][2] / 2


# ----- percentiles, resampling


def test_percentiles_are_of_all_voxels_of_a_volume_each(tmp_path: Path):
    spacings = [(1.0, 1.0, 1.0), (0.8, 0.8, 5.0), (2.0, 1.0, 1.0)]
    scans = [scan(seed) * (seed + 1) - 100 * seed for seed in range(3)]
    scans[1][1:11, :2, 0] = np.arange(2000, 2020).reshape(10, 2)  # within 0.5 % by volume, not by voxels
    cases = [
        Pair(str(i), write(tmp_path / f"{i}.nii.gz", values, spacing=spacing), ())
        for i, (values, spacing) in enumerate(zip(scans, spacings, strict=True))
    ]
    for chosen in ([0], [1], [0, 1, 2]):
        values = np.concatenate([scans[i].ravel() for i in chosen])
        weights = np.repeat([np.prod(spacings[i]) for i in chosen], scans[0].size)
        expected = np.percentile(values, (0.5, 99.5), method="inverted_cdf", weights=weights)
        assert window_of(cases[i] for i in chosen) == tuple(expected)


def test_resampling_keeps_a_linear_function(tmp_path: Path):
    right, forward, up = (
        (np.arange(count) + 0.5) * side for count, side in zip(SHAPE, SPACING, strict=True)
    )  # mm from the volume's corner
    ramp = -900 + 50 * right[:, None, None] + 30 * forward[:, None] + 20 * up
    case = Pair("ramp", write(tmp_path / "ramp.nii.gz", ramp.astype(np.float32)), ())
    preparation = Preparation((0.6, 0.75, 1.0), (-1000, 1000), (4, 4))
    shape = preparation.shape(grid_of(case.image))
    assert shape == (25, 28, 20)
    planes = resample(read_scan(case).astype(np.float64), shape)
    up, forward, right = ((np.arange(n) + 0.5) * s for n, s in zip(shape, (1.0, 0.75, 0.6), strict=True))
    expected = -900 + 50 * right[::-1] + 30 * forward[::-1, None] + 20 * up[:, None, None]
    inside = [slice(2, -2)] * 3  # beyond the middles of the outermost voxels it is constant
    assert np.allclose(planes.numpy()[*inside], expected[*inside], atol=1e-4)


def test_labels_become_those_of_the_nearest_voxel():
    planes = np.random.default_rng(0).integers(0, 14, (4, 5, 6), dtype=np.uint8)
    doubled = resample(planes, (8, 10, 12))
    assert doubled.dtype == torch.uint8
    assert np.array_equal(doubled, planes.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    third = resample(planes.repeat(3, 0).repeat(3, 1).repeat(3, 2), (4, 5, 6))
    assert np.array_equal(third, planes)


def test_slices_are_resized_after_resampling(folder: Path):
    case = flare22.cases_of(folder)["labelled"][0]
    whole, small = (Preparation(SPACING, (-1000.0, 1000.0), size) for size in ((14, 12), (7, 6)))
    assert small.images(case).shape == (10, 1, 7, 6)
    assert torch.equal(small.labels(case), whole.labels(case)[:, 1::2, 1::2])
    striped = scan(0)
    striped[:] = -1000
    striped[3::4] = 1000  # from the right of the patient the first column and every fourth after it
    write(case.image, striped)
    quarter = Preparation(SPACING, (-1000.0, 1000.0), (14, 3)).images(case)
    assert torch.allclose(quarter[..., 1], torch.tensor(0.25)), "the mean of four columns, not the two in their middle"


# ----- what is wrong


def test_files_and_checks(folder: Path):
    report = check_task("flare22", root=folder.parent)
    assert report.problem is None
    assert len(report.present) == 2 * LABELLED + UNLABELLED
    image = folder / "Training" / "FLARE22_LabeledCase50" / "images" / "FLARE22_Tr_0002_0000.nii.gz"
    image.rename(folder / "away.nii.gz")
    assert "labels/FLARE22_Tr_0002.nii.gz is a mask without a picture" in check_task("flare22", folder.parent).problem
    for name in ("FLARE22_Tr_0002_0000.nii.gz", "deeper/FLARE22_Tr_0002_0000.nii.gz"):
        write(folder / name, scan(1))
    problem = check_task("flare22", folder.parent).problem
    assert "deeper/FLARE22_Tr_0002_0000.nii.gz and " in problem
    assert "are of the same case: keep one of them" in problem
    assert "holds no file like FLARE22_Tr_0001_0000.nii.gz" in check_task("flare22", folder).problem


def test_more_cases_than_there_are_is_an_error_of_the_option(folder: Path):
    for options, words in (
        ({"cases": (3, 1, 2)}, r"Task flare22, option 'cases': 6 are asked for, but .*flare22 has 5 labelled"),
        ({"unlabelled": 4}, r"option 'unlabelled': 4 cases like .* asked for, but .*flare22 has 3"),
        ({"unlabelled_statistics": 50}, r"option 'unlabelled_statistics': 50 cases like .* has 3"),
        ({"spacing": (1, 1, 30)}, r"option 'spacing\.2': .* less than or equal to 20"),
        ({"cases": (0, 1, 1)}, r"option 'cases\.0'"),
    ):
        with pytest.raises(UserError, match=words):
            load_task("flare22", root=folder.parent, **{**COUNTS, **options})


def test_a_case_may_lack_an_organ_but_not_all_of_them(folder: Path):
    cases = flare22.cases_of(folder)["labelled"]
    lacking = organs()
    lacking[lacking == 9] = 0
    for case in cases[:-1]:
        write(case.masks[0], lacking)
    flare22.check(folder)
    flare22.load(Options(**COUNTS), folder)
    write(cases[-1].masks[0], lacking)
    words = r"None of the 5 label maps read in .*labels has the label 9 \(gallbladder\)"
    with pytest.raises(UserError, match=words):
        flare22.check(folder)
    with pytest.raises(UserError, match=words):
        flare22.load(Options(**COUNTS), folder)


def oblique(degrees: float) -> np.ndarray:
    turn, (cos, sin) = np.eye(4), (np.cos(np.radians(degrees)), np.sin(np.radians(degrees)))
    turn[:2, :2] = [[cos, -sin], [sin, cos]]
    return turn @ np.diag([*SPACING, 1.0])


IMAGES = {
    "no orientation": (nib.Nifti1Image(scan(0), None), r"does not say how the patient lies \(qform and sform codes"),
    "spacing": (nib.Nifti1Image(scan(0), np.diag([1.0, 1.0, 25.0, 1.0])), r"a side of its voxels measures 25 mm"),
    "oblique": (nib.Nifti1Image(scan(0), oblique(15)), r"has axes that are more than 10 degrees off the patient's"),
    "4-D": (nib.Nifti1Image(scan(0)[..., None].repeat(2, 3), np.eye(4)), r"has the shape \(12, 14, 10, 2\)"),
    "windowed": (nib.Nifti1Image((scan(0) + 1000).astype(np.float32) / 2000, np.eye(4)), r"from 0 to 0\.85, which are"),
    "8 bits": (nib.Nifti1Image((scan(0) + 1000).clip(0, 255).astype(np.uint8), np.eye(4)), r"from 0 to 255, which are"),
    "no bone": (nib.Nifti1Image(scan(0).clip(-1000, 200), np.eye(4)), r"from -1000 to 200, which are no Hounsfield"),
    "too much": (nib.Nifti1Image(scan(0).astype(np.int32) * 100, np.eye(4)), r"from -100000 to 70000, which are no"),
    "NaN": (nib.Nifti1Image(np.full(SHAPE, np.nan, np.float32), np.eye(4)), r"holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["FLARE22_Tr_0003_0000.nii.gz", "Case_00002_0000.nii.gz"])
def test_what_is_wrong_with_a_scan_is_named(folder: Path, name: str, kind: str):
    image, words = IMAGES[kind]
    (path,) = folder.rglob(name)
    nib.save(image, path)
    for action in (flare22.check, lambda folder: flare22.load(Options(**COUNTS), folder)):
        with pytest.raises(UserError, match=rf"{name} .*{words}"):
            action(folder)


def test_a_header_that_says_two_things_about_a_voxel_is_named(folder: Path):
    (path,) = folder.rglob("Case_00001_0000.nii.gz")
    image = nib.Nifti1Image(scan(0), np.diag([*SPACING, 1.0]))
    image.header["pixdim"][3] = 5.0
    nib.save(image, path)
    words = r"its voxels measure 1 x 1\.5 x 5 mm, but its affine says 1 x 1\.5 x 2\.5 mm"
    with pytest.raises(UserError, match=rf"Case_00001_0000\.nii\.gz .*{words}"):
        flare22.check(folder)


def test_a_patient_may_lie_a_little_askew(tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(scan(0), oblique(8)), path)
    assert np.allclose(grid_of(path).spacing, SPACING)
    assert grid_of(path).shape == SHAPE


def test_what_is_wrong_with_labels_is_named(folder: Path):
    labels = flare22.cases_of(folder)["labelled"][1].masks[0]
    elsewhere = r"FLARE22_Tr_0002\.nii\.gz and its image FLARE22_Tr_0002_0000\.nii\.gz lie at different places"
    for values, spacing, words in (
        (organs() + (organs() == 13), SPACING, r"labels/FLARE22_Tr_0002\.nii\.gz holds the label 14"),
        (organs() * 0, SPACING, r"FLARE22_Tr_0002\.nii\.gz labels nothing"),
        (organs() * np.float32(0.5), SPACING, r"FLARE22_Tr_0002\.nii\.gz holds values that are not whole numbers"),
        (organs()[:-1], SPACING, r"Tr_0002\.nii\.gz has 11 x 14 x 10 voxels but its image .* has 12 x 14 x 10"),
        (organs(), (1.0, 1.5, 2.0), elsewhere),
    ):
        write(labels, values, spacing=spacing)
        with pytest.raises(UserError, match=words):
            flare22.check(folder)
    labels.write_bytes(b"no volume")
    with pytest.raises(UserError, match=r"FLARE22_Tr_0002\.nii\.gz cannot be read"):
        flare22.load(Options(**COUNTS), folder)


def test_a_scan_that_was_broken_off_is_named(folder: Path):
    (path,) = folder.rglob("Case_00003_0000.nii.gz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"Case_00003_0000\.nii\.gz cannot be read"):
        flare22.load(Options(**COUNTS), folder)


def test_the_classes_are_in_the_order_of_the_files():
    assert ", ".join(CLASSES[1:]) == (
        "liver, right kidney, spleen, pancreas, aorta, inferior vena cava, right adrenal gland, left adrenal gland, "
        "gallbladder, esophagus, stomach, duodenum, left kidney"
    )
