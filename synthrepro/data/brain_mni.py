"""The embedded task `brain-mni`: brain tissue on slices of the MNI152 T1 template that ships inside nilearn.

The template is one average anatomy with its own measured T1-weighted intensities and maps of grey and white matter.
Individuals are made from it, images are its intensities:

1. Anatomy. An individual is a random in-plane pose, a random diffeomorphism (`individuals.flow`) and random fields on
   the log-odds of the three tissues. The flow has no through-plane part, so tissue never leaves its slab of slices and
   the slabs of the test set stay disjoint from those of training and validation.
2. T1-weighted image ("t1w", the domain of training). The template's intensity, deformed. Where the random fields
   change the tissue fractions p of a place, its intensity moves by the change of the expected tissue intensity,
   `sum_k (p'_k - p_k) mean_k` with `mean_k` measured on the template, so image and label keep agreeing at boundaries
   and the measured texture stays.
3. Other contrasts. The same intensity gives a T1 by one monotone map (`t1_of_intensity`), tissue fractions give T2* and
   proton density, and the signal equations of `mri` give FLASH at 3, 5, 20 and 30 degrees and an MPRAGE as control.
4. Acquisition. Signals are computed on a grid of at most 1.5 mm and averaged to the voxel (partial volume), multiplied
   by a smooth receive field, given Rician noise and rescaled by `mri.rescale`.

Labels are the largest of the four fractions (outside, CSF, GM, WM) of a voxel. The brain is where the template is
positive (it is skull-stripped); CSF is what lies inside the brain and is neither grey nor white matter.
"""

import hashlib
import importlib.util
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import from_matvec
from nibabel.filebasedimages import ImageFileError
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, field_validator
from torch import Tensor

from synthrepro.data.individuals import flow, sample, smooth_field
from synthrepro.data.mri import TISSUES, flash, mprage, rescale, rician
from synthrepro.data.task import Card, Split, Task
from synthrepro.errors import UserError

FAMILY = "embedded"
CLASSES = ("background", "CSF", "GM", "WM")
FILES = [f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("t1", "gm", "wm")]
SHAPE, ORIGIN = (197, 233, 189), (-98.0, -134.0, -72.0)  # voxels of 1 mm and the position of the first in MNI space, mm
EXTENT = (SHAPE[2], SHAPE[1], SHAPE[0])  # mm along slices, rows (front to back) and columns (left to right)
CENTRE = (115, 98)  # row and column of the middle of the brain

# Axial slabs, mm in MNI space, both ends included; at least 3 mm of nobody's land between any two.
TRAINING_SLABS = ((-28, -20), (-4, 4), (20, 28), (44, 52))
TEST_SLABS = ((-16, -8), (8, 16), (32, 40), (56, 64))

CONTRASTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | None] = {
    "t1w": None,  # measured, not computed
    "flash3": partial(flash, flip=3.0, tr=20.0, te=5.0),
    "flash5": partial(flash, flip=5.0, tr=20.0, te=5.0),
    "flash20": partial(flash, flip=20.0, tr=20.0, te=5.0),
    "flash30": partial(flash, flip=30.0, tr=20.0, te=5.0),
    "mprage": partial(mprage, flip=9.0, tr=2300.0, ti=900.0, echo_spacing=7.0, pulses=176, te=3.0),
}

# Anatomical variation at `variation=1`.
ROTATION, ZOOM, SHIFT = 8.0, (-0.04, 0.06), 4.0  # uniform draws: degrees, mean and half-width of the zoom, mm
VELOCITY = ((40.0, 3.5), (16.0, 2.0))  # (knot spacing in mm, standard deviation in mm)
LOG_ODDS = ((14.0, 0.8), (6.0, 0.8))  # (knot spacing in mm, standard deviation)
BIAS_SPACING = 90.0  # mm between knots of the log receive field
FLOOR = 0.01  # a tissue's smallest fraction before log-odds are taken: fields can move boundaries, not raise islands


