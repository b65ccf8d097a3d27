"""The page on real data says what the readers of the data say."""

import importlib
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from synthrepro.data import TASKS, brain_oasis, breast_us, pairs
from synthrepro.data.volumes import read_pair
from synthrepro.errors import UserError

TEXT = (Path(__file__).resolve().parent.parent / "book" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^## `([\w-]+)`\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
READERS = {name: importlib.import_module(f"synthrepro.data.{name.replace('-', '_')}") for name in TASKS}
REAL = [name for name, reader in READERS.items() if reader.FAMILY == "real"]


def plain(text: str) -> str:
    """Without line breaks and marks of code."""
    return " ".join(text.replace("`", "").split())


def tree(name: str) -> str:
    """The folder that a section shows."""
    (block,) = re.findall(r"```text\n(.*?)```", SECTIONS[name], re.DOTALL)
    return str(block)


# ----- the sections


def test_every_real_task_has_a_section_and_no_other_has_one():
    assert sorted(SECTIONS) == sorted(REAL)


@pytest.mark.parametrize("name", REAL)
def test_a_section_gives_source_licence_and_doubt_of_the_card(name: str):
    card, said = READERS[name].CARD, plain(SECTIONS[name])
    for text in (card.source, card.licence, card.doubt):
        assert plain(text) in said


@pytest.mark.parametrize("name", REAL)
def test_every_option_is_explained(name: str):
    common = TEXT.partition("## What they have in common")[2].partition("\n## ")[0]
    for option in READERS[name].Options.model_fields:
        assert f"`{option}`" in common + SECTIONS[name], option


def test_the_classes_are_named_in_their_order():
    assert f"{', '.join(brain_oasis.CLASSES[1:-1])} and {brain_oasis.CLASSES[-1]}." in plain(TEXT)
    assert f"one value more, {brain_oasis.UNLABELLED}," in plain(TEXT)


# ----- the folders


def test_the_folder_of_brain_oasis_is_the_one_that_is_read():
    root, part, found = Path("brain-oasis"), "", []
    for line in tree("brain-oasis").splitlines()[1:]:
        if folder := re.fullmatch(r"  (\w+)/", line):
            part = folder[1]
        patterns, numbers = re.findall(r"NNNN\S+\.gz", line), re.findall(r"\b\d{4}\b", line)
        found += [root / part / pattern.replace("NNNN", number) for number in numbers for pattern in patterns]
    assert sorted(found) == sorted(brain_oasis.files(root))


def test_the_folder_of_brain_labelmaps_goes_from_the_first_file_to_the_last(tmp_path: Path):
    names = [path.name for path in READERS["brain-labelmaps"].files(tmp_path)]
    assert re.findall(r"training\S+", tree("brain-labelmaps")) == [*names[:2], names[-1]]


def test_the_folder_of_neurite_oasis_has_what_is_read(tmp_path: Path):
    (tmp_path / "subjects.txt").write_text("OASIS_OAS1_0001_MR1\n")
    for kind in ("slice_norm", "aligned_norm"):
        path = tmp_path / "OASIS_OAS1_0001_MR1" / f"{kind}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    read = {path.name for path in READERS["neurite-oasis"].files(tmp_path)}
    assert set(re.findall(r"\w+\.(?:txt|nii\.gz)", tree("neurite-oasis"))) == read


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("abide", "Caltech_0051456/mri"),
        ("oasis3", "OAS30001_MR_d0129/mri"),
        ("oasis3", "OAS30001_Freesurfer53_d0129/deeper/mri"),
    ],
)
def test_the_folders_of_freesurfer_are_where_it_is_looked_for(tmp_path: Path, name: str, folder: str):
    (tmp_path / folder).mkdir(parents=True)
    read = READERS[name].files(tmp_path)
    assert [path.parent for path in read] == [tmp_path / folder] * 2
    shown = folder.split("/")[0].replace("OAS30001", "OAS3NNNN").replace("d0129", "dDDDD")
    below = tree(name).partition(f"  {shown}/\n")[2]
    assert re.findall(r"\w+\.mgz", below)[:2] == [path.name for path in read]


