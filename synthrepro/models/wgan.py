r"""A Wasserstein GAN that makes masks and images together from noise: the baseline to which GenSeg compares its own.

Zhang et al. (Nature Communications 2025) name a WGAN among the ways to make more training pairs, and give no details.
This is the plainest: the networks of DCGAN (Radford et al., ICLR 2016) without BatchNorm in the critic, trained with
the gradient penalty of Gulrajani et al., Improved training of Wasserstein GANs, NeurIPS 2017, algorithm 1.

A sample is the image and its foreground classes one-hot, all in [-1, 1], (B, C + K - 1, H, W): :func:`join` makes it
from an image and a label map, :func:`split` takes it apart. Algorithm 1 takes ``CRITIC_STEPS`` steps of the critic to
one of the generator, each on new real and generated samples, with Adam of learning rate 1e-4 and betas (0, 0.9).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pix2pix import initialise

NOISE = 128  # values that a sample is made from, N(0, 1)
PENALTY = 10.0  # weight of the gradient penalty
CRITIC_STEPS = 5

Critics = Callable[[Tensor], Tensor]


class Generator(nn.Module):
    """Transposed convolutions from 4 x 4 pixels on, doubling; BatchNorm and ReLU between them, tanh at the end.

    Args:
        channels: C + K - 1, channels of the image and foreground classes together.
        size: Height and width, a power of two from 8 on.
        features: Channels of the last map but one; each smaller map has twice as many, up to 8 times.

    Raises:
        ValueError: Another size.
    """

    def __init__(self, channels: int, size: int, features: int = 64) -> None:
        super().__init__()
        widths = _widths(size, features)[::-1]
        parts: list[nn.Module] = [nn.ConvTranspose2d(NOISE, widths[0], 4, bias=False)]
        for before, after in pairwise(widths):
            parts += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        parts += [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*parts)
        initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        """Make samples (B, channels, size, size) in (-1, 1) from noise (B, NOISE)."""
        return self.layers(z[:, :, None, None])


class Critic(nn.Module):
    """Convolutions that halve the map down to 4 x 4 pixels, and one that looks at all of them.

    Every sample is normalised by itself (layer normalisation), for the gradient penalty is one of each sample (section
    4 there, "No critic batch normalization").

    Args:
        channels, size, features: Of the samples, as in :class:`Generator`.

    Raises:
        ValueError: Another size.
    """

    def __init__(self, channels: int, size: int, features: int = 64) -> None:
        super().__init__()
        widths = _widths(size, features)
        parts: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            parts += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(1, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4))
        initialise(self)

    def forward(self, samples: Tensor) -> Tensor:
        """Score samples (B, channels, size, size) in [-1, 1]: (B,), higher for real ones, without bounds."""
        return self.layers(samples).flatten()


def _widths(size: int, features: int) -> list[int]:
    """Channels of the maps of size / 2, size / 4, ..., 4 pixels."""
    if size < 8 or size & (size - 1):
        raise ValueError(f"The size must be a power of two from 8 on, not {size}.")
    return [features * min(2**level, 8) for level in range(int(math.log2(size)) - 2)]


def gradient_penalty(critic: Critics, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of (|gradient| - 1)² of the critic at random points between real and generated samples (equation 3).

    Args:
        critic: Maps (B, ...) to scores (B,), each of its own sample alone.
        real, fake: Samples (B, ...); no gradient reaches them through the penalty.
        generator: What the points are drawn from, one number a sample.
    """
    place = torch.rand(len(real), generator=generator, device=generator.device)
    place = place.to(real).view(-1, *[1] * (real.dim() - 1))
    between = torch.lerp(fake.detach(), real.detach(), place).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(critic: Critics, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    """What the critic minimises: mean score of generated less that of real samples, plus 10 gradient penalties.

    Arguments as in :func:`gradient_penalty`. Give ``fake`` detached where no gradient is to reach the generator.
    """
    penalty = gradient_penalty(critic, real, fake, generator)
    return critic(fake).mean() - critic(real).mean() + PENALTY * penalty


def generator_score(critic: Critics, fake: Tensor) -> Tensor:
    """Mean score of generated samples, which the generator *maximises*: its loss is the negative."""
    return critic(fake).mean()


def join(images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Make samples (B, C + K - 1, H, W) in [-1, 1].

    Args:
        images: (B, C, H, W) in [0, 1].
        labels: (B, H, W), int64, 0 to classes - 1.
        classes: K, background included.
    """
    foreground = F.one_hot(labels, classes)[..., 1:].movedim(-1, 1)  # (B, K - 1, H, W)
    return 2 * torch.cat([images, foreground.to(images)], 1) - 1


def split(samples: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Take samples (B, C + K - 1, H, W) in [-1, 1] apart.

    Args:
        samples: What the generator has made.
        channels: C, of the image.

    Returns:
        Images (B, C, H, W) in [0, 1], and label maps (B, H, W), int64: the class with the highest value, or background
        where none is above 0.
    """
    value, label = samples[:, channels:].max(1)
    return (samples[:, :channels] + 1) / 2, torch.where(value > 0, label + 1, 0)
