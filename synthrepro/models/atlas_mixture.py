"""An atlas and a Gaussian mixture fitted to each image: segmentation that never saw a training image's intensities.

The role of SAMSEG (Puonti et al., NeuroImage 2016) in Learn2Synth's tables, in its older and plainer form: Van
Leemput et al., Automated model-based bias field correction / tissue classification of MR images of the brain, IEEE
TMI 1999. The label maps of the training set give the prior probability of each class at each place; the intensities
of a class are one Gaussian whose mean and SD are fitted to the image at hand, with a smooth bias field, by
expectation-maximisation. So the contrast does not matter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from synthrepro.errors import UserError

OFFSET = 0.02  # added before the logarithm, units of intensity: background noise stays at a finite distance
SMALLEST_SD = 0.02  # of a Gaussian, log units: 2 % of the intensity; a masked background has no spread of its own
BIAS_SD = 1.0  # of the prior of each bias coefficient, log units: wide, it only keeps empty images solvable
FEWEST = 1.0  # pixels that a Gaussian needs to be fitted; one that has fewer keeps its parameters


@dataclass(frozen=True)
class Atlas:
    """Prior probabilities of the classes at each place, one set for each level (such as the height of the slice)."""

    prior: Tensor
    """(L, N, H, W), adding up to 1 over the N label values."""
    classes: int
    """Values answered are 0 to classes - 1. N may be one more: tissue that the label maps leave unlabelled."""

    @classmethod
    def from_labels(
        cls, labels: Tensor, classes: int, smoothing: float = 1.0, levels: int = 1, floor: float = 0.01
    ) -> Self:
        """Count labels at each place.

        Args:
            labels: (M, H, W), int64, values 0 to classes - 1; pixels of value `classes` are tissue without a label,
                with a prior and a Gaussian of their own, which is answered as 0.
            classes: Classes, background included.
            smoothing: SD of a Gaussian that smooths the counts, pixels.
            levels: Sets of similar label maps, one prior each, found by Ward's clustering of the maps.
            floor: Share of the prior that is uniform over classes, since the training maps do not show everything.

        Raises:
            UserError: Label values out of range, or fewer label maps than levels.
        """
        low, high = labels.aminmax()
        if low < 0 or high > classes:
            raise UserError(f"Label values must be 0 to {classes}, but these run from {int(low)} to {int(high)}.")
        if not 1 <= levels <= len(labels):
            raise UserError(f"An atlas of {levels} levels cannot be made of {len(labels)} label maps: take fewer.")
        values = max(classes, int(high) + 1)
        group = torch.from_numpy(_cluster(labels, values, levels))
        counts = torch.stack(
            [F.one_hot(labels[group == level].cpu(), values).double().mean(0) for level in range(levels)]
        )  # (L, H, W, N)
        smooth = gaussian_filter(counts.numpy(), smoothing, axes=(1, 2), mode="nearest")
        prior = torch.from_numpy(smooth).movedim(-1, 1)
        prior = prior / prior.sum(1, keepdim=True) * (1 - floor) + floor / values
        return cls(prior.float().contiguous(), classes)


def _cluster(labels: Tensor, values: int, levels: int) -> np.ndarray:
    """Level of each label map, (M,), by Ward's method on coarse class fractions."""
    if levels == 1:
        return np.zeros(len(labels), dtype=np.int64)
    size = tuple(min(s, 16) for s in labels.shape[1:])
    maps = [F.adaptive_avg_pool2d(F.one_hot(m.cpu(), values).movedim(-1, 0).float(), size) for m in labels]
    tree = linkage(torch.stack(maps).flatten(1).numpy(), "ward")
    return fcluster(tree, levels, "maxclust").astype(np.int64) - 1


@dataclass(frozen=True)
class Mixture:
    """What was fitted to each of B images; G Gaussians, all in log intensity."""

    prior: Tensor
    """(B, N, H, W), the atlas as it was used."""
    means: Tensor
    """(B, G)."""
    sds: Tensor
    """(B, G)."""
    coefficients: Tensor
    """(B, P) of the bias field's cosines."""
    log_bias: Tensor
    """(B, H, W), logarithm of the bias field."""
    log_likelihood: Tensor
    """(B, T) a pixel, before each iteration and at the end, with the log prior of the coefficients; converged images
    repeat their last."""
    posterior: Tensor
    """(B, N, H, W), adding up to 1 over label values."""


def cosines(size: Sequence[int], order: int, like: Tensor) -> Tensor:
    """Two-dimensional cosines (DCT-II) of total frequency 1 to order, (P, H W), without the constant."""
    rows, columns = (
        torch.cos(math.pi * (torch.arange(s)[None] + 0.5) * torch.arange(order + 1)[:, None] / s) for s in size
    )
    waves = [torch.outer(rows[u], columns[v]) for u in range(order + 1) for v in range(order + 1 - u) if u + v]
    return torch.stack(waves).flatten(1).to(like) if waves else like.new_zeros(0, math.prod(size))


