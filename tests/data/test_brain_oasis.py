"""The task `brain-oasis`, on a small tree of its layout."""

import re
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from synthrepro.data import brain_oasis, fingerprint
from synthrepro.data.brain_oasis import CLASSES, CONTRASTS, PEOPLE, STRUCTURES, UNLABELLED, WITH_IMAGE
from synthrepro.data.mri import TISSUES, flash
from synthrepro.data.task import Split, Task
from synthrepro.errors import UserError

NUMBERS = {1: 44, 2: 101, 3: 52, 4: 60, 5: 37, 6: 58, 7: 55, 8: 48, 9: 31, 10: 38, 11: 41, 12: 35}
SMALL = {"size": (36, 32), "spacing": 5.0, "slices": 6}  # pixels as large as the small tree's voxels
CLEAN = {"noise": (0.0, 0.0), "bias": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, head: Callable, write_volume: Callable) -> Path:
    root = tmp_path_factory.mktemp("data") / "brain-oasis"
    for path in brain_oasis.files(root):
        name, kind = path.name.split(".")[0].split("_")
        person = head(seed=int(name), zoom=0.94 + int(name) % 7 / 50)
        numbers = NUMBERS | ({13: 46} if path.parent.name == "test_old" else {})  # CSF in a sulcus, mostly unlabelled
        write_volume(path, person.scan if kind == "SS" else person.labels(numbers))
    return root


@pytest.fixture(scope="module")
def task(folder: Path) -> Callable[..., Task]:
    @lru_cache
    def load(**options: object) -> Task:
        return brain_oasis.load(brain_oasis.Options(**(SMALL | options)), folder)

    return load


# ----- what it is


def test_images_labels_and_splits_are_of_the_promised_form(task: Callable):
    loaded = task(subjects=(7, 2))
    assert loaded.name == "brain-oasis"
    assert loaded.classes == CLASSES
    expected = {"train": 7, "validation": 2, "maps": 13, "test-young": 4, "test-old": 6, "test": 10}
    expected |= {f"test-{contrast}": 10 for contrast in ("flash3", "flash5", "flash20", "flash30")}
    assert {name: len(split.individuals) for name, split in loaded.splits.items()} == expected
    for name, split in loaded.splits.items():
        assert len(split) == 6 * expected[name]
        assert split.images.shape == (len(split), 0 if name == "maps" else 1, 36, 32)
        assert split.images.dtype == torch.float32
        assert split.labels.shape == (len(split), 36, 32)
        assert split.labels.dtype == torch.int64
        assert set(split.labels.unique().tolist()) == set(range(UNLABELLED + (name == "maps")))
        if name != "maps":
            assert split.images.min() >= 0
            assert split.images.max() == 1


def test_tissues_group_the_structures(task: Callable):
    fine, coarse = task(), task(classes="tissues")
    assert coarse.classes == ("background", "CSF", "GM", "WM")
    assert all(torch.equal(split.images, fine.splits[name].images) for name, split in coarse.splits.items())
    every = Split(torch.zeros(1, 0, 1, 14), torch.arange(14)[None, None], ("a",))
    grouped = brain_oasis.with_tissues(Task("brain-oasis", CLASSES, 1, {"maps": every}, brain_oasis.CARD))
    tissue = dict(zip((*CLASSES, "unlabelled"), grouped.splits["maps"].labels.flatten().tolist(), strict=True))
    assert tissue["background"] == 0
    assert tissue["ventricles"] == 1
    assert tissue["cerebral cortex"] == tissue["thalamus"] == tissue["amygdala"] == tissue["cerebellar cortex"] == 2
    assert tissue["cerebral white matter"] == tissue["cerebellar white matter"] == tissue["brain stem"] == 3
    assert tissue["unlabelled"] == 4
    for name in ("train", "test"):
        assert torch.equal(coarse.splits[name].labels == 1, fine.splits[name].labels == 3)


def test_there_may_be_nobody_to_validate(task: Callable):
    validation = task().splits["validation"]
    assert len(validation) == 0
    assert validation.images.shape == (0, 1, 36, 32)
    assert validation.labels.shape == (0, 36, 32)
    assert task().splits["maps"].individuals == PEOPLE["train"]


