import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import stats

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import pixel_generators
from synthrepro.synthesis.noise import (
    FADE,
    KINDS,
    Limits,
    Noise,
    Range,
    gaussian,
    gradient_noise,
    gradient_sd,
    perlin,
    perlin_field,
    poisson,
    rayleigh_field,
    rician,
    scale_range,
    speckle,
)

LEVELS = torch.tensor([0.0, 0.2, 0.9])  # of three flat images
P = 1e-3  # tests of a distribution fail this often, had the seeds not been chosen


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(count: int) -> list[torch.Generator]:
    return [generator(10 + i) for i in range(count)]


def flat(levels: torch.Tensor = LEVELS, size: tuple[int, int] = (96, 128)) -> torch.Tensor:
    return levels[:, None, None, None].expand(-1, 1, *size).contiguous()


def images(count: int, size: tuple[int, int] = (48, 64)) -> torch.Tensor:
    return torch.rand(count, 1, *size, generator=generator(1))


def same(values: torch.Tensor, distribution) -> bool:
    """Whether the values are from a continuous distribution of scipy's, by Kolmogorov and Smirnov's test."""
    return stats.kstest(values.flatten().double().numpy(), distribution.cdf).pvalue > P


class TestGaussian:
    def test_follows_the_stated_distribution(self):
        sd = torch.tensor([0.05, 0.1, 0.3])
        for noisy, level, s in zip(gaussian(flat(), sd, generators(3)), LEVELS.tolist(), sd.tolist(), strict=True):
            assert same(noisy, stats.norm(level, s))

    def test_pixels_are_independent(self):
        n = gaussian(flat(), torch.ones(3), generators(3))[1, 0] - LEVELS[1]
        for a, b in ((n[1:], n[:-1]), (n[:, 1:], n[:, :-1])):
            assert abs((a * b).mean().item()) < 4 / math.sqrt(n.numel())


class TestPoisson:
    def test_follows_the_stated_distribution(self):
        photons = torch.tensor([50.0, 20.0, 40.0])
        noisy = poisson(flat(), photons, generators(3))
        assert (noisy[0] == 0).all()
        for i in (1, 2):
            counts = noisy[i] * photons[i]
            torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
            expected = stats.poisson((photons[i] * LEVELS[i]).item())
            low, high = int(expected.ppf(0.001)), int(expected.ppf(0.999))  # the tails in one bin each
            observed = counts.round().long().clamp(low, high).flatten().bincount(minlength=high + 1)[low:]
            share = expected.pmf(np.arange(low, high + 1))
            share[0], share[-1] = expected.cdf(low), expected.sf(high - 1)
            assert stats.chisquare(observed.numpy(), share * counts.numel()).pvalue > P

    def test_mean_and_variance(self):
        noisy = poisson(flat(), torch.full((3,), 500.0), generators(3))
        n = noisy[0].numel()
        for i, level in enumerate(LEVELS.tolist()):
            variance = level / 500
            assert noisy[i].mean().item() == pytest.approx(level, abs=4 * math.sqrt(variance / n) + 1e-9)
            assert noisy[i].var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n), abs=1e-9)


class TestRician:
    def test_follows_the_stated_distribution(self):
        sd = torch.tensor([0.1, 0.15, 0.2])
        noisy = rician(flat(), sd, generators(3))
        assert same(noisy[0], stats.rayleigh(scale=0.1))  # where there is no signal
        for i in (1, 2):
            assert same(noisy[i], stats.rice(LEVELS[i].item() / sd[i].item(), scale=sd[i].item()))

    def test_second_moment(self):
        sd = torch.tensor([0.1, 0.1, 0.1])
        second = rician(flat(), sd, generators(3)).square().mean((1, 2, 3))
        torch.testing.assert_close(second, LEVELS**2 + 2 * sd**2, rtol=0.03, atol=0)


