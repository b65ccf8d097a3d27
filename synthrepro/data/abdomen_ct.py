"""The real task `abdomen-ct`: abdominal CT slices with pancreas, kidneys and liver outlined, of the CURVAS challenge.

The folder holds, for each of the annotators, the slices that were taken from that annotator's volumes:

    annotator1/images/10001_458.png   patient and number of the slice; 512 x 512, grey, 8 bits, windowed
    annotator1/masks/10001_458.png    512 x 512, RGB: cyan pancreas, yellow kidney, magenta liver, black the rest
    annotator2/, annotator3/          likewise

They are the folders `mini_test` of the projects CURVAS-Annotation-1, -2 and -3 in the repository that the card names.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt

from synthrepro.data import pairs
from synthrepro.data.pairs import UNREADABLE, Pair, find, match
from synthrepro.data.task import Card, Sample, Split, Task
from synthrepro.data.volumes import ADVICE
from synthrepro.errors import UserError

FAMILY = "real"

CLASSES = ("background", "pancreas", "kidney", "liver")
COLOURS = ((0, 0, 0), (0, 255, 255), (255, 255, 0), (255, 0, 255))  # of the classes, in the masks
SIDE = 512  # pixels, as CURVAS has them


class Options(pairs.Options):
    """Options of the task; `seed` draws who is where.

    Attributes:
        size: rows and columns to which the slices are resized.
        patients: how many patients train, validate and test, each with all of their slices.
        unlabelled: whether there is a split "unlabelled" too.
    """

    size: tuple[PositiveInt, PositiveInt] = (256, 256)
    patients: tuple[PositiveInt, NonNegativeInt, PositiveInt] = (9, 2, 3)
    unlabelled: bool = False


def files(folder: Path) -> list[Path]:
    """Slices and masks that are there."""
    return pairs.files(pairs_of, folder)


def check(folder: Path) -> None:
    """Read and check every file.

    Raises:
        UserError: see `pairs_of` and `read_slice`.
    """
    for pair in pairs_of(folder)["curvas"]:
        read_slice(pair)


def load(options: Options, folder: Path) -> Task:
    """Build the task: "train", "validation" (may be empty), "test" and, if asked for, "unlabelled".

    "unlabelled" has the images of "train" and -1 for every label: all slices of the training patients, and none of
    those who validate or test.

    Raises:
        UserError: there are fewer patients than asked for; see `pairs_of` and `read_slice`.
    """
    found = pairs_of(folder)["curvas"]
    there, asked = len({pair.subject for pair in found}), sum(options.patients)
    if asked > there:
        raise UserError(f"Task abdomen-ct, option 'patients': {asked} are asked for, but {folder} has only {there}.")
    train, validation, test = options.patients
    counts = {"test": test, "validation": validation, "train": train}  # who tests depends on nothing else
    drawn = pairs.divide("abdomen-ct", found, counts, options.seed, lambda pair: [read_sample(pair, options.size)])
    splits = {name: pairs.stack(drawn[name], options.size, 1) for name in ("train", "validation", "test")}
    if options.unlabelled:
        pool = splits["train"]
        splits["unlabelled"] = Split(pool.images, torch.full_like(pool.labels, -1), pool.subjects)
    return Task("abdomen-ct", CLASSES, 1, splits, CARD)


def pairs_of(folder: Path) -> dict[str, list[Pair]]:
    """The slices of all annotators, "curvas", in the order of patients and of the slices' numbers.

    Raises:
        UserError: there is no folder of an annotator; a slice is there twice; see `pairs.find` and `pairs.match`.
    """
    annotators = sorted(path for path in folder.glob("annotator*") if path.is_dir())
    if not annotators:
        raise UserError(f"{folder} holds no folder annotator1: put the data set there as book/data.md says.")
    found: dict[tuple[int, int], Pair] = {}
    for annotator in annotators:
        images, masks = (find(annotator / kind, r"(\d+_\d+)") for kind in ("images", "masks"))
        for case, (image, mask) in match(images, masks).items():
            patient, number = re.findall(r"\d+", case)
            place = (int(patient), int(number))
            if place in found:
                raise UserError(f"{image} shows the same slice as {found[place].image}: keep one of them.")
            found[place] = Pair(patient, image, mask)
    return {"curvas": [found[place] for place in sorted(found)]}


def read_sample(pair: Pair, size: tuple[int, int]) -> Sample:
    """A slice and its labels resized: antialiased bilinear interpolation, and the nearest pixel.

    Raises:
        UserError: see `read_slice`.
    """
    pixels, classes = (torch.from_numpy(plane)[None, None] for plane in read_slice(pair))
    image = F.interpolate(pixels, size, mode="bilinear", antialias=True).clamp(0, 1)
    label = F.interpolate(classes, size, mode="nearest-exact")
    return Sample(image[0], label[0, 0].long(), pair.subject)


def read_slice(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """A slice as it is in the files: values (512, 512) float32 in [0, 1] and classes (512, 512) uint8.

    Raises:
        UserError: a file cannot be read to its end, has another size or kind of pixels than the layout says, or the
            mask a colour that stands for no class; the slice has the same value everywhere.
    """
    values, colours = read_png(pair.image, "L", "grey"), read_png(pair.masks[0], "RGB", "RGB")
    if values.min() == values.max():
        raise UserError(f"{pair.image} has the same value everywhere, so it shows nothing: {ADVICE}.")
    classes = np.full(colours.shape[:2], len(COLOURS), dtype=np.uint8)
    for value, colour in enumerate(COLOURS):
        classes[(colours == colour).all(-1)] = value
    if (unknown := classes == len(COLOURS)).any():
        other = ", ".join(str(part) for part in colours[unknown][0])
        raise UserError(f"{pair.masks[0]} has the colour ({other}), which stands for no organ of this task: {ADVICE}.")
    return values.astype(np.float32) / 255, classes


def read_png(path: Path, mode: str, words: str) -> np.ndarray:
    """Pixels of a picture of 8 bits, (512, 512) or (512, 512, 3) uint8.

    Args:
        mode: PIL's name of the kind of pixels that it must have; words: ours.

    Raises:
        UserError: it cannot be read to its end, or has another kind of pixels or another size.
    """
    try:
        with Image.open(path) as picture:
            found, size, values = picture.mode, picture.size, np.array(picture)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({str(error).rstrip('.')}): {ADVICE}.") from error
    if found != mode:
        raise UserError(f"{path} is no {words} picture of 8 bits (its pixels are of PIL's kind {found}): {ADVICE}.")
    if size != (SIDE, SIDE):
        raise UserError(f"{path} has {size[0]} x {size[1]} pixels instead of {SIDE} x {SIDE}: {ADVICE}.")
    return values


CARD = Card(
    what=(
        "Axial slices of abdominal CT, windowed to 8 bits, with pancreas, both kidneys (one class) and liver. The "
        "outlines are those of TotalSegmentator as radiologists corrected them; each slice comes with "
        "one radiologist's. Patients are seen from their feet, the liver on the left."
    ),
    splits=(
        "By patient, at random. 'unlabelled', if asked for, has all slices of the training patients without their "
        "labels, so nobody who validates or tests is in it."
    ),
    doubt=(
        "Few patients with few slices each, and slices of one patient are not independent. The files do not say how "
        "their values were windowed. The challenge is about where its three radiologists differ; here a slice has one "
        "of them, and which one differs between slices. The unlabelled slices are the training slices and no more, so "
        "what pre-training could gain from further data cannot be seen."
    ),
    source=(
        "github.com/sarah-antillia/TensorFlow-FlexUNet-Image-Segmentation-CURVAS-Abdominal-MultiOrgan, folders "
        "mini_test; from CURVAS (Riera-Marín et al., arXiv 2505.08685, 2025; curvas.grand-challenge.org)."
    ),
    licence="CC BY-NC 4.0, as the repository states it.",
)
