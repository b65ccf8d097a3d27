"""Smooth fields and smoothing, all separable: a field is (rows' weights) @ (control points) @ (columns' weights)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from synthrepro.synthesis.draws import Draw


def pick(table: Tensor, index: Tensor) -> Tensor:
    """Entries of each sample's own table: (B, N, ...) and (B, *shape), int64, to (B, *shape, ...).

    A look-up in one flat table is several times faster on a CPU than gather.
    """
    if len(table) > 1:
        offset = torch.arange(len(table), device=table.device) * table.shape[1]
        index = index + offset.reshape(-1, *(1,) * (index.ndim - 1))
    return table.flatten(0, 1).index_select(0, index.flatten()).reshape(*index.shape, *table.shape[2:])


def corner_positions(size: int, nodes: Tensor) -> Tensor:
    """Where `size` pixels lie among nodes whose first and last sit on the first and last pixel.

    Args:
        nodes: (B,) number of nodes.

    Returns:
        (B, size) positions from 0 to nodes - 1.
    """
    return torch.linspace(0, 1, size, device=nodes.device) * (nodes[:, None] - 1)


def cell_positions(size: int, nodes: int) -> Tensor:
    """Where `size` pixels lie among nodes that are the centres of `nodes` equal cells of the image (half-pixel rule).

    Returns:
        (1, size) positions from 0 to nodes - 1, pixels outside the outer centres held at them.
    """
    return (((torch.arange(size) + 0.5) * (nodes / size)) - 0.5).clamp(0, nodes - 1)[None]


def linear_weights(positions: Tensor, nodes: int) -> Tensor:
    """Linear interpolation: (B, size) positions among nodes 0, 1, ... to (B, size, nodes) weights that add up to 1."""
    return (1 - (positions[..., None] - torch.arange(nodes, device=positions.device)).abs()).clamp_min_(0)


def bspline_weights(positions: Tensor, nodes: int) -> Tensor:
    """Uniform cubic B-spline: weights as :func:`linear_weights`, control points mirrored beyond the first and last.

    The weights are positive and add up to 1, so a field stays between its smallest and largest control point, which
    it smooths rather than passes through.
    """
    outer = torch.arange(-2, nodes + 2, device=positions.device)
    t = (positions[..., None] - outer).abs()  # (B, size, nodes + 4)
    spline = torch.where(t < 1, 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp_min(0) ** 3 / 6)
    mirrored = outer % (2 * nodes)
    mirrored = torch.minimum(mirrored, 2 * nodes - 1 - mirrored)
    weights = positions.new_zeros(*positions.shape, nodes)
    return weights.index_add_(-1, mirrored, spline)


def expand(controls: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Field of control points.

    Args:
        controls: (B, ..., n, m).
        rows: (B, H, n) weights; columns: (B, W, m) weights. Both may have B = 1.

    Returns:
        (B, ..., H, W).
    """
    between = (1,) * (controls.ndim - 3)
    rows = rows.reshape(len(rows), *between, *rows.shape[1:])
    columns = columns.reshape(len(columns), *between, *columns.shape[1:])
    return rows @ controls @ columns.mT


def gaussian_transfer(sd: Tensor, frequencies: Tensor) -> Tensor:
    """Transfer function of the discrete Gaussian kernel: exp(sd^2 (cos w - 1)).

    On pixels this kernel (Lindeberg, Scale-space for discrete signals, IEEE PAMI 1990) is what a sampled Gaussian only
    is in the limit: positive, of variance exactly sd^2, and the identity at sd = 0.

    Args:
        sd: any shape, pixels.
        frequencies: (F,) radians a pixel.

    Returns:
        (*sd.shape, F); values below 1e-6 are 0, because products of such numbers are denormal and slow.
    """
    transfer = torch.exp(sd[..., None].square() * (frequencies.cos() - 1))
    return F.threshold(transfer, 1e-6, 0.0)


def smoothing_kernel(sd: Tensor, size: int) -> Tensor:
    """Discrete Gaussian kernel for an axis of `size` pixels mirrored at its edges: (B,) pixels to (B, 2 size).

    The kernel is even and periodic; entry d is the weight at distance d.
    """
    frequencies = torch.fft.rfftfreq(2 * size, device=sd.device) * (2 * torch.pi)
    return torch.fft.irfft(gaussian_transfer(sd, frequencies), n=2 * size)


