"""How a label map becomes an image of no modality in particular: levels, textures, contrast modulation, noise.

SynthFM (Sengupta et al., arXiv 2504.08177) fills its shapes and label maps from "a noise library with contrast
modulation", so that images have the contrast, texture and noise of medical ones. It published no code and no numbers.
The paper's are: the noise library, contrast modulation, and that regions have textures. What each of them is in
detail, the structured background, the soft edges and every number are ours, chosen for what is plausible in CT, MR and
ultrasound in general.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, normal, pixel_generators, seeds, spawn, uniform
from synthrepro.synthesis.fields import (
    bspline_weights,
    cell_positions,
    expand,
    multiply_banded,
    pick,
    smoothing_kernel,
    smoothing_matrix,
)
from synthrepro.synthesis.noise import OFF, Limits, Noise, Range, check_ranges, draw_range, perlin_field, scale_ranges


@dataclass(frozen=True)
class Appearance:
    """Ranges from which the look of an image is drawn, in the order of the stages.

    A pair is the bounds of a uniform or, where it says so, a log-uniform distribution. The paper's are the noise
    library, contrast modulation and textures; every number is ours. Lengths are fractions of the image's side, the
    longer one if it is not square. Widening or leaving out one stage changes no other stage's draws. A stage is off
    at (0, 0), a chance or a gamma at 0, the noise without kinds; only levels an image must have.
    """

    background: Range = (0.1, 0.9)
    """Level of label 0."""
    contrast: Range = (0.02, 0.6)
    """Contrast modulation, first part: scale of an image's contrasts, log-uniform. All labels of an image share it, so
    that an image has high contrast or low as a whole, down to labels that are next to identical."""
    contrast_jitter: Range = (0.5, 1.5)
    """A label differs from the background by the image's contrast times this, up or down; log-uniform. Where that
    leaves [0, 1] it goes the other way; if that leaves it too, it is reflected at 0 and 1."""
    texture: Range = (0.0, 0.08)
    """SD of each label's texture."""
    texture_spacing: Range = (0.01, 0.1)
    """Lattice of an image's textures, which are Perlin noise; log-uniform."""
    ground_chance: float = 0.5
    """Of a background with structure: Perlin noise of a coarse lattice, on label 0."""
    ground: Range = (0.02, 0.15)
    """SD of that structure."""
    ground_spacing: Range = (0.1, 0.5)
    """Lattice of that structure, log-uniform."""
    blur: Range = (0.0, 0.004)
    """SD of the Gaussian that softens edges (partial volume)."""
    gamma: float = 0.3
    """Contrast modulation, second part: SD of the logarithm of the exponent that intensities are raised to."""
    bias: Range = (0.0, 0.4)
    """Third part: a smooth factor, a cubic B-spline in the logarithm; SD of the logarithm at its control points, the
    largest of which is then set to 0, so that nothing saturates."""
    bias_nodes: int = 4
    """Control points along an axis."""
    inversion_chance: float = 0.5
    """Fourth part: chance of 1 - image, so that gamma and bias act on bright and dark alike; before noise."""
    noise: Noise = field(default_factory=Noise)
    """Last, before clipping to [0, 1]."""

    limits: ClassVar[dict[str, Limits]] = {
        "background": Limits(0.0, 1.0),
        "contrast": Limits(0.001, 1.0, log=True),
        "contrast_jitter": Limits(0.05, 5.0, log=True),
        "texture": Limits(),
        "texture_spacing": Limits(0.005, 1.0, log=True),
        "ground": Limits(),
        "ground_spacing": Limits(0.02, 1.0, log=True),
        "blur": Limits(0.0, 0.05),
        "bias": Limits(),
    }
    """What each range may be, and those that are log-uniform."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("ground_chance", "inversion_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"Appearance.{name} is {getattr(self, name)}: a chance is from 0 to 1.")
        if not 0 <= self.gamma < math.inf:
            raise UserError(f"Appearance.gamma is {self.gamma}: it is a standard deviation, give 0 or more.")
        if self.bias_nodes < 1:
            raise UserError(f"Appearance.bias_nodes is {self.bias_nodes}: a bias field has at least 1 control point.")

    def scaled(self, factor: float) -> Self:
        """Every range `factor` times as wide, see :func:`synthrepro.synthesis.noise.scale_range`, the noise's too.

        So is gamma, a normal distribution's width; chances and counts stay.
        """
        return replace(scale_ranges(self, factor), gamma=self.gamma * factor, noise=self.noise.scaled(factor))

    def draw(self, count: int, classes: int, generator: torch.Generator) -> Draw:
        """Draw the look of `count` images.

        Args:
            classes: Values of the label maps are 0 (background) to classes - 1.
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the CPU: ``level`` (B, classes), [0, 1]; ``texture`` (B, classes, 2), amplitudes of an image's two
            fields; ``texture_spacing``, ``ground_spacing`` and ``blur`` (B,) fractions of the side; ``ground`` (B,)
            SD, 0 where there is none; ``gamma`` (B,) exponents; ``bias`` (B, n, n) logarithms, at most 0; ``invert``
            (B,) bool; ``texture_seed`` and ``ground_seed`` (B,); ``noise``, the draw of the noise.

        Raises:
            UserError: The generator is not on the CPU.
            ValueError: There is less than one class.
        """
        return self.draw_from(classes, spawn(count, generator))

    def draw_from(self, classes: int, samples: list[torch.Generator]) -> Draw:
        """As :meth:`draw`, from each sample's own generator: for generators that the appearance is a part of."""
        if classes < 1:
            raise ValueError(f"classes is {classes}, but there is always the background.")
        background = draw_range(self, "background", samples)[:, None]
        contrast = draw_range(self, "contrast", samples)[:, None]
        one: dict[str, Tensor] = {
            name: draw_range(self, name, samples) for name in ("texture_spacing", "ground", "ground_spacing", "blur")
        }
        one["ground"] = one["ground"] * (uniform(samples, ()) < self.ground_chance)
        gamma = (self.gamma * normal(samples)).exp()
        bias = draw_range(self, "bias", samples)[:, None, None] * normal(samples, (self.bias_nodes, self.bias_nodes))
        invert = uniform(samples, ()) < self.inversion_chance
        texture_seed, ground_seed, noise = seeds(samples), seeds(samples), self.noise.draw_from(samples)

        contrast = contrast * draw_range(self, "contrast_jitter", samples, (classes,))
        sign = torch.where(uniform(samples, (classes,)) < 0.5, -1.0, 1.0)
        level = background + sign * contrast
        level = torch.where((level < 0) | (level > 1), background - sign * contrast, level)
        level = 1 - (1 - level % 2).abs()  # reflected
        level[:, 0] = background[:, 0]
        amplitude, angle = draw_range(self, "texture", samples, (classes,)), uniform(samples, (classes,))
        angle = angle * (2 * torch.pi)
        return Draw(
            level=level,
            texture=amplitude[..., None] * torch.stack([angle.cos(), angle.sin()], -1),
            **one,
            gamma=gamma,
            bias=bias - bias.amax((1, 2), keepdim=True),
            invert=invert,
            texture_seed=texture_seed,
            ground_seed=ground_seed,
            noise=noise,
        )

    @torch.no_grad()
    def apply(self, labels: Tensor, draw: Draw) -> Tensor:
        """The images of a draw.

        Args:
            labels: (B, H, W), int64, values 0 to classes - 1 of the draw.
            draw: From :meth:`draw`.

        Returns:
            (B, 1, H, W), float32, [0, 1], on the labels' device.

        Raises:
            UserError: The labels are not as above, or not as many as the draw has samples.
        """
        _check(labels, draw)
        draw = draw.to(labels.device)
        if labels.device.type != "cpu":
            return self._images(labels, draw)
        result = torch.empty(len(labels), 1, *labels.shape[1:])
        for i in range(len(labels)):  # one at a time stays in the cache, and its bits do not depend on its batch
            result[i : i + 1] = self._images(labels[i : i + 1], draw[i])
        return result

    def _images(self, labels: Tensor, draw: Draw) -> Tensor:
        size = (labels.shape[1], labels.shape[2])
        image = pick(draw.level, labels)  # (B, H, W), as everything below
        if self.texture != OFF:
            # Two fields mixed at each label's own angle: neighbours' textures are alike by chance only.
            pixels = pixel_generators(draw.texture_seed, labels.device)
            for k in (0, 1):
                texture = perlin_field(draw.texture_spacing, size, pixels)
                image = image.addcmul_(pick(draw.texture[..., k].contiguous(), labels), texture)
        if self.ground != OFF and self.ground_chance:
            pixels = pixel_generators(draw.ground_seed, labels.device)
            ground = perlin_field(draw.ground_spacing, size, pixels).mul_(draw.ground[:, None, None])
            image = image.add_(ground.mul_(labels == 0))
        if self.blur != OFF:
            image = self._blur(image, draw.blur * max(size))
        image = image.clamp_(0, 1)
        if self.gamma:
            image = image.pow_(draw.gamma[:, None, None])
        if self.bias != OFF:
            rows, columns = (
                bspline_weights(cell_positions(s, self.bias_nodes), self.bias_nodes).to(labels.device) for s in size
            )
            image = image.mul_(expand(draw.bias, rows, columns).exp_())
        if self.inversion_chance:
            image = torch.where(draw.invert[:, None, None], 1 - image, image)
        return self.noise.apply(image[:, None], draw.noise).clamp_(0, 1)

    def _blur(self, image: Tensor, sd: Tensor) -> Tensor:
        """Gaussian smoothing of SD (B,) pixels, the image mirrored at its edges."""
        height, width = image.shape[1:]
        reach = math.ceil(6 * self.blur[1] * max(height, width)) + 2
        rows = smoothing_matrix(smoothing_kernel(sd, height))
        columns = rows if width == height else smoothing_matrix(smoothing_kernel(sd, width))
        return multiply_banded(rows, multiply_banded(columns, image.mT, reach).mT, reach)


def _check(labels: Tensor, draw: Draw) -> None:
    if labels.dtype != torch.int64:
        raise UserError(f"Label maps must be int64, but these are {labels.dtype}: convert them with .long().")
    if labels.ndim != 3:
        raise UserError(f"Label maps must be (B, H, W), but these are {tuple(labels.shape)}: add or drop axes.")
    if len(draw) != len(labels):
        raise UserError(f"This draw has {len(draw)} samples for {len(labels)} label maps: draw for this batch.")
    (low, high), classes = labels.aminmax(), draw.level.shape[1]
    if low < 0 or high >= classes:
        raise UserError(
            f"Label values must be 0 to {classes - 1}, but these run from {int(low)} to {int(high)}: remap them or "
            "draw for more classes."
        )
