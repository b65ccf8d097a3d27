"""Pictures and masks in files: finding the pairs, reading and checking them, dividing them by subject.

What the tasks of photographs, ultrasound, endoscopy and radiographs share. A picture comes with one or several binary
masks, which are united. Both are resized to one size whatever their sides, so their aspect ratio is not kept, as in the
released loaders of GenSeg (Zhang et al., Nature Communications 16:6486, 2025): the picture by antialiased bicubic
interpolation as there, the mask by the majority of the area where theirs take the nearest pixel (for ISIC) or
interpolate (for JSRT).

A picture whose mask has no foreground, in the file or once resized, is left out of every split: the Jaccard index of an
image without foreground is undefined. Whatever else is wrong with a file is a `UserError` that names it.
"""

import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from synthrepro.data.task import Sample, Split, Task
from synthrepro.data.volumes import ADVICE
from synthrepro.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
RAW = ".img"  # as JSRT publishes its radiographs: RAW_SIDE x RAW_SIDE big-endian integers of 12 bits, bright is low
RAW_SIDE, RAW_TOP = 2048, 4095
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as PIL converts colour to grey

Found = Mapping[str, tuple[Path, ...]]  # what was found of a case, by the case's name


class Options(BaseModel):
    """What the tasks of pictures and masks have in common.

    Attributes:
        size: rows and columns to which pictures and masks are resized, whatever their aspect ratio.
        seed: of the random division of the subjects.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[PositiveInt, PositiveInt] = (64, 64)
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """A picture and its masks.

    Attributes:
        subject: whom it shows.
        image, masks: the files; the foreground is what any of the masks holds.
        finer: by which whole factors the picture may have more rows and columns than its masks.
    """

    subject: str
    image: Path
    masks: tuple[Path, ...]
    finer: tuple[int, ...] = (1,)


Sets = Mapping[str, Sequence[Pair]]  # the pairs of a data set, by its name


# ----- finding


def find(folder: Path, pattern: str = "(.+)", several: bool = False) -> Found:
    """The pictures of a folder whose stem matches a pattern, by the case that its first group names.

    What does not match and what is no picture by its suffix is passed over.

    Args:
        several: a case may have several files.

    Raises:
        UserError: there is no such folder or no such picture; two are of one case, unless `several`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: put the data set there as the task's card and book/data.md say.")
    found: dict[str, tuple[Path, ...]] = {}
    for path in sorted(folder.iterdir()):
        named = re.fullmatch(pattern, path.stem)
        if named is None or path.suffix.lower() not in (*SUFFIXES, RAW) or path.name.startswith("."):
            continue
        before = found.get(named[1], ())
        if before and not several:
            raise UserError(f"{path} and {before[0].name} are of the same case: keep one of them.")
        found[named[1]] = (*before, path)
    if not found:
        raise UserError(f"{folder} holds none of the files that are looked for there: {ADVICE}.")
    return found


def join(*parts: Found) -> Found:
    """What was found in several folders.

    Raises:
        UserError: a case stands in two of them.
    """
    joined: dict[str, tuple[Path, ...]] = {}
    for part in parts:
        for case, paths in part.items():
            if case in joined:
                raise UserError(f"{paths[0]} and {joined[case][0]} are of the same case: keep one of them.")
            joined[case] = paths
    return joined


def match(images: Found, *masks: Found, partial: bool = False) -> dict[str, tuple[Path, tuple[Path, ...]]]:
    """Case -> picture and masks, in the order of the cases' names.

    Args:
        masks: each must hold every case, for instance left and right lungs.
        partial: leave out the pictures that lack a mask.

    Raises:
        UserError: a picture has no mask, unless `partial`; a mask has no picture.
    """
    matched = {}
    for case, (image, *_) in sorted(images.items()):
        lacking = [found for found in masks if case not in found]
        if not lacking:
            matched[case] = (image, tuple(path for found in masks for path in found[case]))
        elif not partial:
            folder = next(iter(lacking[0].values()))[0].parent
            raise UserError(f"{image} has no mask in {folder}: {ADVICE}.")
    for found in masks:
        for case, paths in sorted(found.items()):
            if case not in images:
                raise UserError(f"{paths[0]} is a mask without a picture: {ADVICE}.")
    return matched


# ----- reading


def read_pixels(path: Path) -> np.ndarray:
    """The picture in a file, (H, W, C) float32 in [0, 1] with one or three channels.

    Transparency is dropped, palettes are looked up. Eight bits are divided by 255; values of more bits are stretched
    from the least to the greatest in the file, since how many of the bits are in use is written nowhere.

    Raises:
        UserError: the file is missing, cannot be read to its end, or holds a single value.
    """
    values = _read(path)
    if values.min() == values.max():
        raise UserError(f"{path} has the same value everywhere, so it shows nothing: {ADVICE}.")
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 255
    wide = values.astype(np.float64)
    return ((wide - wide.min()) / (wide.max() - wide.min())).astype(np.float32)


