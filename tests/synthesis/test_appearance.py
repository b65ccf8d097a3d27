import math
from dataclasses import fields, replace

import pytest
import torch
from scipy import stats

from synthrepro.errors import UserError
from synthrepro.synthesis.appearance import Appearance
from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.noise import Noise, Range

CLASSES = 4
QUIET = Noise(kinds=())
OFF = {
    "texture": {"texture": (0.0, 0.0)},
    "ground": {"ground": (0.0, 0.0)},
    "blur": {"blur": (0.0, 0.0)},
    "gamma": {"gamma": 0.0},
    "bias": {"bias": (0.0, 0.0)},
    "inversion": {"inversion_chance": 0.0},
    "noise": {"noise": QUIET},
}
PLAIN = Appearance(**{name: value for change in OFF.values() for name, value in change.items()})
ON = {
    "texture": {"texture": (0.05, 0.05)},
    "ground": {"ground": (0.1, 0.1), "ground_chance": 1.0},
    "blur": {"blur": (0.02, 0.02)},
    "gamma": {"gamma": 0.5},
    "bias": {"bias": (0.3, 0.3)},
    "inversion": {"inversion_chance": 1.0},
    "noise": {"noise": Noise()},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks(count: int, size: tuple[int, int] = (48, 64)) -> torch.Tensor:
    """Label maps of four upright stripes, (count, *size)."""
    return (torch.arange(size[1]) * CLASSES // size[1]).expand(count, *size).contiguous()


def made(settings: Appearance, count: int = 6, seed: int = 0) -> torch.Tensor:
    return settings.apply(blocks(count), settings.draw(count, CLASSES, generator(seed)))


def same(one: Draw, other: Draw) -> bool:
    return all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())


class TestContract:
    def test_images_are_float32_in_0_to_1(self):
        images = made(Appearance(), 20)
        assert images.shape == (20, 1, 48, 64)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert not torch.equal(images[0], images[1])

    def test_replay_batch_inputs_and_global_state(self):
        settings, labels = Appearance(), blocks(6)
        before = torch.get_rng_state()
        draw = settings.draw(6, CLASSES, generator())
        images = settings.apply(labels, draw)
        assert torch.equal(settings.apply(labels, draw), images)
        assert torch.equal(settings.apply(labels[:2], settings.draw(2, CLASSES, generator())), images[:2])
        assert torch.equal(settings.apply(labels[4:5], draw[4]), images[4:5])
        assert torch.equal(labels, blocks(6))
        again = settings.draw(6, CLASSES, generator())
        for name, value in vars(draw).items():
            assert same(value, again.noise) if name == "noise" else torch.equal(value, getattr(again, name))
        assert torch.equal(before, torch.get_rng_state())

    def test_a_draw_is_for_any_size(self):
        settings = replace(Appearance(), noise=QUIET)
        draw = settings.draw(4, CLASSES, generator())
        small, large = (settings.apply(blocks(4, size), draw) for size in ((96, 128), (288, 384)))
        means = torch.nn.functional.avg_pool2d(large, 3)
        assert (means - small).abs().mean() < 0.01

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_takes_a_cpu_draw(self):
        settings = replace(Appearance(), noise=QUIET, texture=(0.0, 0.0), ground=(0.0, 0.0))
        draw = settings.draw(4, CLASSES, generator())
        there = settings.apply(blocks(4).cuda(), draw)
        torch.testing.assert_close(there.cpu(), settings.apply(blocks(4), draw), atol=1e-4, rtol=0)
        full = Appearance()
        draw = full.draw(8, CLASSES, generator())
        images = full.apply(blocks(8).cuda(), draw)
        assert images.is_cuda
        assert torch.equal(images, full.apply(blocks(8).cuda(), draw))


class TestLevels:
    def test_a_plain_image_has_the_levels_drawn(self):
        draw = PLAIN.draw(5, CLASSES, generator())
        images = PLAIN.apply(blocks(5), draw)
        for b in range(5):
            for k in range(CLASSES):
                assert (images[b, 0][blocks(5)[b] == k] == draw.level[b, k]).all()

    def test_labels_differ_from_the_background_by_the_contrast_drawn(self):
        """Of no more than half, every contrast fits on one side of the background."""
        level = replace(PLAIN, contrast=(0.2, 0.2), contrast_jitter=(0.5, 2.0)).draw(2000, 3, generator()).level
        difference = (level[:, 1:] - level[:, :1]).abs().flatten()
        assert stats.kstest(difference.numpy(), stats.loguniform(0.1, 0.4).cdf).pvalue > 1e-3
        assert stats.kstest(level[:, 0].numpy(), stats.uniform(0.1, 0.8).cdf).pvalue > 1e-3
        middle = (level[:, 0] - 0.5).abs() < 0.1  # where both signs fit
        brighter = (level[middle, 1] > level[middle, 0]).float()
        assert brighter.mean().item() == pytest.approx(0.5, abs=2.5 / math.sqrt(len(brighter)))

    @pytest.mark.parametrize("contrast", [(0.02, 0.6), (0.9, 1.0)])
    def test_levels_are_in_0_to_1(self, contrast):
        level = replace(PLAIN, contrast=contrast, background=(0.0, 1.0)).draw(2000, 5, generator()).level
        assert level.min() >= 0
        assert level.max() <= 1
        assert level.std(1).min() > 0

    def test_labels_next_to_identical_occur_as_often_as_stated(self):
        """The logarithm is the sum of two uniform numbers: its distribution is a parabola, then a line."""
        settings = replace(PLAIN, contrast=(0.02, 0.3))
        level = settings.draw(5000, 2, generator()).level.double()
        difference = (level[:, 1] - level[:, 0]).abs()
        (a, b), (c, d) = settings.contrast, settings.contrast_jitter
        u, v = math.log(b / a), math.log(d / c)
        assert v < u
        for threshold in (0.0099, 0.015, 0.03, 0.05, 0.1):
            z = math.log(threshold / (a * c))
            share = 0.0 if z <= 0 else z**2 / (2 * u * v) if z < v else (z - v / 2) / u
            found = (difference < threshold).double().mean().item()
            assert found == pytest.approx(share, abs=4 * math.sqrt(share / 5000))

    def test_an_image_is_of_low_or_high_contrast_as_a_whole(self):
        level = replace(PLAIN, contrast_jitter=(1.0, 1.0), contrast=(0.02, 0.5)).draw(500, 4, generator()).level
        difference = (level[:, 1:] - level[:, :1]).abs()
        torch.testing.assert_close(difference, difference[:, :1].expand(-1, 3), atol=1e-6, rtol=0)


class TestStages:
    @pytest.mark.parametrize("stage", OFF)
    def test_one_that_is_off_is_the_identity(self, stage):
        """Code that is skipped gives what code that runs at strength 0 gives."""
        tiny = {"gamma": 1e-12, "inversion_chance": 1e-12, "noise": Noise(("gaussian",), gaussian_sd=(0.0, 0.0))}
        key = next(iter(OFF[stage]))
        silent = replace(PLAIN, **{key: tiny.get(key, (0.0, 1e-12))})
        torch.testing.assert_close(made(silent), made(PLAIN), atol=2e-6, rtol=0)

    @pytest.mark.parametrize("stage", ON)
    def test_one_that_is_on_is_not(self, stage):
        difference = made(replace(PLAIN, **ON[stage])) - made(PLAIN)
        assert (difference.abs().amax((1, 2, 3)) > 1e-3).all()

    @pytest.mark.parametrize("stage", ON)
    def test_one_changes_no_others_draws(self, stage):
        plain, changed = (vars(s.draw(50, CLASSES, generator())) for s in (PLAIN, replace(PLAIN, **ON[stage])))
        name = {"inversion": "invert"}.get(stage, stage)
        assert {n for n in plain if n != "noise" and not torch.equal(plain[n], changed[n])} == {name} - {"noise"}
        if stage != "noise":
            assert same(plain["noise"], changed["noise"])

    def test_textures_have_their_labels_sd(self):
        settings = replace(
            PLAIN, background=(0.5, 0.5), contrast=(0.01, 0.01), texture=(0.01, 0.08), texture_spacing=(0.02, 0.02)
        )
        draw = settings.draw(3, CLASSES, generator())
        labels = blocks(3, (256, 256))
        images = settings.apply(labels, draw)[:, 0]
        found = torch.stack([torch.stack([images[b][labels[b] == k].std() for k in range(CLASSES)]) for b in range(3)])
        torch.testing.assert_close(found, draw.texture.norm(dim=-1), rtol=0.12, atol=0)

    def test_textures_of_neighbours_are_unrelated_on_average(self):
        texture = Appearance().draw(4000, 2, generator()).texture
        direction = texture / texture.norm(dim=-1, keepdim=True)
        likeness = (direction[:, 0] * direction[:, 1]).sum(-1)
        assert likeness.mean().abs().item() < 4 * math.sqrt(0.5 / 4000)
        assert likeness.square().mean().item() == pytest.approx(0.5, abs=0.03)

    def test_structure_is_on_the_background_only_and_as_often_as_stated(self):
        settings = replace(PLAIN, background=(0.5, 0.5), ground=(0.05, 0.05), ground_chance=0.3)
        images, plain = made(settings, 20), made(replace(PLAIN, background=(0.5, 0.5)), 20)
        changed = images != plain
        ground = blocks(20)[:, None] == 0
        assert not changed[~ground].any()
        present = settings.draw(3000, 2, generator()).ground > 0
        assert present.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 3000))
        assert torch.equal((changed & ground).any(3).any(2)[:, 0], settings.draw(20, 2, generator()).ground > 0)

    def test_an_edge_becomes_a_gaussians_integral(self):
        settings = replace(PLAIN, blur=(3 / 128, 3 / 128))
        labels = (torch.arange(128) >= 64).long().expand(1, 128, 128).contiguous()
        draw = settings.draw(1, 2, generator())
        low, high = draw.level[0]
        profile = (settings.apply(labels, draw)[0, 0, 50] - low) / (high - low)
        expected = torch.special.ndtr((torch.arange(128) - 63.5) / 3)
        torch.testing.assert_close(profile, expected, atol=0.005, rtol=0)
        across = settings.apply(labels.mT.contiguous(), draw)[0, 0, :, 50]
        torch.testing.assert_close((across - low) / (high - low), profile, atol=1e-4, rtol=0)

    def test_blur_of_an_image_that_is_not_square(self):
        settings = replace(PLAIN, blur=(0.03, 0.03))
        draw = settings.draw(1, CLASSES, generator())
        wide, square = (settings.apply(blocks(1, size), draw) for size in ((20, 64), (64, 64)))
        torch.testing.assert_close(wide, square[:, :, :20], atol=1e-5, rtol=0)

    def test_gamma_raises_to_a_lognormal_power(self):
        settings = replace(PLAIN, gamma=0.4)
        draw = settings.draw(1000, CLASSES, generator())
        assert stats.kstest(draw.gamma.log().numpy(), stats.norm(0, 0.4).cdf).pvalue > 1e-3
        expected = made(PLAIN).pow(draw.gamma[:6, None, None, None])
        torch.testing.assert_close(made(settings), expected)

    def test_bias_is_a_smooth_factor_that_saturates_nothing(self):
        settings = replace(PLAIN, bias=(0.5, 0.5))
        factor = made(settings) / made(PLAIN)
        assert factor.max() <= 1
        assert factor.amin((1, 2, 3)).max() < 0.9
        assert factor.log().diff(dim=-1).abs().max() < 0.25  # a knot's change over a dozen pixels
        controls = settings.draw(500, 2, generator()).bias
        assert (controls.amax((1, 2)) == 0).all()
        assert controls.var((1, 2)).mean().sqrt().item() == pytest.approx(0.5, rel=0.03)

    def test_inversion_is_as_often_as_stated(self):
        settings = replace(PLAIN, inversion_chance=0.3)
        invert = settings.draw(3000, 2, generator()).invert
        assert invert.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 3000))
        images, plain = made(settings, 20), made(PLAIN, 20)
        for i, inverted in enumerate(invert[:20].tolist()):
            assert torch.equal(images[i], 1 - plain[i] if inverted else plain[i])

    def test_noise_comes_last(self):
        quiet, noise = replace(Appearance(), noise=QUIET), Noise(("gaussian",), gaussian_sd=(0.1, 0.1))
        draw = replace(quiet, noise=noise).draw(4, CLASSES, generator())
        expected = noise.apply(quiet.apply(blocks(4), quiet.draw(4, CLASSES, generator())), draw.noise).clamp(0, 1)
        assert torch.equal(replace(quiet, noise=noise).apply(blocks(4), draw), expected)


