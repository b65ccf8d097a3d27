"""Label maps from nothing: SynthMorph's random shapes, gaps eroded between them, and one region as the target.

The boundary-aware half of SynthFM's data (Sengupta et al., ISBI 2025, no code released): adjacent structures that share
boundaries, their labels randomly eroded, the gap being background. The label maps' parameters are SynthMorph's; how
wide the paper's erosion is and how it picks a target is not public, so those defaults are ours.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage import measure
from torch import Tensor
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, normal, spawn, uniform
from synthrepro.synthesis.fields import cell_positions, linear_weights, pick

Range = tuple[float, float]
COMPONENT_SIDE = 256  # components to choose a target from are looked for at so many points a side at most
CHUNK = 2**14  # pixels interpolated at once, so that they stay in the cache


@dataclass(frozen=True)
class SynthMorphMaps:
    """SynthMorph's random label maps: of several smooth noise images, each warped on its own, the largest one's number.

    Source: Hoffmann et al., SynthMorph, IEEE TMI 2022, with the numbers of the authors' published
    notebook and ``draw_perlin`` of neurite: at every scale, one SD is drawn uniformly, which all labels (and, of a
    warp, both directions) share; normal numbers of that SD at ceil(size / scale) control points a side, the outer ones
    on the image's edges, are interpolated linearly, and the scales are added up.

    Differences: labels are 1 to `labels`, because 0 is kept for the background. Every label's warp is its own, as the
    paper says; in the notebook, ``draw_perlin`` also coarsens the axis of the labels, which at 16 labels and scales of
    16 and more leaves one warp for all. SDs are uniform from 0, as in the first and in the latest version of
    ``draw_perlin``; one in between takes the upper bound unless told otherwise. At another size than `size`, the warped
    noise is interpolated linearly and its maximum taken there, so that boundaries have no steps.
    """

    labels: int = 16
    size: int = 256
    """Pixels a side of the grid on which noise is warped, and the unit of the lengths below."""
    scales: tuple[int, ...] = (32, 64)
    """Distances of the noise's control points, pixels."""
    warp_scales: tuple[int, ...] = (16, 32, 64)
    """Distances of the warp's control points, pixels."""
    warp_sd: float = 16.0
    """Upper bound of the uniform SD of the warp's control points, pixels, at each scale."""

    def __post_init__(self) -> None:
        if self.labels < 1 or self.size < 2 or not self.scales:
            raise UserError(
                f"SynthMorph label maps need a label, 2 pixels a side and a scale, but these have {self.labels}, "
                f"{self.size} and {len(self.scales)}: raise them."
            )

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw the control points of `count` label maps.

        Args:
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the CPU: for the i-th scale ``noise{i}`` (B, labels, n, n), and for the i-th warp scale ``warp{i}``
            (B, labels, 2, n, n), displacement of rows and columns in pixels of `size`.

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples = spawn(count, generator)
        controls = {}
        for name, scales, components, sd in (
            ("noise", self.scales, (), 1.0),
            ("warp", self.warp_scales, (2,), self.warp_sd),
        ):
            for i, scale in enumerate(scales):
                nodes = math.ceil(self.size / scale)
                shape = (self.labels, *components, nodes, nodes)
                drawn = uniform(samples, (1,) * len(shape), (0.0, sd))
                controls[f"{name}{i}"] = drawn * normal(samples, shape)
        return Draw(**controls)

    @torch.no_grad()
    def apply(self, draw: Draw, size: int, device: torch.device | str) -> Tensor:
        """Label maps of a draw.

        Args:
            draw: From :meth:`draw`.
            size: Rows and columns, any number; the maps of a draw at two sizes show the same shapes.

        Returns:
            (B, size, size), int64, 1 to `labels`.
        """
        draw = draw.to(device)
        if torch.device(device).type != "cpu":
            return 1 + largest_at(self.fields(draw), size)
        # One by one, the fields stay in the CPU's cache, and a sample's bits do not depend on its batch.
        return torch.cat([1 + largest_at(self.fields(draw[i]), size) for i in range(len(draw))])

    def fields(self, draw: Draw) -> Tensor:
        """Warped noise images, (B, labels, `size`, `size`), on the draw's device."""
        noise = self._field([vars(draw)[f"noise{i}"] for i in range(len(self.scales))])
        if not self.warp_scales:
            return noise
        warp = self._field([vars(draw)[f"warp{i}"] for i in range(len(self.warp_scales))])
        axis = torch.linspace(-1, 1, self.size, device=noise.device)
        warp = warp.mul_(2 / (self.size - 1)).flatten(0, 1)  # (B labels, 2, H, W) in the units of grid_sample
        place = torch.stack([warp[:, 1] + axis, warp[:, 0] + axis[:, None]], -1)  # x, y
        warped = F.grid_sample(noise.flatten(0, 1)[:, None], place, padding_mode="border", align_corners=True)
        return warped.view_as(noise)

    def _field(self, scales: list[Tensor]) -> Tensor:
        """Sum over the scales of control points (B, ..., n, n), each interpolated: (B, ..., `size`, `size`)."""
        weights = []
        for nodes in (controls.shape[-1] for controls in scales):
            positions = torch.linspace(0, nodes - 1, self.size, device=scales[0].device)
            weights.append(linear_weights(positions, nodes))  # (size, nodes)
        rows = torch.cat([w @ controls for w, controls in zip(weights, scales, strict=True)], -1)
        return rows @ torch.cat(weights, -1).mT  # one product adds them up


