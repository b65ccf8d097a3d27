"""The tasks `neurite-oasis`, `abide` and `oasis3`, on small trees of their layouts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthrepro.data import abide, cohorts, neurite_oasis, oasis3
from synthrepro.data.brain_oasis import CLASSES, UNLABELLED
from synthrepro.data.cohorts import part
from synthrepro.errors import UserError

SMALL = {"size": (36, 32), "spacing": 5.0, "slices": 6}
ASEG = {1: 41, 2: 42, 3: 43, 4: 10, 5: 50, 6: 12, 7: 52, 8: 17, 9: 54, 10: 8, 11: 46, 12: 16, 13: 24}
TABLE = {1: "Left-Cerebral-White-Matter", 2: "Left-Cerebral-Cortex", 3: "Right-Inf-Lat-Ventricle", 4: "Left-Thalamus",
         5: "Right-Accumbens", 6: "Left-Putamen", 7: "Right-Pallidum", 8: "Left-Hippocampus", 9: "Right-Amygdala",
         10: "Left-Cerebellum-Cortex", 11: "Right-Cerebellum-White-Matter", 12: "Left-Ventral-DC"}  # fmt: skip
# As in the archives, numbers count up and are not FreeSurfer's; here they do so from behind.
NEURITE = {value: 13 - value for value in TABLE}
LUT = "".join(
    f"{n:3d}  {name:<40} 245 245 245 0\n" for n, name in [(0, "Unknown")] + [(NEURITE[v], TABLE[v]) for v in TABLE]
)


def write_slice(path: Path, plane: np.ndarray) -> None:
    """A coronal slice as in the archive: first axis to the left, second down, third of length one."""
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(plane[::-1, ::-1, None], np.eye(4)), path)


@pytest.fixture(scope="module")
def neurite(tmp_path_factory: pytest.TempPathFactory, head: Callable, write_volume: Callable) -> Path:
    root = tmp_path_factory.mktemp("data") / "neurite-oasis"
    names = [f"OASIS_OAS1_{i:04d}_MR1" for i in range(1, 11)]
    for i, name in enumerate(names):
        person = head(seed=i, zoom=0.94 + i / 100)
        scan = (person.scan / 1100).clip(0, 1).astype(np.float32)
        labels = person.labels(NEURITE).astype(np.float32)
        write_volume(root / name / "aligned_norm.nii.gz", scan, axes="LIA")
        write_volume(root / name / "aligned_seg35.nii.gz", labels, axes="LIA")
        pixels = np.ones((5, 5))  # slices have pixels of 1 mm
        plane = np.kron(np.where(person.classes == 13, 2, person.classes)[:, 22], pixels).astype(int)
        plane[100:103, 100:] *= plane[100:103, 100:] != 2  # a sulcus that closing can bridge
        numbers = np.array([NEURITE.get(value, 0) for value in range(13)], dtype=np.float32)
        write_slice(root / name / "slice_norm.nii.gz", np.kron(scan[:, 22], pixels).astype(np.float32))
        write_slice(root / name / "slice_seg24.nii.gz", numbers[plane])
    (root / "subjects.txt").write_text("\n".join(names) + "\n")
    for count in (24, 35):
        (root / f"seg{count}_labels.txt").write_text(LUT)
    return root


def freesurfer(folder: Path, person: object, write_volume: Callable) -> None:
    write_volume(folder / "norm.mgz", person.scan.astype(np.float32) / 8, axes="LIA")
    write_volume(folder / "aseg.mgz", person.labels(ASEG).astype(np.int32), axes="LIA")


@pytest.fixture
def abide_folder(tmp_path: Path, head: Callable, write_volume: Callable) -> Path:
    for i, name in enumerate(["Caltech_0051456", "CMU_a_0050642", "NYU_0050954", "Pitt_0050002", "Yale_0050601"]):
        freesurfer(tmp_path / "abide" / name / "mri", head(seed=i, zoom=0.94 + i / 100), write_volume)
    return tmp_path / "abide"


@pytest.fixture
def oasis3_folder(tmp_path: Path, head: Callable, write_volume: Callable) -> Path:
    root = tmp_path / "oasis3"
    sessions = [
        "OAS30001_MR_d0129/mri",
        "OAS30001_MR_d0757/mri",
        "OAS30001_Freesurfer53_d2430/out/resources/DATA/files/OAS30001_MR_d2430/mri",
        "OAS30002_Freesurfer53_d0371/mri",
        "OAS30003_MR_d0558/mri",
        "OAS30003_MR_d1631/mri",
        "OAS30004_MR_d1101/mri",
    ]
    for i, session in enumerate(sessions):
        freesurfer(root / session, head(seed=i, zoom=0.94 + i / 100), write_volume)
    return root


# ----- who is where


def test_people_are_parted_by_the_written_shares():
    people = [f"person-{i}" for i in range(100)]
    parts = part(people, halves=False)
    assert {name: len(who) for name, who in parts.items()} == {"train": 64, "validation": 16, "maps": 64, "test": 20}
    assert parts["train"] == parts["maps"]
    assert set(people) == {*parts["train"], *parts["validation"], *parts["test"]}
    assert part(reversed(people), halves=False) == parts, "whatever the order of the list"
    assert parts["test"] != tuple(sorted(people)[-20:]), "neighbours in a list do not stay together"
    halved = part(people, halves=True)
    assert (halved["test"], halved["validation"]) == (parts["test"], parts["validation"])
    assert halved["train"] + halved["maps"] == parts["train"]
    assert len(halved["train"]) == len(halved["maps"]) == 32


def test_parting_is_pinned():
    """The rule is written down, so nobody may move when the code does."""
    parts = part("abcde", halves=True)
    assert parts == {"train": ("d", "c"), "validation": ("e",), "maps": ("b",), "test": ("a",)}


@pytest.mark.parametrize("count", range(4, 12))
def test_few_people_fill_every_split(count: int):
    parts = part([str(i) for i in range(count)], halves=True)
    assert all(parts.values())
    assert sum(map(len, parts.values())) == count


def test_too_few_people_are_an_error():
    with pytest.raises(UserError, match="only 3 are there"):
        part("abcc", halves=False)


# ----- neurite-oasis


def test_neurite_volumes_are_axial_slices_of_the_classes(neurite: Path):
    task = neurite_oasis.load(neurite_oasis.Options(form="volumes", **SMALL), neurite)
    assert task.classes == CLASSES
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 36, "validation": 12, "maps": 36, "test": 12,
    }  # fmt: skip
    split = task.splits["train"]
    assert split.images.shape == (36, 1, 36, 32)
    assert split.images.dtype == torch.float32
    assert task.splits["maps"].images.shape == (36, 0, 36, 32)
    assert set(split.labels.unique().tolist()) == set(range(UNLABELLED))
    assert set(task.splits["maps"].labels.unique().tolist()) == set(range(UNLABELLED + 1))
    for image, label in zip(split.images[:, 0], split.labels, strict=True):
        assert image[label == 1].median() > image[label > 0].min()
        if 9 in label:
            assert (label == 9).nonzero()[:, 1].min() > 16  # right
        if {4, 5} <= set(label.unique().tolist()):
            assert (label == 5).nonzero()[:, 0].max() < (label == 4).nonzero()[:, 0].min()  # in front


def test_neurite_slices_are_coronal_and_upright(neurite: Path):
    task = neurite_oasis.load(neurite_oasis.Options(**SMALL), neurite)
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 6, "validation": 2, "maps": 6, "test": 2,
    }  # fmt: skip
    split = task.splits["train"]
    assert split.images.shape == (6, 1, 36, 32)
    for image, label in zip(split.images[:, 0], split.labels, strict=True):
        rows, columns = (label == 3).nonzero().float().mean(0)
        assert rows < (label == 9).nonzero().float().mean(0)[0]  # ventricles above the amygdala
        assert abs(columns - 15.5) < 0.6
        assert (label == 9).nonzero()[:, 1].min() > 16  # right
        csf, gm, wm = (image[label == k].median() for k in (3, 2, 1))
        assert csf < gm < wm
        assert wm > 0.8, "a slice is as bright as its scan, however thick slices are"
    sulcus = (task.splits["maps"].labels == UNLABELLED).nonzero()
    assert sulcus[:, 0].unique().tolist() == list(range(6))
    assert sulcus[:, 1].max() < 18 - 8  # above
    assert sulcus[:, 2].unique().tolist() == [16]


def test_halves_give_images_and_maps_of_different_people(neurite: Path):
    splits = neurite_oasis.load(neurite_oasis.Options(halves=True, **SMALL), neurite).splits
    assert len(splits["train"].individuals) == len(splits["maps"].individuals) == 3
    assert not set(splits["train"].subjects) & set(splits["maps"].subjects)


def test_neurite_checks_the_archives_that_are_there(neurite: Path, tmp_path: Path):
    neurite_oasis.check(neurite)
    files = neurite_oasis.files(neurite)
    assert len(files) == 1 + 2 * (1 + 2 * 10)
    assert all(path.is_file() for path in files)
    with pytest.raises(UserError, match=r"subjects\.txt is missing"):
        neurite_oasis.check(tmp_path)


def test_what_is_wrong_with_a_neurite_archive_is_named_alike_by_check_and_load(neurite: Path, tmp_path: Path):
    copy = tmp_path / "neurite-oasis"
    shutil.copytree(neurite, copy)

    def both(reason: str) -> None:
        for action in (neurite_oasis.check, lambda root: neurite_oasis.load(neurite_oasis.Options(**SMALL), root)):
            with pytest.raises(UserError, match=reason):
                action(copy)

    table = copy / "seg24_labels.txt"
    table.write_text(LUT + " 13  Left-Elbow  0 0 0 0\n")
    both(r"seg24_labels\.txt names the structure 'Left-Elbow'")
    table.write_text(LUT.replace(" 12  ", " 99  "))
    both(r"slice_seg24\.nii\.gz holds the label 12")
    table.unlink()
    both(r"seg24_labels\.txt is missing")
    table.write_text(LUT)
    (copy / "OASIS_OAS1_0004_MR1" / "slice_seg24.nii.gz").unlink()
    both(r"0004_MR1/slice_seg24\.nii\.gz is missing, though its other half")
    subjects = copy / "subjects.txt"
    subjects.write_text(subjects.read_text() + "OAS1_0500\n")
    both(r"subjects\.txt names 'OAS1_0500'")


# ----- abide


def test_abide_has_a_scan_a_person(abide_folder: Path):
    (abide_folder / "Phenotypic_V1_0b.csv").write_text("not a person")
    abide.check(abide_folder)
    assert len(abide.files(abide_folder)) == 10
    task = abide.load(abide.Options(**SMALL), abide_folder)
    assert {name: len(split.individuals) for name, split in task.splits.items()} == {
        "train": 3, "validation": 1, "maps": 3, "test": 1,
    }  # fmt: skip
    assert "CMU_a_0050642" in {person for split in task.splits.values() for person in split.subjects}
    assert set(task.splits["maps"].labels.unique().tolist()) == set(range(UNLABELLED + 1))
    for label in task.splits["train"].labels:
        if 9 in label:
            assert (label == 9).nonzero()[:, 1].min() > 16  # right


def test_what_is_wrong_with_abide_is_named_alike_by_check_and_load(abide_folder: Path, tmp_path: Path):
    (abide_folder / "NYU_0050954" / "mri" / "aseg.mgz").unlink()
    for action in (abide.check, lambda root: abide.load(abide.Options(**SMALL), root)):
        with pytest.raises(UserError, match=r"NYU_0050954/mri/aseg\.mgz is missing, though its other half norm\.mgz"):
            action(abide_folder)
        with pytest.raises(UserError, match=r"holds no folder like Caltech_0051456"):
            action(tmp_path / "nowhere")


# ----- oasis3


def test_all_sessions_of_a_person_are_in_one_split(oasis3_folder: Path):
    oasis3.check(oasis3_folder)
    splits = oasis3.load(oasis3.Options(**SMALL), oasis3_folder).splits
    people = {name: set(splits[name].subjects) for name in ("train", "validation", "test")}
    assert sorted(person for who in people.values() for person in who) == [f"OAS3000{i}" for i in range(1, 5)]
    counts = {
        person: 6 * sessions for person, sessions in zip(sorted(set.union(*people.values())), (3, 1, 2, 1), strict=True)
    }
    for name, who in people.items():
        assert {person: splits[name].subjects.count(person) for person in who} == {p: counts[p] for p in who}


def test_what_is_wrong_with_oasis3_is_named_alike_by_check_and_load(
    oasis3_folder: Path, head: Callable, write_volume: Callable
):
    def both(reason: str) -> None:
        for action in (oasis3.check, lambda root: oasis3.load(oasis3.Options(**SMALL), root)):
            with pytest.raises(UserError, match=reason):
                action(oasis3_folder)

    path = oasis3_folder / "OAS30003_MR_d1631" / "mri" / "norm.mgz"
    path.write_bytes(path.read_bytes()[:999])
    both(r"OAS30003_MR_d1631/mri/norm\.mgz cannot be read")
    freesurfer(oasis3_folder / "OAS30001_Freesurfer53_d0129" / "mri", head(), write_volume)
    both("are the same session")
    for mri in (oasis3_folder / "OAS30001_MR_d0129" / "mri").iterdir():
        mri.unlink()
    (oasis3_folder / "OAS30001_MR_d0129" / "mri").rmdir()
    (oasis3_folder / "OAS30001_MR_d0129").rmdir()
    (oasis3_folder / "OAS30009_MR_d0001").mkdir()
    both(r"OAS30009_MR_d0001 holds 0 folders mri/")


def test_an_absent_folder_is_an_error(tmp_path: Path):
    for module in (abide, oasis3, neurite_oasis):
        with pytest.raises(UserError):
            module.check(tmp_path)
        assert not any(path.is_file() for path in module.files(tmp_path))
        assert module.FAMILY == "real"
        assert issubclass(module.Options, cohorts.Options)
