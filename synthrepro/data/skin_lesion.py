"""The real task `skin-lesion`: dermoscopic pictures with the lesion drawn, of ISIC 2018 (task 1) and of PH2.

The folder holds the two sets, of which the second may be absent, as their archives unpack:

    ISIC2018_Task1-2_Training_Input/        ISIC_0000000.jpg
    ISIC2018_Task1_Training_GroundTruth/    ISIC_0000000_segmentation.png
    PH2Dataset/PH2 Dataset images/IMD002/   IMD002_Dermoscopic_Image/IMD002.bmp, IMD002_lesion/IMD002_lesion.bmp

The challenge's folders for validation and test are not read: like GenSeg, all parts are taken from the training set.
"""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from synthrepro.data import pairs
from synthrepro.data.pairs import Pair, find, match
from synthrepro.data.task import Card, Task
from synthrepro.data.volumes import ADVICE
from synthrepro.errors import UserError

FAMILY = "real"

CLASSES = ("background", "lesion")


class Options(pairs.Options):
    """Options of the task, beside those of `pairs.Options`.

    Attributes:
        subjects: how many pictures of ISIC's training set train, validate and test; GenSeg tests on 594.
    """

    subjects: tuple[PositiveInt, NonNegativeInt, PositiveInt] = (200, 50, 594)


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
    """Build the task: "train", "validation" (may be empty), "test" and, if PH2 is there, "test-ph2".

    Raises:
        UserError: see `pairs_of` and `pairs.build`.
    """
    return pairs.build(Task("skin-lesion", CLASSES, 3, {}, CARD), pairs_of(folder), options.subjects, options)


def pairs_of(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of "isic" and, if it is there, of "test-ph2".

    Raises:
        UserError: see `pairs.find` and `pairs.match`; PH2's folder holds no pictures.
    """
    images = find(folder / "ISIC2018_Task1-2_Training_Input", r"(ISIC_\d+)")
    masks = find(folder / "ISIC2018_Task1_Training_GroundTruth", r"(ISIC_\d+)_segmentation")
    sets = {"isic": [Pair(case, image, mask) for case, (image, mask) in match(images, masks).items()]}
    if (folder / "PH2Dataset").is_dir():
        sets["test-ph2"] = ph2(folder / "PH2Dataset" / "PH2 Dataset images")
    return sets


def ph2(folder: Path) -> list[Pair]:
    """PH2's pairs, which have a folder each.

    Raises:
        UserError: there is none; see `pairs.find`.
    """
    cases = sorted(path for path in folder.glob("IMD*") if path.is_dir())
    if not cases:
        raise UserError(f"{folder} holds no folder like IMD002: {ADVICE}.")
    found = []
    for case in cases:
        images = find(case / f"{case.name}_Dermoscopic_Image", f"({case.name})")
        masks = find(case / f"{case.name}_lesion", f"({case.name})_lesion")
        found += [Pair(name, image, mask) for name, (image, mask) in match(images, masks).items()]
    return found


CARD = Card(
    what=(
        "Dermoscopic colour pictures of pigmented lesions of the skin, each with the lesion's outline. In-domain is "
        "the training set of ISIC 2018, task 1, from several clinics; out of domain is PH2, of one hospital (Pedro "
        "Hispano, Matosinhos) and one device."
    ),
    splits="ISIC's training set is divided at random by picture. 'test-ph2' is all of PH2.",
    doubt=(
        "Patients and lesions that come several times are not named, so one may stand on both sides of the split. "
        "Outlines were made in different ways by different people; hairs, rulers and dark corners give sources away."
    ),
    source=(
        "ISIC 2018: challenge.isic-archive.com/data (Codella et al., arXiv 1902.03368, 2019; Tschandl et al., "
        "Scientific Data 5:180161, 2018). PH2: Mendonça et al., Proc. IEEE EMBC, 5437-5440, 2013; the ADDI project of "
        "the University of Porto."
    ),
    licence="ISIC 2018: CC BY-NC, as the archive states it. PH2: for research and education, as its home states it.",
)