def largest_at(fields: Tensor, size: int) -> Tensor:
    """Which of several fields is the largest, at the pixels of another grid that covers the same square.

    The fields are linear between the centres of their pixels (half-pixel rule). Where one is the largest at all four
    pixels around a place, it is so at the place too; only elsewhere, along boundaries, is there anything to compute.

    Args:
        fields: (B, K, n, n), n at least 2.

    Returns:
        (B, size, size), int64, 0 to K - 1.
    """
    nodes = fields.shape[-1]
    winner = fields.max(1).indices
    first = winner[:, :-1, :-1]
    disputed = (first != winner[:, :-1, 1:]) | (first != winner[:, 1:, :-1]) | (first != winner[:, 1:, 1:])
    position = cell_positions(size, nodes)[0].to(fields.device)
    before = position.floor().clamp_max_(nodes - 2)
    part, before = (position - before)[:, None], before.long()
    result = first[:, before][:, :, before]
    sample, row, column = disputed[:, before][:, :, before].nonzero(as_tuple=True)

    table = fields.movedim(1, -1).contiguous().flatten(0, 2)  # (B n n, K)
    corner = (sample * nodes + before[row]) * nodes + before[column]
    largest = []
    for c, across, down in zip(*(t.split(CHUNK) for t in (corner, part[column], part[row])), strict=True):
        upper, lower = (table[k].lerp_(table[k + 1], across) for k in (c, c + nodes))
        largest.append(upper.lerp_(lower, down).max(1).indices)
    result[sample, row, column] = torch.cat(largest)
    return result


@dataclass(frozen=True)
class Erosion:
    """Random erosion of every label: the boundary between two of them becomes a gap of background.

    The ranges are ours; the paper's are not public.
    """

    labels: int = 16
    """Label maps' values are 0 (background) to this."""
    width: Range = (0.0, 0.008)
    """What labels lose at their boundary, fraction of the image's shorter side; one draw an image."""
    jitter_chance: float = 0.5
    """Of an image whose labels differ in their widths."""
    jitter: Range = (0.5, 1.5)
    """Factor of each label's own width in such an image."""

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw the widths of `count` images.

        Returns:
            On the CPU: ``width`` (B, labels), fractions of the image's shorter side, of labels 1, 2, ...

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples = spawn(count, generator)
        width, chance = uniform(samples, (1,), self.width), uniform(samples, (1,))
        factor = uniform(samples, (self.labels,), self.jitter)
        return Draw(width=width * torch.where(chance < self.jitter_chance, factor, 1.0))

    def apply(self, labels: Tensor, draw: Draw) -> Tensor:
        """Eroded label maps.

        Args:
            labels: (B, H, W), int64, 0 to `labels`.
            draw: From :meth:`draw`, for as many images.

        Returns:
            (B, H, W), int64, on the labels' device.

        Raises:
            UserError: The label maps are not as above, or not as many as the draw has samples.
        """
        _check(labels)
        if len(draw) != len(labels):
            raise UserError(f"This draw has {len(draw)} samples for {len(labels)} label maps: draw for this batch.")
        low, high = labels.aminmax()
        if low < 0 or high > self.labels:
            raise UserError(
                f"Label values must be 0 to {self.labels}, but these run from {int(low)} to {int(high)}: remap them "
                "or set labels."
            )
        return erode(labels, (draw.width.cpu() * min(labels.shape[1:])).round().long())


def erode(labels: Tensor, radius: Tensor) -> Tensor:
    """Set to 0 every pixel near which there is another label.

    A pixel stays if all pixels within its label's radius have its label. Radii are those of the octagons that the 3 x 3
    square and the cross of five pixels make in turn, the square first; a radius of 0 leaves a label as it is, and
    nothing is lost at the edges of the image.

    Args:
        labels: (B, H, W), int64, 0 to K.
        radius: (B, K), int64, pixels, of labels 1 to K; on the CPU.

    Returns:
        (B, H, W), int64.
    """
    most = int(radius.max())
    wanted = pick(F.pad(radius, (1, 0)).to(torch.int16).to(labels.device), labels)  # (B, H, W)
    near, gone = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels, dtype=torch.bool)
    for step in range(1, most + 1):
        near = _beside_another(labels) if step == 1 else _grow(near, square=step % 2 == 1)
        gone |= near & (wanted == step)
    return labels.masked_fill(gone, 0)


