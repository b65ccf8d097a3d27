"""The real task `lung-xray`: radiographs of the chest with the lungs drawn by hand, of JSRT and of two sets of the NLM.

The folder holds, as their archives unpack, JSRT's radiographs and the masks of SCR, and the other two or neither:

    All247images/                 JPCLN001.IMG ..., or the same as .png or .bmp in the usual polarity, lungs dark
    fold1/masks/left lung/        JPCLN001.gif ..., and in "right lung"
    fold2/masks/left lung/        likewise
    MontgomerySet/CXR_png/        MCUCXR_0001_0.png
    MontgomerySet/ManualMask/     leftMask/MCUCXR_0001_0.png, rightMask/MCUCXR_0001_0.png
    ChinaSet_AllFiles/CXR_png/    CHNCXR_0001_0.png
    ChinaSet_AllFiles/mask/       CHNCXR_0001_0_mask.png

Left and right lung are one foreground. JSRT's radiographs may have twice as many rows and columns as the masks of SCR,
as they are published. In ChinaSet (Shenzhen) not every radiograph has a mask; those without are left out.
"""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from synthrepro.data import pairs
from synthrepro.data.pairs import Pair, find, join, match
from synthrepro.data.task import Card, Task

FAMILY = "real"

CLASSES = ("background", "lung")


class Options(pairs.Options):
    """Options of the task, beside those of `pairs.Options`.

    Attributes:
        subjects: how many of JSRT's 247 radiographs train, validate and test; GenSeg's code tests on 72.
    """

    subjects: tuple[PositiveInt, NonNegativeInt, PositiveInt] = (140, 35, 72)


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
    """Build the task: "train", "validation" (may be empty), "test" and, if they are there, the test sets of the NLM.

    Those are "test-montgomery" and "test-shenzhen".

    Raises:
        UserError: see `pairs_of` and `pairs.build`.
    """
    return pairs.build(Task("lung-xray", CLASSES, 1, {}, CARD), pairs_of(folder), options.subjects, options)


def pairs_of(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of "jsrt" and, if they are there, of "test-montgomery" and "test-shenzhen".

    Raises:
        UserError: see `pairs.find`, `pairs.join` and `pairs.match`.
    """
    lungs = [
        join(*(find(folder / f"fold{k}" / "masks" / f"{side} lung") for k in (1, 2))) for side in ("left", "right")
    ]
    matched = match(find(folder / "All247images", r"(JPC\w+)"), *lungs)
    sets = {"jsrt": [Pair(case, image, masks, finer=(1, 2)) for case, (image, masks) in matched.items()]}
    montgomery, china = folder / "MontgomerySet", folder / "ChinaSet_AllFiles"
    if montgomery.is_dir():
        lungs = [find(montgomery / "ManualMask" / f"{side}Mask") for side in ("left", "right")]
        matched = match(find(montgomery / "CXR_png"), *lungs)
        sets["test-montgomery"] = [Pair(case, image, masks) for case, (image, masks) in matched.items()]
    if china.is_dir():
        matched = match(find(china / "CXR_png"), find(china / "mask", "(.+)_mask"), partial=True)
        sets["test-shenzhen"] = [Pair(case, image, masks) for case, (image, masks) in matched.items()]
    return sets


CARD = Card(
    what=(
        "Radiographs of the chest from the front, with both lungs outlined by hand as one foreground. In-domain is "
        "JSRT (Japan, digitised films, with and without a nodule); out of domain are the sets of the NLM from "
        "Montgomery County (USA) and Shenzhen (China), with and without tuberculosis."
    ),
    splits=(
        "JSRT is divided at random by picture. 'test-montgomery' is all of that set, 'test-shenzhen' all "
        "radiographs of that set with a mask."
    ),
    doubt=(
        "What counts as lung differs between the sets, for instance behind the heart and the diaphragm. The masks of "
        "Shenzhen were drawn later and by others than the set's authors. Values are stretched between the least and "
        "the greatest of each picture, which is not the normalisation of GenSeg's code (equalisation and gamma)."
    ),
    source=(
        "JSRT: db.jsrt.or.jp (Shiraishi et al., American Journal of Roentgenology 174:71-74, 2000). SCR: van Ginneken "
        "et al., Medical Image Analysis 10:19-40, 2006. Montgomery and Shenzhen: National Library of Medicine (Jaeger "
        "et al., Quantitative Imaging in Medicine and Surgery 4:475-477, 2014); masks of Shenzhen: Stirenko et al., "
        "arXiv 1803.01199, 2018."
    ),
    licence=(
        "JSRT: on registration. SCR: free for research, not to be handed on, no commercial use. NLM: see the sets' "
        "home page. Masks of Shenzhen: CC BY-NC-SA 4.0, as mirrors state it."
    ),
)
