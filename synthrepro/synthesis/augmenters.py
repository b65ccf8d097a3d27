"""Learnable augmenters: what Learn2Synth puts between the generator and the segmentation network.

Each draws first (``draw(images, generator)``, everything random, no graph) and is then a differentiable function of
its parameters (``forward(images, draw)``), so that a hypergradient can be taken through it, or replay it for finite
differences. None clips its output: clipping kills the gradient of every pixel it touches. Nor does any normalise:
whether intensities are normalised before or after is the caller's choice, and matters, since normalising after a
field removes part of it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from synthrepro.errors import UserError
from synthrepro.models import unet
from synthrepro.synthesis.draws import Draw, normal, pixel_generators, seeds, spawn, uniform
from synthrepro.synthesis.fields import bspline_weights, cell_positions, expand, linear_weights
from synthrepro.training import seeded


def _initial(values: Sequence[float] | None, count: int, generator: torch.Generator | None) -> Tensor:
    """The start given, or U(0, 1) as in the released code: (count,)."""
    if values is not None:
        return torch.tensor(values, dtype=torch.float32)
    if generator is None:
        raise UserError("A learnable augmenter needs its initial values or a generator to draw them from: give one.")
    return torch.rand(count, generator=generator)


class GaussianNoise(nn.Module):
    """Additive Gaussian noise of learnable SD: x + sigma eps, eps ~ N(0, 1) a pixel (paper, parametric model).

    The sign of sigma is not identifiable, since eps and -eps are equally likely: read :attr:`magnitude`.

    Args:
        mode: ``"fixed"``: one sigma for all images. ``"modulated"``: sigma s, with s ~ N(0, 1) an image (the paper's
            randomly modulated variant). ``"range"``: sigma ~ U(low, high) an image, both ends learnable, written as
            low + (high - low) u with u ~ U(0, 1) so that it is differentiable (released
            ``train_gaussian_vary_vary_bias.py``, which draws one u a batch).
        sigma: Initial value(s), in units of intensity: one, or (low, high) for ``"range"``. Default U(0, 1) each from
            `generator`, as released.

    Raises:
        UserError: Neither `sigma` nor `generator` given, or `sigma` of the wrong length.
    """

    def __init__(
        self,
        mode: Literal["fixed", "modulated", "range"] = "fixed",
        sigma: float | tuple[float, float] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        count = {"fixed": 1, "modulated": 1, "range": 2}.get(mode)
        if count is None:
            raise UserError(f"Noise mode {mode!r} is unknown: take 'fixed', 'modulated' or 'range'.")
        values = (sigma,) if isinstance(sigma, int | float) else sigma
        initial = _initial(values, count, generator)
        if len(initial) != count:
            raise UserError(f"Noise mode {mode!r} has {count} parameter(s), but sigma gives {len(initial)}.")
        self.mode = mode
        self.sigma = nn.Parameter(initial)  # (1,), or (2,): low and high

    @property
    def magnitude(self) -> Tensor:
        """Absolute value of sigma, a scalar; for ``"range"`` (2,), the smaller first."""
        magnitude = self.sigma.detach().abs()
        return magnitude.sort().values if self.mode == "range" else magnitude[0]

    def draw(self, images: Tensor, generator: torch.Generator) -> Draw:
        """``eps`` as the images, ``modulation`` (B,): s or u of the mode, 1 for ``"fixed"``."""
        return self._draw(images, spawn(len(images), generator))

    def _draw(self, images: Tensor, samples: list[torch.Generator]) -> Draw:
        modulation = torch.ones(len(images))
        if self.mode == "modulated":
            modulation = normal(samples)
        if self.mode == "range":
            modulation = uniform(samples, ())
        eps = normal(pixel_generators(seeds(samples), images.device), tuple(images.shape[1:]))
        return Draw(eps=eps.to(images.dtype), modulation=modulation.to(images))

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Noisy images, (B, C, H, W), not clipped."""
        if self.mode == "range":
            sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * draw.modulation
        else:
            sigma = self.sigma * draw.modulation
        return images + sigma[:, None, None, None] * draw.eps


