"""The atlas mixture on images made by its own model, where the truth is known."""

import pytest
import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.models import atlas_mixture
from synthrepro.models.atlas_mixture import Atlas, fit_atlas, fit_mixture, place_atlas, segment_by_atlas

SIZE = (32, 28)
MEANS = (0.05, 0.3, 0.6, 0.9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anatomies(count: int, seed: int = 0, shift: float = 1.0, scale: float = 1.0) -> Tensor:
    """Label maps of three nested ellipses that move about, (B, H, W)."""
    g = generator(seed)
    centre = shift * torch.randn(count, 2, 1, 1, generator=g) + torch.tensor(SIZE)[:, None, None] / 2
    radius = scale * (1 + 0.05 * torch.randn(count, 1, 1, generator=g))
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    distance = ((rows - centre[:, 0]) / 1.1).hypot(columns - centre[:, 1]) / radius
    return sum((distance < r).long() for r in (12, 9, 5))  # type: ignore[return-value]


def paint(
    labels: Tensor, means: tuple[float, ...] = MEANS, sd: float = 0.03, bias: float = 0.0, seed: int = 0
) -> Tensor:
    """Intensities of the classes under a slope of the log field from -bias to bias, with noise: (B, 1, H, W)."""
    field = torch.linspace(-bias, bias, SIZE[0]).exp()[:, None]
    clean = torch.tensor(means)[labels] * torch.where(labels > 0, field, 1)
    return (clean + sd * torch.randn(labels.shape, generator=generator(seed))).clamp(0, 1)[:, None]


def share(maps: Tensor, labels: Tensor) -> float:
    """Share of pixels that are right."""
    return float((maps == labels).float().mean())


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.from_labels(anatomies(60, seed=5), 4, smoothing=1.0)


class TestAtlas:
    def test_priors_are_the_counts(self):
        labels = torch.zeros(4, 6, 5, dtype=torch.int64)
        labels[:3, 2, 2] = 1
        prior = Atlas.from_labels(labels, 2, smoothing=0, floor=0.02).prior
        assert prior.shape == (1, 2, 6, 5)
        assert prior[0, 1, 2, 2] == pytest.approx(0.75 * 0.98 + 0.01)
        assert prior[0, 1, 0, 0] == pytest.approx(0.01)

    def test_priors_add_up_to_1_and_are_positive(self, atlas):
        torch.testing.assert_close(atlas.prior.sum(1), torch.ones(1, *SIZE))
        assert atlas.prior.min() > 0

    def test_levels_are_kinds_of_label_maps(self):
        small, large = anatomies(10, 1, scale=0.5), anatomies(14, 2)
        mixed = torch.cat([small, large])[torch.randperm(24, generator=generator())]
        bank = Atlas.from_labels(mixed, 4, levels=2).prior
        alone = torch.cat([Atlas.from_labels(kind, 4).prior for kind in (small, large)])
        order = bank[:, 0].sum((1, 2)).argsort(descending=True)
        torch.testing.assert_close(bank[order], alone)

    def test_an_unlabelled_tissue_has_a_prior_of_its_own(self):
        assert Atlas.from_labels(anatomies(3), 3).prior.shape[1] == 4
        assert Atlas.from_labels(anatomies(3), 4).prior.shape[1] == 4

    def test_what_cannot_be_an_atlas_is_refused(self):
        with pytest.raises(UserError, match="0 to 2"):
            Atlas.from_labels(anatomies(3), 2)
        with pytest.raises(UserError, match="take fewer"):
            Atlas.from_labels(anatomies(3), 4, levels=5)


class TestFit:
    def test_the_log_likelihood_never_falls(self, atlas):
        images = paint(anatomies(3), bias=0.5).double()
        for gaussians in (None, (0, 1, 2, 2)):
            plain = fit_mixture(images, atlas.prior.double().expand(3, -1, -1, -1), gaussians)
            whole = fit_atlas(images, atlas, gaussians)  # with registrations in between
            for fit in (plain, whole):
                assert fit.log_likelihood.diff(dim=1).min() > -1e-12
            assert (plain.log_likelihood[:, -1] - plain.log_likelihood[:, 0]).min() > 0.1
            assert (whole.log_likelihood[:, -1] >= plain.log_likelihood[:, -1] - 1e-3).all()

    def test_it_is_the_likelihood_of_the_model(self, atlas):
        """Against torch's own mixture, at the parameters it ends with."""
        images = paint(anatomies(1), bias=0.3).double()
        prior = atlas.prior.double()
        prior = prior / prior.sum(1, keepdim=True)
        fit = fit_mixture(images, prior)
        z = (images[0, 0] + atlas_mixture.OFFSET).log()
        shift = fit.log_bias[0][..., None] * torch.tensor([0.0, 1, 1, 1])
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(prior[0].movedim(0, -1)),
            torch.distributions.Normal(fit.means[0] + shift, fit.sds[0]),
        )
        expected = mixture.log_prob(z).mean() - fit.coefficients.square().sum() / (2 * z.numel())
        assert float(fit.log_likelihood[0, -1]) == pytest.approx(float(expected), rel=1e-9)

    def test_it_converges(self, atlas):
        images, prior = paint(anatomies(3)).double(), atlas.prior.double().expand(3, -1, -1, -1)
        short = fit_mixture(images, prior, tolerance=1e-5)
        assert short.log_likelihood.shape[1] < 101  # the limit was not reached
        long = fit_mixture(images, prior, tolerance=0, iterations=300)
        torch.testing.assert_close(short.log_likelihood[:, -1], long.log_likelihood[:, -1], rtol=0, atol=1e-3)
        assert fit_mixture(images, prior, iterations=4, tolerance=0).log_likelihood.shape[1] == 5

    def test_it_finds_the_means_and_sds_of_a_mixture(self, atlas):
        """Log-normal classes: exactly the model."""
        labels = anatomies(8)
        means, sds = torch.tensor([-3.0, -1.6, -0.8, -0.2]), torch.tensor([0.1, 0.05, 0.1, 0.05])
        z = means[labels] + sds[labels] * torch.randn(labels.shape, generator=generator())
        fit = fit_atlas((z.exp() - atlas_mixture.OFFSET)[:, None], atlas, bias_order=0)
        assert (fit.means - means).abs().max() < 0.03
        assert (fit.sds.mean(0) / sds - 1).abs().max() < 0.05
        torch.testing.assert_close(fit.posterior.sum(1), torch.ones(8, *SIZE))

    def test_it_finds_the_bias_field(self, atlas):
        labels = anatomies(4)
        fit = fit_atlas(paint(labels, sd=0.01, bias=0.5), atlas)
        slope = torch.linspace(-0.5, 0.5, SIZE[0])[:, None].expand(4, *SIZE)
        tissue = labels > 0
        for i in range(4):
            error = (fit.log_bias[i] - slope[i])[tissue[i]]
            assert error.std() < 0.06
            assert fit.log_bias[i][tissue[i]].mean().abs() < 0.01  # a constant would not be told from the means

    def test_classes_that_share_a_gaussian_share_its_parameters(self, atlas):
        fit = fit_atlas(paint(anatomies(2), (0.05, 0.4, 0.8, 0.4)), atlas, (3, 1, 2, 1))
        assert fit.means.shape == (2, 3)
        assert (fit.means.exp() - torch.tensor([0.42, 0.82, 0.07])).abs().max() < 0.03  # in the order of the numbers

    def test_the_number_of_gaussians_is_checked(self, atlas):
        with pytest.raises(UserError, match="names 3 Gaussians for 4"):
            segment_by_atlas(paint(anatomies(1)), atlas, (0, 1, 2))


