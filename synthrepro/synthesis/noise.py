"""Noise of medical images, after SynthFM's noise library: Gaussian, Poisson, Perlin, speckle and Rician.

SynthFM (Sengupta et al., arXiv 2504.08177) names these five kinds and published no code and no numbers: the formulas
are the textbook ones stated here, and every range is ours. Lengths are fractions of the image's side, the longer one
if it is not square, so that the same draw can be applied at any size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, normal, pixel_generators, seeds, spawn, uniform
from synthrepro.synthesis.fields import gaussian_transfer, pick

Range = tuple[float, float]
OFF: Range = (0.0, 0.0)
KINDS = ("gaussian", "poisson", "perlin", "speckle", "rician")
OCTAVES, PERSISTENCE = 3, 0.5  # of Perlin noise: each octave has half the spacing and half the amplitude of the last
FADE = Polynomial([1, 0, 0, -10, 15, -6])  # weight of a lattice point at a distance of 0 to 1 cells
RAYLEIGH_MEAN = math.sqrt(math.pi / 2)  # of the modulus of two independent standard normal numbers

Generators = list[torch.Generator]
Settings = TypeVar("Settings", bound=Any)  # a frozen dataclass with the limits of its ranges


class Limits(NamedTuple):
    """What a range may be: its admissible bounds, and whether it is drawn log-uniformly rather than uniformly."""

    low: float = 0.0
    high: float = math.inf
    log: bool = False


def scale_range(values: Range, factor: float, limits: Limits) -> Range:
    """A range made `factor` times as wide about its middle, of the logarithm if drawn so, and clipped to its limits."""
    low, high = values
    more = (factor - 1) / 2
    if limits.log:
        ratio = (high / low) ** more
        return max(low / ratio, limits.low), min(high * ratio, limits.high)
    width = high - low
    return max(low - more * width, limits.low), min(high + more * width, limits.high)


def scale_ranges(settings: Settings, factor: float) -> Settings:
    """Settings, a dataclass with its ranges' ``limits``, with every range through :func:`scale_range`.

    Raises:
        UserError: The factor is not positive.
    """
    if not factor > 0:
        raise UserError(f"Ranges cannot be scaled by {factor}: take a positive factor.")
    ranges = settings.limits.items()
    return replace(settings, **{name: scale_range(getattr(settings, name), factor, limits) for name, limits in ranges})


def check_ranges(settings: Any) -> None:
    """Check every range of settings.

    Raises:
        UserError: A range is upside down, not finite or beyond its limits.
    """
    for name, limits in settings.limits.items():
        low, high = getattr(settings, name)
        if not limits.low <= low <= high <= limits.high or math.isinf(high):
            raise UserError(
                f"{type(settings).__name__}.{name} is ({low}, {high}): give two finite numbers, the smaller first, "
                f"from {limits.low} to {limits.high}."
            )


def draw_range(settings: Any, name: str, samples: Generators, shape: tuple[int, ...] = ()) -> Tensor:
    """Numbers from a range of settings, uniform or log-uniform as its limits say: (B, *shape)."""
    low, high = getattr(settings, name)
    if settings.limits[name].log:
        return uniform(samples, shape, (math.log(low), math.log(high))).exp_()
    return uniform(samples, shape, (low, high))


def gaussian(image: Tensor, sd: Tensor, generators: Generators) -> Tensor:
    """Additive Gaussian noise: y = x + sd n, n ~ N(0, 1) at every pixel. Mean x, variance sd^2.

    Args:
        image: (B, 1, H, W).
        sd: (B,), in units of the image's range; 0 is the identity.
        generators: One a sample, on the image's device.

    Returns:
        (B, 1, H, W), not clipped.
    """
    return _column(sd) * normal(generators, image.shape[1:]) + image


def poisson(image: Tensor, photons: Tensor, generators: Generators) -> Tensor:
    """Counting noise: y = N / photons, N ~ Poisson(photons x). Mean x, variance x / photons.

    Args:
        image: (B, 1, H, W), at least 0.
        photons: (B,), counts at intensity 1; infinitely many are the identity.
        generators: One a sample, on the image's device.

    Returns:
        (B, 1, H, W), not clipped.
    """
    finite = photons.isfinite()
    photons = torch.where(finite, photons, 1.0)
    rates = _column(photons) * image
    counts = torch.stack([torch.poisson(rate, generator=g) for rate, g in zip(rates, generators, strict=True)])
    return torch.where(_column(finite), counts / _column(photons), image)


def gradient_noise(angles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One octave of gradient noise (Perlin, An image synthesizer, SIGGRAPH 1985).

    A unit gradient stands on each lattice point p; the noise at z is the sum over the four corners of z's cell of
    f(|y|) f(|x|) gradient . (y, x), with (y, x) = z - p and f(t) = 1 - 10 t^3 + 15 t^4 - 6 t^5, the quintic of Perlin,
    Improving noise, SIGGRAPH 2002, in place of the cubic of 1985. It is 0 on the lattice, has mean 0 everywhere, and
    is uncorrelated from two cells on. As f is a product, an axis can be done after the other.

    Args:
        angles: (B, n, m), directions of the gradients, radians from the rows' axis.
        rows: (B, H) positions from 0 to below n - 1; columns: (B, W) positions from 0 to below m - 1.

    Returns:
        (B, H, W); over uniform angles and positions its SD is :func:`gradient_sd`.
    """
    tables = torch.stack([angles.sin(), angles.cos()]).mT  # (2, B, m, n)
    along = tables.new_zeros(2, len(angles), columns.shape[1], angles.shape[1])  # (2, B, W, n)
    for node, weight, slope in _corners(columns):
        along[0].addcmul_(slope[..., None], pick(tables[0], node))
        along[1].addcmul_(weight[..., None], pick(tables[1], node))
    along = along.mT.contiguous()  # (2, B, n, W)
    result = along.new_zeros(len(angles), rows.shape[1], columns.shape[1])
    for node, weight, slope in _corners(rows):
        result.addcmul_(weight[..., None], pick(along[0], node))
        result.addcmul_(slope[..., None], pick(along[1], node))
    return result


