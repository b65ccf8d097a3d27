"""The real task `wound`: photographs of foot ulcers with the wound drawn by hand, of FUSeg and of Medetec.

The folder holds the two sets, of which the second may be absent:

    FUSeg/train/       images/0001.png, labels/0001.png
    FUSeg/validation/  likewise
    Medetec/train/     images/foot-ulcer-0001.png, labels/foot-ulcer-0001.png

Further folders are not read: FUSeg's test/ has no masks, and what is in Medetec's test/ is in its train/ too. Medetec
gives every photograph four times, as it is and in the mirrored and turned copies _1, _2 and _3, which are not read.
"""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from synthrepro.data import pairs
from synthrepro.data.pairs import Pair, find, match
from synthrepro.data.task import Card, Task

FAMILY = "real"

CLASSES = ("background", "wound")


class Options(pairs.Options):
    """Options of the task, beside those of `pairs.Options`.

    Attributes:
        subjects: how many photographs of FUSeg's train/ train and validate.
    """

    subjects: tuple[PositiveInt, NonNegativeInt] = (50, 4)


def files(folder: Path) -> list[Path]:
    """Pictures and masks that are there."""
    return pairs.files(pairs_of, folder)


def check(folder: Path) -> None:
    """Read and check every file.

    Raises:
        UserError: see `pairs_of` and `pairs.check`.
    """
    pairs.check(pairs_of(folder))


def load(options: Options, folder: Path) -> Task:
    """Build the task: "train", "validation" (may be empty), "test" and, if Medetec is there, "test-medetec".

    Raises:
        UserError: see `pairs_of` and `pairs.build`.
    """
    return pairs.build(Task("wound", CLASSES, 3, {}, CARD), pairs_of(folder), options.subjects, options)


def pairs_of(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of "fuseg" (its train/), "test" (its validation/) and, if it is there, "test-medetec".

    Raises:
        UserError: see `pairs.find` and `pairs.match`.
    """
    sets = {"fuseg": photographs(folder / "FUSeg" / "train"), "test": photographs(folder / "FUSeg" / "validation")}
    if (folder / "Medetec").is_dir():
        sets["test-medetec"] = photographs(folder / "Medetec" / "train", "([^_]+)")
    return sets


def photographs(folder: Path, pattern: str = "(.+)") -> list[Pair]:
    """The pairs in images/ and labels/; who is shown in several photographs is not published."""
    matched = match(find(folder / "images", pattern), find(folder / "labels", pattern))
    return [Pair(case, image, masks) for case, (image, masks) in matched.items()]


CARD = Card(
    what=(
        "Colour photographs of foot ulcers, padded to squares, with the wound outlined by professionals of wound care. "
        "In-domain is FUSeg, of one clinic; out of domain is Medetec, a collection of stock images. Graphic. "
        "Photographs without a wound are left out, and so are the mirrored copies in Medetec."
    ),
    splits=(
        "The publisher's: FUSeg's train/ trains and, by a random draw of photographs, validates; its validation/ is "
        "'test', since the masks of its own test set are not public. 'test-medetec' is what Medetec has in train/."
    ),
    doubt=(
        "Patients come several times and are not named, so one may stand on both sides; in the full set a few "
        "photographs in train/ and validation/ are almost the same. Wounds are small: at low resolution some "
        "vanish, and their photographs are left out."
    ),
    source=(
        "github.com/uwm-bigdata/wound-segmentation, folder data (FUSeg: Wang et al., Scientific Reports 10:21897, "
        "2020, and fusc.grand-challenge.org; Medetec: medetec.co.uk)."
    ),
    licence="FUSeg: CC BY-NC. Medetec: copyright of Medetec, terms not stated with the files.",
)
