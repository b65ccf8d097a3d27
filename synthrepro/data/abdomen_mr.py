"""The embedded task `abdomen-mr`: the people of the task `abdomen`, in a magnetic resonance scanner.

Anatomy, levels and labels are those of `abdomen`, case by case; only the looks differ. The same painters run on a finer
grid, `FINE` pixels to a pixel along each side, and put down which tissue is where (`TissueCanvas`). Tissue becomes
signal by physics, the signals of water and of fat in a pixel are averaged, as complex numbers, and magnitude, a smooth
receive field and Rician noise follow. A case has one of three contrasts at 1.5 T (`CONTRASTS`): spoiled gradient echoes
with water and fat in phase and in opposed phase, where pixels that hold both are dark, and a T2-weighted spin echo.

T1 and T2 of liver, spleen, pancreas, kidney, muscle and marrow and T1 of fat are the means at 1.5 T of de Bazelaire et
al., "MR imaging relaxation times of abdominal and pelvic tissues measured in vivo at 3.0 T: preliminary results",
Radiology 230:652-659 (2004), which gives both fields; T1 and T2 of blood are those of Stanisz et al., "T1, T2
relaxation and magnetization transfer in tissue at 3T", Magn Reson Med 54:507-512 (2005), likewise. All else (other
tissues, T2*, proton density, share of fat, spreads, texture, flow, parameters of the scanner) is set by hand within
textbook ranges. The difference in frequency of fat and water is the usual 3.5 ppm.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from synthrepro.data.abdomen import draw_case
from synthrepro.data.abdomen_anatomy import DEPTH, FIELD_OF_VIEW, Anatomy
from synthrepro.data.abdomen_looks import (
    CLASSES,
    GRAINS,
    HU,
    Canvas,
    Looks,
    Part,
    paint_back,
    paint_bowel,
    paint_frame,
    paint_middle,
    paint_upper,
)
from synthrepro.data.brain_mni import stream
from synthrepro.data.individuals import smooth_field
from synthrepro.data.mri import flash, rescale, rician
from synthrepro.data.task import Card, Split, Task

FAMILY = "embedded"

# ----- which tissue is where

# The painters give muscle at half its value for the small vessels of the mesentery, and blends of cortex and medulla.
_FIRST = ("air", "small vessels", "muscle", "cortex", "medulla")
_UNNAMED = ("gas", "lung", "table", "sinus fat", "skin", "canal", "disc", "cortical bone")
TISSUES = (*_FIRST, *(name for name in HU if name not in _FIRST), *_UNNAMED)
CODE = {name: code for code, name in enumerate(TISSUES)}
# What the painters of `abdomen_looks` give in HU, not by name.
GIVEN = {-850.0: "gas", -500.0: "gas", -150.0: "table", 10.0: "skin", 30.0: "canal", 85.0: "disc"}
GIVEN |= dict.fromkeys((330.0, 380.0, 400.0), "cortical bone")


class TissueCanvas(Canvas):
    """A canvas whose `hu` holds codes of `TISSUES`, one a voxel and never a mixture."""

    def __init__(self, anatomy: Anatomy, levels: Tensor, size: tuple[int, int], key: tuple[object, ...]):
        # The painters mix what is in the veins of the liver with the mean of the liver, the only one they look up.
        super().__init__(anatomy, Looks("none", {"liver": float(CODE["veins"])}), levels, size, key)
        self.hu.fill_(CODE["air"])

    def textured(self, tissue: str, part: Part) -> Tensor:
        """The tissue's code."""
        return torch.tensor(float(CODE[tissue]))

    def paint(self, depth: Tensor, hu: Tensor | float, label: int | None, part: Part) -> None:
        """Put a tissue where `depth` is positive.

        Args:
            hu: code of a tissue; or HU, which are turned into a code: floats by `GIVEN`, and fields without a class,
                which are those of the lung and of the fat in the kidney.
        """
        if isinstance(hu, float):
            code = torch.tensor(float(CODE[GIVEN[hu]]))
        elif hu.dim() and not label:
            code = torch.tensor(float(CODE["lung" if hu.mean() < -400 else "sinus fat"]))
        else:
            code = hu.round()
        inside, here = depth > 0, self.hu[part]
        here.copy_(torch.where(inside, code, here))
        if label is not None:
            self.labels[part].masked_fill_(inside, label)


