"""The real task `polyp`: frames of colonoscopies with the polyp drawn by hand, of CVC-ClinicDB and of Kvasir-SEG.

The folder holds the two sets, of which the second may be absent:

    CVC-ClinicDB/Original/      1.tif ... 612.tif, or .png
    CVC-ClinicDB/Ground Truth/  likewise
    Kvasir-SEG/images/          names.jpg
    Kvasir-SEG/masks/           likewise

The frames of CVC-ClinicDB come from 29 sequences, one after another; a sequence is never divided.
"""

from bisect import bisect_left
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from synthrepro.data import pairs
from synthrepro.data.pairs import Pair, find, match
from synthrepro.data.task import Card, Task
from synthrepro.errors import UserError

FAMILY = "real"

CLASSES = ("background", "polyp")

# Last frame of every sequence, from the table on the set's home page (see `CARD`) as the conversion script of
# github.com/dataset-ninja/cvc-612 repeats it.
ENDS = (25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317, 342, 363, 383, 408, 428, 447, 466, 478,
        503, 528, 546, 571, 591, 612)  # fmt: skip


class Options(pairs.Options):
    """Options of the task, beside those of `pairs.Options`.

    Attributes:
        subjects: how many of CVC-ClinicDB's 29 sequences train, validate and test.
    """

    subjects: tuple[PositiveInt, NonNegativeInt, PositiveInt] = (17, 2, 10)


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
    """Build the task: "train", "validation" (may be empty), "test" and, if Kvasir-SEG is there, "test-kvasir".

    Raises:
        UserError: see `pairs_of` and `pairs.build`.
    """
    return pairs.build(Task("polyp", CLASSES, 3, {}, CARD), pairs_of(folder), options.subjects, options)


def pairs_of(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of "cvc" and, if it is there, of "test-kvasir".

    Raises:
        UserError: see `pairs.find`, `pairs.match` and `sequence_of`.
    """
    cvc, kvasir = folder / "CVC-ClinicDB", folder / "Kvasir-SEG"
    matched = match(find(cvc / "Original", r"(\d+)"), find(cvc / "Ground Truth", r"(\d+)"))
    sets = {"cvc": [Pair(sequence_of(image), image, masks) for image, masks in matched.values()]}
    if kvasir.is_dir():
        matched = match(find(kvasir / "images"), find(kvasir / "masks"))
        sets["test-kvasir"] = [Pair(case, image, masks) for case, (image, masks) in matched.items()]
    return sets


def sequence_of(frame: Path) -> str:
    """The sequence to which a frame of CVC-ClinicDB belongs.

    Raises:
        UserError: its number is not one of the set's, so nobody knows.
    """
    number = int(frame.stem)
    if not 1 <= number <= ENDS[-1]:
        raise UserError(f"{frame} belongs to no sequence, since frames are numbered 1 to {ENDS[-1]}: remove it.")
    return f"sequence {bisect_left(ENDS, number) + 1}"


CARD = Card(
    what=(
        "Frames of colonoscopies in white light, each with at least one polyp outlined by hand. In-domain is "
        "CVC-ClinicDB (Barcelona), out of domain Kvasir-SEG (hospitals in Norway)."
    ),
    splits=(
        "The 29 sequences of CVC-ClinicDB are divided at random, each with all of its frames. 'test-kvasir' is all of "
        "Kvasir-SEG."
    ),
    doubt=(
        "Published scores on CVC-ClinicDB often come from a division by frame, in which neighbouring frames of a "
        "sequence stand on both sides; they are higher for that. Frames of a sequence are not independent, and "
        "sequences are few. Every frame shows a polyp. Which pictures of Kvasir-SEG show the same patient is not "
        "published."
    ),
    source=(
        "CVC-ClinicDB: polyp.grand-challenge.org/CVCClinicDB (Bernal et al., Computerized Medical Imaging and Graphics "
        "43:99-111, 2015). Kvasir-SEG: datasets.simula.no/kvasir-seg (Jha et al., MultiMedia Modeling, 451-462, 2020)."
    ),
    licence=(
        "CVC-ClinicDB: see its home page. Kvasir-SEG: for research and education; for other uses ask its authors, as "
        "its home page states it."
    ),
)
