"""Random fields have the law they claim, and flows do not fold."""

import pytest
import torch

from synthrepro.data.individuals import flow, jacobian_determinant, sample, smooth_field

EXTENT = (60, 80, 70)
AXES = tuple(torch.linspace(0, length, 5) for length in EXTENT)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_smooth_field_has_unit_variance_at_every_point():
    draws = smooth_field(EXTENT, 16.0, 4000, AXES, generator())  # (Z, 4000, R, C): channels are independent draws
    assert draws.mean(dim=1).abs().max() < 0.08
    torch.testing.assert_close(draws.std(dim=1), torch.ones(5, 5, 5), rtol=0, atol=0.06)


def test_a_smooth_field_is_correlated_within_a_knot_spacing_and_not_beyond_four():
    line = torch.tensor([0.0, 4.0, 70.0])
    draws = smooth_field(EXTENT, 16.0, 4000, (AXES[0][:1], line, AXES[2][:1]), generator())[0, :, :, 0]
    near, far = (draws[:, 0] * draws[:, 1]).mean(), (draws[:, 0] * draws[:, 2]).mean()
    assert near > 0.9
    assert far.abs() < 0.06


def test_a_field_does_not_depend_on_the_points_it_is_looked_at():
    whole = smooth_field(EXTENT, 16.0, 2, AXES, generator())
    part = smooth_field(EXTENT, 16.0, 2, (AXES[0][2:3], AXES[1][1:3], AXES[2]), generator())
    torch.testing.assert_close(part, whole[2:3, :, 1:3])


def test_sampling_at_the_lattice_gives_the_values_and_between_them_their_mean():
    planes = torch.rand(1, 1, 4, 5, generator=generator())
    at = torch.tensor([[[[3.0, 6.0], [4.5, 6.0]]]])  # step 3 mm: row 1 column 2, and half way to row 2
    found = sample(planes, at, step=3.0)[0, 0, 0]
    torch.testing.assert_close(found, torch.stack([planes[0, 0, 1, 2], planes[0, 0, 1:3, 2].mean()]))


def test_a_constant_velocity_moves_everything_by_itself():
    velocity = torch.tensor([3.0, -2.0])[None, :, None, None].expand(1, 2, 10, 12)
    torch.testing.assert_close(flow(velocity, 4.0), velocity)


def test_a_flow_is_undone_by_the_opposite_flow():
    step = 2.0
    axes = torch.arange(0, 80, step), torch.arange(0, 70, step)
    velocity = 3.0 * smooth_field(EXTENT, 20.0, 2, (torch.zeros(1), *axes), generator())
    lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]
    there = lattice + flow(velocity, step).movedim(1, -1)
    back = there + sample(flow(-velocity, step), there, step).movedim(1, -1)
    assert (back - lattice)[:, 6:-6, 6:-6].abs().max() < 0.15  # mm; nearer to the edge points leave the lattice
    assert (there - lattice).abs().max() > 3


def test_the_jacobian_tells_a_fold_from_a_stretch():
    lattice = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(4.0), indexing="ij"), dim=-1)[None]
    torch.testing.assert_close(
        jacobian_determinant(lattice * torch.tensor([2.0, 3.0]), 1.0), torch.full((1, 4, 3), 6.0)
    )
    assert (jacobian_determinant(lattice * torch.tensor([-1.0, 1.0]), 1.0) < 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_strong_velocity_does_not_fold_the_plane(seed: int):
    step = 4.0
    axes = torch.arange(0, 80, step), torch.arange(0, 70, step)
    velocity = 8.0 * smooth_field(EXTENT, 20.0, 2, (torch.zeros(1), *axes), generator(seed))
    lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]
    naive = jacobian_determinant(lattice + velocity.movedim(1, -1), step)
    flown = jacobian_determinant(lattice + flow(velocity, step).movedim(1, -1), step)
    assert flown.min() > 0
    assert flown.min() > naive.min()