@dataclass(frozen=True)
class Template:
    """The average anatomy.

    Attributes:
        planes: (189, 3, 233, 197) intensity, grey and white matter fraction in [0, 1], all zero outside the brain;
            axial slices from below, rows from front to back, columns from left to right, 1 mm.
        means: (3,) mean intensity where CSF, GM, WM fill more than 95 % of a voxel.
    """

    planes: Tensor
    means: Tensor


def files(folder: Path) -> list[Path]:
    """The template's three files: in `folder` if there is such a folder, else where nilearn keeps them.

    Raises:
        UserError: nilearn is not installed.
    """
    if not folder.is_dir():
        spec = importlib.util.find_spec("nilearn")  # does not import it: that takes seconds and is not needed
        if spec is None or spec.origin is None:
            raise UserError("brain-mni needs the package nilearn, which is not installed: run pip install nilearn.")
        folder = Path(spec.origin).parent / "datasets" / "data"
    return [folder / name for name in FILES]


@lru_cache(maxsize=2)
def read_template(folder: Path) -> Template:
    """Read and check the template's maps.

    Raises:
        UserError: nilearn or one of the files is missing; a file cannot be read, has other voxels than the template's,
            or holds values that are negative or not finite.
    """
    intensity, gm, wm = (_read(path) for path in files(folder))
    brain = intensity > 0
    gm, wm = gm * brain, wm * brain
    means = [float(intensity[fraction > 0.95].mean()) for fraction in (brain - gm - wm, gm, wm)]
    planes = np.stack([map_.transpose(2, 1, 0)[:, ::-1] for map_ in (intensity, gm, wm)], axis=1)
    return Template(torch.from_numpy(planes), torch.tensor(means))


check = read_template


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"brain-mni misses {path}: nilearn ships it, run pip install --force-reinstall nilearn.")
    try:
        image = nib.load(path)
        data = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, ImageFileError, zlib.error) as error:
        raise UserError(
            f"brain-mni cannot read {path} ({error}): nilearn ships it, run pip install --force-reinstall nilearn."
        ) from error
    if data.shape != SHAPE:
        raise UserError(f"brain-mni needs maps of {SHAPE} voxels of 1 mm, but {path} has {data.shape}.")
    if not np.allclose(image.affine, from_matvec(np.eye(3), ORIGIN)):  # type: ignore[attr-defined]
        raise UserError(f"brain-mni needs voxels of 1 mm from {ORIGIN} mm on, but {path} places them elsewhere.")
    if not np.isfinite(data).all():
        raise UserError(f"brain-mni found values that are not finite (NaN or infinity) in {path}.")
    if data.min() < 0 or data.max() == 0:
        raise UserError(f"brain-mni needs values from 0 up, some of them above it, but {path} has none such.")
    return data / data.max()


def t1_of_intensity(intensity: Tensor, means: Tensor) -> Tensor:
    """Longitudinal relaxation time in ms from T1-weighted intensity, one monotone map for all tissues.

    log T1 is piecewise linear through the published T1 of CSF, GM and WM at the template's mean intensity of each
    (`means`); the last piece goes on above white matter, and nothing is longer than free water.
    """
    x = means.double().numpy()
    y = np.log([TISSUES[name].t1 for name in CLASSES[1:]])
    end = 1.5  # intensity, above any that occurs
    x, y = np.append(x, end), np.append(y, y[2] + (y[2] - y[1]) / (x[2] - x[1]) * (end - x[2]))
    return torch.from_numpy(np.exp(np.interp(intensity.numpy(), x, y)).astype(np.float32))