@torch.no_grad()
def fit_mixture(
    images: Tensor,
    prior: Tensor,
    gaussians: Sequence[int] | None = None,
    *,
    bias_order: int = 3,
    iterations: int = 100,
    tolerance: float = 1e-5,
    start: Mixture | None = None,
) -> Mixture:
    """Fit Gaussians and bias field to each image by expectation-maximisation.

    Of the log intensity z at a pixel, p(z) = sum_k prior_k N(z - b; mean_g(k), sd_g(k)^2), with b the log of the bias
    field, a sum of low-order cosines; b is 0 for the Gaussian of label 0, since an empty background has no signal to
    be multiplied. Means, field and SDs are updated one after the other, each to its maximum given the others, so that
    the log-likelihood never falls (generalised EM; Van Leemput et al. 1999, eqs. for the polynomial field, with
    cosines in place of polynomials).

    Args:
        images: (B, 1, H, W), [0, 1].
        prior: (B, N, H, W), positive, adding up to 1 over label values.
        gaussians: Gaussian of each label value, numbered from 0: classes that share a number share mean and SD.
            None: one each.
        bias_order: Highest total frequency of the field, half periods across the image; 0 for no field.
        iterations: At most so many.
        tolerance: An image has converged when its log-likelihood rises by less than this share of its size.
        start: Where to begin; None begins with the prior as posterior.

    Raises:
        UserError: `gaussians` does not name a Gaussian for each label value.
    """
    count, values, *size = prior.shape
    index = torch.tensor(list(range(values)) if gaussians is None else list(gaussians), device=prior.device)
    if len(index) != values:
        raise UserError(f"gaussians names {len(index)} Gaussians for {values} label values: give one for each.")
    total = int(index.max()) + 1
    z = (images[:, 0].flatten(1) + OFFSET).log()  # (B, M)
    place = prior.new_zeros(count, total, z.shape[1]).index_add_(1, index, prior.flatten(2))  # (B, G, M)
    basis = cosines(size, bias_order, z)  # (P, M)
    biased = (torch.arange(total, device=z.device) != index[0]).to(z)[None, :, None]  # (1, G, 1)

    if start is None:
        coefficients = z.new_zeros(count, len(basis))
        means = z.mean(1, keepdim=True).expand(-1, total)
        variances = z.var(1, keepdim=True).clamp_min(SMALLEST_SD**2).expand(-1, total)
        means, coefficients, variances = _maximise(z, place, basis, biased, means, coefficients, variances)
    else:
        means, coefficients, variances = start.means, start.coefficients, start.sds.square()
    log_place = place.log()
    active = torch.ones(count, 1, dtype=torch.bool, device=z.device)
    history: list[Tensor] = []
    for i in range(iterations + 1):
        joint = log_place + _log_density(z, coefficients @ basis, biased, means, variances)  # (B, G, M)
        evidence = joint.logsumexp(1)
        objective = evidence.mean(1) - coefficients.square().sum(1) / (2 * BIAS_SD**2 * z.shape[1])
        history.append(objective)
        if i:
            rise = objective - history[-2]
            active = active & (rise > tolerance * objective.abs())[:, None]
        if i == iterations or not active.any():
            break
        weight = (joint - evidence[:, None]).exp()
        updated = _maximise(z, weight, basis, biased, means, coefficients, variances)
        means, coefficients, variances = (
            torch.where(active, new, old) for new, old in zip(updated, (means, coefficients, variances), strict=True)
        )
    density = _log_density(z, coefficients @ basis, biased, means, variances)
    posterior = (prior.flatten(2).log() + density[:, index]).softmax(1)
    return Mixture(
        prior=prior,
        means=means,
        sds=variances.sqrt(),
        coefficients=coefficients,
        log_bias=(coefficients @ basis).unflatten(1, size),
        log_likelihood=torch.stack(history, 1),
        posterior=posterior.unflatten(2, size),
    )


