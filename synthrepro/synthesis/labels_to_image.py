"""Label map -> image by domain randomisation, after SynthSeg and the generator Learn2Synth uses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.deformation import (
    affine_matrix,
    integrate,
    separable_positions,
    warp,
)
from synthrepro.synthesis.draws import Draw, normal, pixel_generators, seeds, spawn, uniform
from synthrepro.synthesis.fields import (
    corner_positions,
    expand,
    linear_weights,
    multiply_banded,
    pick,
    resampling_matrix,
    smooth_textures,
    smoothing_kernel,
    smoothing_matrix,
    texture_factors,
)

Range = tuple[float, float]
OFF: Range = (0.0, 0.0)
QUANTILE_PIXELS = 10_000  # quantiles are of about as many pixels, on a regular grid (cornucopia: at random)
FWHM = math.sqrt(8 * math.log(2))  # full width at half maximum of a Gaussian, in SDs


@dataclass(frozen=True)
class LabelsToImage:
    """Ranges from which the parameters of a synthetic image are drawn, one field a stage, in the order of the stages.

    A pair is the bounds of a uniform distribution; a stage at (0, 0) is off. Widening one stage changes no other
    stage's draws. An image is drawn after its labels were deformed, so the two are aligned. (Learn2Synth's released
    ``DiffSynth`` gives the deformed labels with an intensity transform of the undeformed image.)
    """

    classes: int
    """Values of the label maps are 0 (background) to classes - 1."""
    generation_classes: tuple[int, ...] | None = None
    """Gaussian of each label value; labels with the same number share mean, SD and smoothing. None: one each."""

    translation: Range = OFF
    """Fraction of the field of view, rows and columns each."""
    rotation: Range = OFF
    """Degrees, about the centre."""
    shear: Range = OFF
    zoom: Range = OFF
    """Added to 1, rows and columns each."""
    displacement: Range = OFF
    """Elastic, first kind: largest displacement of a control point, fraction of the field of view."""
    displacement_nodes: tuple[int, int] = (2, 10)
    """Fewest and most control points along an axis; between them the displacement is linear."""
    velocity: Range = OFF
    """Elastic, second kind: SD of a stationary velocity, pixels, integrated to a diffeomorphism."""
    velocity_scale: float = 0.04
    """Velocity control points a pixel."""

    mean: Range = (0.0, 1.0)
    """Mean of each class's Gaussian."""
    sd: Range = (0.0, 0.05)
    """SD of each class's Gaussian."""
    texture_fwhm: Range = OFF
    """Smoothing of the noise within each class, full width at half maximum in pixels; it lowers the class's SD."""
    fill_background: bool = False
    """Whether label 0 has a Gaussian too; else it is 0 before noise."""
    bias: Range = OFF
    """SD of the logarithm of the bias field at its control points."""
    bias_scale: float = 0.025
    """Bias control points a pixel; between them the logarithm is linear."""
    clip: float = math.inf
    """Intensities are clipped to 0 and this, then stretched to [0, 1]."""
    gamma: float = 0.0
    """SD of the logarithm of the exponent that intensities are raised to."""
    blur_fwhm: Range = OFF
    """Full width at half maximum, pixels."""
    resolution: Range = (1.0, 1.0)
    """Low-resolution pixel, in pixels, along both axes (one image in ten)."""
    resolution_one_axis: Range = (1.0, 1.0)
    """Low-resolution pixel, in pixels, along one axis taken at random (the other images)."""
    noise: Range = OFF
    """SD of Gaussian noise, in units of the image's range."""
    quantiles: tuple[float, float] | None = None
    """Quantiles that become 0 and 1: the lower of all pixels, the upper of all but an unfilled background."""

    def __post_init__(self) -> None:
        if OFF not in (self.displacement, self.velocity):
            raise UserError("displacement and velocity are two kinds of elastic deformation: leave one at (0, 0).")
        if self.generation_classes is not None and len(self.generation_classes) != self.classes:
            raise UserError(
                f"generation_classes names {len(self.generation_classes)} Gaussians for {self.classes} label values: "
                "give one for each."
            )

    @classmethod
    def learn2synth(
        cls, classes: int, generation_classes: tuple[int, ...] | None = None, *, spacing: float = 1.0
    ) -> Self:
        """The generator of Learn2Synth's released scripts.

        That is ``SynthFromLabelTransform(order=1, resolution=False, snr=False, bias=False)`` of cornucopia, with the
        ranges that were its defaults at the time (cornucopia d8f91b7, June 2024): translation 0.1 of the field of
        view, rotation 15 degrees, shear 0.012, zoom 0.15; displacement up to U(0, 0.05) of the field of view at
        2 to 10 control points; class means U(0, 1), SDs U(0, 0.05), smoothing U(0, 10) FWHM, background 0; gamma
        LogNormal(0, 0.6); blur U(0, 3) FWHM; 1 % and 99 % quantiles.

        Differences from cornucopia: the displacement lives on the deformed image's frame; classes smooth one field of
        noise, each shifted on its own, on a periodic image; negative intensities are clipped, so the background is
        the minimum; and the stretch by quantiles. cornucopia takes both of the pixels that are not 0 and clips
        nothing, which sends the background below 0; clipping that to [0, 1] would give background and darkest class
        one intensity. So the lower quantile is of all pixels here: the background, if at least 1 % of the image.

        Args:
            spacing: Pixel in mm; cornucopia's widths are in voxels, and the authors' voxels are 1 mm.
        """
        return cls(
            classes,
            generation_classes,
            translation=(-0.1, 0.1),
            rotation=(-15.0, 15.0),
            shear=(-0.012, 0.012),
            zoom=(-0.15, 0.15),
            displacement=(0.0, 0.05),
            texture_fwhm=(0.0, 10.0 / spacing),
            gamma=0.6,
            blur_fwhm=(0.0, 3.0 / spacing),
            quantiles=(0.01, 0.99),
        )

    @classmethod
    def synthseg(cls, classes: int, generation_classes: tuple[int, ...] | None = None, *, spacing: float = 1.0) -> Self:
        """The generator of SynthSeg (Billot et al., Medical Image Analysis 2023), in two dimensions.

        Ranges of BBillot/SynthSeg at 66342c1: scaling 0.2, rotation 15 degrees, shear 0.012, no translation; velocity
        of SD U(0, 4) at 0.04 control points a voxel, integrated; class means U(25, 225) and SDs U(5, 25) of 255,
        background included; bias field exp(N(0, U(0, 0.7))) at 0.025 control points a voxel; clipped to 300 of 255,
        stretched from minimum to maximum, gamma exp(N(0, 0.5)); resolution, one image in twenty kept, one in ten up
        to 4 mm along both axes, the others up to 8 mm along one, with the blur of a slice thickness between the two
        resolutions.

        Differences from SynthSeg: the velocity is integrated every 4 pixels instead of every 2; no flip, which needs
        pairs of left and right labels; and no crop.

        Args:
            spacing: Pixel in mm; SynthSeg's voxels are 1 mm.
        """
        return cls(
            classes,
            generation_classes,
            rotation=(-15.0, 15.0),
            shear=(-0.012, 0.012),
            zoom=(-0.2, 0.2),
            velocity=(0.0, 4.0 / spacing),
            velocity_scale=0.04 * spacing,
            mean=(25 / 255, 225 / 255),
            sd=(5 / 255, 25 / 255),
            fill_background=True,
            bias=(0.0, 0.7),
            bias_scale=0.025 * spacing,
            clip=300 / 255,
            gamma=0.5,
            resolution=(1.0, max(4.0 / spacing, 1.0)),
            resolution_one_axis=(1.0, max(8.0 / spacing, 1.0)),
        )

    def __call__(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """:meth:`draw`, then :meth:`apply`."""
        return self.apply(labels, self.draw(labels, generator))

    def draw(self, labels: Tensor, generator: torch.Generator) -> Draw:
        """Draw the parameters of one image a label map.

        Args:
            labels: (B, H, W), int64, values 0 to classes - 1; only their shape and device count.
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the labels' device: ``affine`` (B, 2, 3), translation in fractions of the field of view;
            ``displacement`` (B, 2, n, n), same fractions; ``nodes`` (B, 2), how many of the n are used; ``velocity``
            (B, 2, h, w) pixels; ``mean``, ``sd``, ``texture_sd`` (pixels) (B, classes); ``texture_shift``
            (B, classes, 2) fractions of the image; ``bias`` (B, h', w') logarithms; ``gamma`` (B,) exponents;
            ``blur_sd`` and ``resolution`` (B, 2) pixels; ``noise`` (B,) SDs; ``seed`` (B,) of the pixel noise.

        Raises:
            UserError: The labels are not as above, or the generator is not on the CPU.
        """
        self._check(labels)
        size = labels.shape[1:]
        samples = spawn(len(labels), generator)

        def draws(shape: tuple[int, ...], bounds: Range) -> Tensor:
            return uniform(samples, shape, bounds)

        matrix = affine_matrix(draws((), self.rotation), draws((), self.shear), draws((2,), self.zoom))
        affine = torch.cat([matrix, draws((2, 1), self.translation)], -1)
        fewest, most = self.displacement_nodes
        nodes = draws((2,), (fewest, most + 1)).floor().clamp_max(most)
        amplitude = draws((), self.displacement)[:, None, None, None]
        displacement = amplitude * draws((2, most, most), (-1.0, 1.0))
        coarse = tuple(max(math.ceil(s * self.velocity_scale), 2) for s in size)
        velocity = draws((), self.velocity)[:, None, None, None] * normal(samples, (2, *coarse))

        gaussian = list(self.generation_classes or range(self.classes))
        count = max(gaussian) + 1
        mean, sd = draws((count,), self.mean)[:, gaussian], draws((count,), self.sd)[:, gaussian]
        texture_sd = draws((count,), self.texture_fwhm)[:, gaussian] / FWHM
        texture_shift = draws((self.classes, 2), (0.0, 1.0))
        if not self.fill_background:
            mean[:, 0] = sd[:, 0] = 0
        coarse = tuple(max(math.ceil(s * self.bias_scale), 2) for s in size)
        bias = draws((), self.bias)[:, None, None] * normal(samples, coarse)
        gamma = (self.gamma * normal(samples)).exp()
        blur_sd = draws((), self.blur_fwhm)[:, None].expand(-1, 2) / FWHM
        resolution, slice_sd = self._draw_resolution(samples)
        return Draw(
            affine=affine,
            displacement=displacement,
            nodes=nodes,
            velocity=velocity,
            mean=mean,
            sd=sd,
            texture_sd=texture_sd,
            texture_shift=texture_shift,
            bias=bias,
            gamma=gamma,
            blur_sd=blur_sd.hypot(slice_sd),
            resolution=resolution,
            noise=draws((), self.noise),
            seed=seeds(samples),
        ).to(labels.device)

    def _draw_resolution(self, samples: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Low-resolution pixel and SD of its slice profile, (B, 2) pixels each, as SynthSeg's SampleResolution."""
        both, one = uniform(samples, (2,), self.resolution), uniform(samples, (2,), self.resolution_one_axis)
        chance, axis = uniform(samples, (2, 1)), uniform(samples, (1,)) < 0.5
        one = torch.where(torch.cat([axis, ~axis], 1), one, 1.0)
        resolution = torch.where(chance[:, 0] < 0.1, both, one)
        resolution = torch.where(chance[:, 1] < 0.05, 1.0, resolution)
        thickness = 1 + uniform(samples, (2,)) * (resolution - 1)
        jitter = uniform(samples, (2,), (1 / 1.03, 1.03))
        if not self._resamples:
            return resolution, torch.zeros_like(resolution)
        return resolution, torch.where(resolution == 1, 0.5, 0.75 * thickness) * jitter

    @property
    def _resamples(self) -> bool:
        return max(self.resolution[1], self.resolution_one_axis[1]) > 1

    @torch.no_grad()
    def apply(self, labels: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The image and the label map of a draw.

        Args:
            labels: (B, H, W), int64, the label maps the draw was made for.
            draw: From :meth:`draw`, on the same device.

        Returns:
            Images (B, 1, H, W), float32, [0, 1], and deformed label maps (B, H, W), int64.

        Raises:
            UserError: The labels are not as :meth:`draw` wants them, or not as many as the draw has samples.
        """
        labels = self.deform(labels, draw)
        return self._draw_images(labels, draw), labels

    @torch.no_grad()
    def deform(self, labels: Tensor, draw: Draw) -> Tensor:
        """Deformed label maps (B, H, W); arguments and errors as :meth:`apply`."""
        self._check(labels, draw)
        return _each(warp, labels, self._positions(draw, labels.shape[1:]), torch.int64)

    @torch.no_grad()
    def intensities(self, labels: Tensor, draw: Draw) -> Tensor:
        """Images (B, 1, H, W) of label maps that are deformed already; arguments and errors as :meth:`apply`."""
        self._check(labels, draw)
        return self._draw_images(labels, draw)

    def _draw_images(self, labels: Tensor, draw: Draw) -> Tensor:
        return _each(self._intensities, labels, self._factors(draw, labels.shape[1:]), torch.float32)[:, None]

    def _positions(self, draw: Draw, size: torch.Size) -> Draw:
        fov = draw.affine.new_tensor(size)
        controls, nodes = draw.displacement * fov[:, None, None], draw.nodes
        if self.velocity != OFF:
            controls = integrate(draw.velocity, size)
            nodes = nodes.new_tensor(controls.shape[2:]).expand(len(nodes), -1)
        return separable_positions(draw.affine[..., :2], draw.affine[..., 2] * fov, controls, nodes, size)

    def _factors(self, draw: Draw, size: torch.Size) -> Draw:
        """The draw and the small tensors that images of this size need, made for the whole batch at once."""
        factors: dict[str, Tensor] = {}
        if self.texture_fwhm != OFF:
            first = 0 if self.fill_background else 1
            shift = (draw.texture_shift * draw.texture_shift.new_tensor(size)).floor()
            factors |= vars(texture_factors(draw.texture_sd[:, first:], shift[:, first:], size))
        if self.bias != OFF:
            for name, pixels, nodes in zip(("bias_rows", "bias_columns"), size, draw.bias.shape[1:], strict=True):
                factors[name] = linear_weights(
                    corner_positions(pixels, draw.gamma.new_full((len(draw),), nodes)), nodes
                )
        if self._resamples or self.blur_fwhm != OFF:
            factors["row_kernel"] = smoothing_kernel(draw.blur_sd[:, 0], size[0])
            factors["column_kernel"] = smoothing_kernel(draw.blur_sd[:, 1], size[1])
        return Draw(**vars(draw), **factors)

    def _intensities(self, labels: Tensor, draw: Draw) -> Tensor:
        pixels = pixel_generators(draw.seed, labels.device)
        image = self._mixture(labels, draw, pixels)  # (B, H, W), as everything below
        if self.bias != OFF:
            image = image.mul_(expand(draw.bias, draw.bias_rows, draw.bias_columns).exp_())
        image = image.clamp_(0, self.clip)
        image = _stretch(image, image.amin((1, 2)), image.amax((1, 2)))
        if self.gamma:
            image = image.pow_(draw.gamma[:, None, None])
        image = self._resample(image, draw)
        if self.noise != OFF:
            noise = normal(pixels, image.shape[1:])
            image = image.add_(noise.mul_(draw.noise[:, None, None]))
        if self.quantiles is not None:
            image = _stretch(image, *self._quantiles(image, labels))
        return image.clamp_(0, 1)

    def _mixture(self, labels: Tensor, draw: Draw, pixels: list[torch.Generator]) -> Tensor:
        """Gaussian mixture, the noise smoothed within each class if that stage is on."""
        noise = normal(pixels, labels.shape[1:])
        if self.texture_fwhm == OFF:
            return pick(draw.mean, labels).addcmul_(pick(draw.sd, labels), noise)
        first = 0 if self.fill_background else 1
        rows = _rows_of_classes(labels, self.classes)
        planes = noise.new_zeros(len(noise), self.classes, *noise.shape[1:])
        for k, texture in enumerate(smooth_textures(noise, draw, rows[first:]), first):
            planes[:, k, rows[k]] = texture.mul_(draw.sd[:, k, None, None]).add_(draw.mean[:, k, None, None])
        return planes.gather(1, labels[:, None])[:, 0]

    def _resample(self, image: Tensor, draw: Draw) -> Tensor:
        if not self._resamples and self.blur_fwhm == OFF:
            return image
        for axis, kernel in ((1, draw.column_kernel), (0, draw.row_kernel)):
            if self._resamples:
                matrix, reach = resampling_matrix(kernel, draw.resolution[:, axis]), image.shape[1 + axis]
            else:
                matrix, reach = smoothing_matrix(kernel), math.ceil(6 * self.blur_fwhm[1] / FWHM) + 2
            if axis == 1:
                image = multiply_banded(matrix, image.mT, reach).mT
            else:
                image = multiply_banded(matrix, image, reach)
        return image

    def _quantiles(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Intensities to become 0 and 1, (B,) each.

        The upper one is exceeded by as many pixels as are in the tail of those that have a Gaussian.
        """
        assert self.quantiles is not None
        stride = max(math.isqrt(image[0].numel() // QUANTILE_PIXELS), 1)
        pixels = image[:, ::stride, ::stride].flatten(1)
        count = pixels.shape[1]
        low = pixels.kthvalue(1 + int(self.quantiles[0] * (count - 1)), dim=1).values
        tail = 1 - self.quantiles[1]
        largest = pixels.topk(1 + int(tail * (count - 1)), dim=1).values  # (B, N), falling
        drawn = labels[:, ::stride, ::stride].count_nonzero((1, 2)) if not self.fill_background else count
        rank = (drawn * torch.full_like(low, tail)).long().clamp_max(largest.shape[1] - 1)
        return low, largest.gather(1, rank[:, None])[:, 0]

    def _check(self, labels: Tensor, draw: Draw | None = None) -> None:
        if labels.dtype != torch.int64:
            raise UserError(f"Label maps must be int64, but these are {labels.dtype}: convert them with .long().")
        if labels.ndim != 3:
            raise UserError(f"Label maps must be (B, H, W), but these are {tuple(labels.shape)}: add or drop axes.")
        if draw is not None and len(draw) != len(labels):
            raise UserError(f"This draw has {len(draw)} samples for {len(labels)} label maps: draw for this batch.")
        low, high = labels.aminmax()
        if low < 0 or high >= self.classes:
            raise UserError(
                f"Label values must be 0 to {self.classes - 1}, but these run from {int(low)} to {int(high)}: remap "
                "them or set classes."
            )


def _each(function: Callable[[Tensor, Draw], Tensor], labels: Tensor, draw: Draw, dtype: torch.dtype) -> Tensor:
    """Apply to the batch as a whole, on a CPU sample by sample.

    One sample's fields stay in the CPU's cache, a batch's do not; and its bits then do not depend on its batch.
    """
    if labels.device.type != "cpu":
        return function(labels, draw)
    result = torch.empty(labels.shape, dtype=dtype)
    for i in range(len(labels)):
        result[i : i + 1] = function(labels[i : i + 1], draw[i])
    return result


def _rows_of_classes(labels: Tensor, classes: int) -> list[slice]:
    """Rows that each class lies within, to save drawing the others; all rows on a GPU, where looking means waiting."""
    if labels.device.type != "cpu" or classes > 63:
        return [slice(None)] * classes
    present = np.bitwise_or.reduce(np.left_shift(1, labels.numpy()), axis=(0, 2))  # a bit a class, for every row
    ranges = (np.flatnonzero(present >> k & 1) for k in range(classes))
    return [slice(rows[0], rows[-1] + 1) if len(rows) else slice(1) for rows in ranges]


def _stretch(image: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map low and high, (B,), to 0 and 1, in place; a flat image becomes 0."""
    scale = 1 / (high - low).clamp_min(1e-6)
    return image.sub_(low[:, None, None]).mul_(scale[:, None, None])