def paint_tissues(
    anatomy: Anatomy, levels: Tensor, size: tuple[int, int], key: tuple[object, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Paint which tissue is where; the counterpart of `abdomen_looks.picture`, with the same arguments.

    Returns:
        (S, H, W) int64 codes of `TISSUES`, (S, H, W) int64 classes, and (3, S, H, W) fields of unit variance, from
        fine to coarse.
    """
    canvas = TissueCanvas(anatomy, levels, size, key)
    cavity, diaphragm = paint_frame(canvas, anatomy)
    paint_bowel(canvas, anatomy, cavity, diaphragm)
    paint_upper(canvas, anatomy, cavity, diaphragm)
    paint_back(canvas, anatomy, cavity)
    paint_middle(canvas, anatomy, cavity)
    return canvas.hu.long(), canvas.labels.long(), torch.stack(list(canvas.grains))


# ----- how a tissue looks


@dataclass(frozen=True)
class Relaxation:
    """A tissue at 1.5 T.

    Attributes:
        t1, t2, t2_star: of its water, ms.
        pd: protons that are seen, water and fat together, relative to pure water.
        fat: share of them that are in fat.
        spread: standard deviation over the cases of the logarithms of T1 and T2.
        texture: standard deviation within it of the logarithm of T1, of each grain.
    """

    t1: float
    t2: float
    t2_star: float
    pd: float
    fat: float = 0.0
    spread: float = 0.07
    texture: tuple[float, float, float] = (0.04, 0.03, 0.0)


FAT = Relaxation(343, 95, 35, 1.0)  # T2 as it seems in a train of echoes, which is longer than that of single ones
NOTHING = Relaxation(1000, 50, 5, 0.0, texture=(0.0, 0.0, 0.0))
BLOOD = Relaxation(1441, 290, 120, 0.85, texture=(0.02, 0.02, 0.0))
WALL = Relaxation(900, 55, 28, 0.78, 0.02, 0.10, (0.08, 0.04, 0.0))
RELAXATION = {
    "air": NOTHING,
    "table": NOTHING,
    "gas": NOTHING,
    "lung": Relaxation(1200, 40, 1.5, 0.22, texture=(0.10, 0.10, 0.0)),
    "small vessels": BLOOD,
    "veins": BLOOD,
    "aorta": BLOOD,
    "inferior vena cava": BLOOD,
    "heart": Relaxation(1150, 90, 45, 0.82, texture=(0.05, 0.15, 0.0)),
    "muscle": Relaxation(856, 27, 24, 0.75, 0.03, texture=(0.06, 0.06, 0.0)),
    "cortex": Relaxation(966, 87, 55, 0.82, texture=(0.05, 0.03, 0.0)),
    "medulla": Relaxation(1412, 85, 55, 0.85, texture=(0.05, 0.03, 0.0)),
    "liver": Relaxation(586, 46, 26, 0.76, 0.03, 0.08, (0.03, 0.03, 0.02)),
    "spleen": Relaxation(1057, 79, 45, 0.80, 0.0, 0.08, (0.03, 0.03, 0.02)),
    "pancreas": Relaxation(584, 46, 32, 0.78, 0.06, 0.10, (0.10, 0.06, 0.0)),
    "adrenal gland": Relaxation(750, 60, 35, 0.78, 0.12, 0.10),
    "gallbladder": Relaxation(1700, 500, 250, 0.95, 0.0, 0.35, (0.01, 0.02, 0.05)),
    "esophagus": WALL,
    "stomach wall": WALL,
    "duodenum wall": WALL,
    "bowel wall": WALL,
    "stomach": Relaxation(1700, 260, 60, 0.88, 0.02, 0.40, (0.10, 0.15, 0.10)),
    "duodenum": Relaxation(1500, 220, 60, 0.88, 0.02, 0.35, (0.12, 0.10, 0.0)),
    "bowel": Relaxation(1400, 180, 50, 0.86, 0.02, 0.35, (0.15, 0.15, 0.0)),
    "stool": Relaxation(700, 55, 12, 0.62, 0.08, 0.30, (0.35, 0.35, 0.0)),
    "fat": Relaxation(800, 40, 25, 1.0, 0.92, 0.03, (0.05, 0.05, 0.0)),
    "sinus fat": Relaxation(1000, 70, 35, 0.95, 0.75, 0.05, (0.10, 0.05, 0.0)),
    "skin": Relaxation(700, 35, 15, 0.55, 0.05),
    "bone": Relaxation(549, 49, 12, 0.72, 0.30, 0.08, (0.08, 0.05, 0.03)),
    "cortical bone": Relaxation(500, 1.0, 0.5, 0.20),
    "disc": Relaxation(1000, 75, 40, 0.78),
    "canal": Relaxation(2200, 400, 150, 0.92),
}
FLOWING = ("aorta", "inferior vena cava", "veins", "small vessels", "heart")

SHIFT = 3.5e-6 * 63.87e3  # cycles per ms by which water is ahead of fat: 3.5 ppm at 1.5 T
PHASE_TE = 0.5 / SHIFT  # ms until the two are opposed
# Share of the cases; multiple of `PHASE_TE`; range of what flow does to the signal: fresh blood is bright in gradient
# echoes, and what leaves the slice before its echo is missing in spin echoes.
CONTRASTS = {"in phase": 0.35, "opposed phase": 0.25, "T2": 0.40}
FLOW = {"in phase": (0.8, 1.7), "opposed phase": (0.8, 1.7), "T2": (0.05, 0.45)}
GRADIENT_TR, FLIP = (120.0, 190.0), (65.0, 85.0)  # ms, degrees
SPIN_TR, SPIN_TE = (2500.0, 6000.0), (60.0, 90.0)  # ms
RECEIVE, RECEIVE_SPACING = (0.10, 0.25), 150.0  # standard deviation of the field's logarithm; mm between its knots
SNR = (14.0, 40.0)  # of the spleen in a pixel, before the receive field
FINE = 3  # odd, so that a pixel has a middle
CHUNK = 2**20  # fine pixels painted at once


@dataclass(frozen=True)
class Scan:
    """A case's contrast, the scanner's parameters and the case's tissues.

    Attributes:
        contrast: one of `CONTRASTS`.
        tr, te: ms; flip: degrees, of the gradient echoes.
        t1, t2: (tissues,) of the water of each tissue, ms.
        flow: (tissues,) by which its signal is multiplied.
        receive: standard deviation of the logarithm of the receive field; snr: see `SNR`.
    """

    contrast: str
    tr: float
    te: float
    flip: float
    t1: Tensor
    t2: Tensor
    flow: Tensor
    receive: float
    snr: float


def draw_scan(generator: torch.Generator) -> Scan:
    """Draw one; the number of draws does not depend on what they come to."""
    chosen = int(torch.multinomial(torch.tensor(list(CONTRASTS.values())), 1, generator=generator))
    contrast = list(CONTRASTS)[chosen]
    share = torch.rand(5, generator=generator).tolist()
    shifts = torch.randn(2, len(TISSUES), generator=generator)
    flows = torch.rand(len(TISSUES), generator=generator).tolist()

    def between(bounds: tuple[float, float], u: float) -> float:
        return bounds[0] + (bounds[1] - bounds[0]) * u

    if contrast == "T2":
        tr, te = between(SPIN_TR, share[0]), between(SPIN_TE, share[1])
    else:
        tr, te = between(GRADIENT_TR, share[0]), PHASE_TE * (2 if contrast == "in phase" else 1)
    tissues = [RELAXATION[name] for name in TISSUES]
    t1, t2 = (
        torch.tensor([getattr(tissue, name) for tissue in tissues])
        * (torch.tensor([tissue.spread for tissue in tissues]) * z).exp()
        for name, z in zip(("t1", "t2"), shifts, strict=True)
    )
    flow = [between(FLOW[contrast], u) if name in FLOWING else 1.0 for name, u in zip(TISSUES, flows, strict=True)]
    flip, receive, snr = (between(b, u) for b, u in zip((FLIP, RECEIVE, SNR), share[2:], strict=True))
    return Scan(contrast, tr, te, flip, t1, t2, torch.tensor(flow), receive, snr)


def spin_echo(t1: Tensor, t2: Tensor, pd: Tensor, *, tr: float, te: float) -> Tensor:
    """Signal of a spin echo after excitations by 90 degrees, TE being far below TR.

        S = PD (1 - exp(-TR / T1)) exp(-TE / T2)

    Args:
        t1, t2, pd: of one shape; ms, ms, relative proton density.
        tr, te: repetition and (effective) echo time, ms.

    Source: Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (Elsevier, 2004), chapter on spin echoes.
    """
    return pd * (1 - (-tr / t1).exp()) * (-te / t2).exp()


def signal(codes: Tensor, grains: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """Signals of water and of fat before they add up.

    Args:
        codes: (S, H, W) of `TISSUES`; grains: (3, S, H, W), which the logarithm of T1 follows, see `Relaxation`.

    Returns:
        (S, H, W) each, not negative; in spin echoes the two always are in phase, in gradient echoes fat turns by
        `SHIFT` times TE.
    """
    tissues = [RELAXATION[name] for name in TISSUES]

    def look_up(values: list[float] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)[codes]

    weights = [look_up([tissue.texture[k] for tissue in tissues]) for k in range(len(GRAINS))]
    texture = sum((w * grain for w, grain in zip(weights, grains, strict=True)), torch.zeros(())).exp()
    t1 = look_up(scan.t1) * texture
    pd, share = look_up([tissue.pd for tissue in tissues]), look_up([tissue.fat for tissue in tissues])
    one = torch.ones(())
    if scan.contrast == "T2":
        water = spin_echo(t1, look_up(scan.t2) * texture, pd, tr=scan.tr, te=scan.te)
        fat = spin_echo(FAT.t1 * one, FAT.t2 * one, one, tr=scan.tr, te=scan.te)
    else:
        settings = {"flip": scan.flip, "tr": scan.tr, "te": scan.te}
        water = flash(t1, look_up([tissue.t2_star for tissue in tissues]), pd, **settings)
        fat = flash(FAT.t1 * one, FAT.t2_star * one, one, **settings)
    return water * (1 - share) * look_up(scan.flow), fat * pd * share


def magnitude(water: Tensor, fat: Tensor, scan: Scan) -> Tensor:
    """Length of the sum of the two signals after the echo time."""
    angle = 0.0 if scan.contrast == "T2" else 2 * math.pi * SHIFT * scan.te
    return torch.hypot(water + fat * math.cos(angle), fat * math.sin(angle))


def pool(fine: Tensor) -> Tensor:
    """Mean over the fine pixels of each pixel: (S, FINE H, FINE W) to (S, H, W)."""
    return F.avg_pool2d(fine[:, None], FINE)[:, 0]


def clean_slices(
    anatomy: Anatomy, scan: Scan, levels: Tensor, size: tuple[int, int], key: tuple[object, ...]
) -> tuple[Tensor, Tensor]:
    """Magnitudes without noise (S, H, W), and (S, H, W) int64 classes.

    Args:
        levels: (S,) z of the slices; key: of the streams of random numbers of the case.
    """
    height, width = size
    codes, labels, grains = paint_tissues(anatomy, levels, (FINE * height, FINE * width), key)
    water, fat = signal(codes, grains, scan)
    rows, columns = ((torch.arange(n) + 0.5) * (FIELD_OF_VIEW / n) for n in size)
    extent = (int(DEPTH), int(FIELD_OF_VIEW), int(FIELD_OF_VIEW))
    receive = smooth_field(extent, RECEIVE_SPACING, 1, (levels + 20.0, rows, columns), stream(*key, "receive"))[:, 0]
    clean = magnitude(pool(water), pool(fat), scan) * (scan.receive * receive).exp()
    middle = FINE // 2
    return clean, labels[:, middle::FINE, middle::FINE]


def reference_signal(scan: Scan) -> float:
    """Signal of the spleen without texture, to which the noise is set."""
    code = torch.tensor([[[CODE["spleen"]]]])
    return float(magnitude(*signal(code, torch.zeros(len(GRAINS), 1, 1, 1), scan), scan))


def case(seed: int, part: str, i: int, slices: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Slices of a case from top to bottom.

    Returns:
        (slices, H, W) magnitudes with noise, and (slices, H, W) int64 classes.
    """
    key = (seed, part, i)
    anatomy, _ = draw_case(*key)
    scan = draw_scan(stream(*key, "scan"))
    step = max(1, CHUNK // (FINE**2 * size[0] * size[1]))
    parts = [clean_slices(anatomy, scan, levels, size, key) for levels in anatomy.levels(slices).split(step)]
    clean, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    return rician(clean, reference_signal(scan) / scan.snr, stream(*key, "mr noise")), labels


# ----- the task


def files(folder: Path) -> list[Path]:
    """The files the task needs: none."""
    return []


def check(folder: Path) -> None:
    """Nothing can be missing or wrong."""


class Options(BaseModel):
    """Options of the task.

    Attributes:
        size: rows and columns of the field of view, 384 mm x 384 mm whatever the size.
        cases: for training, validation and test.
        slices: of each case.
        seed: of everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]] = (128, 128)
    cases: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 4, 8)
    slices: PositiveInt = 12
    seed: int = 0


def load(options: Options, folder: Path) -> Task:
    """Build the task: splits "train", "validation" and "test".

    Case i of a split shows the person who is case i of that split of `abdomen` with the same seed; with the same size
    and number of slices it has the same labels. It is the same whatever the number of cases. Its slices lie next to one
    another, top to bottom; subjects are "train-003". A case is divided by its own 99.5th percentile.

    Args:
        folder: not used.
    """

    def build(part: str, count: int) -> Split:
        images = torch.empty(count * options.slices, 1, *options.size)
        labels = torch.empty(count * options.slices, *options.size, dtype=torch.int64)
        for i in range(count):
            rows = slice(i * options.slices, (i + 1) * options.slices)
            pixels, labels[rows] = case(options.seed, part, i, options.slices, options.size)
            images[rows, 0] = rescale(pixels.flatten(0, 1)).clamp_(0, 1).view_as(pixels)
        return Split(images, labels, tuple(f"{part}-{i:03d}" for i in range(count) for _ in range(options.slices)))

    parts = zip(("train", "validation", "test"), options.cases, strict=True)
    return Task("abdomen-mr", CLASSES, 1, {part: build(part, count) for part, count in parts}, CARD)


CARD = Card(
    what=(
        "Synthetic axial slices of the upper abdomen as in magnetic resonance at 1.5 T, with the thirteen organs of "
        "FLARE22: the people of the task abdomen with the same labels. A case is a spoiled gradient echo with water "
        "and fat in phase or in opposed phase, or a T2-weighted spin echo; signals come from T1, T2, T2*, proton "
        "density and share of fat of each tissue by the usual equations, with texture, partial volume, flow, a smooth "
        "receive field and Rician noise."
    ),
    splits="By case, each one person, the same ones as in the task abdomen with the same seed.",
    doubt=(
        "Nothing here was measured on a scanner. Organs are healthy, smooth and all of one mould; breathing, "
        "pulsation, fat suppression, contrast agent, distortion and the many other sequences of a clinic are missing. "
        "Blood's flow is one number a vessel. Labels are exact, where people who outline organs disagree. A result "
        "here says that a method can work, not how well it does on patients."
    ),
    source=(
        "Code of this package. Anatomy as in the task abdomen; T1 and T2 at 1.5 T after de Bazelaire et al., Radiology "
        "230:652-659 (2004), and, of blood, Stanisz et al., Magn Reson Med 54:507-512 (2005); the rest is set by hand "
        "within textbook ranges. Classes after FLARE22 (Ma et al., Lancet Digital Health 6:e815, 2024), of which "
        "nothing is contained."
    ),
    licence="That of this package.",
)
