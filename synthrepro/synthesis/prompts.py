"""Prompts that a person might give for a mask: points clicked inside and around it, and a box.

Sengupta et al., "SynthFM" (ISBI 2025, arXiv 2504.08177), prompt with one or three positive and no or two negative
points, and do not say how the points are taken; the way here is ours. Points are (x, y) = (column, row) in pixels, as
SAM has them, with label 1 (positive), 0 (negative) or -1 (padding: no point). Lengths are fractions of the image's
shorter side, rounded to pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, seeds, spawn, uniform


@dataclass(frozen=True)
class PointPrompts:
    """Positive points well inside a mask, and negative points in a ring around it.

    Numbers of points are ranges, both bounds included, from which each sample has its own; (3, 3) is always three.
    """

    positive: tuple[int, int]
    negative: tuple[int, int]
    margin: float = 0.02
    """Positive points keep so far from what is not the mask; at least a pixel."""
    ring: tuple[float, float] = (0.02, 0.1)
    """Negative points keep farther than the first and not farther than the second; at least a pixel, and one more."""

    def __post_init__(self) -> None:
        if not 1 <= self.positive[0] <= self.positive[1]:
            raise UserError(f"positive must be a range of 1 or more points, but is {self.positive}.")
        if not 0 <= self.negative[0] <= self.negative[1]:
            raise UserError(f"negative must be a range of 0 or more points, but is {self.negative}.")
        if not (self.margin >= 0 and 0 <= self.ring[0] < self.ring[1]):
            raise UserError(f"margin {self.margin} must not be negative, and ring {self.ring} a range from 0 on.")

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw what decides where the points of `count` masks go.

        From generators in the same state, more points are fewer points and further ones.

        Args:
            count: Masks.
            generator: On the CPU; one number a mask is taken from it.

        Returns:
            On the CPU: ``positives`` and ``negatives`` (B,), int64, numbers of points; ``inside`` and ``around``
            (B, most points), the place of each point in the order of its region's pixels, from 0 to below 1.

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples = spawn(count, generator)
        inside, around = (
            _places([torch.Generator().manual_seed(seed) for seed in seeds(samples).tolist()], most)
            for most in (self.positive[1], self.negative[1])
        )
        numbers = [
            uniform(samples, (), (fewest, most + 1)).floor().clamp_max(most).long()
            for fewest, most in (self.positive, self.negative)
        ]
        return Draw(positives=numbers[0], negatives=numbers[1], inside=inside, around=around)

    @torch.no_grad()
    def apply(self, masks: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The points of a draw.

        Positive points are uniform over the mask's pixels around which a square that reaches `margin` to all sides
        is in the mask. If there is none the margin is halved, down to a pixel and then to none, until there is one: a
        mask with any pixel whose eight neighbours are mask gets no point on its border. The image's border is no
        border of the mask, because images cut organs; a point may lie on it.

        Negative points are uniform over the pixels that the same kind of square around some pixel of the mask reaches
        with the ring's outer radius, but not with its inner one. If there are none, because the mask fills the image,
        they are padding.

        Args:
            masks: (B, H, W), int64, values 0 and 1.
            draw: From :meth:`draw`; it is moved to the masks' device.

        Returns:
            On the masks' device, with N the most positive and negative points together: points (B, N, 2), float32,
            middles of pixels (x, y) given by their column and row; labels (B, N), int64. Positives come first, each
            kind is followed by its padding, and padding lies at (0, 0).

        Raises:
            UserError: The masks are not as above, one is empty, or they are not as many as the draw has samples.
        """
        _check(masks, draw)
        draw = draw.to(masks.device)
        region, side = masks.byte(), min(masks.shape[1:])
        margin = max(round(self.margin * side), 1)
        inner = max(round(self.ring[0] * side), 1)
        outer = max(round(self.ring[1] * side), inner + 1)
        inside, present = _kth_pixels(_well_inside(region, margin), draw.inside)
        _refuse_empty(present)
        points, labels = [inside], [_labels(draw.positives, present, draw.inside.shape[1], 1)]
        if self.negative[1]:
            near = _dilate(region, inner)
            ring = _dilate(near, outer - inner) - near
            around, present = _kth_pixels(ring, draw.around)
            points.append(around)
            labels.append(_labels(draw.negatives, present, draw.around.shape[1], 0))
        label = torch.cat(labels, 1)
        return torch.cat(points, 1).mul_((label >= 0)[..., None]), label


