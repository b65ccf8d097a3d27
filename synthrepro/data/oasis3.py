"""The real task `oasis3`: sessions of OASIS-3 as processed by FreeSurfer.

The folder holds sessions as the project's download scripts leave them, or as the archives unpack:

    OAS3NNNN_MR_dDDDD/mri/norm.mgz, aseg.mgz
    OAS3NNNN_Freesurfer53_dDDDD/.../mri/norm.mgz, aseg.mgz

NNNN is the person and DDDD the day; all sessions of a person are in one split.
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
    """Both files of every session that has a folder."""
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
    return cohorts.build("oasis3", scans_of(folder), FREESURFER, options, CARD)


def scans_of(folder: Path) -> list[Scan]:
    """The scan of every session.

    Raises:
        UserError: there is none; a session is there twice; it has no or more than one folder mri/.
    """
    found: dict[tuple[str, str], Path] = {}
    scans = []
    for path in sorted(folder.glob("OAS3*")):
        match = re.fullmatch(r"(OAS3\d{4})_(?:MR|Freesurfer\d\d)_(d\d{4})", path.name)
        if match is None or not path.is_dir():
            continue
        if (other := found.setdefault((match[1], match[2]), path)) != path:
            raise UserError(f"{path} and {other} are the same session: remove one.")
        inner = sorted(mri for mri in path.rglob("mri") if mri.is_dir())
        if len(inner) != 1:
            raise UserError(f"{path} holds {len(inner)} folders mri/ instead of one: download the session again.")
        scans.append(Scan(match[1], inner[0] / "norm.mgz", inner[0] / "aseg.mgz"))
    if not scans:
        raise UserError(f"{folder} holds no session like OAS30001_MR_d0129: put the FreeSurfer sessions there.")
    return scans


CARD = Card(
    what=(
        "Axial slices of T1-weighted scans of ageing people, healthy and with dementia, many of them scanned several "
        "times; skull-stripped and bias-corrected, with structures segmented by FreeSurfer in twelve classes, left and "
        "right together."
    ),
    splits=(
        "By person with all sessions, in the order of the SHA-256 of their id: the last 20 % test, the last 20 % of "
        "the rest validate, the others train. On request the first half of these gives images and the second label "
        "maps for synthesis."
    ),
    doubt=(
        "The labels are FreeSurfer's output, made from the very images: agreement with them is no accuracy. Sessions "
        "of one person are not independent. Which people are there depends on what was downloaded."
    ),
    source="oasis-brains.org, with github.com/NrgXnat/oasis-scripts (LaMontagne et al., medRxiv 2019.12.13.19014902).",
    licence="OASIS data use agreement (oasis-brains.org): to be accepted by each user, not to be handed on.",
)