def test_scaled():
    settings = Appearance()
    assert settings.scaled(1) == settings
    half, double = settings.scaled(0.5), settings.scaled(2)
    assert half.noise == settings.noise.scaled(0.5)
    assert (half.gamma, double.gamma) == pytest.approx((settings.gamma / 2, 2 * settings.gamma))
    for name, limits in Appearance.limits.items():
        (low, high), inner, outer = (getattr(s, name) for s in (settings, half, double))
        assert low < inner[0] <= inner[1] < high
        assert outer[0] < low or outer[0] == low == limits.low
        assert outer[1] > high or outer[1] == high == limits.high
    for other in (half, double):
        images = made(other)
        assert images.min() >= 0
        assert images.max() <= 1


def test_every_range_has_limits():
    assert set(Appearance.limits) == {f.name for f in fields(Appearance) if f.type == Range}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 4, 4), CLASSES), "0 to 3, but these run from 4 to 4"),
        (torch.full((2, 4, 4), -1), "-1"),
        (torch.zeros(2, 4, 4), "int64"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), r"\(B, H, W\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "2 samples for 3"),
    ],
)
def test_labels_that_do_not_fit_the_draw_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        Appearance().apply(labels, Appearance().draw(2, CLASSES, generator()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"background": (0.0, 1.2)}, "background"),
        ({"contrast": (0.0, 0.5)}, "contrast"),
        ({"ground_chance": 1.5}, "ground_chance"),
        ({"inversion_chance": -0.1}, "inversion_chance"),
        ({"gamma": -1.0}, "gamma"),
        ({"bias_nodes": 0}, "bias_nodes"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Appearance(**change)


def test_there_is_at_least_the_background():
    with pytest.raises(ValueError, match="background"):
        Appearance().draw(1, 0, generator())
