import math

import pytest
import torch

from synthrepro.synthesis.deformation import affine_matrix, integrate, separable_positions, warp
from synthrepro.synthesis.fields import expand


def displace(labels: torch.Tensor, affine: list[list[float]], controls: torch.Tensor) -> torch.Tensor:
    """One label map, warped by an affine map in pixels and control points (2, n, m)."""
    matrix = torch.tensor([affine]).float()
    nodes = torch.tensor([controls.shape[1:]]).float()
    positions = separable_positions(matrix[..., :2], matrix[..., 2], controls[None], nodes, labels.shape)
    return warp(labels[None], positions)[0]


def move(labels: torch.Tensor, affine: list[list[float]]) -> torch.Tensor:
    return displace(labels, affine, torch.zeros(2, 2, 2))


def field(controls: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Displacement (B, 2, H, W) of control points (B, 2, n, m)."""
    count = len(controls)
    nodes = torch.tensor([controls.shape[2:]]).float().expand(count, -1)
    p = separable_positions(torch.zeros(count, 2, 2), torch.zeros(count, 2), controls, nodes, size)
    return expand(p.controls, p.rows, p.columns)


def test_identity_leaves_labels_alone():
    labels = torch.arange(12).reshape(3, 4)
    assert torch.equal(move(labels, [[1, 0, 0], [0, 1, 0]]), labels)


def test_translation_moves_by_whole_pixels_and_repeats_the_edge():
    labels = torch.arange(12).reshape(3, 4)
    expected = labels[[1, 2, 2]][:, [0, 0, 0, 1]]
    assert torch.equal(move(labels, [[1, 0, 1], [0, 1, -2]]), expected)


def test_rotation_by_a_quarter_turn_is_rot90():
    labels = torch.arange(25).reshape(5, 5)
    matrix = affine_matrix(torch.tensor([90.0]), torch.zeros(1), torch.zeros(1, 2))
    turned = move(labels, torch.cat([matrix[0], torch.zeros(2, 1)], 1).tolist())
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
    controls = torch.zeros(2, 4, 4)
    controls[1, 2, 1] = 2.0  # the pixel (2, 1) comes from (2, 3)
    labels = torch.arange(16).reshape(4, 4)
    warped = displace(labels, [[1, 0, 0], [0, 1, 0]], controls)
    assert (warped != labels).nonzero().tolist() == [[2, 1]]
    assert warped[2, 1] == labels[2, 3]


def test_a_displacement_is_linear_between_control_points():
    controls = torch.zeros(1, 2, 5, 5)
    controls[0, 0, 1, 2] = 3.0
    displacement = field(controls, (17, 17))
    assert displacement.max() == displacement[0, 0, 4, 8] == 3.0
    assert displacement[0, 0, 2, 8] == 1.5
    assert displacement[0, 1].abs().max() == 0


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
    displacement = field(flow, (256, 256))
    rows, columns = torch.arange(256.0)[:, None], torch.arange(256.0)
    y, x = displacement[:, 0] + rows, displacement[:, 1] + columns
    jacobian = y.diff(dim=1)[:, :, 1:] * x.diff(dim=2)[:, 1:] - y.diff(dim=2)[:, 1:] * x.diff(dim=1)[:, :, 1:]
    assert (jacobian <= 0).float().mean() < 1e-4
