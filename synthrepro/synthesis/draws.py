"""What a generator has drawn, and where it draws from: every sample of a batch from a sub-seed of its own.

Parameters are always drawn on the CPU, so that they do not depend on the device; pixel noise is made where the images
are, from a recorded seed, and so differs between a CPU and a GPU.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from synthrepro.errors import UserError


class Draw(SimpleNamespace):
    """Everything random about one batch: tensors by name (``draw.gamma``), whose first axis is the sample.

    A draw holds no graph and no generator: applying it twice gives the same images bit for bit. ``vars(draw)`` is a
    plain dictionary to record. A composed generator's draw holds its parts' draws.
    """

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self, index: int | slice) -> "Draw":
        """The draw of one sample, or of a slice of samples; the sample axis stays."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return Draw(**{name: value[index] for name, value in vars(self).items()})

    def to(self, *args: Any, **kwargs: Any) -> "Draw":
        """Move every tensor, as :meth:`torch.Tensor.to`."""
        return Draw(**{name: value.to(*args, **kwargs) for name, value in vars(self).items()})


def spawn(count: int, generator: torch.Generator) -> list[torch.Generator]:
    """One CPU generator a sample, each seeded by one number of `generator`.

    Sample i depends on the state of `generator` and on i alone, not on `count`.

    Raises:
        UserError: `generator` is not on the CPU, so its parameters would differ from those of a CPU generator.
    """
    if generator.device.type != "cpu":
        raise UserError(f"draw needs a CPU torch.Generator, but this one is on {generator.device}: create it there.")
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform(
    generators: list[torch.Generator], shape: tuple[int, ...], bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Uniform numbers between the bounds, (B, *shape)."""
    low, high = bounds
    return torch.stack([torch.rand(shape, generator=g) for g in generators]).mul_(high - low).add_(low)


def normal(generators: list[torch.Generator], shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers on the generators' device, (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def seeds(generators: list[torch.Generator]) -> Tensor:
    """A further seed of each sample, for its pixel noise: (B,), int64."""
    return torch.stack([torch.randint(2**62, (), generator=g) for g in generators])


def pixel_generators(seeds: Tensor, device: torch.device) -> list[torch.Generator]:
    """A generator of pixel noise for each of (B,) seeds, on the device of the images."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