def _corners(positions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The lattice points before and after each position, with f(|t|) and t f(|t|) of the distance t from them."""
    before = positions.floor()
    for corner in (0, 1):
        t = positions - before - corner
        near = t.abs()
        weight = 1 - near**3 * (10 + near * (6 * near - 15))
        yield before.long() + corner, weight, weight * t


def gradient_sd() -> float:
    """SD of :func:`gradient_noise`: its square is 4 A B, A and B the integrals of f(t)^2 and of t^2 f(t)^2 over (0, 1).

    Each of the four corners contributes f(y)^2 f(x)^2 (y^2 + x^2) / 2, averaged over the cell.
    """
    return 2 * math.sqrt((FADE**2).integ()(1) * (Polynomial([0, 1]) ** 2 * FADE**2).integ()(1))


def perlin_field(
    spacing: Tensor,
    size: tuple[int, int],
    generators: Generators,
    octaves: int = OCTAVES,
    persistence: float = PERSISTENCE,
) -> Tensor:
    """Perlin noise of mean 0 and SD 1: octave k = 0, 1, ... has spacing / 2^k and amplitude persistence^k.

    Every octave's lattice lies at a random offset, so that their zeros do not coincide and mean and SD are the same at
    every pixel. They are those over draws: a field with few cells has a mean and an SD of its own.

    Args:
        spacing: (B,), of the coarsest lattice, fraction of the longer side.
        size: (H, W).
        generators: One a sample, on the spacing's device.

    Returns:
        (B, H, W).
    """
    result = spacing.new_zeros(len(spacing), *size)
    pixels = [(torch.arange(s, device=spacing.device) + 0.5) / max(size) for s in size]
    coarsest = spacing.tolist()
    for k in range(octaves):
        nodes = [math.ceil(2**k / s) + 2 for s in coarsest]  # at any offset
        offsets, angles = spacing.new_empty(len(spacing), 2), spacing.new_zeros(len(spacing), max(nodes), max(nodes))
        for i, (n, g) in enumerate(zip(nodes, generators, strict=True)):
            offsets[i] = torch.rand(2, generator=g, device=g.device)
            angles[i, :n, :n] = torch.rand((n, n), generator=g, device=g.device)
        rows, columns = (pixels[a] * (2**k / spacing[:, None]) + offsets[:, a, None] for a in (0, 1))
        result.add_(gradient_noise(angles.mul_(2 * torch.pi), rows, columns), alpha=persistence**k)
    return result.div_(gradient_sd() * math.sqrt(sum(persistence ** (2 * k) for k in range(octaves))))


def perlin(image: Tensor, sd: Tensor, spacing: Tensor, generators: Generators) -> Tensor:
    """Additive Perlin noise: y = x + sd p, p of mean 0 and SD 1 from :func:`perlin_field`, three octaves.

    Args:
        image: (B, 1, H, W).
        sd: (B,), in units of the image's range; 0 is the identity.
        spacing: (B,), of the coarsest lattice, fraction of the longer side.
        generators: One a sample, on the image's device.

    Returns:
        (B, 1, H, W), not clipped.
    """
    return _column(sd) * perlin_field(spacing, (image.shape[2], image.shape[3]), generators)[:, None] + image


def rayleigh_field(grain: Tensor, size: tuple[int, int], generators: Generators) -> Tensor:
    """Envelope of fully developed speckle: r = |n1 + i n2| sqrt(2 / pi), Rayleigh of mean 1 and variance 4 / pi - 1.

    n1 and n2 are white noise smoothed by a Gaussian of SD `grain`, on a periodic image, and brought back to variance
    1, so that r stays Rayleigh at every pixel; at a distance d their correlation is exp(-d^2 / (4 grain^2)), and that
    of r^2 the square of this.

    Args:
        grain: (B,), fraction of the longer side; at 0, pixels are independent.
        size: (H, W).
        generators: One a sample, on the grain's device.

    Returns:
        (B, H, W).
    """
    spectrum = torch.view_as_complex(normal(generators, (*size, 2)))  # the spectrum of white noise is white noise
    for axis, pixels in zip((1, 2), size, strict=True):
        frequencies = torch.fft.fftfreq(pixels, device=grain.device) * (2 * torch.pi)
        transfer = gaussian_transfer(grain * max(size), frequencies)  # (B, pixels)
        transfer = transfer / transfer.square().mean(1, keepdim=True).sqrt()
        spectrum.mul_(transfer.unsqueeze(3 - axis))
    return torch.fft.ifft2(spectrum, norm="ortho").abs().div_(RAYLEIGH_MEAN)


def speckle(image: Tensor, strength: Tensor, grain: Tensor, generators: Generators) -> Tensor:
    """Multiplicative noise of ultrasound: y = x (1 - s + s r), r Rayleigh of mean 1 from :func:`rayleigh_field`.

    Mean x, variance x^2 s^2 (4 / pi - 1).

    Args:
        image: (B, 1, H, W).
        strength: (B,), s in [0, 1]; 0 is the identity, 1 fully developed speckle.
        grain: (B,), fraction of the longer side.
        generators: One a sample, on the image's device.

    Returns:
        (B, 1, H, W), not clipped.
    """
    r = rayleigh_field(grain, (image.shape[2], image.shape[3]), generators)[:, None]
    return image * (r.sub_(1).mul_(_column(strength)).add_(1))


def rician(image: Tensor, sd: Tensor, generators: Generators) -> Tensor:
    """Noise of magnitude MR images: y = |x + sd n1 + i sd n2| = sqrt((x + sd n1)^2 + (sd n2)^2), n ~ N(0, 1).

    y follows Rice's distribution: E y^2 = x^2 + 2 sd^2; where x is 0, Rayleigh's.

    Args:
        image: (B, 1, H, W), at least 0.
        sd: (B,), in units of the image's range; 0 is the identity.
        generators: One a sample, on the image's device.

    Returns:
        (B, 1, H, W), not clipped.
    """
    n = normal(generators, (2, *image.shape[1:])).mul_(_column(sd)[:, None])
    return torch.hypot(image + n[:, 0], n[:, 1])


def _column(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values[:, None, None, None]


APPLY: dict[str, Callable[[Tensor, Draw, Generators], Tensor]] = {
    "gaussian": lambda images, draw, pixels: gaussian(images, draw.gaussian_sd, pixels),
    "poisson": lambda images, draw, pixels: poisson(images, draw.poisson_photons, pixels),
    "perlin": lambda images, draw, pixels: perlin(images, draw.perlin_sd, draw.perlin_spacing, pixels),
    "speckle": lambda images, draw, pixels: speckle(images, draw.speckle, draw.speckle_grain, pixels),
    "rician": lambda images, draw, pixels: rician(images, draw.rician_sd, pixels),
}


@dataclass(frozen=True)
class Noise:
    """One kind of noise an image, each kind as likely: ranges of its parameters.

    The five kinds are the paper's; every number is ours. A pair is the bounds of a uniform or, where it says so, a
    log-uniform distribution. Widening one range changes no other parameter's draw.
    """

    kinds: tuple[str, ...] = KINDS
    """Of :data:`KINDS`, without order; with none, images stay as they are."""
    gaussian_sd: Range = (0.0, 0.1)
    """In units of the image's range."""
    poisson_photons: Range = (30.0, 3000.0)
    """Counts at intensity 1, log-uniform."""
    perlin_sd: Range = (0.0, 0.1)
    """In units of the image's range."""
    perlin_spacing: Range = (0.02, 0.2)
    """Of the coarsest lattice, fraction of the side, log-uniform."""
    speckle: Range = (0.2, 0.8)
    """Share s of the speckle, [0, 1]."""
    speckle_grain: Range = (0.0, 0.004)
    """SD of the smoothing of the complex field, fraction of the side."""
    rician_sd: Range = (0.0, 0.1)
    """In units of the image's range."""

    limits: ClassVar[dict[str, Limits]] = {
        "gaussian_sd": Limits(),
        "poisson_photons": Limits(1.0, 1000000.0, log=True),
        "perlin_sd": Limits(),
        "perlin_spacing": Limits(0.01, 1.0, log=True),
        "speckle": Limits(0.0, 1.0),
        "speckle_grain": Limits(0.0, 0.05),
        "rician_sd": Limits(),
    }
    """What each range may be, and those that are log-uniform."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise UserError(f"Noise of kind {unknown[0]!r} is unknown: take some of {', '.join(KINDS)}.")
        check_ranges(self)

    def scaled(self, factor: float) -> Self:
        """Every range `factor` times as wide, see :func:`scale_range`; the kinds stay."""
        return scale_ranges(self, factor)

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw the noise of `count` images.

        Args:
            generator: On the CPU; one number a sample is taken from it.

        Returns:
            On the CPU, (B,) each: ``kind``, index in :data:`KINDS`, -1 for none; every range by its name, whether the
            kind uses it or not; ``seed`` of the pixel noise.

        Raises:
            UserError: The generator is not on the CPU.
        """
        return self.draw_from(spawn(count, generator))

    def draw_from(self, samples: Generators) -> Draw:
        """As :meth:`draw`, from each sample's own generator: for generators that noise is a part of."""
        drawn = {name: draw_range(self, name, samples) for name in self.limits}
        choice = uniform(samples, ())
        index = torch.tensor(sorted(KINDS.index(kind) for kind in set(self.kinds)) or [-1])
        kind = index[(choice * len(index)).long().clamp_max(len(index) - 1)]
        return Draw(kind=kind, **drawn, seed=seeds(samples))

    @torch.no_grad()
    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """The images with the noise of a draw.

        Args:
            images: (B, 1, H, W), float32, at least 0.
            draw: From :meth:`draw`.

        Returns:
            (B, 1, H, W), not clipped.

        Raises:
            UserError: There are not as many images as the draw has samples.
        """
        if len(images) != len(draw):
            raise UserError(f"This draw has {len(draw)} samples for {len(images)} images: draw for this batch.")
        kinds = draw.kind.tolist()
        draw = draw.to(images.device)
        result = images.clone()
        for rows in _groups(kinds, images.device):
            if kinds[rows[0]] < 0:
                continue
            index = torch.tensor(rows, device=images.device)
            part = Draw(**{name: value[index] for name, value in vars(draw).items()})
            pixels = pixel_generators(part.seed, images.device)
            result[index] = APPLY[KINDS[kinds[rows[0]]]](images[index], part, pixels)
        return result


def _groups(kinds: list[int], device: torch.device) -> list[list[int]]:
    """Rows of one kind together; on a CPU every row by itself.

    One sample's fields stay in the CPU's cache, and its bits then do not depend on its batch.
    """
    if device.type == "cpu":
        return [[i] for i in range(len(kinds))]
    return [[i for i, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds))]
