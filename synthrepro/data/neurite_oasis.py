"""The real task `neurite-oasis`: 414 people of OASIS-1 as prepared for the package neurite.

The folder is what one of the two published archives unpacks to, or both:

    subjects.txt                                     names of the folders of scans, one a line
    seg24_labels.txt, seg35_labels.txt               FreeSurfer colour tables: number, name, red, green, blue, alpha
    OASIS_OAS1_NNNN_MR1/slice_norm.nii.gz, slice_seg24.nii.gz        neurite-oasis.2d.v1.0.tar: one coronal slice
    OASIS_OAS1_NNNN_MR1/aligned_norm.nii.gz, aligned_seg35.nii.gz    neurite-oasis.v1.0.tar: volumes

Label numbers are the archive's own, so the structures are taken from the names in its colour tables.
"""

import re
from pathlib import Path
from typing import Literal

from synthrepro.data import cohorts
from synthrepro.data.brain_oasis import UNLABELLED
from synthrepro.data.cohorts import Scan
from synthrepro.data.task import Card, Task
from synthrepro.errors import UserError

FAMILY = "real"

FORMS = {"slices": ("slice_norm", "slice_seg24", "seg24_labels.txt"),
         "volumes": ("aligned_norm", "aligned_seg35", "seg35_labels.txt")}  # fmt: skip

# Name without side, punctuation, "proper" and "area" -> class.
NAMES = {
    "unknown": 0, "background": 0, "csf": UNLABELLED, "vessel": UNLABELLED, "nonwmhypointensities": UNLABELLED,
    "cerebralwhitematter": 1, "wmhypointensities": 1, "lesion": 1, "cerebralcortex": 2,
    "lateralventricle": 3, "inflatvent": 3, "inflatventricle": 3, "3rdventricle": 3, "4thventricle": 3,
    "5thventricle": 3, "choroidplexus": 3,
    "thalamus": 4, "caudate": 5, "accumbens": 5, "putamen": 6, "pallidum": 7, "hippocampus": 8, "amygdala": 9,
    "cerebellumcortex": 10, "cerebellumwhitematter": 11, "brainstem": 12, "ventraldc": 12, "opticchiasm": 12,
}  # fmt: skip


class Options(cohorts.Options):
    """Options of a cohort, and which of the archives to read.

    Attributes:
        form: "slices" is the coronal slice a person that is published as such (`slices` is without effect); "volumes"
            is cut into axial slices.
    """

    form: Literal["slices", "volumes"] = "slices"


def files(folder: Path) -> list[Path]:
    """The list of people, and what it and the archives found say must be there."""
    there = folder / "subjects.txt"
    names = there.read_text().split() if there.is_file() else []
    found = [there]
    for form in forms(folder):
        image, labels, table = FORMS[form]
        found += [folder / table, *(folder / name / f"{kind}.nii.gz" for name in names for kind in (image, labels))]
    return found


def forms(folder: Path) -> list[str]:
    """Which of the archives is there; "slices" if none is."""
    return [form for form, kinds in FORMS.items() if any(folder.glob(f"OASIS_*/{kinds[0]}.nii.gz"))] or ["slices"]


def check(folder: Path) -> None:
    """Read and check every file of the archives that are there.

    Raises:
        UserError: see `scans_of`, `read_table` and `cohorts.check_scans`.
    """
    for form in forms(folder):
        cohorts.check_scans(scans_of(folder, form), read_table(folder / FORMS[form][2]))


def load(options: Options, folder: Path) -> Task:
    """Build the task.

    Raises:
        UserError: see `scans_of`, `read_table` and `cohorts.build`.
    """
    table = read_table(folder / FORMS[options.form][2])
    return cohorts.build("neurite-oasis", scans_of(folder, options.form), table, options, CARD)


def scans_of(folder: Path, form: str) -> list[Scan]:
    """The scans that subjects.txt names.

    Raises:
        UserError: the list is missing or holds a name of another form.
    """
    image, labels, _ = FORMS[form]
    scans = []
    for name in _text(folder / "subjects.txt").split():
        match = re.fullmatch(r"OASIS_(OAS1_\d{4})_MR\d", name)
        if match is None:
            raise UserError(
                f"{folder / 'subjects.txt'} names {name!r}, which is no OASIS_OAS1_NNNN_MR1: unpack it anew."
            )
        scan, map_ = (folder / name / f"{kind}.nii.gz" for kind in (image, labels))
        scans.append(Scan(match.group(1), scan, map_, flat=form == "slices"))
    return scans


def read_table(path: Path) -> dict[int, int]:
    """Label number -> class, from a colour table.

    Raises:
        UserError: the file is missing, or names a structure that has no class.
    """
    table = {0: 0}
    for number, name in re.findall(r"^\s*(\d+)\s+(\S+)", _text(path), re.MULTILINE):
        plain = re.sub(r"^(left|right)|proper|area|[^a-z0-9]", "", name.lower())
        if plain not in NAMES:
            raise UserError(f"{path} names the structure {name!r}, which this task does not know: unpack it anew.")
        table[int(number)] = NAMES[plain]
    return table


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is missing: unpack the archive from where the task's card says.")
    return path.read_text()


CARD = Card(
    what=(
        "T1-weighted scans of 414 people of 18 to 96 years, skull-stripped and bias-corrected by FreeSurfer, aligned "
        "to a template, with structures segmented by software (FreeSurfer, SAMSEG) in twelve classes, left and right "
        "together: the published coronal slice, or axial slices of the volumes."
    ),
    splits=(
        "By person, in the order of the SHA-256 of their id: the last 20 % test, the last 20 % of the rest validate, "
        "the others train. On request the first half of these gives images and the second label maps for synthesis."
    ),
    doubt=(
        "The labels are the output of other software, made from the very images: agreement with them is no accuracy. "
        "Some of the people above 60 years have dementia. Classes are groups of the published ones. The first axis of "
        "the slices is taken to run from right to left, as in FreeSurfer's volumes; no class depends on it."
    ),
    source=(
        "github.com/adalca/medical-datasets, neurite-oasis.md (Hoopes et al., MELBA 2022; Marcus et al., Journal of "
        "Cognitive Neuroscience 19:1498-1507, 2007)."
    ),
    licence="OASIS data use agreement (oasis-brains.org): to be accepted by each user, not to be handed on.",
)