class TestSpeckle:
    # Correlated pixels count less, so the test of a distribution takes them far apart, of many images.
    @pytest.mark.parametrize("grain", [0.0, 0.02])
    def test_the_envelope_is_rayleigh_of_mean_1(self, grain):
        r = rayleigh_field(torch.full((64,), grain), (96, 128), generators(64))
        assert same(r[:, ::16, ::16], stats.rayleigh(scale=math.sqrt(2 / math.pi)))

    @pytest.mark.parametrize("strength", [0.3, 1.0])
    def test_mean_and_variance(self, strength):
        noisy = speckle(flat(), torch.full((3,), strength), torch.zeros(3), generators(3))
        n = noisy[0].numel()
        for i, level in enumerate(LEVELS.tolist()):
            variance = level**2 * strength**2 * (4 / math.pi - 1)
            assert noisy[i].mean().item() == pytest.approx(level, abs=4 * math.sqrt(variance / n) + 1e-9)
            assert noisy[i].var().item() == pytest.approx(variance, rel=0.06)

    @pytest.mark.parametrize("axis", [1, 2])
    def test_the_grain_has_the_stated_width(self, axis):
        grain, size = 4 / 128, (96, 128)
        power = rayleigh_field(torch.full((200,), grain), size, generators(200)).square()
        power = power / (4 / math.pi) - 1  # exponential of mean 1 and SD 1, less its mean
        for lag in (0, 2, 4, 8, 20):
            correlation = (power * power.roll(lag, axis)).mean((1, 2))
            error = correlation.std().item() / math.sqrt(len(power))
            assert correlation.mean().item() == pytest.approx(math.exp(-((lag / 4) ** 2) / 2), abs=5 * error)

    def test_without_grain_pixels_are_independent(self):
        r = rayleigh_field(torch.zeros(1), (128, 128), generators(1))[0] - 1
        for axis in (0, 1):
            assert abs(torch.corrcoef(torch.stack([r, r.roll(1, axis)]).flatten(1))[0, 1].item()) < 4 / 128


class TestPerlin:
    def octave(self, count: int = 400, cells: int = 5, per_cell: int = 8) -> torch.Tensor:
        """Fields whose pixels 0, per_cell, ... lie on the lattice."""
        angles = 2 * math.pi * torch.rand(count, cells + 2, cells + 2, generator=generator(3))
        positions = (torch.arange(cells * per_cell + 1) / per_cell).expand(count, -1)
        return gradient_noise(angles, positions, positions)

    def test_is_the_sum_over_four_corners(self):
        angles = 2 * math.pi * torch.rand(1, 4, 5, generator=generator(3), dtype=torch.float64)
        rows, columns = torch.tensor([[0.3, 1.9, 2.0]]).double(), torch.tensor([[0.0, 0.5, 3.7]]).double()
        noise = gradient_noise(angles, rows, columns)
        for i, y in enumerate(rows[0].tolist()):
            for j, x in enumerate(columns[0].tolist()):
                expected = 0.0
                for p in (int(y), int(y) + 1):
                    for q in (int(x), int(x) + 1):
                        a = angles[0, p, q].item()
                        slope = math.cos(a) * (y - p) + math.sin(a) * (x - q)
                        expected += FADE(abs(y - p)) * FADE(abs(x - q)) * slope
                assert noise[0, i, j].item() == pytest.approx(expected, abs=1e-12)

    def test_is_zero_on_the_lattice_and_has_the_gradient_there(self):
        field = self.octave()
        assert field[:, ::8, ::8].abs().max() < 1e-6
        angles = torch.rand(1, 4, 4, dtype=torch.float64)
        step = 1e-4
        slope = gradient_noise(angles, torch.tensor([[1 + step]]).double(), torch.tensor([[2.0]]).double()) / step
        assert slope.item() == pytest.approx(angles[0, 1, 2].cos().item(), abs=1e-3)

    def test_is_bounded(self):
        assert self.octave().abs().max() <= math.sqrt(0.5) + 1e-6  # half a cell's diagonal

    def test_is_smooth(self):
        """The fade's first two derivatives vanish at both ends, so no cell's border can be seen."""
        for order in (1, 2):
            assert FADE.deriv(order)(1) == 0
        assert FADE(1) == 0
        assert FADE.deriv()(0) == FADE.deriv(2)(0) == 0

    def test_one_octave_has_the_stated_sd(self):
        field = self.octave()[:, :-1, :-1]  # whole cells
        means = field.square().mean((1, 2))
        assert means.mean().sqrt().item() == pytest.approx(gradient_sd(), rel=0.02)

    def test_mean_is_0_and_sd_1_at_every_pixel(self):
        field = perlin_field(torch.full((3000,), 0.4), (12, 16), generators(3000))
        assert field.mean(0).abs().max().item() < 5 / math.sqrt(3000)
        torch.testing.assert_close(field.std(0), torch.ones(12, 16), atol=0.08, rtol=0)

    def test_adds_noise_of_the_stated_sd(self):
        sd = torch.tensor([0.02, 0.05, 0.1])
        residual = perlin(flat(), sd, torch.full((3,), 0.04), generators(3)) - flat()
        torch.testing.assert_close(residual.std((1, 2, 3)), sd, rtol=0.06, atol=0)

    @pytest.mark.parametrize("spacing", [8, 16])
    def test_correlation_scales_with_the_spacing(self, spacing):
        """Against the closed form (hh(d) ff(0) + ff(d) hh(0)) / (2 hh(0) ff(0)), of the correlations of f and t f."""
        field = perlin_field(torch.full((400,), spacing / 128), (40, 128), generators(400), octaves=1)
        t = np.linspace(-1, 1, 2001)
        f = FADE(abs(t))
        for lag in (0.25, 0.5, 1.0, 2.0, 3.0):
            shift = round(lag * 1000)
            ff, hh = (np.sum(a[: max(2001 - shift, 0)] * a[shift:]) / np.sum(a * a) for a in (f, t * f))
            pixels = round(lag * spacing)
            for a, b in ((field[:, :, pixels:], field[:, :, :-pixels]), (field[:, pixels:], field[:, :-pixels])):
                if a.shape[1] == 0:
                    continue
                product = (a * b).mean((1, 2))
                error = product.std().item() / math.sqrt(len(product))
                assert product.mean().item() == pytest.approx((ff + hh) / 2, abs=5 * error)

    def test_the_same_noise_at_any_size(self):
        coarse, fine = (perlin_field(torch.tensor([0.3]), (s, s), generators(1)) for s in (32, 96))
        torch.testing.assert_close(fine[:, 1::3, 1::3], coarse, atol=1e-4, rtol=0)

    def test_pixels_are_square_in_images_that_are_not(self):
        wide, square = (perlin_field(torch.tensor([0.3]), size, generators(1)) for size in ((20, 64), (64, 64)))
        torch.testing.assert_close(wide, square[:, :20])


