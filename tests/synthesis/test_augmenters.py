from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis import Draw, GaussianNoise, IntensityNonUniformity, Nonparametric, Parametric


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 3, size: tuple[int, int] = (16, 12), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 1, *size, generator=generator(9)).to(dtype)


AUGMENTERS: dict[str, Callable[[], nn.Module]] = {
    "fixed noise": lambda: GaussianNoise("fixed", 0.1),
    "modulated noise": lambda: GaussianNoise("modulated", 0.1),
    "range noise": lambda: GaussianNoise("range", (0.02, 0.2)),
    "B-spline field": lambda: IntensityNonUniformity(exponents=(0.3, 0.5, 0.8)),
    "bilinear field": lambda: IntensityNonUniformity(basis="bilinear", exponents=(0.3, 0.5, 0.8), shared=True),
    "parametric": lambda: Parametric(IntensityNonUniformity(generator=generator()), GaussianNoise(sigma=0.1)),
    "residual": lambda: Parametric(noise=GaussianNoise("range", (0.1, 0.2)), residual=True),
    "nonparametric": lambda: Nonparametric(generator()),
    "nonparametric, two levels": lambda: Nonparametric(generator(), features=(4, 8)),
    "nonparametric, released": lambda: Nonparametric(generator(), released=True),
}


@pytest.fixture(params=AUGMENTERS)
def augmenter(request) -> nn.Module:
    return AUGMENTERS[request.param]()


def tensors(draw: Draw) -> list[Tensor]:
    """All tensors of a draw and of the draws it holds."""
    return [t for v in vars(draw).values() for t in (tensors(v) if isinstance(v, Draw) else [v])]


class TestEveryAugmenter:
    def test_a_replayed_draw_gives_the_same_bits(self, augmenter):
        x = images()
        draw = augmenter.draw(x, generator())
        first = augmenter(x, draw)
        assert first.shape == x.shape
        assert first.dtype == x.dtype
        assert torch.equal(first, augmenter(x, draw))
        assert not torch.equal(first, augmenter(x, augmenter.draw(x, generator(1))))

    def test_a_sample_draws_the_same_in_any_batch(self, augmenter):
        x = images(4)
        draw, alone = augmenter.draw(x, generator()), augmenter.draw(x[:2], generator())
        for both, one in zip(tensors(draw), tensors(alone), strict=True):
            assert torch.equal(both[:2], one)
        torch.testing.assert_close(augmenter(x[1:2], draw[1]), augmenter(x, draw)[1:2])

    def test_a_draw_has_no_graph_and_leaves_the_global_state_alone(self, augmenter):
        before = torch.get_rng_state()
        draw = augmenter.draw(images(), generator())
        assert torch.equal(before, torch.get_rng_state())
        assert not any(t.requires_grad for t in tensors(draw))

    def test_nothing_is_clipped(self, augmenter):
        x = torch.stack([torch.zeros(1, 16, 12), 3 * torch.ones(1, 16, 12)])
        y = augmenter(x, augmenter.draw(x, generator()))
        assert y.max() > 1
        if not isinstance(augmenter, IntensityNonUniformity):
            assert y.min() < 0

    def test_gradients_agree_with_central_differences(self, augmenter):
        """Every parameter, in float64, against the whole forward pass with the draw replayed."""
        augmenter = augmenter.double()
        x = images(dtype=torch.float64)
        draw = augmenter.draw(x, generator())
        weight = torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
        params = {name: p.detach() for name, p in augmenter.named_parameters()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            y = functional_call(augmenter, values, (x, draw))
            return (weight * y + y**2).sum()

        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
        for (name, value), gradient in zip(params.items(), gradients, strict=True):
            direction = torch.randn(value.shape, generator=generator(3), dtype=torch.float64)
            assert (gradient != 0).all(), name
            h = 1e-6
            up, down = (loss({**params, name: value + s * h * direction}) for s in (1, -1))
            torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * h), rtol=1e-6, atol=1e-7)

    def test_hypergradients_through_a_step_agree_with_central_differences(self, augmenter):
        """One SGD step of a network on the augmented images, then a loss of the stepped network: second order."""
        augmenter = augmenter.double()
        x = images(dtype=torch.float64)
        draw = augmenter.draw(x, generator())
        target, real = images(dtype=torch.float64).flip(0), images(dtype=torch.float64).flip(-1)
        kernel = 0.3 * torch.randn(1, 1, 3, 3, generator=generator(4), dtype=torch.float64)
        params = {name: p.detach() for name, p in augmenter.named_parameters()}

        def outer(values: dict[str, Tensor]) -> Tensor:
            leaf = kernel.clone().requires_grad_()
            augmented = functional_call(augmenter, values, (x, draw))
            inner = (F.silu(F.conv2d(augmented, leaf, padding=1)) - target).square().mean()
            (gradient,) = torch.autograd.grad(inner, leaf, create_graph=True)
            return (F.silu(F.conv2d(real, leaf - 0.5 * gradient, padding=1)) - target).square().mean()

        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        gradients = torch.autograd.grad(outer(leaves), list(leaves.values()))
        for (name, value), gradient in zip(params.items(), gradients, strict=True):
            direction = torch.randn(value.shape, generator=generator(3), dtype=torch.float64)
            assert gradient.abs().max() > 0, name
            h = 1e-5
            up, down = (outer({**params, name: value + s * h * direction}) for s in (1, -1))
            torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * h), rtol=1e-5, atol=1e-11)


