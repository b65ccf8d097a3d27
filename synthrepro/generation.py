r"""How close generated images come to real ones: FID, sFID, precision, recall and F1, from features of both.

Table 1 of Huang et al., arXiv 2402.15216, which names these scores and no implementation. Where a choice is open it is
that of guided-diffusion's ``evaluations/evaluator.py``, the usual one in diffusion; features come from
:mod:`synthrepro.models.extractors`.

Every score depends on the extractor and on how many images there are: with fewer of them the Fréchet distance comes
out larger, also between two samples of the same distribution. Compare scores of equal numbers of images only.
"""

import torch
from torch import Tensor

ROWS = 1024  # rows of a matrix of distances that are in memory at once


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    r"""Squared Fréchet distance between normal distributions with the means and covariances of two sets of features.

    Heusel et al., NeurIPS 2017, equation 6:

    .. math:: \|\mu_r - \mu_g\|^2 + \operatorname{tr}\left(\Sigma_r + \Sigma_g - 2 (\Sigma_r \Sigma_g)^{1/2}\right)

    Of Inception's pooled features this is FID. Of its spatial ones it is sFID (Nash et al., ICML 2021): the formula is
    the same, so that there is no second function.

    With centred features A, B divided by :math:`\sqrt{N - 1}, \sqrt{M - 1}`, the root's trace is the sum of the
    singular values of :math:`A B^\top`. No root of a singular product is taken, as MONAI's ``FIDMetric`` and the
    evaluator do, so that it is as exact with fewer images than features. (MONAI's also passes an argument that scipy
    1.18 removes.) Computed in float64.

    Args:
        real: (N, D), N at least 2.
        generated: (M, D), M at least 2.

    Raises:
        ValueError: Other shapes.
    """
    _check(real, generated, 2)
    shift, total, factors = real.double().mean(0) - generated.double().mean(0), 0.0, []
    for features in (real.double(), generated.double()):
        centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
        total += float(centred.square().sum())  # the covariance's trace
        # A = Q R, and Q changes no singular value: R has at most D rows
        factors.append(torch.linalg.qr(centred, mode="r").R)
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return max(0.0, float(shift.square().sum()) + total - 2 * float(root))  # rounding may leave it below


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, rows: int = ROWS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, equations 1 and 2).

    Precision is the share of generated images that lie in some ball around a real one, whose radius is the distance to
    its k-th nearest other real image; recall is the share of real images in such balls around generated ones. A point
    on a ball's surface is inside.

    The paper takes k = 3 and VGG-16's features; guided-diffusion's evaluator takes k = 3 and the pooled features of
    FID, and computes distances in float16, as |u|² - 2 u·v + |v|², unless they overflow. Here the differences are taken
    first, in the features' own type: a copy of an image is at distance 0, and copies decide these scores when a
    generator collapses or memorises.

    Args:
        real: (N, D), N more than k.
        generated: (M, D), M more than k.
        k: Which neighbour.
        rows: So many rows of a matrix of distances are in memory at once; changes nothing else.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: Other shapes.
    """
    _check(real, generated, k + 1)
    reach_real, reach_generated = _radii(real, k, rows), _radii(generated, k, rows)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for some, reach in zip(generated.split(rows), reach_generated.split(rows), strict=True):
        distance = _distance(some, real)  # (rows, N)
        precise.append((distance <= reach_real).any(1))
        recalled |= (distance <= reach[:, None]).any(0)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def generation_scores(
    real_pooled: Tensor, generated_pooled: Tensor, real_spatial: Tensor, generated_spatial: Tensor
) -> dict[str, float]:
    """The five scores of Table 1.

    Args:
        real_pooled, generated_pooled: (N, D) and (M, D).
        real_spatial, generated_spatial: (N, d) and (M, d), of the same images.

    Returns:
        ``fid``, ``sfid`` (0 is best, unbounded), ``precision``, ``recall`` and their harmonic mean ``f1`` (in [0, 1]; 0
        where both are 0). The last three are of the pooled features.

    Raises:
        ValueError: Shapes differ, or there are fewer than four images.
    """
    precision, recall = precision_recall(real_pooled, generated_pooled)
    return {
        "fid": frechet_distance(real_pooled, generated_pooled),
        "sfid": frechet_distance(real_spatial, generated_spatial),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    }


def _radii(features: Tensor, k: int, rows: int) -> Tensor:
    """Distance of each (N, D) to its k-th nearest other one, (N,); the nearest of all is itself."""
    return torch.cat([_distance(some, features).kthvalue(k + 1, dim=1).values for some in features.split(rows)])


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check(real: Tensor, generated: Tensor, least: int) -> None:
    shapes = [tuple(features.shape) for features in (real, generated)]
    if any(len(shape) != 2 or shape[0] < least for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"Features must be (N, D) and (M, D) with N and M of {least} or more, not {shapes}.")