@pytest.mark.parametrize(
    "noisy",
    [
        lambda x, g: gaussian(x, torch.zeros(3), g),
        lambda x, g: poisson(x, torch.full((3,), math.inf), g),
        lambda x, g: perlin(x, torch.zeros(3), torch.full((3,), 0.1), g),
        lambda x, g: speckle(x, torch.zeros(3), torch.full((3,), 0.01), g),
        lambda x, g: rician(x, torch.zeros(3), g),
    ],
    ids=KINDS,
)
def test_strength_0_is_the_identity(noisy):
    assert torch.equal(noisy(images(3), generators(3)), images(3))


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids=[*KINDS, "all"])
class TestNoise:
    def test_shape_type_and_change(self, kinds):
        settings = Noise(kinds, gaussian_sd=(0.1, 0.1), perlin_sd=(0.1, 0.1), rician_sd=(0.1, 0.1))
        noisy = settings.apply(images(4), settings.draw(4, generator()))
        assert noisy.shape == (4, 1, 48, 64)
        assert noisy.dtype == torch.float32
        assert noisy.isfinite().all()
        assert (noisy != images(4)).any((1, 2, 3)).all()

    def test_replay_batch_inputs_and_global_state(self, kinds):
        settings, x = Noise(kinds), images(6)
        before = torch.get_rng_state()
        draw = settings.draw(6, generator())
        kept = {name: value.clone() for name, value in vars(draw).items()}
        noisy = settings.apply(x, draw)
        assert torch.equal(settings.apply(x, draw), noisy)
        assert torch.equal(settings.apply(x[:2], settings.draw(2, generator())), noisy[:2])
        assert torch.equal(settings.apply(x[4:5], draw[4]), noisy[4:5])
        assert torch.equal(x, images(6))
        assert all(torch.equal(value, kept[name]) for name, value in vars(draw).items())
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_takes_a_cpu_draw(self, kinds):
        settings, x = Noise(kinds), images(8).cuda()
        draw = settings.draw(8, generator())
        noisy = settings.apply(x, draw)
        assert noisy.is_cuda
        assert torch.equal(noisy, settings.apply(x, draw))
        here = settings.apply(x.cpu(), draw)
        torch.testing.assert_close(noisy.std((1, 2, 3)).cpu(), here.std((1, 2, 3)), rtol=0.3, atol=0.01)