class TestGaussianNoise:
    def test_no_sigma_changes_nothing(self):
        x = images()
        for mode, sigma in [("fixed", 0.0), ("modulated", 0.0), ("range", (0.0, 0.0))]:
            noise = GaussianNoise(mode, sigma)
            assert torch.equal(noise(x, noise.draw(x, generator())), x)

    def test_fixed_noise_has_sigma_as_its_sd_and_is_white(self):
        x = torch.zeros(4, 1, 128, 128)
        noise = GaussianNoise("fixed", 0.3)
        y = noise(x, noise.draw(x, generator())).detach()
        assert y.std((1, 2, 3)).tolist() == pytest.approx([0.3] * 4, rel=0.03)
        assert y.mean().abs() < 5e-3
        assert y.pow(4).mean().item() / 0.3**4 == pytest.approx(3, abs=0.15)
        pairs = torch.stack([y[..., :-1].flatten(), y[..., 1:].flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.02

    def test_modulated_noise_has_sigma_times_a_normal_number_an_image(self):
        x = torch.zeros(400, 1, 24, 24)
        noise = GaussianNoise("modulated", 0.2)
        draw = noise.draw(x, generator())
        assert draw.modulation.mean().item() == pytest.approx(0, abs=0.15)
        assert draw.modulation.std().item() == pytest.approx(1, abs=0.1)
        sd = noise(x, draw).detach().std((1, 2, 3))
        torch.testing.assert_close(sd, 0.2 * draw.modulation.abs(), rtol=0.15, atol=1e-3)

    def test_range_noise_is_uniform_between_its_ends(self):
        x = torch.zeros(400, 1, 24, 24)
        noise = GaussianNoise("range", (0.1, 0.3))
        sd = noise(x, noise.draw(x, generator())).detach().std((1, 2, 3))
        assert sd.min().item() == pytest.approx(0.1, abs=0.012)
        assert sd.max().item() == pytest.approx(0.3, abs=0.03)
        assert sd.mean().item() == pytest.approx(0.2, abs=0.01)

    def test_channels_have_noise_of_their_own(self):
        x = torch.zeros(1, 2, 32, 32)
        noise = GaussianNoise("fixed", 1.0)
        first, second = noise(x, noise.draw(x, generator()))[0].detach()
        assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.1

    def test_magnitude_has_no_sign_and_an_order(self):
        assert GaussianNoise("fixed", -0.05).magnitude.item() == pytest.approx(0.05)
        torch.testing.assert_close(GaussianNoise("range", (0.21, -0.15)).magnitude, torch.tensor([0.15, 0.21]))
        assert not GaussianNoise("fixed", 1.0).magnitude.requires_grad

    def test_the_released_start_is_uniform_and_comes_from_the_generator(self):
        starts = torch.cat([GaussianNoise("range", generator=generator(seed)).sigma.detach() for seed in range(200)])
        assert 0 <= starts.min() < 0.05
        assert 0.95 < starts.max() <= 1
        assert torch.equal(GaussianNoise(generator=generator()).sigma, GaussianNoise(generator=generator()).sigma)


class TestIntensityNonUniformity:
    def test_no_exponents_change_nothing(self):
        x = images()
        field = IntensityNonUniformity(exponents=(0, 0, 0))
        torch.testing.assert_close(field(x, field.draw(x, generator())), x, atol=1e-7, rtol=0)

    @pytest.mark.parametrize("basis", ["bilinear", "bspline"])
    def test_the_image_is_multiplied_by_the_product_of_powers(self, basis):
        x = images()
        field = IntensityNonUniformity(basis=basis, exponents=(0.2, 1, 0.7))
        draw = field.draw(x, generator())
        alphas = draw.log_fields.exp()  # (B, 3, H, W)
        expected = x * (alphas[:, :1] ** 0.2 * alphas[:, 1:2] * alphas[:, 2:] ** 0.7)
        torch.testing.assert_close(field(x, draw), expected)
        assert alphas.min() >= 0.5
        assert alphas.max() <= 2

    def test_bilinear_fields_are_the_released_codes(self):
        """uniform(0.5, 2) on 2 x 2, 4 x 4, 8 x 8, interpolated bilinearly without aligned corners."""
        x = torch.ones(500, 1, 16, 16)
        field = IntensityNonUniformity(basis="bilinear", exponents=(1, 1, 1))
        alphas = field.draw(x, generator()).log_fields.exp()
        for k, nodes in enumerate((2, 4, 8)):
            stride = 16 // nodes
            low = F.avg_pool2d(alphas[:, k], stride)  # the middle of a cell, here the mean of its middle pixels
            corner = alphas[:, k, 0, 0]  # outside the outer centres: the control point itself
            assert corner.min().item() == pytest.approx(0.5, abs=0.02)
            assert corner.max().item() == pytest.approx(2, abs=0.02)
            assert corner.mean().item() == pytest.approx(1.25, abs=0.06)
            assert corner.std().item() == pytest.approx(1.5 / 12**0.5, abs=0.03)
            if stride > 1:
                again = F.interpolate(low[:, None], 16, mode="bilinear", align_corners=False)[:, 0]
                assert torch.corrcoef(torch.stack([again.flatten(), alphas[:, k].flatten()]))[0, 1] > 0.85

    @pytest.mark.parametrize("basis", ["bilinear", "bspline"])
    def test_later_fields_have_higher_frequencies(self, basis):
        x = torch.ones(100, 1, 64, 64)
        field = IntensityNonUniformity(basis=basis, exponents=(1, 1, 1))
        logs = field.draw(x, generator()).log_fields
        roughness = logs.diff(dim=-1).std((0, 2, 3)) / logs.std((0, 2, 3))
        assert roughness[0] < 0.7 * roughness[1] < 0.7**2 * roughness[2]

    def test_shared_fields_are_one_a_batch_and_others_one_an_image(self):
        x = images(3)
        shared = IntensityNonUniformity(shared=True, exponents=(1, 1, 1)).draw(x, generator()).log_fields
        own = IntensityNonUniformity(exponents=(1, 1, 1)).draw(x, generator()).log_fields
        assert torch.equal(shared[0], shared[2])
        assert not torch.equal(own[0], own[2])
        assert torch.equal(shared[0], own[0])

    def test_exponents_start_where_they_are_told_or_as_released(self):
        given = IntensityNonUniformity(exponents=(1, 0, 0.25)).exponents
        torch.testing.assert_close(given.detach(), torch.tensor([1, 0, 0.25]))
        released = torch.cat([IntensityNonUniformity(generator=generator(s)).exponents.detach() for s in range(100)])
        assert 0.5 <= released.min() < 0.51
        assert 0.72 < released.max() < 0.7311

    def test_the_number_of_fields_is_free(self):
        x = images()
        field = IntensityNonUniformity(2, generator=generator())
        assert field.draw(x, generator()).log_fields.shape == (3, 2, 16, 12)


class TestParametric:
    def test_field_comes_first_and_noise_is_not_multiplied(self):
        x = images()
        field, noise = IntensityNonUniformity(exponents=(1, 1, 1)), GaussianNoise(sigma=0.3)
        both = Parametric(field, noise)
        draw = both.draw(x, generator())
        expected = field(x, draw.field) + 0.3 * draw.noise.eps
        torch.testing.assert_close(both(x, draw), expected)

    def test_residual_noise_is_the_released_two_x_plus_noise(self):
        x = images()
        augmenter = Parametric(noise=GaussianNoise(sigma=0.3), residual=True)
        draw = augmenter.draw(x, generator())
        torch.testing.assert_close(augmenter(x, draw), 2 * x + 0.3 * draw.noise.eps)

    def test_the_papers_model_has_four_scalars(self):
        augmenter = Parametric(IntensityNonUniformity(generator=generator()), GaussianNoise(generator=generator()))
        assert sum(p.numel() for p in augmenter.parameters()) == 4

    def test_zero_parameters_change_nothing(self):
        x = images()
        augmenter = Parametric(IntensityNonUniformity(exponents=(0, 0, 0)), GaussianNoise(sigma=0.0))
        torch.testing.assert_close(augmenter(x, augmenter.draw(x, generator())), x, atol=1e-7, rtol=0)


class TestNonparametric:
    def test_it_adds_what_the_network_makes_of_image_and_noise(self):
        x = images()
        augmenter = Nonparametric(generator())
        draw = augmenter.draw(x, generator())
        assert draw.xi.shape == (3, 1, 16, 12)
        expected = x + augmenter.network(torch.cat([x, draw.xi], 1))
        torch.testing.assert_close(augmenter(x, draw), expected)

    def test_a_network_of_zeros_changes_nothing(self):
        x = images()
        augmenter = Nonparametric(generator())
        for parameter in augmenter.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(augmenter(x, augmenter.draw(x, generator())), x)

    def test_the_released_variant_sees_no_noise_and_adds_some(self):
        x = images()
        augmenter = Nonparametric(generator(), released=True)
        draw = augmenter.draw(x, generator())
        expected = x + augmenter.network(x) + augmenter.noise.sigma * draw.eps
        torch.testing.assert_close(augmenter(x, draw), expected)

    def test_one_level_is_one_convolution_and_the_output(self):
        shapes = [tuple(p.shape) for p in Nonparametric(generator()).parameters()]
        assert shapes == [(16, 2, 3, 3), (16,), (1, 16, 3, 3), (1,)]

    def test_initial_weights_depend_on_the_generator_alone(self):
        torch.manual_seed(1)
        one = nn.utils.parameters_to_vector(Nonparametric(generator()).parameters())
        torch.manual_seed(2)
        other = nn.utils.parameters_to_vector(Nonparametric(generator()).parameters())
        assert torch.equal(one, other)

    def test_there_is_nothing_that_normalises(self):
        kinds = {type(m).__name__ for m in Nonparametric(generator(), features=(4, 8)).modules()}
        assert not any("Norm" in kind for kind in kinds)

    def test_sides_that_do_not_divide_are_refused(self):
        augmenter = Nonparametric(generator(), features=(4, 8, 8))
        x = images(size=(16, 10))
        with pytest.raises(UserError, match="divisible by 4"):
            augmenter(x, augmenter.draw(x, generator()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianNoise(), "initial values or a generator"),
        (lambda: GaussianNoise("loud", 0.1), "'loud'"),
        (lambda: GaussianNoise("range", 0.1), "2 parameter"),
        (lambda: GaussianNoise("fixed", (0.1, 0.2)), "1 parameter"),
        (lambda: IntensityNonUniformity(), "initial values or a generator"),
        (lambda: IntensityNonUniformity(basis="wavelet", exponents=(1, 1, 1)), "'wavelet'"),
        (lambda: IntensityNonUniformity(exponents=(0.5, 0.5)), "3 numbers"),
        (lambda: IntensityNonUniformity(exponents=(0.5, 0.5, 1.5)), "from 0 to 1"),
    ],
)
def test_wrong_settings_are_one_sentence(build, message):
    with pytest.raises(UserError, match=message) as error:
        build()
    assert str(error.value).endswith(".")
