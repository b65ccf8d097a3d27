"""The Wasserstein GAN: closed forms of its losses, and a short training on a toy distribution."""

import pytest
import torch
from torch import Tensor, nn

from synthrepro.models import wgan


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def as_it_was():
    """Initial weights are drawn from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class TestPenalty:
    def test_of_a_linear_critic_it_is_known(self):
        w = torch.randn(3, 4, 4, generator=rng(1), dtype=torch.float64, requires_grad=True)
        real, fake = torch.randn(2, 5, 3, 4, 4, generator=rng(2), dtype=torch.float64)
        penalty = wgan.gradient_penalty(lambda x: (x * w).sum((1, 2, 3)), real, fake, rng())
        torch.testing.assert_close(penalty, (w.norm() - 1).square())
        (slope,) = torch.autograd.grad(penalty, w)
        torch.testing.assert_close(slope, 2 * (w.norm() - 1) * w / w.norm())

    def test_it_is_taken_between_real_and_fake_at_one_point_a_sample(self):
        """The gradient of |x|² / 2 is x itself; along a line from 0 to e the norm is the place on it."""
        e = torch.zeros(4000, 2, 3, 3)
        e[:, 0, 1, 1] = 1
        penalty = wgan.gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, e, torch.zeros_like(e), rng()).detach()
        assert float(penalty) == pytest.approx(1 / 3, abs=0.02)  # of a uniform place u: mean of (u - 1)²
        place = torch.rand(4000, generator=rng())
        assert float(penalty) == pytest.approx(float((place - 1).square().mean()), rel=1e-5)

    def test_the_losses_put_the_scores_the_right_way_round(self):
        def critic(x: Tensor) -> Tensor:
            return 2 * x[:, 0, 0, 0]  # of slope 2: a penalty of 1

        real, fake = torch.full((3, 1, 2, 2), 0.5), torch.full((3, 1, 2, 2), -0.25)
        assert float(wgan.critic_loss(critic, real, fake, rng())) == pytest.approx(-0.5 - 1.0 + 10)
        assert float(wgan.generator_score(critic, fake)) == pytest.approx(-0.5)

    def test_the_penalty_sends_nothing_to_the_samples(self):
        critic = wgan.Critic(2, 8, 4)
        fake = torch.zeros(2, 2, 8, 8, requires_grad=True)
        penalty = wgan.gradient_penalty(critic, torch.ones(2, 2, 8, 8), fake, rng())
        assert torch.autograd.grad(penalty, fake, allow_unused=True) == (None,)


class TestNetworks:
    @pytest.mark.parametrize("size", [8, 32])
    def test_shapes_and_range(self, size: int):
        samples = wgan.Generator(3, size, 4)(torch.randn(2, wgan.NOISE, generator=rng()))
        assert samples.shape == (2, 3, size, size)
        assert samples.abs().max() < 1
        assert wgan.Critic(3, size, 4)(samples).shape == (2,)

    def test_the_critic_scores_each_sample_by_itself(self):
        critic = wgan.Critic(2, 16, 4)
        x = torch.randn(3, 2, 16, 16, generator=rng())
        torch.testing.assert_close(critic(x)[1:2], critic(x[1:2]))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in critic.modules())

    @pytest.mark.parametrize("size", [4, 12])
    def test_sizes_that_do_not_halve_down_to_4_are_refused(self, size: int):
        for network in (wgan.Generator, wgan.Critic):
            with pytest.raises(ValueError, match="power of two"):
                network(2, size)


class TestSamples:
    def test_split_undoes_join(self):
        images = torch.rand(2, 3, 6, 5, generator=rng())
        labels = torch.randint(4, (2, 6, 5), generator=rng(1))
        samples = wgan.join(images, labels, 4)
        assert samples.shape == (2, 3 + 3, 6, 5)
        assert set(samples[:, 3:].unique().tolist()) == {-1, 1}
        back, again = wgan.split(samples, 3)
        torch.testing.assert_close(back, images)
        assert torch.equal(again, labels)

    def test_an_unsure_pixel_gets_the_highest_class_or_background(self):
        values = torch.tensor([[-0.1, -0.9], [0.2, 0.1], [-0.5, 0.01]])  # pixels x foreground classes
        samples = torch.cat([torch.zeros(1, 1, 3, 1), values.T[None, :, :, None]], 1)
        images, labels = wgan.split(samples, 1)
        assert labels.flatten().tolist() == [0, 1, 2]
        assert images.unique().tolist() == [0.5]


def test_a_short_training_moves_towards_the_data():
    """Bright discs, left or right, with their masks: the mean image and mask, and that they agree."""
    size, classes, g = 8, 2, rng()
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def data(count: int) -> Tensor:
        centre = 2 + 3 * torch.randint(2, (count, 1, 1), generator=g)
        labels = ((rows - 3.5).square() + (columns - centre).square() < 5).long()
        return wgan.join(0.1 + 0.7 * labels[:, None].float(), labels, classes)

    def made(count: int) -> Tensor:
        return generator(torch.randn(count, wgan.NOISE, generator=g))

    def errors() -> tuple[float, float]:
        """RMS error of the mean sample, and the share of pixels where image and mask disagree."""
        with torch.no_grad():
            samples = made(200)
        images, labels = wgan.split(samples, 1)
        mean = (samples.mean(0) - data(200).mean(0)).square().mean().sqrt()
        return float(mean), float(((images[:, 0] > 0.45) != labels).float().mean())

    generator, critic = wgan.Generator(2, size, 16), wgan.Critic(2, size, 16)
    optimisers = [torch.optim.Adam(m.parameters(), 2e-3, (0.0, 0.9)) for m in (critic, generator)]
    before = errors()
    for _ in range(150):
        for _ in range(wgan.CRITIC_STEPS):
            optimisers[0].zero_grad()
            wgan.critic_loss(critic, data(16), made(16).detach(), g).backward()
            optimisers[0].step()
        optimisers[1].zero_grad()
        (-wgan.generator_score(critic, made(16))).backward()
        optimisers[1].step()
    after = errors()
    assert after[0] < before[0] / 3
    assert after[1] < before[1] / 3