@dataclass(frozen=True)
class BoxPrompts:
    """The box of a mask, each side moved outwards by U(0, jitter) of its own and clipped to the image.

    MedSAM (Ma et al., Nature Communications 2024) moves sides by 0 to 20 whole pixels of 1024; the default is that
    range, but continuous.
    """

    jitter: float = 20 / 1024

    def __post_init__(self) -> None:
        if not self.jitter >= 0:
            raise UserError(f"jitter must not be negative, but is {self.jitter}: boxes are only enlarged.")

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw ``shift`` (B, 4), how far left, upper, right and lower side move, fractions of the shorter side.

        Raises:
            UserError: The generator is not on the CPU.
        """
        return Draw(shift=uniform(spawn(count, generator), (4,), (0.0, self.jitter)))

    @torch.no_grad()
    def apply(self, masks: Tensor, draw: Draw) -> Tensor:
        """Boxes (B, 4), float32, of masks (B, H, W); as :func:`box_of`, and so are the errors.

        Raises:
            UserError: Also if the draw is not for as many masks.
        """
        _check(masks, draw)
        rows, columns = masks.shape[1:]
        shift = draw.shift.to(masks.device) * min(rows, columns)
        boxes = box_of(masks) + shift * shift.new_tensor([-1, -1, 1, 1])
        return boxes.clamp_min(0).minimum(boxes.new_tensor([columns, rows, columns, rows]))


def box_of(masks: Tensor) -> Tensor:
    """The smallest boxes around masks.

    Args:
        masks: (B, H, W), int64, values 0 and 1.

    Returns:
        (B, 4), float32: (x0, y0, x1, y1) in pixels, at the pixels' outer edges: first column, first row, last column
        plus 1, last row plus 1. The sides lie on the mask's border, so a mask of one pixel has a box of area 1.

    Raises:
        UserError: The masks are not as above, or one is empty.
    """
    _check(masks)
    sides = []
    for axis in (1, 2):
        line = masks.amax(axis)  # (B, W), then (B, H)
        sides.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    _refuse_empty(line.amax(1) > 0)
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).float()


def check_points(points: Tensor, size: tuple[int, int]) -> None:
    """Refuse points that are not in an image.

    Args:
        points: (N, 2) or (B, N, 2), (x, y) in pixels.
        size: Rows and columns.

    Raises:
        UserError: The shape is another, or a point is not within 0 <= x < columns and 0 <= y < rows.
    """
    if points.ndim not in (2, 3) or points.shape[-1] != 2:
        raise UserError(f"Points must be (N, 2) or (B, N, 2), (x, y) each, but these are {tuple(points.shape)}.")
    rows, columns = size
    x, y = points.unbind(-1)
    outside = ~((x >= 0) & (x < columns) & (y >= 0) & (y < rows))  # so NaN is outside
    if outside.any():
        *sample, point = outside.nonzero()[0].tolist()
        where = "".join(f" of sample {i}" for i in sample)
        x0, y0 = points[(*sample, point)].tolist()
        raise UserError(
            f"Point {point}{where}, (x, y) = ({x0:g}, {y0:g}), lies outside the image of {columns} columns and {rows} "
            "rows: give (column, row) in pixels of this image."
        )


def _places(generators: list[torch.Generator], most: int) -> Tensor:
    """Uniform numbers (B, most), one by one, so that fewer of them are the first of more."""
    if most == 0:
        return torch.zeros(len(generators), 0)
    return torch.stack([uniform(generators, ()) for _ in range(most)], 1)


def _dilate(region: Tensor, radius: int) -> Tensor:
    """Dilate (B, H, W), uint8, by the square that reaches `radius` to all sides; beyond the image is nothing.

    Along each axis, windows of one pixel grow to the power of two below the square's side by doubling, and two of
    those overlap to make the square's side.
    """
    side = 2 * radius + 1
    for axis in (2, 1):
        length = region.shape[axis]
        region = F.pad(region, (radius, radius) if axis == 2 else (0, 0, radius, radius))
        window = 1
        while 2 * window <= side:
            width = region.shape[axis] - window
            region = region.narrow(axis, 0, width) | region.narrow(axis, window, width)
            window *= 2
        region = region.narrow(axis, 0, length) | region.narrow(axis, side - window, length)
    return region


def _well_inside(masks: Tensor, margin: int) -> Tensor:
    """Masks eroded by the first of margin, margin / 2, ..., 1, 0 pixels that leaves something; (B, H, W), uint8."""
    background = 1 - masks
    region = 1 - _dilate(background, margin)
    while margin:
        margin //= 2
        empty = (region.flatten(1).amax(1) == 0).nonzero()[:, 0]
        if len(empty) == 0:
            break
        region[empty] = 1 - _dilate(background[empty], margin)
    return region


def _kth_pixels(region: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of regions (B, H, W), uint8, at places (B, K) in [0, 1) in the order of their pixels: row by row.

    Returns:
        (x, y) as (B, K, 2), float32, without meaning where the region is empty; and whether it is not, (B,), bool.
    """
    counts = region.sum(2, dtype=torch.int32)  # (B, H)
    in_rows = counts.cumsum(1)
    area = in_rows[:, -1:]
    rank = (places.double() * area).long().minimum(area - 1) + 1  # from 1 on
    row = torch.searchsorted(in_rows, rank).clamp_max(region.shape[1] - 1)  # (B, K)
    before = in_rows.gather(1, row) - counts.gather(1, row)
    lines = region.gather(1, row[..., None].expand(-1, -1, region.shape[2])).cumsum(2)  # (B, K, W)
    column = torch.searchsorted(lines, (rank - before)[..., None])[..., 0].clamp_max(region.shape[2] - 1)
    return torch.stack([column, row], -1).float(), area[:, 0] > 0


def _labels(numbers: Tensor, present: Tensor, most: int, label: int) -> Tensor:
    """Labels (B, most): `label` for so many points of each sample (B,) whose region is present, then -1."""
    there = torch.arange(most, device=numbers.device) < (numbers * present)[:, None]
    return torch.where(there, label, -1)


def _check(masks: Tensor, draw: Draw | None = None) -> None:
    if masks.dtype != torch.int64 or masks.ndim != 3:
        raise UserError(
            f"Masks must be int64 (B, H, W), but these are {masks.dtype} {tuple(masks.shape)}: convert them with "
            ".long(), and add or drop axes."
        )
    if draw is not None and len(draw) != len(masks):
        raise UserError(f"This draw has {len(draw)} samples for {len(masks)} masks: draw for this batch.")
    low, high = masks.aminmax()
    if low < 0 or high > 1:
        raise UserError(
            f"Masks must have the values 0 and 1, but these run from {int(low)} to {int(high)}: compare the label map "
            "with the label that is meant."
        )


def _refuse_empty(present: Tensor) -> None:
    if not present.all():
        first = int((~present).nonzero()[0])
        raise UserError(f"Mask {first} of the batch is empty, so nothing in it can be prompted for: leave it out.")