def read_image(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """A picture resized, (C, H, W) float32 in [0, 1]; grey becomes three equal channels, colour becomes its luma.

    Args:
        channels: 1 or 3.

    Raises:
        UserError: see `read_pixels`.
    """
    return resize_image(read_pixels(path), size, channels)


def read_mask(path: Path) -> np.ndarray:
    """The foreground of a binary mask, (H, W) bool.

    A pixel has the value of its greatest channel, so that any colour on black is foreground. Values of 0 and 1 are
    taken as such; otherwise foreground is what reaches half of the full range, 255 or, if there is more, 65535.

    Raises:
        UserError: the file is missing, cannot be read to its end, or its greatest value is neither 0, 1 nor at least
            half of the range, hence a mask in an unknown code.
    """
    values = _read(path).max(axis=-1)
    top = values.max()
    if top <= 1:
        return np.asarray(values == 1)
    half = 127.5 if top <= 255 else 32767.5
    if top < half or values.min() < 0:
        raise UserError(f"{path} is no binary mask (its values end at {values.min():g} and {top:g}): {ADVICE}.")
    return np.asarray(values > half)


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Picture (H, W, C) in [0, 1] and foreground (H', W') bool, H' and W' smaller by one of the pair's factors.

    Raises:
        UserError: see `read_pixels` and `read_mask`; the sizes do not fit.
    """
    pixels = read_pixels(pair.image)
    foreground = None
    for path in pair.masks:
        mask = read_mask(path)
        if pixels.shape[:2] not in [tuple(n * factor for n in mask.shape) for factor in pair.finer]:
            sizes = [" x ".join(str(n) for n in (array.shape[1], array.shape[0])) for array in (mask, pixels)]
            raise UserError(f"{path} has {sizes[0]} pixels but its image {pair.image.name} has {sizes[1]}: {ADVICE}.")
        if foreground is not None and foreground.shape != mask.shape:
            raise UserError(
                f"{path} has another size than {pair.masks[0].name}, the other mask of its image: {ADVICE}."
            )
        foreground = mask if foreground is None else foreground | mask
    assert foreground is not None, "a pair has a mask"
    return pixels, foreground


def read_sample(pair: Pair, size: tuple[int, int], channels: int) -> Sample | None:
    """The pair resized; None if its mask, in the file or resized, has no foreground.

    Raises:
        UserError: see `read_pair`.
    """
    pixels, foreground = read_pair(pair)
    label = resize_mask(foreground, size)
    return Sample(resize_image(pixels, size, channels), label, pair.subject) if label.any() else None


def resize_image(pixels: np.ndarray, size: tuple[int, int], channels: int) -> Tensor:
    """Antialiased bicubic interpolation of (h, w, c) to (C, H, W); what it overshoots is clamped to [0, 1]."""
    if pixels.shape[-1] == 3 and channels == 1:
        pixels = pixels @ LUMA[:, None]
    planes = [_resize(pixels[..., c], size, Image.Resampling.BICUBIC) for c in range(pixels.shape[-1])]
    return torch.from_numpy(np.stack(planes)).clamp(0, 1).expand(channels, -1, -1).contiguous()


def resize_mask(foreground: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W) int64: 1 where at least half of what a pixel covers of the (h, w) bool is foreground."""
    share = _resize(foreground, size, Image.Resampling.BOX)
    return torch.from_numpy(share > 0.5 - 1e-5).long()  # a half stays a half, however it is rounded


def _resize(plane: np.ndarray, size: tuple[int, int], filter_: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(plane.astype(np.float32)).resize(size[::-1], filter_))


def _read(path: Path) -> np.ndarray:
    """(H, W, C) uint8, or of more bits with one channel; transparency is dropped."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {ADVICE}.")
    if path.suffix.lower() == RAW:
        return _read_raw(path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                values = np.array(image)[..., None]
            elif image.mode in ("1", "L", "LA", "La"):
                values = np.array(image.convert("L"))[..., None]
            else:  # over RGBA, since a palette may have transparency of its own
                values = np.array(image.convert("RGBA"))[..., :3]
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({str(error).rstrip('.')}): {ADVICE}.") from error
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{path} holds values that are not finite (NaN or infinity): {ADVICE}.")
    return values


def _read_raw(path: Path) -> np.ndarray:
    values = np.fromfile(path, dtype=np.uint8)
    if len(values) != 2 * RAW_SIDE**2:
        sides = f"{RAW_SIDE} x {RAW_SIDE}"
        raise UserError(f"{path} has {len(values)} bytes instead of the {2 * RAW_SIDE**2} of {sides} values: {ADVICE}.")
    values = values.view(">u2").reshape(RAW_SIDE, RAW_SIDE, 1).astype(np.uint16)
    if values.max() > RAW_TOP:
        raise UserError(f"{path} holds values above {RAW_TOP}, so it is no picture of 12 bits: {ADVICE}.")
    return RAW_TOP - values


# ----- sets


def files(pairs_of: Callable[[Path], Sets], folder: Path) -> list[Path]:
    """Pictures and masks of every set; the folder itself if they do not pair up, of which `check` gives the reason."""
    try:
        return [path for pairs in pairs_of(folder).values() for pair in pairs for path in (pair.image, *pair.masks)]
    except UserError:
        return [folder]


def build(task: Task, sets: Sets, subjects: Sequence[int], options: Options) -> Task:
    """A task whose first set is divided into "train", "validation" and perhaps "test"; the others are further splits.

    Args:
        task: without splits.
        sets: name -> pairs; of all but the first the name is that of a split.
        subjects: how many train, validate and, unless the test set is one of the others, test.

    Raises:
        UserError: see `divide` and `read_split`.
    """
    own, *others = sets
    names = ("train", "validation", "test")[: len(subjects)]
    counts = dict(reversed([*zip(names, subjects, strict=True)]))  # whom the test set shows depends on nothing else

    def read(pair: Pair) -> list[Sample]:
        sample = read_sample(pair, options.size, task.channels)
        return [sample] if sample else []

    drawn = divide(task.name, sets[own], counts, options.seed, read)
    splits = {name: stack(drawn[name], options.size, task.channels) for name in names}
    splits |= {name: read_split(sets[name], options.size, task.channels) for name in others}
    return replace(task, splits=splits)


def check(sets: Sets) -> None:
    """Read and check every file.

    Raises:
        UserError: see `read_pair`; no mask of a set has any foreground.
    """
    for pairs in sets.values():
        if not [pair for pair in pairs if read_pair(pair)[1].any()]:
            raise _nothing(pairs)


def read_split(pairs: Iterable[Pair], size: tuple[int, int], channels: int) -> Split:
    """All pairs but those without foreground, in their order.

    Raises:
        UserError: see `read_pair`; no mask has any foreground.
    """
    pairs = list(pairs)
    samples = [sample for pair in pairs if (sample := read_sample(pair, size, channels))]
    if not samples:
        raise _nothing(pairs)
    return stack(samples, size, channels)


def divide(
    name: str, pairs: Iterable[Pair], counts: Mapping[str, int], seed: int, read: Callable[[Pair], Sequence[Sample]]
) -> dict[str, list[Sample]]:
    """Parts of a set, with different subjects in each, in an order that the seed draws.

    Parts are filled in the order of `counts`, so the subjects of the first do not depend on how many the others take.
    Only what is taken is read. Subjects without foreground are passed over.

    Args:
        name: of the task.
        counts: part -> how many subjects, each with all of its pairs.
        read: gives the samples of a pair, none if it has no foreground.

    Raises:
        UserError: there are not that many subjects; nobody has foreground; whatever `read` raises.
    """
    of: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        of[pair.subject].append(pair)
    names = sorted(of)
    if sum(counts.values()) > len(names):
        raise _too_many(name, counts, f"{len(names)} are")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    waiting = iter([names[i] for i in order])
    parts: dict[str, list[list[Sample]]] = {part: [] for part in counts}
    for part, count in counts.items():
        while len(parts[part]) < count:
            subject = next(waiting, None)
            if subject is None:
                if not any(parts.values()):
                    raise _nothing([pair for n in names for pair in of[n]])
                found = sum(len(subjects) for subjects in parts.values())
                raise _too_many(name, counts, f"{found} with foreground are")
            if samples := [sample for pair in of[subject] for sample in read(pair)]:
                parts[part].append(samples)
    return {part: [sample for samples in subjects for sample in samples] for part, subjects in parts.items()}


def stack(samples: Sequence[Sample], size: tuple[int, int], channels: int) -> Split:
    """A split of samples, perhaps of none."""
    if not samples:
        return Split(torch.zeros(0, channels, *size), torch.zeros(0, *size, dtype=torch.int64), ())
    images = torch.stack([sample.image for sample in samples])
    labels = torch.stack([sample.label for sample in samples])
    return Split(images, labels, tuple(sample.subject for sample in samples))


def _too_many(name: str, counts: Mapping[str, int], there: str) -> UserError:
    asked = " + ".join(f"{count} for {part}" for part, count in counts.items())
    return UserError(f"Task {name}, option 'subjects': {asked} are asked for, but only {there} there: ask for fewer.")


def _nothing(pairs: Sequence[Pair]) -> UserError:
    where = pairs[0].masks[0].parent
    return UserError(f"None of the {len(pairs)} masks in {where} has any foreground, so there is one class: {ADVICE}.")
