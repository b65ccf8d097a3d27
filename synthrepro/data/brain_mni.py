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
4. Acquisition. Signals are computed at about 1 mm and averaged to the voxel (partial volume), multiplied by a smooth
   receive field, given Rician noise and rescaled by `mri.rescale`.

Labels are the largest of the four fractions (outside, CSF, GM, WM) of a voxel. The brain is where the template is
positive (it is skull-stripped); CSF is what lies inside the brain and is neither grey nor white matter.
"""

import hashlib
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import from_matvec
from nibabel.filebasedimages import ImageFileError
from torch import Tensor

from .individuals import flow, sample, smooth_field
from .mri import TISSUES, flash, mprage, rescale, rician
from .task import Card, Split, Task

CLASSES = ("background", "CSF", "GM", "WM")
FILES = {
    "t1": "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
    "gm": "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
    "wm": "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz",
}
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
ROTATION, ZOOM, SHIFT = 8.0, (-0.10, 0.02), 4.0  # degrees, relative, mm: half-widths and range of uniform draws
VELOCITY = ((40.0, 3.5), (16.0, 2.0))  # (knot spacing in mm, standard deviation in mm)
LOG_ODDS = ((14.0, 0.8), (6.0, 0.8))  # (knot spacing in mm, standard deviation)
BIAS_SPACING = 90.0  # mm between knots of the log receive field
FLOOR = 0.01  # a tissue's smallest fraction before log-odds are taken: fields can move boundaries, not raise islands


@dataclass(frozen=True)
class Template:
    """The average anatomy.

    Attributes:
        planes: (189, 3, 233, 197) intensity, grey and white matter fraction in [0, 1]; axial slices from below, rows
            from front to back, columns from left to right, 1 mm.
        means: (3,) mean intensity where CSF, GM, WM fill more than 95 % of a voxel.
    """

    planes: Tensor
    means: Tensor


def folder(root: Path | None = None) -> Path:
    """Where the template files are: `root`, or the data folder of the installed nilearn."""
    if root is not None:
        return Path(root)
    spec = importlib.util.find_spec("nilearn")  # does not import it: that takes seconds and is not needed
    if spec is None or spec.origin is None:
        raise FileNotFoundError("brain-mni needs the package nilearn, which is not installed: run pip install nilearn.")
    return Path(spec.origin).parent / "datasets" / "data"


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"brain-mni misses {path}: reinstall nilearn, which ships it.")
    try:
        image = nib.load(path)
        data = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, ImageFileError, zlib.error) as error:
        raise ValueError(f"brain-mni cannot read {path} ({error}): reinstall nilearn, which ships it.") from error
    if data.shape != SHAPE:
        raise ValueError(f"brain-mni needs maps of {SHAPE} voxels of 1 mm, but {path} has {data.shape}.")
    if not np.allclose(image.affine, from_matvec(np.eye(3), ORIGIN)):
        raise ValueError(f"brain-mni needs 1 mm voxels from {ORIGIN} mm, but {path} places its voxels elsewhere.")
    if not np.isfinite(data).all():
        raise ValueError(f"brain-mni found values that are not finite (NaN or infinity) in {path}.")
    if data.min() < 0 or data.max() == 0:
        raise ValueError(f"brain-mni needs maps with values of at least 0 and some above it, which {path} lacks.")
    return data / data.max()


@lru_cache(maxsize=1)
def read_template(root: Path | None = None) -> Template:
    """Read and check the three maps.

    Raises:
        FileNotFoundError: nilearn or one of its files is missing.
        ValueError: a file cannot be read, has the wrong shape or resolution, or holds values that are not finite.
    """
    maps = [_read(folder(root) / name) for name in FILES.values()]
    planes = torch.from_numpy(np.stack([m.transpose(2, 1, 0)[:, ::-1] for m in maps], axis=1).copy())
    brain = planes[:, 0] > 0
    fractions = _fractions(planes)
    means = torch.stack([planes[:, 0][brain & (fractions[:, k] > 0.95)].mean() for k in range(3)])
    return Template(planes, means)


def _fractions(planes: Tensor) -> Tensor:
    """CSF, GM and WM fractions (N, 3, R, C) of template planes (N, 3, R, C); zero outside the brain."""
    brain = (planes[:, 0] > 0).float()
    gm, wm = planes[:, 1] * brain, planes[:, 2] * brain
    return torch.stack([(brain - gm - wm).clamp_min(0), gm, wm], dim=1)


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


def _generator(*key: object) -> torch.Generator:
    """A generator of its own for every purpose, so that no draw depends on how many others were made."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7]))


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
    angle, zoom, *shift = torch.rand(4, generator=generator).tolist()
    angle, zoom = torch.tensor(variation * ROTATION * (2 * angle - 1)).deg2rad(), 1 + variation * (
        ZOOM[0] + (ZOOM[1] - ZOOM[0]) * zoom
    )
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2) / zoom
    centre = torch.tensor(CENTRE, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (h, w, 2)
    posed = (grid - centre) @ rotation.T + centre + variation * SHIFT * (2 * torch.tensor(shift) - 1)
    step = 4.0
    lattice = torch.arange(0, EXTENT[1], step), torch.arange(0, EXTENT[2], step)
    fields = (sd * smooth_field(EXTENT, knots, 2, (z, *lattice), generator) for knots, sd in VELOCITY)
    displacement = flow(variation * sum(fields, torch.zeros(())), step)  # (S, 2, R, C)
    posed = posed.expand(len(z), -1, -1, -1)
    return posed + sample(displacement, posed, step).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Anatomy:
    """An individual's slices on a grid of about 1 mm; every map is (S, n, h, w), n planes through a slice's thickness.

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
    brain = (selected[:, :1] > 0).float()
    stack = torch.cat([selected[:, :1], brain, _fractions(selected)], dim=1).view(s, n * 5, *EXTENT[1:])
    deformed = sample(stack, positions).view(s, n, 5, len(rows), len(columns))
    brain = deformed[:, :, 1]
    inside = brain.clamp_min(1e-3)
    before = deformed[:, :, 2:] / inside[:, :, None] + FLOOR
    before = before / before.sum(dim=2, keepdim=True)
    grid = rows.clamp(0, EXTENT[1]), columns.clamp(0, EXTENT[2])
    fields = (sd * smooth_field(EXTENT, knots, 3, (z, *grid), generator) for knots, sd in LOG_ODDS)
    log_odds = variation * sum(fields, torch.zeros(()))  # (S, 3, h, w)
    after = (before.log() + log_odds[:, None]).softmax(dim=2)
    shift = torch.einsum("snkhw,k->snhw", after - before, template.means)
    intensity = (deformed[:, :, 0] / inside + shift).clamp_min(0)
    return Anatomy(brain, after, intensity, t1_of_intensity(intensity, template.means))


def signal(anatomy: Anatomy, contrast: str) -> Tensor:
    """Noise-free signal (S, n, h, w) of one contrast of `CONTRASTS`; zero outside the brain."""
    equation = CONTRASTS[contrast]
    if equation is None:
        return anatomy.brain * anatomy.intensity
    return anatomy.brain * equation(anatomy.t1, anatomy.mean_of("t2_star"), anatomy.mean_of("pd"))


def labels(anatomy: Anatomy, factor: int) -> Tensor:
    """Largest of the fractions (outside, CSF, GM, WM) of each voxel of `factor` x `factor` points, (S, H, W) int64."""
    tissue = anatomy.fractions * anatomy.brain[:, :, None]
    fractions = torch.cat([1 - anatomy.brain[:, :, None], tissue], dim=2)
    return F.avg_pool2d(fractions.mean(dim=1), factor).argmax(dim=1)


def _options(
    size: tuple[int, int], spacing: float, subjects: tuple[int, int, int], slices: int, contrast: str, variation: float,
    bias: float, noise: tuple[float, float],
) -> None:  # fmt: skip
    """Raise a one-sentence ValueError for an option out of range."""
    slab = min(high - low + 1 for low, high in TRAINING_SLABS + TEST_SLABS)
    rules = {
        f"size={size} must be two positive numbers of pixels (rows, columns)": len(size) == 2 and min(size) > 0,
        f"spacing={spacing} must be at least 1 mm, the template's own, and at most {slab} mm, the thickness of a slab":
            1 <= spacing <= slab,
        f"subjects={subjects} must be three positive numbers (train, validation, test)":
            len(subjects) == 3 and min(subjects) > 0,
        f"slices={slices} must be at least 1 a subject": slices >= 1,
        f"contrast={contrast!r} must be one of {', '.join(CONTRASTS)}": contrast in CONTRASTS,
        f"variation={variation} must not be negative": variation >= 0,
        f"bias={bias} must not be negative": bias >= 0,
        f"noise={noise} must be a range (low, high) with 0 <= low <= high": len(noise) == 2 and 0 <= noise[0] <= noise[1],
    }  # fmt: skip
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"brain-mni: option {rule}.")


def load(
    root: Path | None = None, *, size: tuple[int, int] = (96, 80), spacing: float = 2.0,
    subjects: tuple[int, int, int] = (40, 10, 20), slices: int = 4, contrast: str = "t1w", variation: float = 1.0,
    bias: float = 0.2, noise: tuple[float, float] = (0.02, 0.06), seed: int = 0,
) -> Task:  # fmt: skip
    """Build the task.

    Args:
        root: folder of the template's files instead of nilearn's own.
        size: rows (front to back) and columns (left to right); the brain is about 180 x 145 mm.
        spacing: pixel size in mm; a slice is as many mm thick, rounded.
        subjects: individuals for training, validation and test.
        slices: slices a subject, one a slab in turn; four slabs for training and validation, four others for test.
        contrast: of "train", "validation" and "test"; "test-<contrast>" shows the test anatomies in every other one.
        variation: scale of pose, flow and log-odds fields; 0 makes every individual the template.
        bias: standard deviation of the log of the receive field.
        noise: range of the uniform draw of an acquisition's Rician noise level, relative to bright tissue. It is
            neither stored with the images nor told to a method.
        seed: of everything.

    Returns:
        The task. Subject i of a split is the same whatever the number of subjects, and its anatomy the same at any
        spacing and contrast.

    Raises:
        FileNotFoundError, ValueError: see `read_template`; or an option is out of range.
    """
    _options(size, spacing, subjects, slices, contrast, variation, bias, noise)
    template = read_template(root)
    factor = max(1, round(spacing))
    rows, columns = (
        centre + (torch.arange(n * factor) - n * factor / 2) * (spacing / factor)
        for n, centre in zip(size, CENTRE, strict=True)
    )

    def acquire(clean: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        """Noise-free voxels (S, H, W) to the images a scanner hands out, (S, 1, H, W)."""
        centres = [F.avg_pool1d(axis[None], factor)[0] for axis in (rows, columns)]
        grid = z, centres[0].clamp(0, EXTENT[1]), centres[1].clamp(0, EXTENT[2])
        received = rescale(clean) * (bias * smooth_field(EXTENT, BIAS_SPACING, 1, grid, generator)[:, 0]).exp()
        level = noise[0] + (noise[1] - noise[0]) * float(torch.rand((), generator=generator))
        return rescale(rician(received, level, generator)).clamp(0, 1)[:, None]

    def build(prefix: str, count: int, slabs: tuple[tuple[int, int], ...], contrasts: tuple[str, ...]) -> list[Split]:
        images: dict[str, list[Tensor]] = {name: [] for name in contrasts}
        maps, names = [], []
        for i in range(count):
            subject = f"{prefix}-{i:03d}"
            planes = draw_slices(slabs, slices, factor, _generator(seed, subject, "slices"))
            anatomy = draw_anatomy(template, planes, rows, columns, variation, _generator(seed, subject, "anatomy"))
            maps.append(labels(anatomy, factor))
            names += [subject] * slices
            for name in contrasts:
                clean = F.avg_pool2d(signal(anatomy, name).mean(dim=1), factor)
                z = planes.float().mean(dim=1)
                images[name].append(acquire(clean, z, _generator(seed, subject, name)))
        return [Split(torch.cat(images[name]), torch.cat(maps), tuple(names)) for name in contrasts]

    others = tuple(name for name in CONTRASTS if name != contrast)
    train, validation, test = subjects
    splits = {
        "train": build("train", train, TRAINING_SLABS, (contrast,))[0],
        "validation": build("validation", validation, TRAINING_SLABS, (contrast,))[0],
    }
    names = ["test", *(f"test-{name}" for name in others)]
    splits |= dict(zip(names, build("test", test, TEST_SLABS, (contrast, *others)), strict=True))
    return Task("brain-mni", CLASSES, 1, splits, CARD)


LICENCE = (
    "ICBM 152 template: (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, "
    "McGill University; free to use, copy, modify and distribute with this notice. nilearn, which ships it: BSD-3."
)
CARD = Card(
    what="Semi-synthetic.",
    splits="",
    doubt="",
    source="",
    licence=LICENCE,
)
