import math

import pytest
import torch

from synthrepro.synthesis.deformation import (
    affine_matrix,
    integrate,
    nearest,
    sampling_positions,
    smooth_displacement,
)


def warp(labels: torch.Tensor, affine: list[list[float]]) -> torch.Tensor:
    positions = sampling_positions(torch.tensor([affine]).float(), torch.zeros(1, 2, *labels.shape))
    return nearest(labels[None], positions)[0]


def test_identity_leaves_labels_alone():
    labels = torch.arange(12).reshape(3, 4)
    assert torch.equal(warp(labels, [[1, 0, 0], [0, 1, 0]]), labels)


def test_translation_moves_by_whole_pixels_and_repeats_the_edge():
    labels = torch.arange(12).reshape(3, 4)
    expected = labels[[1, 2, 2]][:, [0, 0, 0, 1]]
    assert torch.equal(warp(labels, [[1, 0, 1], [0, 1, -2]]), expected)


def test_rotation_by_a_quarter_turn_is_rot90():
    labels = torch.arange(25).reshape(5, 5)
    matrix = affine_matrix(torch.tensor([90.0]), torch.zeros(1), torch.zeros(1, 2))
    turned = warp(labels, torch.cat([matrix[0], torch.zeros(2, 1)], 1).tolist())
    assert torch.equal(turned, labels.rot90())


def test_affine_matrix_is_rotation_shear_zoom():
    angle, shear, zoom = 10.0, 0.01, [0.1, -0.2]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    expected = (
        torch.tensor([[c, s], [-s, c]]) @ torch.tensor([[1, shear], [shear, 1]]) @ torch.diag(1 + torch.tensor(zoom))
    )
    matrix = affine_matrix(torch.tensor([angle]), torch.tensor([shear]), torch.tensor([zoom]))
    torch.testing.assert_close(matrix[0], expected)


def test_displacement_is_added_where_it_is():
    displacement = torch.zeros(1, 2, 4, 4)
    displacement[0, 1, 2, 1] = 2.0  # the pixel (2, 1) comes from (2, 3)
    labels = torch.arange(16).reshape(1, 4, 4)
    warped = nearest(labels, sampling_positions(torch.eye(2, 3)[None], displacement))
    changed = warped != labels
    assert changed.nonzero().tolist() == [[0, 2, 1]]
    assert warped[0, 2, 1] == labels[0, 2, 3]


def test_smooth_displacement_reaches_its_control_points():
    controls = torch.zeros(1, 2, 5, 5)
    controls[0, 0, 1, 2] = 3.0
    field = smooth_displacement(controls, torch.tensor([[5.0, 5.0]]), (17, 17))
    assert field.max() == field[0, 0, 4, 8] == 3.0
    assert field[0, 1].abs().max() == 0


def test_a_constant_velocity_displaces_by_itself():
    velocity = torch.tensor([1.5, -2.0])[None, :, None, None].expand(1, 2, 4, 4)
    flow = integrate(velocity, (40, 40))
    torch.testing.assert_close(flow, velocity[..., :1, :1].expand_as(flow))


def test_integration_solves_the_flow_of_a_linear_velocity():
    """dx/dt = a (x - centre) ends at exp(a) (x - centre); scaling and squaring must compose, not only add."""
    size, a = 41, -0.3
    place = torch.linspace(-20, 20, 2)
    velocity = torch.zeros(1, 2, 2, 2)
    velocity[0, 0] = a * place[:, None]
    flow = integrate(velocity, (size, size))
    rows = torch.linspace(-20, 20, flow.shape[2])
    expected = (math.exp(a) - 1) * rows
    torch.testing.assert_close(flow[0, 0, :, 3], expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("sd", [2.0, 4.0])
def test_integrated_velocities_do_not_fold(sd):
    velocity = sd * torch.randn(8, 2, 11, 11, generator=torch.Generator().manual_seed(0))
    flow = integrate(velocity, (256, 256))
    field = smooth_displacement(flow, torch.tensor([flow.shape[2:]]).float(), (256, 256))
    rows, columns = torch.arange(256.0)[:, None], torch.arange(256.0)
    y, x = field[:, 0] + rows, field[:, 1] + columns
    jacobian = y.diff(dim=1)[:, :, 1:] * x.diff(dim=2)[:, 1:] - y.diff(dim=2)[:, 1:] * x.diff(dim=1)[:, :, 1:]
    assert (jacobian <= 0).float().mean() < 1e-4
