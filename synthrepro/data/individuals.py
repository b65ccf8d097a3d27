"""Random individuals: smooth Gaussian fields, and diffeomorphisms that flow along them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def spline_weights(points: Tensor, spacing: float, knots: int) -> Tensor:
    """Cubic B-spline weights of `points` on knots 0, spacing, 2 spacing, ...; each row scaled to unit length.

    Unit length makes a field of independent N(0, 1) knots have variance one everywhere.

    Args:
        points: (P,) positions, same unit as `spacing`; between the second and the last but one knot.

    Returns:
        (P, knots) weights.
    """
    t = (points[:, None] / spacing - torch.arange(knots)).abs()
    near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp_min(0) ** 3 / 6
    weights = torch.where(t < 1, near, far)
    return weights / weights.norm(dim=1, keepdim=True)


def smooth_field(
    extent: tuple[int, int, int],
    spacing: float,
    channels: int,
    points: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """A Gaussian random field of unit variance in space, evaluated on a grid.

    The knots fill the box `extent` whatever the grid, so an individual does not depend on the resolution or the
    slices it is looked at with.

    Args:
        extent: size of the box in mm along z, rows and columns.
        spacing: mm between knots of the cubic B-spline; sets the correlation length.
        points: (Z,), (R,), (C,) positions in the box, mm.

    Returns:
        (Z, channels, R, C).
    """
    counts = [int(length // spacing) + 4 for length in extent]
    knots = torch.randn(channels, *counts, generator=generator)
    z, r, c = (spline_weights(p + spacing, spacing, n) for p, n in zip(points, counts, strict=True))
    return torch.einsum("kzrc,Zz,Rr,Cc->ZkRC", knots, z, r, c)


def sample(planes: Tensor, positions: Tensor, step: float = 1.0) -> Tensor:
    """Bilinear look-up, edge values beyond the edge.

    Args:
        planes: (B, K, R, C) values at rows and columns 0, step, 2 step, ...
        positions: (B, H, W, 2) rows and columns to look at, same unit as `step`.

    Returns:
        (B, K, H, W).
    """
    size = torch.tensor(planes.shape[-2:])
    unit = (positions / step * 2 / (size - 1) - 1).flip(-1)  # grid_sample wants (column, row) in [-1, 1]
    return F.grid_sample(planes, unit, mode="bilinear", padding_mode="border", align_corners=True)


def flow(velocity: Tensor, step: float, squarings: int = 6) -> Tensor:
    """Displacement after unit time along a stationary velocity field, by scaling and squaring.

    Args:
        velocity: (B, 2, R, C), mm per unit time along rows and columns, on a lattice of `step` mm.

    Returns:
        (B, 2, R, C) displacement in mm; the map x -> x + displacement is invertible where the lattice resolves it.

    Source: Arsigny et al., "A log-Euclidean framework for statistics on diffeomorphisms", MICCAI 2006.
    """
    rows, columns = (torch.arange(n) * step for n in velocity.shape[-2:])
    lattice = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (R, C, 2)
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        displacement = displacement + sample(displacement, lattice + displacement.permute(0, 2, 3, 1), step)
    return displacement


def jacobian_determinant(positions: Tensor, step: float) -> Tensor:
    """Determinant of the derivative of a plane map, by forward differences.

    Args:
        positions: (B, H, W, 2) where each grid point is sent, on a grid of `step` mm.

    Returns:
        (B, H - 1, W - 1); positive everywhere if no part of the grid folds.
    """
    down = (positions[:, 1:, :-1] - positions[:, :-1, :-1]) / step
    right = (positions[:, :-1, 1:] - positions[:, :-1, :-1]) / step
    return down[..., 0] * right[..., 1] - down[..., 1] * right[..., 0]
