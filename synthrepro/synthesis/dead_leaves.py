"""Dead-leaves images: opaque leaves of many sizes on top of one another, with the map of the leaf seen at each pixel.

Source: the model is that of Lee, Mumford and Huang, Occlusion models for natural images, IJCV 2001; Baradad et al.,
Learning to see by looking at noise, NeurIPS 2021, train on such images. The ranges below are ours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, spawn, uniform
from synthrepro.synthesis.fields import pick

Range = tuple[float, float]
MOST_CORNERS = 6
CORNER_JITTER = 0.2  # of the angle between two corners; below 0.25 a triangle still encloses its centre
CHUNK = 8  # leaves painted at once, so that they stay in the cache


@dataclass(frozen=True)
class DeadLeaves:
    """Ranges from which dead-leaves images are drawn; lengths are fractions of the image's side.

    A leaf's radius, that of the circle around it, has a density in proportion to radius ** -3, which is what makes
    images of no particular scale. A quarter of the leaves each are discs, ellipses, rectangles and convex polygons of 3
    to 6 corners (what is left over are polygons); centres are uniform on the image, and the order is drawn. There is no
    waiting until the image is covered: behind a given number of leaves there is a background, textured as they are.
    """

    leaves: int = 150
    radius: Range = (0.04, 0.5)
    aspect: Range = (0.3, 1.0)
    """Of ellipses and rectangles: shorter by longer side."""
    gradient: Range = (0.0, 0.3)
    """Change of colour from a leaf's centre to its circle, along a direction of its own; each channel's has a sign."""
    wave: Range = (0.0, 0.15)
    """Amplitude of the stripes on a leaf."""
    wavelength: Range = (0.02, 0.2)
    """Distance of the stripes."""

    def __post_init__(self) -> None:
        if self.leaves < 1 or not 0 < self.radius[0] <= self.radius[1]:
            raise UserError(
                f"Dead leaves need at least one leaf and radii above 0, the smallest first, but these are "
                f"{self.leaves} of {self.radius}: set leaves and radius."
            )

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw the leaves of `count` images.

        Args:
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the CPU, of N leaves: ``order`` (B, N), int64, 1 to N, the later the higher; ``centre`` (B, N, 2) as
            (x, y) and ``radius`` (B, N), fractions of the side; ``turn`` (B, N) radians; ``aspect`` (B, N), 1 for
            discs and polygons; ``corners`` (B, N), int64, and ``jitter`` (B, N, 6) of polygons, in angles between
            corners. ``colour`` (B, N + 1, 3), [0, 1], ``gradient`` and ``wave`` (B, N + 1, 3), amplitudes a channel,
            ``downhill`` and ``phase`` (B, N + 1) radians, and ``wavevector`` (B, N + 1, 2), radians a side, are of
            the background (0) and of the leaves by their order.

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples, n = spawn(count, generator), self.leaves

        def draws(shape: tuple[int, ...], bounds: Range = (0.0, 1.0)) -> Tensor:
            return uniform(samples, shape, bounds)

        low, high = (r**-2 for r in self.radius)
        radius = draws((n,), (low, high)) ** -0.5
        aspect = draws((n,), self.aspect)
        quarter = n // 4
        aspect[:, :quarter] = aspect[:, 3 * quarter :] = 1
        turns = (0.0, 2 * math.pi)
        wavelength, along = draws((n + 1,), self.wavelength), draws((n + 1,), turns)
        sign = torch.where(draws((n + 1, 3)) < 0.5, -1.0, 1.0)
        return Draw(
            order=1 + draws((n,)).argsort(1),
            centre=draws((n, 2)),
            radius=radius,
            turn=draws((n,), turns),
            aspect=aspect,
            corners=draws((n,), (3, MOST_CORNERS + 1)).long().clamp_max(MOST_CORNERS),
            jitter=draws((n, MOST_CORNERS), (-CORNER_JITTER, CORNER_JITTER)),
            colour=draws((n + 1, 3)),
            gradient=sign * draws((n + 1, 3), self.gradient),
            downhill=draws((n + 1,), turns),
            wave=draws((n + 1, 3), self.wave),
            wavevector=torch.stack([along.cos(), along.sin()], -1) * (2 * math.pi / wavelength[..., None]),
            phase=draws((n + 1,), turns),
        )

    @torch.no_grad()
    def apply(self, draw: Draw, size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Images and label maps of a draw.

        Args:
            draw: From :meth:`draw`.
            size: Rows and columns, any number.

        Returns:
            Images (B, 3, size, size), float32, [0, 1], and label maps (B, size, size), int64: the order of the leaf on
            top, 0 where there is none.
        """
        draw = draw.to(device)
        if torch.device(device).type != "cpu":
            return self._paint(draw, size)
        # One by one, the leaves stay in the CPU's cache, and a sample's bits do not depend on its batch.
        images, labels = zip(*(self._paint(draw[i], size) for i in range(len(draw))), strict=True)
        return torch.cat(images), torch.cat(labels)

    def _paint(self, draw: Draw, size: int) -> tuple[Tensor, Tensor]:
        axis = (torch.arange(size, device=draw.radius.device) + 0.5) / size
        labels = self._topmost(draw, axis)
        return _colours(draw, axis, labels), labels

    def _topmost(self, draw: Draw, axis: Tensor) -> Tensor:
        """Order of the leaf on top, 0 for none, (B, H, W)."""
        quarter = self.leaves // 4
        rounds, rectangles, polygons = slice(2 * quarter), slice(2 * quarter, 3 * quarter), slice(3 * quarter, None)
        frame = _frames(draw)
        forms = (
            (rounds, frame[:, rounds], _norm_2),
            (rectangles, frame[:, rectangles] * math.sqrt(2), _norm_infinity),
            (polygons, _sides(draw, frame)[:, polygons], _largest),
        )
        top = axis.new_zeros(len(draw), len(axis), len(axis))
        for leaves, planes, distance in forms:
            order = draw.order[:, leaves, None, None].float()
            rows = planes[..., 1:2] * axis + planes[..., 2:]  # (B, leaves, planes, H)
            columns = planes[..., :1] * axis
            for start in range(0, order.shape[1], CHUNK):
                part = slice(start, start + CHUNK)
                covered = distance(rows[:, part, :, :, None] + columns[:, part, :, None]) <= 1  # (B, leaves, H, W)
                top = torch.maximum(top, (covered * order[:, part]).amax(1))
        return top.long()


