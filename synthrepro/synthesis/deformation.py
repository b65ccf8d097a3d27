"""Affine and elastic deformation of label maps."""

import torch
from torch import Tensor
from torch.nn import functional as F

from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.fields import corner_positions, expand, linear_weights, pick

INTEGRATION_STRIDE = 4  # pixels between points of the grid a velocity is integrated on
INTEGRATION_STEPS = 7  # squarings, as SynthSeg's VecInt layer


def affine_matrix(rotation: Tensor, shear: Tensor, zoom: Tensor) -> Tensor:
    """Rotation @ shear @ zoom, of positions (row, column) about the centre of the image.

    Args:
        rotation: (B,) degrees; shear: (B,), the same along both axes; zoom: (B, 2), 0 for none.

    Returns:
        (B, 2, 2).
    """
    angle = rotation.deg2rad()
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).reshape(-1, 2, 2)
    one = torch.ones_like(shear)
    skew = torch.stack([one, shear, shear, one], -1).reshape(-1, 2, 2)
    return turn @ skew @ torch.diag_embed(1 + zoom)


def integrate(velocity: Tensor, size: torch.Size) -> Tensor:
    """Displacement reached after one unit of time along a stationary velocity, by scaling and squaring.

    Args:
        velocity: (B, 2, n, m) pixels (rows, columns) at nodes, the outer ones on the image's edges.
        size: of the image.

    Returns:
        (B, 2, n', m') displacement, pixels, at nodes every few pixels.
    """
    grid = [max(-(-s // INTEGRATION_STRIDE), n) for s, n in zip(size, velocity.shape[-2:], strict=True)]
    flow = F.interpolate(velocity, grid, mode="bilinear", align_corners=True) / 2**INTEGRATION_STEPS
    axes = [torch.linspace(-1, 1, n, device=flow.device) for n in grid]
    identity = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)  # (n', m', 2) as grid_sample has it: x, y
    to_grid = flow.new_tensor([2 / (size[1] - 1), 2 / (size[0] - 1)])
    for _ in range(INTEGRATION_STEPS):
        there = identity + flow.flip(1).movedim(1, -1) * to_grid
        flow = flow + F.grid_sample(flow, there, padding_mode="border", align_corners=True)
    return flow


def separable_positions(matrix: Tensor, translation: Tensor, controls: Tensor, nodes: Tensor, size: torch.Size) -> Draw:
    """Where each pixel of the deformed image comes from, as factors along rows and columns.

    That is the affine map of the pixel's place about the centre of the image, plus a displacement, which is linear
    between nodes whose outer ones sit on the image's edges.

    Args:
        matrix: (B, 2, 2); translation: (B, 2) pixels.
        controls: (B, 2, n, m) displacement at nodes, pixels; those beyond a sample's own number of nodes are not used.
        nodes: (B, 2) number of nodes along rows and columns.
        size: (H, W).

    Returns:
        Positions (row, column) are ``controls`` (B, 2, n, m) between ``rows`` (B, H, n) and ``columns`` (B, W, m),
        plus ``along_rows`` (B, 2, H, 1) and ``along_columns`` (B, 2, 1, W).
    """
    rows, columns = (
        linear_weights(corner_positions(size[axis], nodes[:, axis]), controls.shape[2 + axis]) for axis in (0, 1)
    )
    centre = matrix.new_tensor([(s - 1) / 2 for s in size])
    row, column = (torch.arange(s, device=matrix.device) - (s - 1) / 2 for s in size)
    along_rows = matrix[..., :1] * row + (translation + centre)[..., None]
    along_columns = matrix[..., 1:] * column
    return Draw(
        controls=controls,
        rows=rows,
        columns=columns,
        along_rows=along_rows[..., None],
        along_columns=along_columns[..., None, :],
    )


def warp(labels: Tensor, positions: Draw) -> Tensor:
    """Labels at positions, nearest neighbour, edge values beyond the edge.

    Args:
        labels: (B, H, W), int64; positions: from :func:`separable_positions`.
    """
    height, width = labels.shape[-2:]
    place = expand(positions.controls, positions.rows, positions.columns)  # (B, 2, H, W)
    row, column = place.add_(positions.along_rows).add_(positions.along_columns).round_().unbind(1)
    index = row.clamp_(0, height - 1).mul_(width).add_(column.clamp_(0, width - 1)).long()
    return pick(labels.flatten(1), index)