class IntensityNonUniformity(nn.Module):
    """Multiplicative field of learnable exponents: x prod_k alpha_k^c_k (paper, parametric model).

    The alpha_k are random positive fields of rising spatial frequency: control points U(0.5, 2) on grids of 2 x 2,
    4 x 4, 8 x 8, ... (released code). The exponents are c = sigmoid(w), w initially U(0, 1), so that they start
    between 0.5 and 0.73.

    Args:
        fields: Number of fields; the paper's K is 3 (low, middle, high).
        basis: ``"bspline"``, as the paper writes, or ``"bilinear"``, as its code does. A B-spline smooths its control
            points, so that the same exponent gives a weaker field.
        exponents: Initial exponents, [0, 1]; 0 and 1 are possible but have no gradient. Default as released, from
            `generator`.
        shared: One set of fields for all images of a batch, as released; else one an image.

    Raises:
        UserError: Neither `exponents` nor `generator` given, or `exponents` not `fields` numbers in [0, 1].
    """

    def __init__(
        self,
        fields: int = 3,
        basis: Literal["bspline", "bilinear"] = "bspline",
        *,
        exponents: Sequence[float] | None = None,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if basis not in ("bspline", "bilinear"):
            raise UserError(f"Basis {basis!r} is unknown: take 'bspline' or 'bilinear'.")
        if exponents is not None and (len(exponents) != fields or not all(0 <= c <= 1 for c in exponents)):
            raise UserError(f"Exponents must be {fields} numbers from 0 to 1, but they are {tuple(exponents)}.")
        initial = _initial(exponents, fields, generator)
        self.weights = nn.Parameter(initial if exponents is None else initial.logit())
        self.basis = basis
        self.shared = shared

    @property
    def exponents(self) -> Tensor:
        """c = sigmoid(w), (fields,), lowest frequency first."""
        return self.weights.sigmoid()

    def draw(self, images: Tensor, generator: torch.Generator) -> Draw:
        """``log_fields`` (B, fields, H, W), logarithms of the alpha_k."""
        return self._draw(images, spawn(len(images), generator))

    def _draw(self, images: Tensor, samples: list[torch.Generator]) -> Draw:
        if self.shared:
            samples = samples[:1]
        weights = {"bspline": bspline_weights, "bilinear": linear_weights}[self.basis]
        fields = []
        for k in range(len(self.weights)):
            nodes = 2 ** (k + 1)
            controls = uniform(samples, (nodes, nodes), (0.5, 2.0)).to(images.device)
            rows, columns = (
                weights(cell_positions(size, nodes), nodes).to(images.device) for size in images.shape[-2:]
            )
            fields.append(expand(controls, rows, columns))
        log_fields = torch.stack(fields, 1).log().to(images.dtype)
        return Draw(log_fields=log_fields.expand(len(images), -1, -1, -1))

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Images times the field, (B, C, H, W), not clipped."""
        return images * torch.einsum("k,bkhw->bhw", self.exponents, draw.log_fields).exp()[:, None]


class Parametric(nn.Module):
    """Intensity non-uniformity, then noise: x prod_k alpha_k^c_k + sigma eps (paper, parametric model).

    Args:
        field: The field; None for noise alone.
        noise: The noise; None for the field alone.
        residual: Add the input once more, giving x field + sigma eps + x. Released scripts default to
            ``synth_residual=True``, which makes noise alone 2 x + sigma eps; their published noise levels suggest
            that runs had it off.
    """

    def __init__(
        self,
        field: IntensityNonUniformity | None = None,
        noise: GaussianNoise | None = None,
        *,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.field = field
        self.noise = noise
        self.residual = residual

    def draw(self, images: Tensor, generator: torch.Generator) -> Draw:
        """``field`` and ``noise``, the draws of the parts there are."""
        samples = spawn(len(images), generator)  # one a sample for both parts
        parts = {"field": self.field, "noise": self.noise}
        return Draw(**{name: part._draw(images, samples) for name, part in parts.items() if part is not None})

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Augmented images, (B, C, H, W), not clipped."""
        augmented = images
        if self.field is not None:
            augmented = self.field(augmented, draw.field)
        if self.noise is not None:
            augmented = self.noise(augmented, draw.noise)
        return augmented + images if self.residual else augmented


class Nonparametric(nn.Module):
    """A UNet's residual: x + A([x, xi]), xi ~ N(0, 1) a pixel (paper, nonparametric model).

    No normalisation and ELU, as released, so that it can be differentiated twice.

    Args:
        generator: Of the network's initial weights, and of the released variant's sigma.
        channels: Of the image.
        features: Channels of each level; one level is one 3 x 3 convolution and an ELU. The paper does not say;
            released scripts have one level of 16.
        released: The released code's variant: the network sees no noise channel, and x + A(x) + sigma eps with a
            learnable sigma follows.
    """

    def __init__(
        self,
        generator: torch.Generator,
        *,
        channels: int = 1,
        features: Sequence[int] = (16,),
        released: bool = False,
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(features) - 1)
        inputs = channels if released else channels + 1

        def build() -> nn.Module:
            if len(features) > 1:
                return unet(inputs, channels, features, norm=None)
            hidden = Convolution(2, inputs, features[0], act="ELU", norm=None)
            return nn.Sequential(hidden, Convolution(2, features[0], channels, conv_only=True))

        self.network = seeded(build, generator)
        self.noise = GaussianNoise(generator=generator) if released else None

    def draw(self, images: Tensor, generator: torch.Generator) -> Draw:
        """``xi`` (B, 1, H, W); the released variant's is that of :class:`GaussianNoise`."""
        if self.noise is not None:
            return self.noise.draw(images, generator)
        pixels = pixel_generators(seeds(spawn(len(images), generator)), images.device)
        return Draw(xi=normal(pixels, (1, *images.shape[-2:])).to(images.dtype))

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Augmented images, (B, C, H, W), not clipped.

        Raises:
            UserError: H or W is not a multiple of 2 ** (levels - 1).
        """
        if any(size % self.stride for size in images.shape[-2:]):
            raise UserError(f"Images of {tuple(images.shape[-2:])} need sides divisible by {self.stride}: pad them.")
        if self.noise is not None:
            return self.noise(images + self.network(images), draw)
        return images + self.network(torch.cat([images, draw.xi], 1))