def test_a_batch_gets_each_sample_its_own_kind():
    settings = Noise()
    draw, x = settings.draw(40, generator()), images(40, (8, 8))
    noisy = settings.apply(x, draw)
    assert draw.kind.unique().tolist() == [0, 1, 2, 3, 4]
    for i in range(40):
        pixels = pixel_generators(draw.seed[i : i + 1], x.device)
        d, one = draw[i], x[i : i + 1]
        expected = [
            lambda d=d, one=one, g=pixels: gaussian(one, d.gaussian_sd, g),
            lambda d=d, one=one, g=pixels: poisson(one, d.poisson_photons, g),
            lambda d=d, one=one, g=pixels: perlin(one, d.perlin_sd, d.perlin_spacing, g),
            lambda d=d, one=one, g=pixels: speckle(one, d.speckle, d.speckle_grain, g),
            lambda d=d, one=one, g=pixels: rician(one, d.rician_sd, g),
        ][draw.kind[i]]()
        assert torch.equal(noisy[i : i + 1], expected)


def test_kinds_are_equally_likely_and_only_those_named():
    kinds = Noise().draw(2000, generator()).kind
    assert stats.chisquare(kinds.bincount(minlength=5).numpy()).pvalue > P
    some = Noise(kinds=("rician", "poisson")).draw(2000, generator()).kind
    assert some.unique().tolist() == [1, 4]
    assert stats.chisquare(some.bincount()[[1, 4]].numpy()).pvalue > P


def test_without_kinds_images_stay():
    settings = Noise(kinds=())
    assert torch.equal(settings.apply(images(3), settings.draw(3, generator())), images(3))


@pytest.mark.parametrize("name", Noise.limits)
def test_parameters_are_uniform_or_log_uniform_in_their_range(name):
    bounds = {"poisson_photons": (10.0, 900.0), "speckle_grain": (0.001, 0.05)}.get(name, (0.2, 0.9))
    settings = replace(Noise(), **{name: bounds})
    low, high = getattr(settings, name)
    values = getattr(settings.draw(2000, generator()), name)
    assert same(values, stats.loguniform(low, high) if Noise.limits[name].log else stats.uniform(low, high - low))
    narrow, wide = (vars(s.draw(50, generator())) for s in (Noise(), settings))
    assert {key for key in narrow if not torch.equal(narrow[key], wide[key])} == {name}


def test_every_range_has_limits():
    assert set(Noise.limits) == {f.name for f in fields(Noise) if f.type == Range}


class TestScaling:
    def test_closed_forms(self):
        assert scale_range((0.2, 0.4), 2, Limits()) == pytest.approx((0.1, 0.5))
        assert scale_range((0.2, 0.4), 0.5, Limits()) == pytest.approx((0.25, 0.35))
        assert scale_range((1.0, 100.0), 0.5, Limits(log=True)) == pytest.approx((math.sqrt(10), 10 * math.sqrt(10)))
        assert scale_range((1.0, 100.0), 2, Limits(log=True)) == pytest.approx((0.1, 1000.0))
        assert scale_range((0.1, 0.9), 2, Limits(0.0, 1.0)) == (0.0, 1.0)
        assert scale_range((0.0, 0.0), 2, Limits()) == (0.0, 0.0)  # off stays off

    def test_half_is_inside_and_double_outside_or_at_the_limits(self):
        settings = Noise()
        assert settings.scaled(1) == settings
        half, double = settings.scaled(0.5), settings.scaled(2)
        for name, limits in Noise.limits.items():
            (low, high), inner, outer = (getattr(s, name) for s in (settings, half, double))
            assert low < inner[0] <= inner[1] < high
            assert outer[0] < low or outer[0] == low == limits.low
            assert outer[1] > high or outer[1] == high == limits.high
            assert limits.low <= outer[0] <= outer[1] <= limits.high

    def test_a_factor_of_0_is_refused(self):
        with pytest.raises(UserError, match="positive factor"):
            Noise().scaled(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("salt",)}, "'salt' is unknown"),
        ({"gaussian_sd": (0.2, 0.1)}, "gaussian_sd"),
        ({"gaussian_sd": (0.0, math.inf)}, "gaussian_sd"),
        ({"rician_sd": (-0.1, 0.1)}, "rician_sd"),
        ({"speckle": (0.0, 1.5)}, "speckle"),
        ({"perlin_spacing": (0.0, 0.1)}, "perlin_spacing"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Noise(**change)


def test_a_draw_for_another_batch_is_refused():
    with pytest.raises(UserError, match="2 samples for 3 images"):
        Noise().apply(images(3), Noise().draw(2, generator()))