def _frames(draw: Draw) -> Tensor:
    """Coordinates along and across each leaf, 1 at its ends, as functions of (x, y, 1): (B, N, 2, 3)."""
    cos, sin = draw.turn.cos(), draw.turn.sin()
    axes = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 2)  # (B, N, 2, 2)
    axes = axes / torch.stack([draw.radius, draw.radius * draw.aspect], -1)[..., None]
    return torch.cat([axes, -axes @ draw.centre[..., None]], -1)


def _sides(draw: Draw, frames: Tensor) -> Tensor:
    """Distances towards each side of a polygon, 1 on it, as functions of (x, y, 1): (B, N, 6, 3).

    Of fewer than six sides, some are there twice.
    """
    count = draw.corners[..., None]
    side = torch.arange(MOST_CORNERS, device=count.device) % count  # (B, N, 6)
    following = (side + 1) % count
    start = side + draw.jitter.gather(2, side)
    end = side + 1 + draw.jitter.gather(2, following)
    angle = 2 * math.pi / count
    middle, half = (start + end) / 2 * angle, (end - start) / 2 * angle
    normals = torch.stack([middle.cos(), middle.sin()], -1) / half.cos()[..., None]  # (B, N, 6, 2)
    return normals @ frames


def _norm_2(coordinates: Tensor) -> Tensor:
    return coordinates.square_().sum(2)


def _norm_infinity(coordinates: Tensor) -> Tensor:
    return coordinates.abs_().amax(2)


def _largest(coordinates: Tensor) -> Tensor:
    return coordinates.amax(2)


def _colours(draw: Draw, axis: Tensor, labels: Tensor) -> Tensor:
    """Images (B, 3, H, W): each leaf's colour, its gradient and its stripes."""
    below = draw.order.argsort(1)  # leaves from the lowest to the highest
    centre = torch.cat([torch.full_like(draw.centre[:, :1], 0.5), draw.centre.take_along_dim(below[..., None], 1)], 1)
    reach = torch.cat([torch.full_like(draw.radius[:, :1], math.sqrt(0.5)), draw.radius.take_along_dim(below, 1)], 1)
    slope = torch.stack([draw.downhill.cos(), draw.downhill.sin()], -1) / reach[..., None]  # (B, N + 1, 2)
    offset = -(slope * centre).sum(-1, keepdim=True)
    table = torch.cat(
        [draw.colour, draw.gradient, draw.wave, slope, offset, draw.wavevector, draw.phase[..., None]], -1
    )
    colour, gradient, wave, slope, stripes = pick(table, labels).split(3, -1)  # (B, H, W, 3) each

    def affine(of: Tensor) -> Tensor:
        return (of[..., 0] * axis + of[..., 1] * axis[:, None] + of[..., 2])[..., None]

    image = colour + gradient * affine(slope) + wave * affine(stripes).sin()
    return image.movedim(-1, 1).clamp(0, 1).contiguous()