class TestSegment:
    def test_any_contrast_will_do(self, atlas):
        labels = anatomies(8)
        known = segment_by_atlas(paint(labels), atlas)
        inverted = segment_by_atlas(1 - paint(labels), atlas)
        permuted = segment_by_atlas(paint(labels, (0.6, 0.9, 0.05, 0.3)), atlas)
        assert known.dtype == torch.int64
        assert share(known, labels) > 0.97
        assert share(permuted, labels) > 0.97
        assert share(inverted, known) > 0.97

    def test_it_beats_the_prior_alone(self, atlas):
        labels = anatomies(8)
        prior = atlas.prior.argmax(1).expand(8, -1, -1)
        assert share(segment_by_atlas(paint(labels), atlas), labels) > share(prior, labels) + 0.08

    def test_the_bias_field_is_worth_its_estimation(self, atlas):
        labels = anatomies(8)
        images = paint(labels, (0.05, 0.3, 0.4, 0.55), sd=0.02, bias=0.5)
        without = segment_by_atlas(images, atlas, bias_order=0)
        assert share(segment_by_atlas(images, atlas), labels) > share(without, labels) + 0.08

    def test_registration_finds_an_anatomy_that_lies_elsewhere(self, atlas):
        labels = anatomies(6, shift=0.5).roll((3, -3), (1, 2))
        images = paint(labels, (0.05, 0.5, 0.6, 0.5), sd=0.04)  # two classes look alike: only their place tells
        still, moved = (segment_by_atlas(images, atlas, (0, 1, 2, 1), affine=affine) for affine in (False, True))
        assert share(moved, labels) > share(still, labels) + 0.02

    def test_the_level_is_found(self):
        small, large = anatomies(20, 1, scale=0.5), anatomies(20, 2)
        bank, alone = (
            Atlas.from_labels(torch.cat([small, large]), 4, levels=2),
            Atlas.from_labels(small, 4),
        )
        labels = anatomies(6, 3, scale=0.5)
        images = paint(labels)
        assert share(segment_by_atlas(images, bank), labels) > 0.95
        assert torch.equal(segment_by_atlas(images, bank), segment_by_atlas(images, alone))

    def test_unlabelled_tissue_is_fitted_and_answered_as_background(self):
        training, labels = anatomies(60, seed=5), anatomies(6)
        order = torch.tensor([0, 3, 1, 2])  # the outer tissue has no label: value K = 3
        atlas = Atlas.from_labels(order[training], 3)
        maps = segment_by_atlas(paint(labels), atlas)
        expected = order[labels]
        assert share(maps, expected.masked_fill(expected == 3, 0)) > 0.97

    def test_absent_classes_and_empty_images_give_no_nan(self, atlas):
        labels = anatomies(3).clamp_max(2)  # no innermost tissue
        images = torch.cat([paint(labels), torch.zeros(1, 1, *SIZE), torch.ones(1, 1, *SIZE)])
        images[2, 0, :, :] = images[2, 0].masked_fill(labels[2] == 0, 0)  # a masked background
        fit = fit_atlas(images, atlas)
        for name, value in vars(fit).items():
            assert value.isfinite().all(), name
        assert fit.log_likelihood.diff(dim=1).min() > -1e-5
        maps = segment_by_atlas(images, atlas)
        assert share(maps[:3].clamp_max(2), labels) > 0.9

    def test_an_image_is_answered_alike_in_any_batch(self, atlas):
        images = paint(anatomies(5), bias=0.2)
        together = segment_by_atlas(images, atlas)
        assert share(segment_by_atlas(images[3:], atlas), together[3:]) > 0.999
        assert share(segment_by_atlas(images, atlas, batch=2), together) > 0.999

    def test_images_must_be_as_large_as_the_atlas(self, atlas):
        with pytest.raises(UserError, match="do not fit an atlas"):
            segment_by_atlas(torch.zeros(1, 1, 8, 8), atlas)


def test_a_pose_moves_the_atlas_by_pixels():
    prior = torch.zeros(1, 1, 33, 17)
    prior[0, 0, 20, 4] = 1
    pose = torch.tensor([[3 / 33, -2 / 17, 0.0, 0, 0, 0]])
    assert place_atlas(prior, pose)[0, 0, 17, 6] == pytest.approx(1, abs=1e-4)  # looked up 3 down and 2 to the left
    turned = place_atlas(prior, torch.tensor([[0.0, 0, -1, 1, 1, -1]]))  # rows and columns swapped
    assert turned[0, 0, 12, 12] == pytest.approx(1, abs=1e-4)  # centre (16, 8): offset (4, -4) becomes (-4, 4)
    torch.testing.assert_close(place_atlas(prior, torch.zeros(1, 6)), prior)
