"""The real task `abide`: scans of ABIDE I as processed by FreeSurfer 5.1 in the ABIDE Preprocessed initiative.

The folder holds, as in the initiative's bucket under Outputs/freesurfer/5.1, one folder a person:

    SITE_NNNNNNN/mri/norm.mgz, aseg.mgz        for instance Caltech_0051456

People for whom processing failed lack files there; leave out their folders.
"""

import re
from pathlib import Path

from synthrepro.data import cohorts
from synthrepro.data.brain_labelmaps import FREESURFER
from synthrepro.data.cohorts import Options, Scan
from synthrepro.data.task import Card, Task
from synthrepro.errors import UserError

__all__ = ["CARD", "FAMILY", "Options", "check", "files", "load"]

FAMILY = "real"


def files(folder: Path) -> list[Path]:
    """Both files of everybody who has a folder."""
    try:
        return [path for scan in scans_of(folder) for path in (scan.image, scan.labels)]
    except UserError:
        return [folder]


def check(folder: Path) -> None:
    """Read and check every file.

    Raises:
        UserError: see `scans_of` and `cohorts.check_scans`.
    """
    cohorts.check_scans(scans_of(folder), FREESURFER)


def load(options: Options, folder: Path) -> Task:
    """Build the task.

    Raises:
        UserError: see `scans_of` and `cohorts.build`.
    """
    return cohorts.build("abide", scans_of(folder), FREESURFER, options, CARD)


def scans_of(folder: Path) -> list[Scan]:
    """Everybody's scan.

    Raises:
        UserError: there is nobody.
    """
    people = sorted(path for path in folder.glob("*") if re.fullmatch(r"\w+_\d{7}", path.name) and path.is_dir())
    if not people:
        raise UserError(f"{folder} holds no folder like Caltech_0051456: put the people's FreeSurfer folders there.")
    return [Scan(path.name, path / "mri" / "norm.mgz", path / "mri" / "aseg.mgz") for path in people]


CARD = Card(
    what=(
        "Axial slices of T1-weighted scans of people with autism and of controls, 7 to 64 years old, from 17 sites; "
        "skull-stripped and bias-corrected, with structures segmented by FreeSurfer 5.1 in twelve classes, left and "
        "right together."
    ),
    splits=(
        "By person, in the order of the SHA-256 of their id, so every site may be in every split: the last 20 % test, "
        "the last 20 % of the rest validate, the others train. On request the first half of these gives images and the "
        "second label maps for synthesis."
    ),
    doubt=(
        "The labels are FreeSurfer's output, made from the very images: agreement with them is no accuracy, and nobody "
        "corrected them. Which people are there depends on what was downloaded."
    ),
    source=(
        "preprocessed-connectomes-project.org/abide, bucket fcp-indi, folder data/Projects/ABIDE_Initiative/Outputs/"
        "freesurfer/5.1 (Di Martino et al., Molecular Psychiatry 19:659-667, 2014; Craddock et al., Frontiers in "
        "Neuroinformatics, 2013)."
    ),
    licence="CC BY-NC-SA, as the 1000 Functional Connectomes Project states it; not to be handed on from here.",
)
