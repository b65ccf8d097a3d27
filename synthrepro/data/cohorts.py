"""What the tasks `neurite-oasis`, `abide` and `oasis3` share: many people, labels made by FreeSurfer or SAMSEG.

Nobody is named in a list: who is in the folder is in the task. People are taken in the order of the SHA-256 of their
id, in which neither sites nor ages stand together; the last 20 % test, the last 20 % of the rest validate, the others
train. These shares, and the halving of the training people between images and label maps for synthesis, are those of
the published code of Learn2Synth (Hu et al., ICCV 2025), which takes people as its list has them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from synthrepro.data.brain_oasis import CLASSES, SPAN, UNLABELLED, picture, with_unlabelled, without_unlabelled
from synthrepro.data.task import Card, Split, Task
from synthrepro.data.volumes import Volume, cut_axially, majority, read_pair
from synthrepro.errors import UserError

SHARE = 0.2  # of the people who test, and of the rest those who validate
FEWEST = 4  # people: one in every split


class Options(BaseModel):
    """Options of a cohort.

    Attributes:
        size: rows and columns.
        spacing: side of a pixel in mm; a slice is as many whole mm thick.
        slices: axial slices a scan, spread evenly over the brain's height between the fractions of `brain_oasis.SPAN`.
        halves: the first half of the training people gives the images of "train", the second the label maps of "maps";
            else everybody who trains gives both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[PositiveInt, PositiveInt] = (64, 56)
    spacing: Annotated[float, Field(ge=1, le=9)] = 3.0
    slices: PositiveInt = 12
    halves: bool = False


@dataclass(frozen=True)
class Scan:
    """One scan of a person; a person may have several. `flat`: the files hold one coronal slice, see `volumes`."""

    person: str
    image: Path
    labels: Path
    flat: bool = False


def part(people: Iterable[str], halves: bool) -> dict[str, tuple[str, ...]]:
    """Who is in "train", "validation", "maps" and "test".

    Raises:
        UserError: there are fewer than `FEWEST`.
    """
    ordered = sorted(set(people), key=lambda person: hashlib.sha256(person.encode()).hexdigest())
    if len(ordered) < FEWEST:
        raise UserError(
            f"At least {FEWEST} people are needed to part them, but only {len(ordered)} are there: get more."
        )
    test = max(1, round(SHARE * len(ordered)))
    rest, tested = ordered[:-test], ordered[-test:]
    validation = max(1, round(SHARE * len(rest)))
    train, validated = rest[:-validation], rest[-validation:]
    half = (len(train) + 1) // 2
    shown, drawn = (train[:half], train[half:]) if halves else (train, train)
    return {"train": tuple(shown), "validation": tuple(validated), "maps": tuple(drawn), "test": tuple(tested)}


def check_scans(scans: Iterable[Scan], table: Mapping[int, int]) -> None:
    """Read and check every file.

    Raises:
        UserError: see `part` and `volumes.read_pair`.
    """
    scans = list(scans)
    part((scan.person for scan in scans), halves=False)
    for scan in scans:
        read_pair(scan.image, scan.labels, table, scan.flat)


def build(name: str, scans: Iterable[Scan], table: Mapping[int, int], options: Options, card: Card) -> Task:
    """Build a task from its scans.

    Args:
        table: label value -> class of `brain_oasis.CLASSES`.

    Raises:
        UserError: see `part` and `volumes.read_pair`.
    """
    scans = sorted(scans, key=lambda scan: (scan.person, scan.image))
    parts = part((scan.person for scan in scans), options.halves)
    images: dict[str, list[Tensor]] = {split: [] for split in parts}
    labels: dict[str, list[Tensor]] = {split: [] for split in parts}
    people: dict[str, list[str]] = {split: [] for split in parts}
    for scan in scans:
        pictures, maps = slices_of(scan, table, options)
        for split in (split for split, members in parts.items() if scan.person in members):
            images[split].append(pictures[:, :0] if split == "maps" else pictures)
            labels[split].append(maps if split == "maps" else without_unlabelled(maps))
            people[split] += [scan.person] * len(maps)
    splits = {s: Split(torch.cat(images[s]), torch.cat(labels[s]), tuple(people[s])) for s in parts}
    return Task(name, CLASSES, 1, splits, card)


def slices_of(scan: Scan, table: Mapping[int, int], options: Options) -> tuple[Tensor, Tensor]:
    """Images (S, 1, H, W) in [0, 1] and label maps (S, H, W), values 0 to `UNLABELLED`; a flat scan is one slice."""
    image, labels = read_pair(scan.image, scan.labels, table, scan.flat)
    if scan.flat:  # its one plane is a slice, however thick slices are
        voxel = (float(round(options.spacing)), *image.voxel[1:])
        image = Volume(image.planes, voxel, image.affine, image.path)
        labels = Volume(labels.planes, voxel, labels.affine, labels.path)
    slices = 1 if scan.flat else options.slices
    cut = cut_axially(image.planes > 0, image.voxel, options.size, options.spacing, slices, SPAN)
    return picture(image, cut), majority(with_unlabelled(labels), cut, UNLABELLED)
