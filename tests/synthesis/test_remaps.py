"""The remaps against the distribution their docstrings state."""

import math

import pytest
import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.remaps import IntensityRemap, log_field, remap

CURVE_ONLY = {"bias": (0.0, 0.0), "noise": (0.0, 0.0)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, size: tuple[int, int] = (24, 20)) -> Tensor:
    """Random intensities, a frame of exact zeros around them."""
    x = torch.rand(count, 1, *size, generator=generator(9)) * 0.98 + 0.01
    x[..., :4, :] = 0
    return x


def slopes(draw: Draw) -> tuple[Tensor, Tensor]:
    """Whether each curve only rises, and whether it only falls, over the control points it uses."""
    steps = draw.curve.diff(dim=1)
    unused = torch.arange(1, draw.curve.shape[1]) >= draw.knots[:, None]
    return (steps.ge(0) | unused).all(1), (steps.le(0) | unused).all(1)


def test_shares_of_curves_are_as_stated():
    transform = IntensityRemap(increasing=0.5, decreasing=0.2, knots=(4, 6))
    draw = transform.draw(torch.zeros(4000, 1, 1, 1), generator())
    rising, falling = slopes(draw)
    chance = 0.3 * sum(1 / math.factorial(n) for n in (4, 5, 6)) / 3  # of the rest, monotone all the same
    assert rising.float().mean() == pytest.approx(0.5 + chance, abs=0.025)
    assert falling.float().mean() == pytest.approx(0.2 + chance, abs=0.025)
    assert draw.knots.bincount(minlength=7)[4:] / 4000 == pytest.approx(torch.full((3,), 1 / 3), abs=0.03)


def test_every_curve_runs_from_0_to_1_and_control_values_are_uniform():
    transform = IntensityRemap(increasing=0, decreasing=0, knots=(5, 5))
    curve = transform.draw(torch.zeros(4000, 1, 1, 1), generator()).curve
    assert (curve.amin(1) == 0).all()
    assert (curve.amax(1) == 1).all()
    inner = curve.sort(1).values[:, 1:-1]  # between the extremes, uniform numbers are uniform still
    assert inner.mean(0) == pytest.approx(torch.tensor([0.25, 0.5, 0.75]), abs=0.02)
    place = (curve == 0).float().mean(0)  # the smallest may stand anywhere
    assert place == pytest.approx(torch.full((5,), 0.2), abs=0.03)


@pytest.mark.parametrize(("increasing", "decreasing", "sign"), [(1.0, 0.0, 1), (0.0, 1.0, -1)])
def test_a_monotone_curve_keeps_or_inverts_the_order_of_intensities(increasing, decreasing, sign):
    transform = IntensityRemap(increasing, decreasing, keep_background=False, **CURVE_ONLY)
    ramp = torch.linspace(0, 1, 101).expand(20, 1, 1, 101)
    out = transform(ramp, generator())
    assert (sign * out.diff(dim=-1) >= -1e-6).all()
    assert (out.amax(-1) - out.amin(-1)).min() > 0.99


def test_a_curve_is_linear_between_its_control_points():
    curve, knots = torch.tensor([[0.2, 1.0, 0.0, 9.0], [0.0, 1.0, 0.0, 1.0]]), torch.tensor([3, 4])
    x = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).expand(2, 1, 1, 5)
    out = remap(x, curve, knots)[:, 0, 0]
    torch.testing.assert_close(out[0], torch.tensor([0.2, 0.6, 1.0, 0.5, 0.0]))
    torch.testing.assert_close(out[1], torch.tensor([0.0, 0.75, 0.5, 0.25, 1.0]))


def test_the_bias_field_has_the_stated_log_sd_and_multiplies_all_but_the_background():
    transform = IntensityRemap(1.0, 0.0, knots=(2, 2), bias=(0.4, 0.4), noise=(0.0, 0.0))
    draw = transform.draw(torch.zeros(1000, 1, 1, 1), generator())
    assert draw.bias.std() == pytest.approx(0.4, rel=0.03)
    assert draw.bias.mean().abs() < 0.015
    x = images()
    out, field = transform.apply(x, draw[:4]), log_field(draw.bias[:4], x.shape[-2:]).exp()[:, None]
    expected = x * field
    torch.testing.assert_close(out, expected / expected.amax((1, 2, 3), keepdim=True))
    torch.testing.assert_close(log_field(draw.bias[:4], torch.Size((9, 7)))[:, ::8, ::6], draw.bias[:4, ::3, ::3])
    spread = IntensityRemap(bias=(0.0, 0.5)).draw(torch.zeros(3000, 1, 1, 1), generator()).bias.square().mean()
    assert spread == pytest.approx(0.25 / 3, rel=0.06)  # E[sd^2] of a uniform SD


def test_the_noise_has_the_stated_sd_and_leaves_the_background():
    transform = IntensityRemap(1.0, 0.0, knots=(2, 2), bias=(0.0, 0.0), noise=(0.05, 0.05))
    x = torch.full((2, 1, 64, 64), 0.5)
    x[..., 0, 0] = 1
    x[..., :8, 8:] = 0
    out = transform(x, generator())
    assert out[..., 8:, :].std() == pytest.approx(0.05, rel=0.05)
    assert (out[x == 0] == 0).all()
    levels = IntensityRemap(noise=(0.02, 0.1)).draw(torch.zeros(2000, 1, 1, 1), generator()).noise
    assert levels.min() >= 0.02
    assert levels.max() <= 0.1
    assert levels.mean() == pytest.approx(0.06, rel=0.03)


def test_the_background_is_remapped_when_asked():
    x = images()
    inverted = IntensityRemap(0.0, 1.0, keep_background=False, **CURVE_ONLY)(x, generator())
    assert (inverted[x == 0] == 1).all()
    kept = IntensityRemap(0.0, 1.0, **CURVE_ONLY)(x, generator())
    assert (kept[x == 0] == 0).all()
    assert (kept[x > 0] > 0).float().mean() > 0.9


def test_images_stay_between_0_and_1_and_replay():
    transform, x = IntensityRemap(bias=(1.0, 1.0), noise=(0.3, 0.3)), images()
    draw = transform.draw(x, generator())
    out = transform.apply(x, draw)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(out, transform.apply(x, draw))
    assert not torch.equal(out, transform(x, generator(1)))
    flat = transform(torch.zeros(1, 1, 8, 8), generator())
    assert torch.equal(flat, torch.zeros(1, 1, 8, 8))


def test_a_sample_does_not_depend_on_its_batch_nor_on_the_global_state():
    transform, x = IntensityRemap(), images(5)
    before = torch.get_rng_state()
    out = transform(x, generator())
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(transform(x[:2], generator()), out[:2])
    draw = transform.draw(x, generator())
    torch.testing.assert_close(transform.apply(x[3:4], draw[3]), out[3:4])


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match="add up to at most 1"):
        IntensityRemap(increasing=0.8, decreasing=0.3)
    with pytest.raises(UserError, match="at least 2"):
        IntensityRemap(knots=(1, 3))
    with pytest.raises(UserError, match="draw for this batch"):
        IntensityRemap().apply(images(2), IntensityRemap().draw(images(3), generator()))