def stream(*key: object) -> torch.Generator:
    """A generator of its own for every purpose, so that no draw depends on how many others were made."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def within(points: Tensor, axis: int) -> Tensor:
    """Positions beyond the box of the random fields, where no brain is, moved to its border."""
    return points.clamp(0, EXTENT[axis])


def draw_slices(slabs: tuple[tuple[int, int], ...], slices: int, thickness: int, generator: torch.Generator) -> Tensor:
    """Template planes of each slice: slice j lies at a random place of slab j (cyclically), wholly inside it.

    Returns:
        (slices, thickness) plane indices.
    """
    chosen = [slabs[j % len(slabs)] for j in range(slices)]
    starts = [low + int(torch.randint(high - low - thickness + 2, (), generator=generator)) for low, high in chosen]
    return torch.tensor(starts)[:, None] + torch.arange(thickness) - int(ORIGIN[2])


def draw_positions(z: Tensor, rows: Tensor, columns: Tensor, variation: float, generator: torch.Generator) -> Tensor:
    """Where in the template an individual's grid points lie: pose, then diffeomorphic flow.

    Args:
        z: (S,) slice heights, mm above the lowest plane; rows: (h,), columns: (w,) grid in template mm.

    Returns:
        (S, h, w, 2) template rows and columns, mm.
    """
    pose = 2 * torch.rand(4, generator=generator) - 1
    angle, zoom = (variation * ROTATION * pose[0]).deg2rad(), 1 + variation * (ZOOM[0] + ZOOM[1] * pose[1])
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2) / zoom
    centre = torch.tensor(CENTRE, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (h, w, 2)
    posed = (grid - centre) @ rotation.T + centre + variation * SHIFT * pose[2:]
    step = 4.0
    lattice = torch.arange(0, EXTENT[1], step), torch.arange(0, EXTENT[2], step)
    fields = (sd * smooth_field(EXTENT, knots, 2, (z, *lattice), generator) for knots, sd in VELOCITY)
    displacement = flow(variation * sum(fields, torch.zeros(())), step)  # (S, 2, R, C)
    posed = posed.expand(len(z), -1, -1, -1)
    return posed + sample(displacement, posed, step).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Anatomy:
    """An individual's slices on a fine grid; every map is (S, n, h, w), n planes through a slice's thickness.

    Attributes:
        brain: fraction of the point inside the brain.
        fractions: CSF, GM and WM fractions within the brain, (S, n, 3, h, w), summing to one.
        intensity: T1-weighted intensity of the tissue.
        t1: ms.
    """

    brain: Tensor
    fractions: Tensor
    intensity: Tensor
    t1: Tensor

    def mean_of(self, attribute: str) -> Tensor:
        """Fraction-weighted mean of a `Tissue` constant, (S, n, h, w)."""
        values = torch.tensor([getattr(TISSUES[name], attribute) for name in CLASSES[1:]])
        return torch.einsum("snkhw,k->snhw", self.fractions, values)


def draw_anatomy(
    template: Template, planes: Tensor, rows: Tensor, columns: Tensor, variation: float, generator: torch.Generator
) -> Anatomy:
    """Draw one individual and look at it in the given planes.

    Args:
        planes: (S, n) template planes; rows (h,) and columns (w,): grid in template mm.
        variation: 0 gives the template itself, 1 the task's individuals.
    """
    s, n = planes.shape
    z = planes.float().mean(dim=1)
    positions = draw_positions(z, rows, columns, variation, generator)
    selected = template.planes[planes.flatten()]
    stack = torch.cat([selected, (selected[:, :1] > 0).float()], dim=1).view(s, n * 4, *EXTENT[1:])
    deformed = sample(stack, positions).view(s, n, 4, len(rows), len(columns))
    brain = deformed[:, :, 3]
    inside = brain.clamp_min(1e-3)[:, :, None]
    matter = deformed[:, :, 1:3] / inside
    before = torch.cat([1 - matter.sum(dim=2, keepdim=True), matter], dim=2).clamp_min(0) + FLOOR
    before = before / before.sum(dim=2, keepdim=True)
    grid = z, within(rows, 1), within(columns, 2)
    fields = (sd * smooth_field(EXTENT, knots, 3, grid, generator) for knots, sd in LOG_ODDS)
    log_odds = variation * sum(fields, torch.zeros(()))  # (S, 3, h, w)
    after = (before.log() + log_odds[:, None]).softmax(dim=2)
    shift = torch.einsum("snkhw,k->snhw", after - before, template.means)
    intensity = (deformed[:, :, 0] / inside[:, :, 0] + shift).clamp_min(0)
    return Anatomy(brain, after, intensity, t1_of_intensity(intensity, template.means))


def signal(anatomy: Anatomy, contrast: str) -> Tensor:
    """Noise-free signal (S, n, h, w) of one contrast of `CONTRASTS`; zero outside the brain."""
    equation = CONTRASTS[contrast]
    if equation is None:
        return anatomy.brain * anatomy.intensity
    return anatomy.brain * equation(anatomy.t1, anatomy.mean_of("t2_star"), anatomy.mean_of("pd"))


def outside_and_tissue(anatomy: Anatomy) -> Tensor:
    """Fractions (S, n, 4, h, w) of what is outside the brain, CSF, GM and WM; they sum to one."""
    brain = anatomy.brain[:, :, None]
    return torch.cat([1 - brain, anatomy.fractions * brain], dim=2)


class Options(BaseModel):
    """Options of the task.

    Attributes:
        size: rows (front to back) and columns (left to right); the brain is about 180 x 145 mm.
        spacing: side of a pixel in mm; a slice is as many whole mm thick.
        subjects: individuals for training, validation and test.
        slices: slices a subject, one a slab in turn: four slabs for training and validation, four others for test.
        contrast: what "train", "validation" and "test" show; "test-<contrast>" shows the test anatomies in each other.
        variation: scale of pose, flow and log-odds fields; at 0 every individual is the template.
        bias: standard deviation of the logarithm of the receive field.
        noise: range of the uniform draw of an acquisition's noise level, relative to bright tissue. The level is
            neither stored with the images nor told to a method.
        seed: of everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[PositiveInt, PositiveInt] = (96, 80)
    spacing: Annotated[float, Field(ge=1, le=9)] = 2.0
    subjects: tuple[PositiveInt, PositiveInt, PositiveInt] = (40, 10, 20)
    slices: PositiveInt = 4
    contrast: Literal["t1w", "flash3", "flash5", "flash20", "flash30", "mprage"] = "t1w"
    variation: NonNegativeFloat = 1.0
    bias: NonNegativeFloat = 0.3
    noise: tuple[NonNegativeFloat, NonNegativeFloat] = (0.02, 0.06)
    seed: int = 0

    @field_validator("noise")
    @classmethod
    def _is_a_range(cls, noise: tuple[float, float]) -> tuple[float, float]:
        if noise[0] > noise[1]:
            raise ValueError("the range must be (low, high)")
        return noise


