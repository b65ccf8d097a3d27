"""Random geometry of GenSeg: of the masks it makes images from, and of real pairs, its baselines.

Every augmentation is one affine map a sample and one look-up. Maps are 3 x 3 matrices of positions (row, column, 1),
measured from the centre of the image, in pixels, and say where a point of the input goes.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, spawn, uniform

Range = tuple[float, float]
Kind = Literal["rotate", "flip", "translate", "all"]

OPERATORS = ("flip", "pad", "scale", "translate", "rotate", "shear")
"""Of the mask augmentation, by their number in a draw's order."""


@dataclass(frozen=True)
class MaskAugmentation:
    """Ranges from which the geometry of a mask is drawn; the defaults are those of GenSeg's released scripts.

    Source: Zhang et al., Nature Communications 2025; the ranges are only in the code (importZL/GenSeg, the end-to-end
    scripts), a list of six operators of the imgaug library (0.4.0) in random order, then "greater than 0.1" of what
    interpolation has left of the binary mask. Scale, translation, rotation and shear are four operators there, each
    with its own place in the order. Sides and axes are drawn independently, but the shear is one angle for both axes,
    and imgaug's two have opposite signs, so that together they are nearly a rotation. The operators are about the
    image's centre, a rotation is clockwise, all four sides are padded and the whole is then resized to the image's
    size, and what comes from outside is background.

    Differences: the six maps are multiplied and the mask is looked up once, where imgaug interpolates after every
    operator but the flip, up to five times, which blurs the edge and so, with a threshold as low as 0.1, makes masks
    larger; nothing is cut off between operators, so that what one moves out of the image, another may bring back;
    padding is not rounded to whole pixels; a shear is by tangents (scikit-image, which imgaug asks for the matrix, has
    sine and cosine in the versions of the paper's time); and every sample is augmented (the released loop is skipped
    for batches of one).

    A pair is the bounds of a uniform distribution.
    """

    flip: float = 0.5
    """Chance of a horizontal flip."""
    pad: Range = (0.0, 0.1)
    """Background added beyond each of the four sides, fraction of the image's height or width."""
    scale: Range = (0.8, 1.2)
    """Of rows and of columns, above 1 larger."""
    translate: Range = (-0.1, 0.1)
    """Along rows and along columns, fraction of the image's height or width."""
    rotate: Range = (-15.0, 15.0)
    """Degrees."""
    shear: Range = (-8.0, 8.0)
    """Degrees, along both axes."""
    threshold: float = 0.1
    """A pixel is foreground where more than this share of it is."""

    def __call__(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """:meth:`draw`, then :meth:`apply`."""
        return self.apply(labels, self.draw(len(labels), generator))

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw the geometry of `count` masks.

        Args:
            count: B.
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the CPU: ``flip`` (B,) bool; ``pad`` (B, 4) of top, right, bottom, left, and ``scale`` and ``translate``
            (B, 2) of rows and columns, fractions; ``rotate`` and ``shear`` (B,) degrees; ``order`` (B, 6), int64, the
            places in :data:`OPERATORS` from the first operator applied to the last.

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples = spawn(count, generator)
        return Draw(
            flip=uniform(samples, ()) < self.flip,
            pad=uniform(samples, (4,), self.pad),
            scale=uniform(samples, (2,), self.scale),
            translate=uniform(samples, (2,), self.translate),
            rotate=uniform(samples, (), self.rotate),
            shear=uniform(samples, (), self.shear),
            order=torch.stack([torch.randperm(len(OPERATORS), generator=g) for g in samples]),
        )

    @torch.no_grad()
    def apply(self, labels: Tensor, draw: Draw) -> Tensor:
        """The masks under a draw's maps.

        Each class is interpolated linearly as an image of its own. A pixel is foreground where the classes but
        background (0) add up to more than the threshold, and then gets the largest of them. With two classes this is
        the released rule; the released scripts have no more classes.

        Args:
            labels: (B, H, W), int64, from 0, the background.
            draw: From :meth:`draw`, on any device.

        Returns:
            (B, H, W), int64.

        Raises:
            UserError: There are not as many masks as the draw has samples.
        """
        _check(labels, draw)
        positions = sources(composed(draw, labels.shape[-2:]).to(labels.device), labels.shape[-2:])
        foreground = F.one_hot(labels).movedim(-1, 1)[:, 1:].float()  # (B, K - 1, H, W)
        if not foreground.shape[1]:
            return labels.clone()  # nothing but background
        shares = F.grid_sample(foreground, positions.to(foreground), align_corners=True)
        return torch.where(shares.sum(1) > self.threshold, shares.argmax(1) + 1, 0)


@dataclass(frozen=True)
class PairedAugmentation:
    """Ranges from which the geometry of an image with its label map is drawn, the baselines of GenSeg.

    The paper compares with rotation, flipping, translation and all three, and publishes no range and no code of them;
    the ranges here are those of its mask augmentation. A pair is the bounds of a uniform distribution.
    """

    kind: Kind
    """Which operators; "all" flips, then rotates, then translates."""
    flip: float = 0.5
    """Chance of a horizontal flip."""
    translate: Range = (-0.1, 0.1)
    """Along rows and along columns, fraction of the image's height or width."""
    rotate: Range = (-15.0, 15.0)
    """Degrees."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(
                f"There is no paired augmentation {self.kind!r}: choose one of {', '.join(get_args(Kind))}."
            )

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """:meth:`draw`, then :meth:`apply`."""
        return self.apply(images, labels, self.draw(len(images), generator))

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw the geometry of `count` pairs; all kinds draw alike, and what a kind has not is the identity.

        Args:
            count: B.
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the CPU: ``flip`` (B,) bool; ``rotate`` (B,) degrees; ``translate`` (B, 2) of rows and columns,
            fractions.

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples = spawn(count, generator)
        flip = uniform(samples, ()) < self.flip
        rotate, translate = uniform(samples, (), self.rotate), uniform(samples, (2,), self.translate)

        def kept(values: Tensor, kind: Kind) -> Tensor:
            return values if self.kind in (kind, "all") else torch.zeros_like(values)

        return Draw(flip=kept(flip, "flip"), rotate=kept(rotate, "rotate"), translate=kept(translate, "translate"))

    @torch.no_grad()
    def apply(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The pairs under a draw's maps, mirrored at the outer pixels beyond the image's edges.

        Args:
            images: (B, C, H, W), [0, 1], interpolated linearly.
            labels: (B, H, W), int64, the nearest.
            draw: From :meth:`draw`, on any device.

        Returns:
            Images (B, C, H, W), [0, 1], and label maps (B, H, W), int64.

        Raises:
            UserError: Images, label maps and the draw's samples differ in number, or images and maps in size.
        """
        _check(labels, draw)
        if len(images) != len(labels) or images.shape[-2:] != labels.shape[-2:]:
            raise UserError(
                f"Images {tuple(images.shape)} and label maps {tuple(labels.shape)} must be as many and as large."
            )
        size = labels.shape[-2:]
        maps = translation(draw.translate, size) @ rotation(draw.rotate) @ flip(draw.flip)
        positions = sources(maps.to(images.device), size).to(images)
        moved = F.grid_sample(images, positions, padding_mode="reflection", align_corners=True)
        nearest = F.grid_sample(
            labels[:, None].to(images.dtype), positions, "nearest", padding_mode="reflection", align_corners=True
        )
        return moved.clamp(0, 1), nearest[:, 0].long()


def composed(draw: Draw, size: torch.Size) -> Tensor:
    """The map of a draw of :class:`MaskAugmentation`, its operators in their order: (B, 3, 3), float64."""
    operators = torch.stack(
        [
            flip(draw.flip),
            padding(draw.pad, size),
            scaling(draw.scale),
            translation(draw.translate, size),
            rotation(draw.rotate),
            shearing(draw.shear),
        ],
        1,
    )  # (B, 6, 3, 3)
    product = torch.eye(3, dtype=torch.float64, device=operators.device)
    for step in draw.order.unbind(1):
        product = operators[torch.arange(len(step), device=step.device), step] @ product
    return product.expand(len(draw.order), 3, 3)


def flip(flipped: Tensor) -> Tensor:
    """Columns mirrored where (B,) is true."""
    return scaling(torch.stack([torch.ones_like(flipped).double(), 1 - 2 * flipped.double()], -1))


def padding(pad: Tensor, size: torch.Size) -> Tensor:
    """Sides (B, 4) of top, right, bottom, left, fractions, added, and the whole resized to what it was."""
    top, right, bottom, left = pad.double().unbind(-1)
    zoom = 1 / torch.stack([1 + top + bottom, 1 + left + right], -1)
    shift = torch.stack([top - bottom, left - right], -1) / 2
    return translation(zoom * shift, size) @ scaling(zoom)


def scaling(scale: Tensor) -> Tensor:
    """Factors (B, 2) of rows and columns."""
    return torch.diag_embed(F.pad(scale.double(), (0, 1), value=1.0))


def translation(translate: Tensor, size: torch.Size) -> Tensor:
    """Fractions (B, 2) of height and width, downwards and to the right."""
    shift = translate.double() * translate.new_tensor(size)
    matrix = torch.eye(3, dtype=torch.float64, device=translate.device).repeat(len(translate), 1, 1)
    matrix[:, :2, 2] = shift
    return matrix


def rotation(rotate: Tensor) -> Tensor:
    """Clockwise by (B,) degrees, as the image is shown with its first row on top."""
    angle = rotate.double().deg2rad()
    return _linear(angle.cos(), angle.sin(), -angle.sin(), angle.cos())


def shearing(shear: Tensor) -> Tensor:
    """Of rows along columns, then of columns along rows the other way, by (B,) degrees, as imgaug has it."""
    slope = shear.double().deg2rad().tan()
    one, none = torch.ones_like(slope), torch.zeros_like(slope)
    return _linear(one, none, -slope, one) @ _linear(one, slope, none, one)


def sources(maps: Tensor, size: torch.Size) -> Tensor:
    """Where each pixel of the output comes from under maps (B, 3, 3), as grid_sample has it (corners aligned).

    Returns:
        (B, H, W, 2) of (column, row), float64; -1 and 1 are the centres of the outer pixels.
    """
    rows, columns = (torch.arange(s, dtype=maps.dtype, device=maps.device) - (s - 1) / 2 for s in size)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    here = torch.stack([row, column, torch.ones_like(row)], -1)  # (H, W, 3)
    there = here @ torch.linalg.inv(maps).mT[:, None]  # (B, H, W, 3)
    half = maps.new_tensor([(s - 1) / 2 for s in size])
    return (there[..., :2] / half).flip(-1)


def _linear(rr: Tensor, rc: Tensor, cr: Tensor, cc: Tensor) -> Tensor:
    """Matrices (B, 3, 3) without translation: row from row, row from column, column from row, column from column."""
    return F.pad(torch.stack([rr, rc, cr, cc], -1).reshape(-1, 2, 2), (0, 1, 0, 1)) + torch.diag(
        rr.new_tensor([0.0, 0.0, 1.0])
    )


def _check(labels: Tensor, draw: Draw) -> None:
    if len(draw) != len(labels):
        raise UserError(f"This draw has {len(draw)} samples for {len(labels)} label maps: draw for this batch.")
