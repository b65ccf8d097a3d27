"""Strong augmentation of real intensities: a random curve, a bias field and noise, for a supervised network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, normal, pixel_generators, seeds, spawn, uniform
from synthrepro.synthesis.fields import corner_positions, expand, linear_weights

Range = tuple[float, float]


@dataclass(frozen=True)
class IntensityRemap:
    """Ranges from which the augmentation of a real image is drawn, in the order of the stages; no shape is changed.

    The control to synthesis: if any random contrast will do, remapped real images should train as contrast-agnostic
    a network as synthetic ones. In the line of Models Genesis (Zhou et al., Medical Image Analysis 2021: monotone
    Bezier curves, half of them falling), nnU-Net (gamma, brightness and contrast, noise; Isensee et al., Nature
    Methods 2021) and the causality-inspired augmentation of Ouyang et al. (IEEE TMI 2022: random shallow convolutions
    of the whole image). Differences: curves are piecewise linear, and not all monotone; a curve is of one pixel's
    intensity, where a random convolution also mixes neighbours; there is no gamma, which a curve includes.

    A pair is the bounds of a uniform distribution. All curves map [0, 1] onto [0, 1].
    """

    increasing: float = 0.4
    """Share of curves whose control values are sorted: brighter stays brighter."""
    decreasing: float = 0.2
    """Share sorted downwards: an inverted contrast. The rest are independent values in any order, which are monotone
    by chance in 2 of n! curves of n control points."""
    knots: tuple[int, int] = (4, 8)
    """Fewest and most control points of a curve, at equal distances; their values are U(0, 1), then stretched."""
    bias: Range = (0.0, 0.5)
    """SD of the logarithm of the bias field at its control points."""
    bias_nodes: int = 4
    """Bias control points along an axis, the outer ones on the image's edges; between them the logarithm is linear."""
    noise: Range = (0.0, 0.1)
    """SD of Gaussian noise, in units of the image's largest intensity."""
    keep_background: bool = True
    """Whether pixels that are exactly 0 stay 0 (a masked background). A noisy background is remapped as tissue is."""

    def __post_init__(self) -> None:
        if min(self.increasing, self.decreasing) < 0 or self.increasing + self.decreasing > 1:
            raise UserError(
                f"Shares of increasing ({self.increasing}) and decreasing ({self.decreasing}) curves must be at least "
                "0 and add up to at most 1."
            )
        if not 2 <= self.knots[0] <= self.knots[1]:
            raise UserError(f"Knots must be (fewest, most), at least 2, but they are {self.knots}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """:meth:`draw`, then :meth:`apply`."""
        return self.apply(images, self.draw(images, generator))

    def draw(self, images: Tensor, generator: torch.Generator) -> Draw:
        """Draw one augmentation an image.

        Args:
            images: (B, C, H, W); only their number and device count.
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the images' device: ``knots`` (B,), how many control points are used; ``curve`` (B, most) their values,
            [0, 1], those not used 0; ``bias`` (B, n, n) logarithms; ``noise`` (B,) SDs; ``seed`` (B,) of the noise.

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples = spawn(len(images), generator)
        fewest, most = self.knots
        knots = uniform(samples, (), (fewest, most + 1)).floor().clamp_max(most).long()
        unused = torch.arange(most) >= knots[:, None]
        values, chance = uniform(samples, (most,)), uniform(samples, (1,))
        rising = values.masked_fill(unused, torch.inf).sort(1).values
        lowest, highest = rising[:, :1], rising.gather(1, knots[:, None] - 1)
        falling = lowest + highest - rising
        values = torch.where(chance < self.increasing + self.decreasing, falling, values)
        values = torch.where(chance < self.increasing, rising, values)
        curve = ((values - lowest) / (highest - lowest).clamp_min(1e-6)).masked_fill(unused, 0).clamp(0, 1)
        sd = uniform(samples, (1, 1), self.bias)
        return Draw(
            knots=knots,
            curve=curve,
            bias=sd * normal(samples, (self.bias_nodes, self.bias_nodes)),
            noise=uniform(samples, (), self.noise),
            seed=seeds(samples),
        ).to(images.device)

    @torch.no_grad()
    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """The augmented images of a draw.

        The curve, then the field; then the largest intensity of the image becomes 1 (0 stays 0, so that a dark tissue
        is not merged with the background), then noise, clipped to [0, 1].

        Args:
            images: (B, C, H, W), [0, 1]; all channels of an image share its curve and field.
            draw: From :meth:`draw`, on the same device.

        Returns:
            (B, C, H, W), [0, 1].

        Raises:
            UserError: There are not as many images as the draw has samples.
        """
        if len(draw) != len(images):
            raise UserError(f"This draw has {len(draw)} samples for {len(images)} images: draw for this batch.")
        remapped = remap(images, draw.curve, draw.knots)
        remapped = remapped * log_field(draw.bias, images.shape[-2:]).exp()[:, None]
        if self.keep_background:
            remapped = torch.where(images == 0, 0.0, remapped)
        remapped = remapped / remapped.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
        noise = normal(pixel_generators(draw.seed, images.device), tuple(images.shape[1:]))
        augmented = (remapped + draw.noise[:, None, None, None] * noise).clamp(0, 1)
        return torch.where(images == 0, 0.0, augmented) if self.keep_background else augmented


def remap(images: Tensor, curve: Tensor, knots: Tensor) -> Tensor:
    """Intensities through a piecewise linear curve of each image.

    Args:
        images: (B, C, H, W), [0, 1], clipped to it.
        curve: (B, n) values at equal distances from 0 to 1, of which the first knots (B,) are used.
    """
    last = (knots - 1)[:, None]
    position = images.clamp(0, 1).flatten(1) * last  # (B, C H W)
    left = position.floor().minimum(last - 1).long()
    values = curve.gather(1, left).lerp(curve.gather(1, left + 1), position - left)
    return values.reshape(images.shape)


def log_field(controls: Tensor, size: torch.Size) -> Tensor:
    """Logarithm of the field, (B, H, W), linear between control points (B, n, n)."""
    nodes = controls.shape[-1]
    rows, columns = (linear_weights(corner_positions(s, controls.new_tensor([nodes])), nodes) for s in size)
    return expand(controls, rows, columns)