def test_nobody_is_on_both_sides_of_a_split(task: Callable):
    splits = task(subjects=(7, 2)).splits
    train, validation, maps, test = (set(splits[name].subjects) for name in ("train", "validation", "maps", "test"))
    assert train == set(WITH_IMAGE[:7])
    assert validation == set(WITH_IMAGE[7:9])
    assert maps == set(PEOPLE["train"]) - validation  # the tenth, who neither trains nor validates, is among the maps
    assert not test & (train | validation | maps)
    assert splits["test"].subjects == splits["test-young"].subjects + splits["test-old"].subjects


def test_a_map_is_its_persons_label_but_for_what_has_no_class(task: Callable):
    splits = task().splits
    maps = splits["maps"].take(splits["train"].individuals)
    assert maps.subjects == splits["train"].subjects
    assert torch.equal(maps.labels.where(maps.labels != UNLABELLED, 0), splits["train"].labels)
    for i in range(5, len(maps), 6):  # the highest slices cut the sulcus, in the middle in front and behind
        sulcus = (maps.labels[i] == UNLABELLED).nonzero()
        assert len(sulcus) > 6
        assert set(sulcus[:, 1].tolist()) == {15, 16}


def test_the_task_does_not_depend_on_anything_but_its_options(folder: Path, task: Callable):
    state = torch.get_rng_state()
    again = brain_oasis.load(brain_oasis.Options(**SMALL), folder)
    assert torch.equal(state, torch.get_rng_state())
    assert fingerprint(again) == fingerprint(task())
    other = task(subjects=(5, 5), seed=1).splits
    assert torch.equal(other["test"].images, again.splits["test"].images)
    assert not torch.equal(other["test-flash3"].images, again.splits["test-flash3"].images)


@pytest.mark.parametrize(("size", "spacing"), [((64, 56), 3.0), ((96, 80), 2.0), ((192, 160), 1.0)])
def test_it_works_at_every_documented_size(folder: Path, size: tuple[int, int], spacing: float):
    splits = brain_oasis.load(brain_oasis.Options(size=size, spacing=spacing, slices=1), folder).splits
    assert splits["train"].images.shape == (10, 1, *size)
    area = (splits["train"].labels > 0).sum((1, 2)) * spacing**2
    assert (area > 0.7 * np.pi * 65 * 80 * 0.94**2).all(), "the whole brain is in the picture"


@pytest.mark.parametrize(
    "options",
    [{"subjects": (9, 2)}, {"subjects": (0, 1)}, {"noise": (0.1, 0.0)}, {"spacing": 0.5}, {"size": 64}, {"x": 1}],
)
def test_options_out_of_range_are_refused(options: dict[str, object]):
    with pytest.raises(ValidationError):
        brain_oasis.Options(**options)


# ----- classes


def test_every_number_of_a_structure_has_a_class_and_pairs_have_one():
    assert set(STRUCTURES.values()) == set(range(UNLABELLED + 1))
    assert len(brain_oasis.TISSUE_OF_CLASS) == UNLABELLED + 1
    assert set(range(100, 208)) <= set(STRUCTURES)
    for right in (*range(100, 208, 2), *range(31, 34, 2), *range(38, 46, 2), *range(47, 66, 2), 36):
        assert STRUCTURES[right] == STRUCTURES[right + 1], right
    assert STRUCTURES[23] == STRUCTURES[30] == STRUCTURES[36]  # accumbens and caudate


def test_tissues_are_those_of_the_challenges_table():
    tissues = [
        (0, (4, 11, 15, 46, 49, 50, 51, 52)),
        (1, (23, 30, 31, 36, 38, 47, 55, 57, 59, 65, 71, 72, 73, 75, 76, *range(100, 208))),
        (2, (35, 40, 41, 44, 45, 61, 62, 69)),
    ]
    for tissue, numbers in tissues:
        assert {brain_oasis.TISSUE_OF_CLASS[STRUCTURES[number]] for number in numbers} == {tissue}
    assert {number for number, value in STRUCTURES.items() if value == UNLABELLED} == {46, 63, 64}


