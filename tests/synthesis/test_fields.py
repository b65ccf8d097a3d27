import math

import pytest
import torch
from torch.nn import functional as F

from synthrepro.synthesis.fields import (
    bspline_weights,
    cell_positions,
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


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def matrix_of(sds: list[float], size: int) -> torch.Tensor:
    """Smoothing matrices (B, size, size) in float64."""
    return smoothing_matrix(smoothing_kernel(torch.tensor(sds).double(), size))


def textures(noise: torch.Tensor, sd: torch.Tensor, shift: torch.Tensor, rows: list[slice] | None = None):
    """Textures of all K classes, of all rows unless told."""
    factors = texture_factors(sd, shift, noise.shape[1:])
    return list(smooth_textures(noise, factors, rows or sd.shape[1] * [slice(None)]))


def test_pick_looks_up_each_sample_in_its_own_table():
    table, index = uniform(3, 5, 2), torch.tensor([[[0, 4]], [[1, 1]], [[2, 3]]])
    expected = torch.stack([table[b][index[b]] for b in range(3)])
    assert torch.equal(pick(table, index), expected)
    assert torch.equal(pick(table[1:2], index[1:2]), expected[1:2])


@pytest.mark.parametrize("corners", [True, False])
def test_linear_fields_are_torch_bilinear_interpolation(corners):
    controls = uniform(2, 1, 4, 3)
    if corners:
        positions = [corner_positions(size, torch.tensor([nodes])) for size, nodes in ((9, 4), (11, 3))]
    else:
        positions = [cell_positions(size, nodes) for size, nodes in ((9, 4), (11, 3))]
    rows, columns = linear_weights(positions[0], 4), linear_weights(positions[1], 3)
    expected = F.interpolate(controls, (9, 11), mode="bilinear", align_corners=corners)
    torch.testing.assert_close(expand(controls, rows, columns), expected)


def test_each_sample_has_its_own_number_of_nodes():
    controls = uniform(2, 4)
    weights = linear_weights(corner_positions(7, torch.tensor([2.0, 4.0])), 4)
    fields = torch.einsum("bsn,bn->bs", weights, controls)
    torch.testing.assert_close(fields[0], controls[0, 0].lerp(controls[0, 1], torch.linspace(0, 1, 7)))
    torch.testing.assert_close(fields[1, ::2], controls[1])


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_bspline_weights_are_positive_add_up_and_draw_mirrored_splines(nodes):
    weights = bspline_weights(cell_positions(32, nodes), nodes)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 32))
    torch.testing.assert_close(weights[0], weights[0].flip(0, 1))  # both ends alike
    middle = bspline_weights(torch.tensor([[1.0]]), 3)
    torch.testing.assert_close(middle[0, 0], torch.tensor([1.0, 4.0, 1.0]) / 6)
    mirrored = bspline_weights(torch.tensor([[0.0]]), 3)
    torch.testing.assert_close(mirrored[0, 0], torch.tensor([5.0, 1.0, 0.0]) / 6)


def test_bspline_fields_have_continuous_curvature():
    weights = bspline_weights(torch.linspace(1, 6, 5001, dtype=torch.float64)[None], 8)
    curvature = (weights[0] @ uniform(8).double()).diff(n=2) / 1e-3**2
    assert curvature.diff().abs().max() < 0.02 * curvature.abs().max()


@pytest.mark.parametrize("sd", [0.0, 0.2, 0.7, 1.27, 4.0])
def test_smoothing_has_the_stated_variance_and_keeps_positive_mass(sd):
    matrix = matrix_of([sd], 101)[0]
    assert matrix.min() > -1e-6
    torch.testing.assert_close(matrix.sum(1), torch.ones(101).double())
    torch.testing.assert_close(matrix.sum(0), torch.ones(101).double())  # mirrored edges lose nothing
    distance = torch.arange(101).double() - 50
    assert (matrix[50] @ distance**2).item() == pytest.approx(sd**2, abs=2e-4)


