"""The embedded task `lesion`: irregular lesions among things that resemble them, all in code; nothing to download.

Two modalities, after what photographs of skin lesions and ultrasound images of nodules look like. A subject is one
image of one lesion, made in four steps. All but the pixels' noise lives in the unit square, so that a subject is the
same at any size.

1. Outline. The logarithm of the radius, as a function of the angle, is a random Fourier series with notches cut in and
   streaks put on; the radius is scaled to the area drawn. Pose, elongation and a random smooth displacement of the
   plane follow. The label is what lies inside.
2. Border. The lesion fades out over a width that changes along the outline, from much less than a pixel to several:
   the border is sharp here and has to be guessed there. It is always the line of half the lesion's strength.
3. Scene. What the lesion does to the tissue is of several kinds, some of them rare, and varies from place to place;
   around it lie things that share its colours but not its form: in dermoscopy smooth spots, freckles, bruises, vessels,
   marks of a pen, stickers, hairs and shadows; in ultrasound layers, cysts, lobules of fat, vessels and acoustic
   shadows. See `lesion_looks`.
4. Picture, in one of the styles of the modality: "standard", and two that shift the domain. Dermoscopy: another
   "camera" (cast, gamma, vignette, noise, a ruler) and another "skin" (dark, with much hair). Ultrasound: another
   "probe" (coarse speckle, attenuation, gain, a narrow display) and another "tissue" (a gland darker than fat, lobules,
   shadows).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor

from synthrepro.data.lesion_looks import PROBES, SKINS, Draws, Grid, Lesion, dermoscopy, pick, ultrasound
from synthrepro.data.task import Card, Split, Task

FAMILY = "embedded"
CLASSES = ("background", "lesion")
LOOKS = {"dermoscopy": (3, dermoscopy, tuple(SKINS)), "ultrasound": (1, ultrasound, tuple(PROBES))}
CHUNK, PIXELS = 32, 2**17  # at most so many subjects and pixels are drawn at once

# The outline; lengths in sides of the image. Ranges are of uniform draws.
AREA = (0.16, 0.38)  # share of the image, log-uniform
CENTRE, ASPECT = (0.28, 0.72), (0.6, 1.0)
ANGLES = 512  # entries of the table of radii
ORDERS, WAVES = (2, 9), 0.12  # of the Fourier series: first and last order, standard deviation of the first's terms
# number, range of the log-radius' change, range of the width in radians
NOTCHES, STREAKS = (3, (-0.5, 0.0), (0.15, 0.35)), (6, (0.0, 0.25), (0.07, 0.16))
WARP = ((0.3, 0.03), (0.08, 0.01))  # (spacing of the knots, standard deviation)
FADE, FADE_CHANGE = (-5.4, -4.4), 0.6  # logarithm of the border's width: its mean, and amplitude along the outline


def files(folder: Path) -> list[Path]:
    """The files the task needs: none."""
    return []


def check(folder: Path) -> None:
    """Nothing can be missing or wrong."""


class Options(BaseModel):
    """Options of the task.

    Attributes:
        modality: "dermoscopy" in colour, "ultrasound" in grey.
        size: rows and columns. The scene fills them, so that one that is not square is stretched.
        subjects: for training, validation and test; each has one image.
        style: what "train", "validation" and "test" show; "test-<style>" shows the test lesions in each other style of
            the modality: "standard", "camera", "skin" or "standard", "probe", "tissue".
        seed: of everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    modality: Literal["dermoscopy", "ultrasound"] = "dermoscopy"
    size: tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]] = (64, 64)
    subjects: tuple[PositiveInt, PositiveInt, PositiveInt] = (1000, 40, 200)
    style: str = "standard"
    seed: int = 0

    @field_validator("style")
    @classmethod
    def _is_of_the_modality(cls, style: str, info: ValidationInfo) -> str:
        modality = info.data.get("modality", "dermoscopy")  # missing where it is itself wrong
        known = LOOKS[modality][2]
        if style not in known:
            raise ValueError(f"the styles of {modality} are {', '.join(known)}")
        return style


def draw_outlines(draws: Draws) -> Tensor:
    """Radius of each lesion at `ANGLES` angles from 0 on, (B, ANGLES), scaled to enclose an area of one."""
    angles = torch.arange(ANGLES) * (2 * torch.pi / ANGLES)
    orders = torch.arange(ORDERS[0], ORDERS[1] + 1)
    terms = torch.cat([(orders[:, None] * angles).cos(), (orders[:, None] * angles).sin()])  # (2 K, ANGLES)
    radius = (WAVES * draws.normal(len(terms)) * (ORDERS[0] / orders).repeat(2)) @ terms
    for count, change, width in (NOTCHES, STREAKS):
        where, height = draws.uniform((0.0, 2 * torch.pi), count, 1), draws.uniform(change, count, 1)
        shape = (((angles - where).cos() - 1) / draws.uniform(width, count, 1) ** 2).exp()  # (B, count, ANGLES)
        radius = radius + (height * shape).sum(1)
    radius = radius.exp()
    return radius / (torch.pi * radius.square().mean(1, keepdim=True)).sqrt()


