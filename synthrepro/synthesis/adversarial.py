"""Augmentation chosen against the network: noise, bias field, deformation and affine map by gradient ascent.

The idea of AdvChain (Chen et al., Enhancing MR image segmentation with realistic adversarial data augmentation,
Medical Image Analysis 2022), written anew; what it does is taken from its abstract and its software's documentation
and behaviour (cherise215/advchain, 2022). Its training step is ::

    reference = probabilities(network, images)  # what the network says of the clean images
    hard, hard_reference = adversarial_images(network, images, reference, consistency_loss, bounds, generator=generator)
    loss = soft_dice_loss(network(images), labels) + weight * consistency_loss(network(hard), hard_reference)

With label maps for `reference` and a segmentation loss for `consistency_loss` the same function gives supervised
adversarial training.

As there: the four transformations, the random start, one step of ascent by default, all parameters moved at once, and
during the ascent the network's answer is warped back to where the clean image has its target. Differences: the order
is always noise, bias, deformation, affine (theirs is drawn at random, and so is how many take part); bias field and
deformation are bounded point by point and step by the gradient's sign, as the affine map does there too (theirs are
bounded by a norm and step along the gradient, as the noise does in both); consistency is the mean squared distance of
the probabilities (they add half a contour loss, which compares edges); the loss that trains the network compares on the
deformed image, with the target deformed along, where theirs warps the answer back; and the ascent sees the network in
evaluation mode (theirs as it is, batch statistics not recorded), which for networks without dropout and batch
normalisation is the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis.deformation import affine_matrix, integrate
from synthrepro.synthesis.draws import Draw, normal, pixel_generators, seeds, spawn, uniform
from synthrepro.synthesis.fields import bspline_weights, cell_positions, expand

BIAS_NODES = 4  # control points of the log bias field along an axis
VELOCITY_SCALE = 1 / 16  # velocity control points a pixel


@dataclass(frozen=True)
class Bounds:
    """How far each transformation may go; 0 turns one off. Defaults are near those of AdvChain's software.

    Its noise is bounded by a norm of 1 over the image; 0.02 is that of an image of 50 x 50.
    """

    noise: float = 0.02
    """Root mean square of the additive noise of an image, units of intensity."""
    bias: float = 0.3
    """Logarithm of the multiplicative field."""
    velocity: float = 1.5
    """Stationary velocity, and so displacement along each axis, pixels."""
    rotation: float = 15.0
    """Degrees."""
    zoom: float = 0.2
    """Added to 1, rows and columns each."""
    translation: float = 0.05
    """Fraction of the field of view, rows and columns each."""


def adversarial_images(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    bounds: Bounds,
    steps: int = 1,
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Images that the network finds hard, and their targets: :func:`draw`, :func:`ascend`, :func:`transform`.

    A step costs one forward and one backward pass. The network is left as it was: gradients, modes and buffers.

    Args:
        network: Gives logits (B, K, H, W).
        images: (B, C, H, W), [0, 1].
        targets: What `loss` compares with: label maps (B, H, W), int64, or probabilities (B, K, H, W).
        loss: Of logits and targets, a scalar that is a mean over images.
        bounds: Of the transformations.
        steps: Of gradient ascent; 0 gives the random start.
        generator: On the CPU; one number a sample is taken from it.

    Returns:
        Images (B, C, H, W), [0, 1], and targets, deformed alike, without a graph.

    Raises:
        UserError: The generator is not on the CPU, or images and targets differ in number or size.
    """
    if len(images) != len(targets) or images.shape[-2:] != targets.shape[-2:]:
        raise UserError(
            f"Images {tuple(images.shape)} and targets {tuple(targets.shape)} must be as many and as large."
        )
    worst = ascend(network, images, targets, loss, draw(images, bounds, generator), bounds, steps)
    with torch.no_grad():
        return transform(images, worst).clamp(0, 1), deform(targets, worst)


def probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """Softmax of the network in evaluation mode, (B, K, H, W), no graph; the network is left as it was."""
    with _Frozen(network), torch.no_grad():
        return network(images).softmax(1)


def consistency_loss(logits: Tensor, reference: Tensor) -> Tensor:
    """Squared distance of the softmax of logits from reference probabilities, (B, K, H, W) both; a mean over pixels."""
    return (logits.softmax(1) - reference).square().sum(1).mean()


def draw(images: Tensor, bounds: Bounds, generator: torch.Generator) -> Draw:
    """The random start: noise on its sphere, all else uniform within its bounds.

    Returns:
        ``noise`` as the images; ``bias`` (B, n, n) logarithms; ``velocity`` (B, 2, h, w) pixels; ``rotation`` (B,)
        degrees; ``zoom`` (B, 2); ``translation`` (B, 2) fractions of the field of view.
    """
    samples = spawn(len(images), generator)
    coarse = tuple(max(math.ceil(s * VELOCITY_SCALE), 2) for s in images.shape[-2:])

    def draws(shape: tuple[int, ...], bound: float) -> Tensor:
        return uniform(samples, shape, (-bound, bound)).to(images)

    start = Draw(
        bias=draws((BIAS_NODES, BIAS_NODES), bounds.bias),
        velocity=draws((2, *coarse), bounds.velocity),
        rotation=draws((), bounds.rotation),
        zoom=draws((2,), bounds.zoom),
        translation=draws((2,), bounds.translation),
    )
    noise = normal(pixel_generators(seeds(samples), images.device), tuple(images.shape[1:])).to(images)
    return Draw(noise=bounds.noise * _unit(noise), **vars(start))