def test_no_smoothing_is_the_identity():
    torch.testing.assert_close(matrix_of([0.0], 16)[0].float(), torch.eye(16), atol=1e-6, rtol=0)


def test_smoothing_mirrors_at_the_edges():
    signal = uniform(40).double()
    twice = torch.cat([signal, signal.flip(0)]).repeat(3)  # even and periodic
    far = matrix_of([2.0], 240)[0] @ twice
    near = matrix_of([2.0], 40)[0] @ signal
    torch.testing.assert_close(near, far[80:120], atol=1e-5, rtol=0)


def test_banded_multiplication_is_multiplication():
    matrix, image = matrix_of([1.27, 0.4], 150).float(), uniform(2, 150, 30)
    torch.testing.assert_close(multiply_banded(matrix, image, 10), matrix @ image, atol=1e-6, rtol=0)
    torch.testing.assert_close(multiply_banded(matrix, image, 150), matrix @ image)


def test_resampling_at_factor_one_only_smooths():
    kernel = smoothing_kernel(torch.tensor([1.5]), 33)
    torch.testing.assert_close(resampling_matrix(kernel, torch.ones(1)), smoothing_matrix(kernel))


def test_resampling_keeps_low_resolution_pixels_and_interpolates_between():
    matrix = resampling_matrix(smoothing_kernel(torch.zeros(1), 32), torch.tensor([4.0]))[0]
    torch.testing.assert_close(matrix.sum(1), torch.ones(32))
    signal = uniform(32)
    low = signal[[2, 6, 10, 14, 18, 22, 26, 30]]  # nearest of the centres 1.5, 5.5, ... (ties to even)
    expected = F.interpolate(low[None, None], 32, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(matrix @ signal, expected, atol=1e-6, rtol=0)


def test_each_sample_is_resampled_at_its_own_factor():
    kernel, factor = smoothing_kernel(torch.tensor([0.5, 3.0]), 30), torch.tensor([1.0, 5.3])
    both = resampling_matrix(kernel, factor)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], resampling_matrix(kernel[i : i + 1], factor[i : i + 1]))


def test_textures_have_the_noise_power_of_their_kernel():
    sd = torch.tensor([[0.0, 1.0, 3.0]])
    noise = torch.randn(1, 256, 240, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack(textures(noise, sd, torch.zeros(1, 3, 2)), 1)[0]
    torch.testing.assert_close(drawn[0], noise[0], atol=1e-5, rtol=0)
    for texture, width in zip(drawn[1:], sd[0, 1:].tolist(), strict=True):
        kernel = matrix_of([width], 101)[0, 50]
        power = kernel.square().sum().item()  # of one axis
        assert texture.std().item() == pytest.approx(power, rel=0.1)
        assert power == pytest.approx(1 / (2 * math.sqrt(math.pi) * width), rel=0.1)


def test_textures_are_shifted_copies_so_that_classes_are_unrelated():
    noise = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([[[0.0, 0.0], [20.0, 31.0]]])
    same, shifted = textures(noise, torch.full((1, 2), 2.0), shift)
    torch.testing.assert_close(shifted[0], same[0].roll((20, 31), (0, 1)), atol=1e-5, rtol=0)
    assert torch.corrcoef(torch.stack([same.flatten(), shifted.flatten()]))[0, 1].abs() < 0.2


def test_textures_are_drawn_for_the_rows_wanted():
    noise = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0))
    sd, shift = torch.tensor([[0.5, 2.0, 1.0]]), torch.ones(1, 3, 2)
    whole = textures(noise, sd, shift)
    parts = textures(noise, sd, shift, [slice(3, 20), slice(60, 64), slice(1)])
    assert [part.shape[1] for part in parts] == [17, 4, 1]
    torch.testing.assert_close(parts[0], whole[0][:, 3:20])
    torch.testing.assert_close(parts[1], whole[1][:, 60:])