def test_slices_are_upright_and_labels_where_the_image_has_them(task: Callable):
    for name in ("train", "test"):
        split = task().splits[name]
        for image, label in zip(split.images[:, 0], split.labels, strict=True):
            if {4, 5} <= set(label.unique().tolist()):
                rows = {k: (label == k).nonzero()[:, 0].float().mean() for k in (4, 5)}
                assert rows[5] < rows[4]  # the small brain has its caudate in front, its thalamus behind
            if 9 in label:
                assert (label == 9).nonzero()[:, 1].min() > 16  # and its amygdala on the right only
            if {1, 2, 3} <= set(label.unique().tolist()):
                csf, gm, wm = (image[label == k].median() for k in (3, 2, 1))
                assert csf < gm < wm
    lowest = split.labels.view(10, 6, 36, 32)[:, 0]
    assert (lowest == 10).flatten(1).any(1).all(), "the lowest slices show the cerebellum"


def test_the_image_is_the_scan_in_the_file(folder: Path, task: Callable):
    scan = np.asarray(nib.load(folder / "train" / "1002_SS.nii.gz").dataobj)[::-1].astype(np.float32)  # LAS to RAS
    planes = scan.transpose(2, 1, 0)[:, ::-1]
    rows, columns = (np.flatnonzero((planes > 0).any(axis)) for axis in ((0, 2), (0, 1)))
    top, left = ((where[0] + where[-1] + 1) // 2 - half for where, half in ((rows, 18), (columns, 16)))
    for image in task().splits["train"].take(["1002"]).images[:, 0]:
        dark = image < 1  # the brightest half per cent is cut off
        errors = []
        for plane in planes:
            expected = torch.from_numpy(plane[top : top + 36, left : left + 32].copy())
            scale = (image * expected).sum() / (expected**2).sum().clamp_min(1)
            errors.append(float((image - scale * expected)[dark].abs().max()))
        assert min(errors) < 0.03


# ----- simulated contrasts


def test_contrasts_show_the_same_people_and_labels(task: Callable):
    splits = task().splits
    for contrast in CONTRASTS:
        assert splits[f"test-{contrast}"].subjects == splits["test"].subjects
        assert torch.equal(splits[f"test-{contrast}"].labels, splits["test"].labels)


def slices_with_ventricles(split: Split) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Image and label of the slices where CSF fills enough pixels not to be cut off as the brightest."""
    found = [(split.images[i, 0], split.labels[i]) for i in range(len(split)) if (split.labels[i] == 3).sum() > 15]
    assert len(found) >= 10
    return found


def test_contrasts_have_the_tissues_as_bright_as_the_signal_equation(task: Callable):
    splits = task(**CLEAN).splits
    for flip in (3, 5, 20, 30):
        tissues = [TISSUES[name] for name in ("CSF", "GM", "WM")]
        t1, t2_star, pd = (torch.tensor([getattr(t, key) for t in tissues]) for key in ("t1", "t2_star", "pd"))
        expected = flash(t1, t2_star, pd, flip=flip, tr=20.0, te=5.0)
        for image, label in slices_with_ventricles(splits[f"test-flash{flip}"]):
            measured = torch.tensor([float(image[label == k].median()) for k in (3, 2, 1)])
            ratio = measured / expected  # each image has a scale of its own
            assert ratio.max() / ratio.min() < 1.05, flip


def test_what_has_no_label_inside_the_brain_is_csf_in_a_contrast(task: Callable):
    splits = task(**CLEAN).splits
    in_t1w = [image for image, _ in slices_with_ventricles(splits["test"])]
    for (image, label), t1w in zip(slices_with_ventricles(splits["test-flash3"]), in_t1w, strict=True):
        sulcus = (label == 0) & (t1w > 0)
        assert sulcus.sum() > 5
        csf, gm = (image[label == k].median() for k in (3, 2))
        assert csf > 1.1 * gm
        assert image[sulcus].median() > (csf + gm) / 2


def test_noise_and_receive_field_are_added_to_contrasts_only(task: Callable):
    clean, noisy = task(**CLEAN).splits, task().splits
    assert torch.equal(clean["test"].images, noisy["test"].images)
    outside = clean["test-flash5"].images == 0
    assert (noisy["test-flash5"].images[outside] > 0).float().mean() > 0.99
    biased = task(noise=(0.0, 0.0), bias=0.3).splits["test-flash5"].images
    ratio = (biased / clean["test-flash5"].images)[(~outside) & (biased < 1) & (clean["test-flash5"].images < 1)]
    assert ratio.std() > 0.1


# ----- what may be wrong


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], shift: float = 0.0) -> None:
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += shift
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), affine), path)


def set_one(value: float, dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(dtype)
        data[20, 20, 20] = value
        return data

    return change


DAMAGE = {
    "truncated scan": ("train/1000_SS", lambda p: p.write_bytes(p.read_bytes()[:3000]), "cannot be read"),
    "truncated labels": ("train/1013_glm", lambda p: p.write_bytes(p.read_bytes()[:900]), "cannot be read"),
    "shape": ("train/1001_glm", lambda p: rewrite(p, lambda d: d[:-1]), "39 x 40 x 40 voxels"),
    "affine": ("train/1001_glm", lambda p: rewrite(p, lambda d: d, shift=3.0), "different places"),
    "unknown label": ("train/1000_glm", lambda p: rewrite(p, set_one(77, np.int16)), "label 77"),
    "a sulcus of the table": ("train/1015_glm", lambda p: rewrite(p, set_one(16, np.int16)), "label 16"),
    "negative label": ("test_old/1128_glm", lambda p: rewrite(p, set_one(-2, np.int16)), "label -2"),
    "missing scan": ("train/1002_SS", Path.unlink, "is missing, though its other half 1002_glm"),
    "missing labels": ("test_young/1019_glm", Path.unlink, "is missing, though its other half 1019_SS"),
    "missing map": ("train/1036_glm", Path.unlink, "is missing: get"),
    "nan": ("train/1000_SS", lambda p: rewrite(p, set_one(np.nan, np.float32)), "not finite"),
    "infinity": ("test_old/1110_SS", lambda p: rewrite(p, set_one(np.inf, np.float32)), "not finite"),
    "four axes": ("train/1000_SS", lambda p: rewrite(p, lambda d: d[..., None].repeat(2, -1)), "3 axes"),
    "fractions": ("train/1000_glm", lambda p: rewrite(p, set_one(44.5, np.float32)), "not whole numbers"),
    "empty": ("train/1000_SS", lambda p: rewrite(p, lambda d: 0 * d), "no value above 0"),
    "contrast": ("train/1003_SS", lambda p: rewrite(p, lambda d: (2000 - d) * (d > 0)), "not T1-weighted"),
    "no ventricles": ("train/1000_glm", lambda p: rewrite(p, lambda d: d * (d != 52)), "lacks ventricles"),
}
DAMAGE["contrast"] = ("test_young/1003_SS", *DAMAGE["contrast"][1:])


@pytest.mark.parametrize("case", DAMAGE)
def test_a_wrong_file_is_named_alike_by_check_and_load(folder: Path, tmp_path: Path, case: str):
    name, damage, reason = DAMAGE[case]
    copy = tmp_path / "brain-oasis"
    shutil.copytree(folder, copy)
    damage(copy / f"{name}.nii.gz")
    messages = []
    for action in (brain_oasis.check, lambda root: brain_oasis.load(brain_oasis.Options(subjects=(1, 0)), root)):
        with pytest.raises(UserError, match=re.escape(reason)) as error:
            action(copy)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert str(copy / f"{name}.nii.gz") in messages[0]
    assert messages[0].endswith("get the file again from where the task's card says.")


def test_a_second_scan_stays_where_its_first_is(folder: Path, tmp_path: Path):
    copy = tmp_path / "brain-oasis"
    shutil.copytree(folder, copy)
    for kind in ("SS", "glm"):
        shutil.copy(copy / "test_young" / f"1003_{kind}.nii.gz", copy / "test_young" / f"1023_{kind}.nii.gz")
    brain_oasis.check(copy)  # beside its first it does no harm, and is not read
    shutil.move(copy / "test_young" / "1023_glm.nii.gz", copy / "train")
    for action in (brain_oasis.check, lambda root: brain_oasis.load(brain_oasis.Options(), root)):
        with pytest.raises(UserError, match=r"1003_SS\.nii\.gz and .*1023_glm\.nii\.gz show the same person"):
            action(copy)


def test_an_absent_folder_is_an_error_and_its_files_are_listed(tmp_path: Path):
    assert len(brain_oasis.files(tmp_path)) == 45
    with pytest.raises(UserError, match=r"1000_SS\.nii\.gz is missing"):
        brain_oasis.check(tmp_path)


def test_whole_files_pass(folder: Path):
    brain_oasis.check(folder)
    assert all(path.is_file() for path in brain_oasis.files(folder))