def _log_density(z: Tensor, log_bias: Tensor, biased: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Log density of each Gaussian, (B, G, M)."""
    residual = z[:, None] - biased * log_bias[:, None] - means[..., None]
    return -0.5 * (residual.square() / variances[..., None] + (2 * math.pi * variances[..., None]).log())


def _maximise(
    z: Tensor, weight: Tensor, basis: Tensor, biased: Tensor, means: Tensor, coefficients: Tensor, variances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, then bias coefficients, then variances, each given the others and the posterior weights (B, G, M)."""
    mass = weight.sum(2)
    enough = mass > FEWEST
    mass = mass.clamp_min(FEWEST)
    corrected = z[:, None] - biased * (coefficients @ basis)[:, None]  # (B, G, M)
    means = torch.where(enough, (weight * corrected).sum(2) / mass, means)

    precision = weight * biased / variances[..., None]
    normal = (precision.sum(1)[:, None] * basis) @ basis.T  # (B, P, P)
    normal = normal + torch.eye(len(basis), device=z.device, dtype=z.dtype) / BIAS_SD**2
    target = (precision * (z[:, None] - means[..., None])).sum(1) @ basis.T  # (B, P)
    coefficients = torch.linalg.solve(normal, target[..., None])[..., 0]

    residual = z[:, None] - biased * (coefficients @ basis)[:, None] - means[..., None]
    spread = (weight * residual.square()).sum(2) / mass
    return means, coefficients, torch.where(enough, spread.clamp_min(SMALLEST_SD**2), variances)


def place_atlas(prior: Tensor, pose: Tensor) -> Tensor:
    """The prior in an affine pose, bilinear, edge values beyond the edge.

    Args:
        prior: (B, N, H, W).
        pose: (B, 6): translation (rows, columns) as a share of the image, then the matrix less the identity, row-major,
            about the image's centre, pixels.
    """
    height, width = prior.shape[-2:]
    matrix = torch.eye(2, device=pose.device, dtype=pose.dtype) + pose[:, 2:].unflatten(1, (2, 2))
    (rr, rc), (cr, cc) = matrix.unbind(1)[0].unbind(1), matrix.unbind(1)[1].unbind(1)
    theta = torch.stack(  # of (x, y) in units of half the image, as affine_grid has it
        [cc, cr * height / width, 2 * pose[:, 1], rc * width / height, rr, 2 * pose[:, 0]], 1
    ).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, list(prior.shape), align_corners=False)
    return F.grid_sample(prior, grid, padding_mode="border", align_corners=False)


def register(images: Tensor, atlas: Tensor, fit: Mixture, index: Tensor, pose: Tensor) -> Tensor:
    """A pose (B, 6) at which the atlas explains the images no worse than at the given one, the mixture held fixed."""
    z = (images[:, 0].flatten(1) + OFFSET).log()
    biased = (torch.arange(fit.means.shape[1], device=z.device) != index[0]).to(z)[None, :, None]
    density = _log_density(z, fit.log_bias.flatten(1), biased, fit.means, fit.sds.square())
    place = atlas.new_zeros(len(atlas), fit.means.shape[1], *atlas.shape[2:]).index_add_(1, index, atlas)

    best, highest = pose, torch.full_like(pose[:, 0], -torch.inf)
    pose = pose.clone().requires_grad_()
    steps = torch.optim.Rprop([pose], lr=0.005, step_sizes=(1e-4, 0.03))
    for _ in range(STEPS):
        with torch.enable_grad():
            fit_ = (place_atlas(place, pose).flatten(2).log() + density).logsumexp(1).mean(1)  # (B,)
            (pose.grad,) = torch.autograd.grad(-fit_.sum(), pose)
        better = fit_.detach() > highest
        best = torch.where(better[:, None], pose.detach(), best)
        highest = torch.where(better, fit_.detach(), highest)
        steps.step()
    return best


STEPS = 15


@torch.no_grad()
def fit_atlas(images: Tensor, atlas: Atlas, gaussians=None, *, bias_order: int = 3, rounds: int = 3) -> Mixture:
    index = torch.tensor(list(range(atlas.prior.shape[1])) if gaussians is None else list(gaussians))
    bank = atlas.prior.to(images)
    fits = [
        fit_mixture(images, p.expand(len(images), -1, -1, -1), gaussians, bias_order=bias_order, iterations=10)
        for p in bank
    ]
    level = torch.stack([f.log_likelihood[:, -1] for f in fits]).argmax(0)
    prior = bank[level]
    fit = fit_mixture(images, prior, gaussians, bias_order=bias_order, iterations=10)
    pose = images.new_zeros(len(images), 6)
    for _ in range(rounds):
        pose = register(images, prior, fit, index, pose)
        fit = fit_mixture(images, place_atlas(prior, pose), gaussians, bias_order=bias_order, iterations=10, start=fit)
    return fit_mixture(images, fit.prior, gaussians, bias_order=bias_order, start=fit)


def segment_by_atlas(images: Tensor, atlas: Atlas, gaussians: Sequence[int] | None = None, **options: int) -> Tensor:
    maps = fit_atlas(images, atlas, gaussians, **options).posterior.argmax(1)
    return maps.masked_fill(maps == atlas.classes, 0)