def acquire(clean: Tensor, field: Tensor, noise: tuple[float, float], generator: torch.Generator) -> Tensor:
    """What a scanner hands out: receive field, Rician noise of one level, and a display scale of its own per image.

    Args:
        clean: (S, H, W) noise-free signal; field: (S, H, W) receive sensitivity.

    Returns:
        (S, 1, H, W) in [0, 1].
    """
    level = noise[0] + (noise[1] - noise[0]) * float(torch.rand((), generator=generator))
    return rescale(rician(rescale(clean) * field, level, generator)).clamp_max(1)[:, None]


def load(options: Options, folder: Path) -> Task:
    """Build the task.

    Subject i of a split is the same whatever the number of subjects, and its anatomy whatever contrast, noise, bias
    and number of slices; its shape also whatever size and spacing.

    Args:
        folder: of the template's files, if it exists; else nilearn's.

    Raises:
        UserError: see `read_template`.
    """
    template = read_template(folder)
    factor, thickness = math.ceil(options.spacing / 1.5), round(options.spacing)
    rows, columns = (
        centre + (torch.arange(n * factor) - n * factor / 2) * options.spacing / factor
        for n, centre in zip(options.size, CENTRE, strict=True)
    )  # (h,), (w,) points in template mm
    pixel_rows, pixel_columns = (
        within(points.view(-1, factor).mean(dim=1), axis) for axis, points in ((1, rows), (2, columns))
    )  # (H,), (W,)

    def pixels(points: Tensor) -> Tensor:
        return F.avg_pool2d(points, factor)

    def build(prefix: str, count: int, slabs: tuple[tuple[int, int], ...], contrasts: list[str]) -> list[Split]:
        images: dict[str, list[Tensor]] = {contrast: [] for contrast in contrasts}
        maps: list[Tensor] = []
        names: list[str] = []
        for subject in (f"{prefix}-{i:03d}" for i in range(count)):
            planes = draw_slices(slabs, options.slices, thickness, stream(options.seed, subject, "slices"))
            anatomy = draw_anatomy(
                template, planes, rows, columns, options.variation, stream(options.seed, subject, "anatomy")
            )
            maps.append(pixels(outside_and_tissue(anatomy).mean(dim=1)).argmax(dim=1))
            names += [subject] * options.slices
            for contrast in contrasts:
                generator = stream(options.seed, subject, contrast)
                grid = planes.float().mean(dim=1), pixel_rows, pixel_columns
                field = (options.bias * smooth_field(EXTENT, BIAS_SPACING, 1, grid, generator)[:, 0]).exp()
                clean = pixels(signal(anatomy, contrast).mean(dim=1))
                images[contrast].append(acquire(clean, field, options.noise, generator))
        labels = torch.cat(maps)
        return [Split(torch.cat(images[contrast]), labels, tuple(names)) for contrast in contrasts]

    train, validation, test = options.subjects
    others = [contrast for contrast in CONTRASTS if contrast != options.contrast]
    splits = build("train", train, TRAINING_SLABS, [options.contrast])
    splits += build("validation", validation, TRAINING_SLABS, [options.contrast])
    splits += build("test", test, TEST_SLABS, [options.contrast, *others])
    names = ["train", "validation", "test", *(f"test-{contrast}" for contrast in others)]
    return Task("brain-mni", CLASSES, 1, dict(zip(names, splits, strict=True)), CARD)