def _beside_another(labels: Tensor) -> Tensor:
    """Whether one of a pixel's eight neighbours has another label, (B, H, W)."""
    beside = torch.zeros_like(labels, dtype=torch.bool)
    first, last, every = slice(None, -1), slice(1, None), slice(None)
    for a, b in (
        ((every, first), (every, last)),
        ((first, every), (last, every)),
        ((first, first), (last, last)),
        ((first, last), (last, first)),
    ):
        differs = labels[:, *a] != labels[:, *b]
        beside[:, *a] |= differs
        beside[:, *b] |= differs
    return beside


def _grow(mask: Tensor, square: bool) -> Tensor:
    """Dilate (B, H, W) by the 3 x 3 square or by the cross of five pixels."""
    grown = mask.clone()
    grown[..., 1:] |= mask[..., :-1]
    grown[..., :-1] |= mask[..., 1:]
    source = grown.clone() if square else mask
    grown[..., 1:, :] |= source[..., :-1, :]
    grown[..., :-1, :] |= source[..., 1:, :]
    return grown


def choose_target(labels: Tensor, u: Tensor, smallest: float, largest: float) -> Tensor:
    """One connected region of one label of each map, of a size within bounds, each such region being as likely.

    Regions are connected through edges, not corners. They are counted, and their areas taken, on the map sampled at
    every few pixels if it has more than `COMPONENT_SIDE` a side; the mask is the region of the map itself, so that it
    can be larger, where regions that are apart on the sampled map hang together by a thread.

    Args:
        labels: (B, H, W), int64; 0 is background and never a target.
        u: (B,), numbers from 0 to 1 that choose.
        smallest, largest: Bounds of the region's share of the image. If no region is within them, the largest of all
            is the target.

    Returns:
        (B, H, W), int64, 0 and 1, on the labels' device.

    Raises:
        UserError: A map has no foreground, the bounds are not in order, or the arguments are not as above.
    """
    _check(labels)
    if len(u) != len(labels):
        raise UserError(f"There are {len(u)} numbers to choose by for {len(labels)} label maps: give one for each.")
    if not 0 <= smallest <= largest:
        raise UserError(f"A target's share cannot be from {smallest} to {largest}: give 0 <= smallest <= largest.")
    rows, columns = (_sampled(size, labels.device) for size in labels.shape[1:])
    sampled = labels[:, rows][:, :, columns].cpu().numpy()
    masks = torch.empty(labels.shape, dtype=torch.int64)
    for i, chance in enumerate(u.tolist()):
        points, places = sampled[i], np.ix_(rows.cpu().numpy(), columns.cpu().numpy())
        if not points.any():  # at the sampled pixels; what lies between them is too small for any bounds
            points = labels[i].cpu().numpy()
            places = np.ix_(*map(np.arange, points.shape))
        if not points.any():
            raise UserError(f"Label map {i} of the batch is background only, so it has no target: leave it out.")
        region = _choose_region(points, chance, smallest, largest)
        value = points[region][0]
        parts, _ = ndimage.label((labels[i] == int(value)).cpu().numpy())
        mask = parts == np.bincount(parts[places][region]).argmax()
        masks[i] = torch.from_numpy(mask)
    return masks.to(labels.device)


def _sampled(size: int, device: torch.device) -> Tensor:
    """Indices of at most `COMPONENT_SIDE` pixels, evenly spread along an axis."""
    stride = -(-size // COMPONENT_SIDE)
    return torch.arange(stride // 2, size, stride, device=device)


def _choose_region(points: np.ndarray, chance: float, smallest: float, largest: float) -> np.ndarray:
    """Mask of one connected region of a label map with foreground, (h, w), bool."""
    regions = measure.label(points, background=0, connectivity=1)
    share = np.bincount(regions.ravel())[1:] / points.size
    admissible = np.flatnonzero((share >= smallest) & (share <= largest))
    if not len(admissible):
        admissible = np.array([share.argmax()])
    return regions == 1 + admissible[min(int(chance * len(admissible)), len(admissible) - 1)]


def _check(labels: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise UserError(f"Label maps must be int64, but these are {labels.dtype}: convert them with .long().")
    if labels.ndim != 3:
        raise UserError(f"Label maps must be (B, H, W), but these are {tuple(labels.shape)}: add or drop axes.")