def look_up(table: Tensor, angle: Tensor) -> Tensor:
    """Values of periodic tables (B, ANGLES) at angles (B, H, W) in radians, linear in between; (B, H, W)."""
    place = angle % (2 * torch.pi) * (table.shape[1] / (2 * torch.pi))
    below = place.long()
    left, right = (table.gather(1, ((below + k) % table.shape[1]).flatten(1)).view_as(angle) for k in (0, 1))
    return left + (place - below) * (right - left)


def draw_lesions(draws: Draws, grid: Grid) -> Lesion:
    """Draw outlines, borders and poses, and look at them on a grid."""
    area = AREA[0] * (AREA[1] / AREA[0]) ** draws.uniform((0.0, 1.0))
    centre, turn, aspect = draws.uniform(CENTRE, 2), draws.uniform((0.0, torch.pi)), draws.uniform(ASPECT)
    radius = draw_outlines(draws) * area.sqrt()[:, None]
    angles, phase = torch.arange(ANGLES) * (2 * torch.pi / ANGLES), draws.uniform((0.0, 2 * torch.pi), 2, 1)
    change = (angles + phase[:, 0]).sin() + (2 * angles + phase[:, 1]).sin()
    width = (draws.uniform(FADE, 1) + FADE_CHANGE * change).exp()  # (B, ANGLES)
    warp = sum((sd * grid.field(draws, spacing, 2) for spacing, sd in WARP), torch.zeros(()))
    y = grid.rows[:, None] + warp[:, 0] - pick(centre[:, 0])
    x = grid.columns + warp[:, 1] - pick(centre[:, 1])
    cos, sin, flat = pick(turn.cos()), pick(turn.sin()), pick(aspect.sqrt())
    u, v = (cos * x + sin * y) * flat, (cos * y - sin * x) / flat
    angle = torch.atan2(v, u)
    distance = look_up(radius, angle) - (u**2 + v**2).sqrt()
    return Lesion((distance / look_up(width, angle)).sigmoid(), distance, angle)


def load(options: Options, folder: Path) -> Task:
    """Build the task.

    Subject i of a split is the same whatever the number of subjects, its lesion and scene whatever the style, and both
    whatever the size.

    Args:
        folder: not used.
    """
    channels, render, styles = LOOKS[options.modality]
    height, width = options.size
    grid = Grid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width)

    def draws(subjects: Sequence[str], purpose: str) -> Draws:
        return Draws([(options.seed, options.modality, subject, purpose) for subject in subjects])

    def build(prefix: str, count: int, shown: Sequence[str]) -> list[Split]:
        labels: list[Tensor] = []
        images: dict[str, list[Tensor]] = {style: [] for style in shown}
        step = min(CHUNK, max(1, PIXELS // (height * width)))
        # Chunks are always full: how many go at once changes the last digits of torch's sums.
        everybody = [f"{prefix}-{i:04d}" for i in range(-(-count // step) * step)]
        for some in (everybody[start : start + step] for start in range(0, count, step)):
            lesions = draw_lesions(draws(some, "lesion"), grid)
            labels.append((lesions.distance > 0).long())
            for style in shown:
                images[style].append(render(lesions, grid, draws(some, "scene"), draws(some, style), style))
        maps, names = torch.cat(labels)[:count], tuple(everybody[:count])
        return [Split(torch.cat(images[style])[:count], maps, names) for style in shown]

    train, validation, test = options.subjects
    others = [style for style in styles if style != options.style]
    splits = build("train", train, [options.style])
    splits += build("validation", validation, [options.style])
    splits += build("test", test, [options.style, *others])
    parts = ["train", "validation", "test", *(f"test-{style}" for style in others)]
    return Task("lesion", CLASSES, channels, dict(zip(parts, splits, strict=True)), CARD)


CARD = Card(
    what=(
        "Synthetic images of one lesion each, as in dermoscopy (colour) or ultrasound (grey). Outlines are random, "
        "notched and streaked, sharp in part and faded in part; skin follows a model of absorption by melanin and "
        "haemoglobin, ultrasound one of levels, attenuation and speckle. Spots, bruises, freckles, vessels, hairs, pen "
        "marks, stickers and shadows, or layers, cysts, lobules and shadows, share the lesion's colours."
    ),
    splits=(
        "By subject, each with one lesion in one image. The further test sets show the lesions of the test split in "
        "another style of the modality, with other pictures of the same surroundings."
    ),
    doubt=(
        "Nothing here was measured: the ranges are set by eye and by how many labels a small network needs, so the "
        "learning curve is the task's design and no finding. Every image holds exactly one lesion, near the middle and "
        "not small. Labels are exact, where people who outline lesions disagree. A result here says that a method can "
        "work, not how well it does on patients."
    ),
    source=(
        "Code of this package; after the look of images as in the ISIC archive (isic-archive.com) and in BUSI "
        "(Al-Dhabyani et al., Data in Brief 28:104863, 2020), of which nothing is contained."
    ),
    licence="That of this package.",
)