def smoothing_matrix(kernel: Tensor) -> Tensor:
    """Smoothing along an axis: (B, 2 size), from :func:`smoothing_kernel`, to (B, size, size), rows adding up to 1."""
    size = kernel.shape[1] // 2
    windows = torch.cat([kernel, kernel], 1).unfold(1, size, 1)  # window s: kernel at s, s + 1, ...
    direct = windows[:, size + 1 : 2 * size + 1].flip(1)  # kernel at column - row
    mirrored = windows[:, 1 : size + 1]  # kernel at column + row + 1
    return direct + mirrored


def resampling_matrix(kernel: Tensor, factor: Tensor) -> Tensor:
    """Smoothing, then sampling every `factor`-th pixel (nearest), then linear interpolation back, along an axis.

    Args:
        kernel: (B, 2 size), from :func:`smoothing_kernel`; factor: (B,) low-resolution pixel in pixels, at least 1.

    Returns:
        (B, size, size), rows adding up to 1.
    """
    size = kernel.shape[1] // 2
    count = (size / factor).floor().clamp_min(1)[:, None]  # (B, 1) low-resolution pixels
    factor = size / count
    position = (torch.arange(size, device=kernel.device) + 0.5) / factor - 0.5  # (B, size) in low-resolution pixels
    position = position.clamp_min(0).minimum(count - 1)
    left = position.floor()
    right = (left + 1).minimum(count - 1)
    smooth = smoothing_matrix(kernel)

    def sampled(pixel: Tensor) -> Tensor:  # rows of the smoothing at the centres of low-resolution pixels
        index = ((pixel + 0.5) * factor - 0.5).round().long()
        return pick(smooth, index)

    return sampled(left).lerp(sampled(right), (position - left)[..., None])


def multiply_banded(matrix: Tensor, image: Tensor, reach: int) -> Tensor:
    """matrix @ image, for a matrix that is 0 further than `reach` from its diagonal: (B, n, n) @ (B, n, m)."""
    size, block = len(matrix[0]), 64
    if 2 * reach + block >= size:
        return matrix @ image
    parts = []
    for start in range(0, size, block):
        near = slice(max(start - reach, 0), start + block + reach)
        parts.append(matrix[:, start : start + block, near] @ image[:, near])
    return torch.cat(parts, 1)


def texture_factors(sd: Tensor, shift: Tensor, size: torch.Size) -> Draw:
    """Smoothing by a discrete Gaussian and a shift, on a periodic image, as factors of its spectrum.

    Args:
        sd: (B, K) pixels; shift: (B, K, 2) rows and columns, whole pixels.
        size: (H, W).

    Returns:
        ``texture_rows`` (B, K, H, 1) and ``texture_columns`` (B, K, 1, W // 2 + 1), complex, and ``texture_kept``
        (B, K): how many columns smoothing leaves more than a thousandth of.
    """
    down = torch.fft.fftfreq(size[0], device=sd.device) * (2 * torch.pi)
    across = torch.fft.rfftfreq(size[1], device=sd.device) * (2 * torch.pi)
    transfer = gaussian_transfer(sd, across)
    return Draw(
        texture_rows=torch.polar(gaussian_transfer(sd, down), -shift[..., :1] * down)[..., None],
        texture_columns=torch.polar(transfer, -shift[..., 1:] * across)[..., None, :],
        texture_kept=(transfer > 1e-3).sum(-1),
    )


def smooth_textures(noise: Tensor, factors: Draw, rows: Sequence[slice]) -> Iterator[Tensor]:
    """One texture a class: white noise smoothed by the class's own discrete Gaussian, on a periodic image.

    All classes of a sample share one field of white noise, each shifted by an amount of its own, so that the textures
    of neighbouring classes are unrelated where they meet.

    Args:
        noise: (B, H, W), standard normal.
        factors: Of the K classes, from :func:`texture_factors`.
        rows: The K rows of the image that are wanted of each class.

    Yields:
        (B, those rows, W) for each class in turn; the SD shrinks as the smoothing grows.
    """
    spectrum = torch.fft.rfft2(noise)
    kept = [spectrum.shape[-1]] * len(rows)
    if noise.device.type == "cpu":  # skip the columns that are next to nothing; on a GPU, counting would mean waiting
        kept = factors.texture_kept.amax(0).tolist()
    for k, n in enumerate(kept):  # one at a time stays in a CPU's cache
        product = spectrum[..., :n] * factors.texture_rows[:, k]
        product = product.mul_(factors.texture_columns[:, k, ..., :n])
        yield torch.fft.irfft(torch.fft.ifft(product, dim=1)[:, rows[k]], n=noise.shape[-1], dim=2)
