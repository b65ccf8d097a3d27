"""The real task `breast-us`: ultrasound of the breast with lesions drawn by hand, of BUSI and of BUS-BRA.

The folder holds the two sets, of which the second may be absent:

    BUSI/benign/     "benign (1).png", "benign (1)_mask.png" and, of a second lesion, "benign (1)_mask_1.png"
    BUSI/malignant/  likewise
    BUS-BRA/Images/  bus_0001-l.png
    BUS-BRA/Masks/   mask_0001-l.png

BUSI's third folder, normal/, is not read, since nothing is drawn there. BUS-BRA is also read in another layout that
goes round: folders images/ and masks/ with the same names in both, like benign_0804-s.png, and masks in colours.
"""

import re
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from synthrepro.data import pairs
from synthrepro.data.pairs import Pair, find, match
from synthrepro.data.task import Card, Task

FAMILY = "real"

CLASSES = ("background", "lesion")

# Its second mask has another size than the picture, and misses the lesion also when stretched to it (seen in a copy of
# the set that goes round).
MISFITS = ("benign (4)",)


class Options(pairs.Options):
    """Options of the task, beside those of `pairs.Options`.

    Attributes:
        subjects: how many pictures of BUSI train, validate and test.
    """

    subjects: tuple[PositiveInt, NonNegativeInt, PositiveInt] = (60, 8, 30)


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
    """Build the task: "train", "validation" (may be empty), "test" and, if BUS-BRA is there, "test-bus-bra".

    Raises:
        UserError: see `pairs_of` and `pairs.build`.
    """
    return pairs.build(Task("breast-us", CLASSES, 1, {}, CARD), pairs_of(folder), options.subjects, options)


def pairs_of(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of "busi" and, if it is there, of "test-bus-bra".

    Raises:
        UserError: see `pairs.find` and `pairs.match`.
    """
    sets = {"busi": [pair for kind in ("benign", "malignant") for pair in busi(folder / "BUSI" / kind)]}
    if (folder / "BUS-BRA").is_dir():
        sets["test-bus-bra"] = bus_bra(folder / "BUS-BRA")
    return sets


def busi(folder: Path) -> list[Pair]:
    """The pairs of one of BUSI's folders; which pictures show the same woman is not published."""
    images = find(folder, r"(\w+ \(\d+\))")
    masks = find(folder, r"(\w+ \(\d+\))_mask(?:_\d+)?", several=True)
    return [Pair(case, image, paths) for case, (image, paths) in match(images, masks).items() if case not in MISFITS]


def bus_bra(folder: Path) -> list[Pair]:
    """The pairs of BUS-BRA; the number in a name is the patient's, the letter after it tells her pictures apart.

    Raises:
        UserError: see `pairs.find` and `pairs.match`.
    """
    published = any(path.name == "Images" for path in folder.iterdir())  # not is_dir: some systems ignore case
    names = ("Images", r"bus_(\d+-\w+)", "Masks", r"mask_(\d+-\w+)")
    if not published:
        names = ("images", r"(.*\d+-\w+)", "masks", r"(.*\d+-\w+)")
    images, masks = find(folder / names[0], names[1]), find(folder / names[2], names[3])
    return [Pair(patient(case), image, paths) for case, (image, paths) in match(images, masks).items()]


def patient(case: str) -> str:
    """The patient's number out of "0001-l" or "benign_0804-s"."""
    found = re.search(r"(\d+)-\w+$", case)
    assert found is not None, "what `bus_bra` finds has a number"
    return f"bus_{found[1]}"


CARD = Card(
    what=(
        "Grey-scale ultrasound pictures of the breast, each with a benign or malignant lesion outlined by hand; "
        "several lesions of a picture are one foreground. In-domain is BUSI (Cairo), out of domain BUS-BRA "
        "(Rio de Janeiro). BUSI's pictures without a lesion are left out, and one whose masks do not fit it."
    ),
    splits=(
        "BUSI is divided at random by picture, since it is not published which pictures show the same woman. "
        "'test-bus-bra' is all of BUS-BRA, with the patient's number as subject."
    ),
    doubt=(
        "Women with several pictures may stand on both sides of BUSI's split, and the whole set is known to hold "
        "duplicates, so in-domain scores are optimistic. Some pictures carry marks and text of the device. Every "
        "picture shows a lesion, which no clinic's pictures do."
    ),
    source=(
        "BUSI: Al-Dhabyani et al., Data in Brief 28:104863, 2020. BUS-BRA: Gómez-Flores et al., Medical Physics "
        "51:3110-3123, 2024; zenodo.org/records/8231412."
    ),
    licence="BUSI: CC0 1.0, as mirrors state it. BUS-BRA: CC BY 4.0.",
)