def shown(name: str) -> list[str]:
    """The files that the folder of a section shows."""
    above: list[str] = []
    found = []
    for line in tree(name).splitlines():
        entry = re.split(r" \.\.\.$|  +", line.strip())[0]
        above[(len(line) - len(line.lstrip())) // 2 :] = [entry]
        if entry != "..." and not entry.endswith("/"):
            found.append("".join(above))
    return found


@pytest.mark.parametrize("name", ["breast-us", "hippocampus", "lung-xray", "polyp", "skin-lesion", "wound"])
def test_the_folders_of_pictures_are_read_as_they_are_shown(tmp_path: Path, name: str):
    paths = [tmp_path / path for path in shown(name)]
    assert len(paths) > 1
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sorted(READERS[name].files(tmp_path / name)) == sorted(paths)


@pytest.mark.parametrize("name", ["breast-us", "hippocampus", "lung-xray", "polyp", "skin-lesion", "wound"])
def test_the_numbers_of_a_split_are_the_options(name: str):
    counts = [count for count in READERS[name].Options().subjects if count]
    _, _, said = plain(SECTIONS[name]).partition("**Splits.**")
    assert re.findall(r"\d+", said.partition("as given, ")[2])[: len(counts)] == [str(count) for count in counts]


# ----- the reports


def damage(label: np.ndarray, image: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "shape":
        return label[..., :-1], image
    if kind == "label":
        label[0, 0, 0] = 3
    if kind == "finite":
        image[0, 0, 0] = np.nan
    return label, image


@pytest.mark.parametrize(
    ("number", "kind"),
    [("1000", "cut"), ("1001", "shape"), ("1002", "label"), ("1006", "half"), ("1007", "finite")],
)
def test_the_page_shows_the_sentences_of_the_checks(tmp_path: Path, number: str, kind: str):
    folder = tmp_path / "data" / "brain-oasis" / "train"
    folder.mkdir(parents=True)
    scan, map_ = folder / f"{number}_SS.nii.gz", folder / f"{number}_glm.nii.gz"
    size = (151, 202, 163) if kind == "shape" else (20, 20, 20)
    label, image = damage(np.full(size, 44, dtype=np.uint8), np.ones(size, dtype=np.float32), kind)
    for path, values in ((scan, image), (map_, label)):
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    if kind == "cut":
        scan.write_bytes(scan.read_bytes()[:-20])
    if kind == "half":
        map_.unlink()
    with pytest.raises(UserError) as error:
        read_pair(scan, map_, brain_oasis.STRUCTURES)
    assert f"brain-oasis (real): {str(error.value).replace(str(tmp_path), '...')}\n" in TEXT


def damage_picture(folder: Path, kind: str) -> None:
    """One picture with its mask in the layout of BUSI, of which something is wrong."""
    stem = folder / f"benign ({['unpaired', 'twice', 'size', '', 'code', 'cut'].index(kind) + 1})"
    noise = np.random.default_rng(0).integers(0, 256, (471, 500), dtype=np.uint8)
    mask = np.zeros((400 if kind == "size" else 471, 500), dtype=np.uint8)
    mask[100:200, 100:200] = 38 if kind == "code" else 255
    for values, end in ((noise, ".png"), (mask, "_mask.png")):
        Image.fromarray(values).save(f"{stem}{end}")
    if kind == "unpaired":
        Path(f"{stem}_mask.png").unlink()
        Image.fromarray(mask).save(folder / "benign (7)_mask.png")
    if kind == "twice":
        Image.fromarray(noise).save(f"{stem}.jpg")
    if kind == "cut":
        path = Path(f"{stem}.png")
        path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize("kind", ["unpaired", "twice", "size", "code", "cut", "nothing"])
def test_the_page_shows_the_sentences_of_the_checks_of_pictures(tmp_path: Path, kind: str):
    folder = tmp_path / "data" / "breast-us" / "BUSI" / "benign"
    if kind != "nothing":
        folder.mkdir(parents=True)
        damage_picture(folder, kind)
    with pytest.raises(UserError) as error:
        pairs.check({"busi": breast_us.busi(folder)})
    assert f"breast-us (real): {str(error.value).replace(str(tmp_path), '...')}\n" in TEXT