CARD = Card(
    what=(
        "Semi-synthetic T1-weighted axial slices of the brain with CSF, grey and white matter. Every individual is the "
        "MNI152 average anatomy, changed by a random pose, a random diffeomorphism and random fields on the log-odds "
        "of the tissues; its intensities are those measured for the template. FLASH at 3, 5, 20 and 30 degrees and an "
        "MPRAGE are computed from a T1 map anchored to those intensities. Partial volume, a receive field and Rician "
        "noise of undisclosed level are added to every contrast."
    ),
    splits=(
        "By individual, and by place: test slices come from other slabs of the head than training and validation "
        "slices. The further test sets show the test anatomies in another contrast."
    ),
    doubt=(
        "One average anatomy stands behind all individuals: they differ in shape, not in the kind of structure they "
        "have, and none is ill. An average is smoother than any head. Reference labels are the template's own maps, "
        "deformed, not drawn by a person. There is no skull, no motion and no distortion. A result here says that a "
        "method can work, not how well it does on patients."
    ),
    source=(
        "ICBM 152 nonlinear symmetric template, version 2009a (Fonov et al., NeuroImage 54:313-327, 2011, and "
        "47:S102, 2009), in the package nilearn (pip install nilearn)."
    ),
    licence=(
        "Template: copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological "
        "Institute, McGill University; may be used, copied, modified and distributed for any purpose, without fee, "
        "if this notice stays. nilearn: BSD-3-Clause."
    ),
)