def transform(images: Tensor, draw: Draw) -> Tensor:
    """Noise, bias field, deformation and affine map of (B, C, H, W), bilinear, edge values beyond the edge.

    Differentiable in the draw and not clipped, which would kill the gradient of the background.
    """
    nodes = draw.bias.shape[-1]
    rows, columns = (bspline_weights(cell_positions(s, nodes), nodes).to(images) for s in images.shape[-2:])
    field = expand(draw.bias, rows, columns).exp()[:, None]  # (B, 1, H, W)
    return _look_up((images + draw.noise) * field, _forward(draw, images.shape[-2:]))


def deform(targets: Tensor, draw: Draw) -> Tensor:
    """Targets under the draw's deformation: label maps (B, H, W), nearest, or probabilities (B, K, H, W), bilinear."""
    positions = _forward(draw, targets.shape[-2:])
    if targets.ndim == 4:
        return _look_up(targets, positions)
    return _look_up(targets[:, None].to(positions.dtype), positions, "nearest")[:, 0].to(targets.dtype)


def undo(logits: Tensor, draw: Draw) -> Tensor:
    """Logits (B, K, H, W) of the deformed images, warped back to the clean ones.

    What the deformed image does not show is undecided: zero logits, which give no gradient.
    """
    positions = _backward(draw, logits.shape[-2:])
    seen = (positions.abs() <= 1).all(-1)[:, None]  # (B, 1, H, W)
    return torch.where(seen, _look_up(logits, positions), 0.0)


def ascend(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    start: Draw,
    bounds: Bounds,
    steps: int = 1,
) -> Draw:
    """Projected gradient ascent on the loss of the warped-back answer; arguments as :func:`adversarial_images`.

    Step i moves every parameter by its bound / sqrt(i) along the gradient's sign (noise: along the gradient, by the
    bound's norm) and puts it back within its bounds (noise: onto the nearest point of its ball).
    """
    current = Draw(**{name: value.detach() for name, value in vars(start).items()})
    for i in range(steps):
        leaves = {name: value.clone().requires_grad_() for name, value in vars(current).items()}
        guess = Draw(**leaves)
        with _Frozen(network), torch.enable_grad():
            value = loss(undo(network(transform(images, guess)), guess), targets)
            gradients = torch.autograd.grad(value, list(leaves.values()))
        moved = {}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            bound = getattr(bounds, name)
            size = bound / math.sqrt(i + 1)
            if name == "noise":
                moved[name] = _into_ball(leaf.detach() + size * _unit(gradient), bound)
            else:
                moved[name] = (leaf.detach() + size * gradient.sign()).clamp(-bound, bound)
        current = Draw(**moved)
    return current


class _Frozen:
    """Evaluation mode for a while; every module's own mode comes back."""

    def __init__(self, network: nn.Module) -> None:
        self.modes = [(module, module.training) for module in network.modules()]

    def __enter__(self) -> None:
        for module, _ in self.modes:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module, training in self.modes:
            module.training = training


def _rms(noise: Tensor) -> Tensor:
    return noise.square().mean((1, 2, 3), keepdim=True).sqrt()


def _unit(noise: Tensor) -> Tensor:
    """Scaled to a root mean square of just under 1, so that rounding cannot lift it over a bound; 0 stays 0."""
    return noise / (_rms(noise) * (1 + 1e-6)).clamp_min(torch.finfo(noise.dtype).tiny)


def _into_ball(noise: Tensor, bound: float) -> Tensor:
    return torch.where(_rms(noise) > bound, bound * _unit(noise), noise)


# Positions are (x, y) as grid_sample has them: -1 and 1 are the centres of the outer pixels.


def _identity(size: torch.Size, like: Tensor) -> Tensor:
    rows, columns = (torch.linspace(-1, 1, s, device=like.device, dtype=like.dtype) for s in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)[None]  # (1, H, W, 2)


def _look_up(planes: Tensor, positions: Tensor, mode: str = "bilinear") -> Tensor:
    return F.grid_sample(planes, positions, mode=mode, padding_mode="border", align_corners=True)


def _affine(draw: Draw, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Matrix (B, 1, 2, 2) and translation (B, 1, 1, 2) of positions (x, y)."""
    extent = draw.zoom.new_tensor([size[0] - 1, size[1] - 1])
    matrix = affine_matrix(draw.rotation, torch.zeros_like(draw.rotation), draw.zoom)
    matrix = matrix * extent / extent[:, None]  # from pixels to halves of the image
    fov = draw.zoom.new_tensor(size)
    return matrix.flip(1, 2)[:, None], (2 * draw.translation * fov / extent).flip(1)[:, None, None]


def _flow(velocity: Tensor, size: torch.Size, positions: Tensor) -> Tensor:
    """Positions moved along the velocity for one unit of time."""
    displacement = _look_up(integrate(velocity, size), positions).movedim(1, -1)  # (B, H, W, 2) pixels, rows first
    return positions + (displacement * 2 / displacement.new_tensor([size[0] - 1, size[1] - 1])).flip(-1)


def _forward(draw: Draw, size: torch.Size) -> Tensor:
    """Where each pixel of the deformed image comes from, (B, H, W, 2)."""
    matrix, translation = _affine(draw, size)
    return _flow(draw.velocity, size, _identity(size, matrix) @ matrix.mT + translation)


def _backward(draw: Draw, size: torch.Size) -> Tensor:
    """Where each pixel of the clean image went, (B, H, W, 2): the inverse of :func:`_forward`."""
    matrix, translation = _affine(draw, size)
    here = _identity(size, matrix).expand(len(matrix), -1, -1, -1)
    return (_flow(-draw.velocity, size, here) - translation) @ torch.linalg.inv_ex(matrix).inverse.mT
