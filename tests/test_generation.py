"""Scores of generation against closed forms, scipy's matrix root and counting by hand."""

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from synthrepro.generation import frechet_distance, generation_scores, precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(n: int, d: int, seed: int = 0) -> Tensor:
    """A sample (n, d) whose own mean is 0 and whose own covariance is the identity."""
    x = normal(n, d, seed=seed)
    return torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5


def line(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


class TestFrechetDistance:
    def test_a_shift_counts_by_its_square(self):
        mean = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
        assert frechet_distance(white(50, 3), white(40, 3, 1) + mean) == pytest.approx(10.25, rel=1e-12)

    def test_spreads_count_by_the_difference_of_standard_deviations(self):
        sd = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)
        expected = 2.0**2 + 1.5**2 + 1.0**2
        assert frechet_distance(white(50, 3) * sd[0], white(40, 3, 1) * sd[1]) == pytest.approx(expected, rel=1e-12)

    def test_any_covariances_as_by_the_matrix_root(self):
        a = normal(200, 6) @ normal(6, 6, seed=1)
        b = normal(150, 6, seed=2) @ normal(6, 6, seed=3) + 0.3
        cov = [x.T.cov().numpy() for x in (a, b)]
        root = sqrtm(cov[0] @ cov[1]).real.trace()
        expected = float((a.mean(0) - b.mean(0)).square().sum()) + cov[0].trace() + cov[1].trace() - 2 * root
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)

    def test_fewer_images_than_features(self):
        """Two pairs of opposite points: covariances 2 u u' and 2 v v', whose product's root has trace 2 |u v|."""
        u, v = normal(2, 64)
        found = frechet_distance(torch.stack([u, -u]), torch.stack([v, -v]))
        assert found == pytest.approx(float(2 * u @ u + 2 * v @ v - 4 * (u @ v).abs()), rel=1e-12)

    @pytest.mark.parametrize("shape", [(100, 8), (20, 64), (2, 3)])
    def test_the_same_images_are_at_no_distance(self, shape: tuple[int, int]):
        x = normal(*shape)
        assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-10)

    def test_large_samples_approach_their_distributions(self):
        a, b = normal(20_000, 4), 2 * normal(20_000, 4, seed=1) + 1
        assert frechet_distance(a.float(), b.float()) == pytest.approx(4 * (1 + 1), rel=0.02)


class TestPrecisionRecall:
    # of 0, 1, ... 9 the third other neighbour is 2 away, at the ends 3
    real = line(*range(10))

    def test_the_same_images(self):
        assert precision_recall(self.real, self.real.flip(0)) == (1.0, 1.0)

    def test_images_far_away(self):
        assert precision_recall(self.real, self.real + 100) == (0.0, 0.0)

    def test_some_of_the_real_images(self):
        """0, 1, 2, 3 reach 3, 2, 2, 3: up to 6, the surface included."""
        assert precision_recall(self.real, line(0, 1, 2, 3)) == (1.0, 0.7)

    def test_beyond_the_end(self):
        """10, 11, 12 lie within 3 of 9, and 13 not; 10 reaches 7, and nothing goes further."""
        assert precision_recall(self.real, line(10, 11, 12, 13)) == (0.75, 0.3)

    def test_other_neighbours(self):
        """With the nearest alone balls of 0 ... 9 reach 1; those of 20 and 20.5 reach a half."""
        assert precision_recall(self.real, line(10, 10.5, 20, 20.5), k=1) == (0.25, 0.0)

    def test_a_collapsed_generator_is_precise_and_recalls_little(self):
        real = normal(400, 2).float()
        precision, recall = precision_recall(real, 0.05 * normal(400, 2, seed=1).float())
        assert precision > 0.95
        assert recall < 0.05

    def test_a_generator_of_copies_recalls_only_what_it_copies(self):
        """Far from the origin, where distances from squared norms would be lost in rounding."""
        real = 1000 + normal(40, 64).float()
        assert precision_recall(real, real[:1].repeat(40, 1)) == (1.0, 1 / 40)

    @pytest.mark.parametrize("k", [1, 3])
    def test_as_counted_by_hand(self, k: int):
        real, generated = normal(12, 3), normal(9, 3, seed=1) + 1

        def share(of: Tensor, around: Tensor) -> float:
            radii = [sorted(float((a - b).norm()) for b in around)[k] for a in around]  # [0] is a itself
            inside = [any((x - a).norm() <= r for a, r in zip(around, radii, strict=True)) for x in of]
            return sum(inside) / len(inside)

        expected = share(generated, real), share(real, generated)
        assert 0 < expected[0] < 1
        assert 0 < expected[1] < 1
        assert precision_recall(real, generated, k) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("rows", [1, 7, 29])
    def test_chunks_change_nothing(self, rows: int):
        real, generated = normal(30, 5).float(), normal(41, 5, seed=1).float()
        whole = precision_recall(real, generated)
        assert 0 < min(whole) < 1
        assert precision_recall(real, generated, rows=rows) == whole


class TestScores:
    def test_five_scores_and_what_they_are_of(self):
        real, generated = line(*range(10)), line(0, 1, 2, 3)
        spatial = white(10, 2), white(4, 2, 1) + 1
        scores = generation_scores(real, generated, *spatial)
        assert list(scores) == ["fid", "sfid", "precision", "recall", "f1"]
        assert scores["fid"] == frechet_distance(real, generated)
        assert scores["sfid"] == pytest.approx(2)
        assert (scores["precision"], scores["recall"]) == (1.0, 0.7)
        assert scores["f1"] == pytest.approx(1.4 / 1.7)

    def test_without_any_overlap_f1_is_zero(self):
        a = white(8, 2)
        assert generation_scores(a, a + 100, a, a)["f1"] == 0.0

    @pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((5, 3), (1, 3)), ((5, 3), (5, 3, 1)), ((5,), (5,))])
    def test_features_that_do_not_fit_are_refused(self, shapes: tuple[tuple[int, ...], tuple[int, ...]]):
        for score in (frechet_distance, precision_recall):
            with pytest.raises(ValueError, match=r"must be \(N, D\) and \(M, D\)"):
                score(*(torch.zeros(shape) for shape in shapes))

    def test_as_many_images_as_neighbours_are_too_few(self):
        with pytest.raises(ValueError, match="of 4 or more"):
            precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
