"""An atlas and a Gaussian mixture fitted to each image: segmentation that never saw a training image's intensities.

The role of SAMSEG (Puonti et al., NeuroImage 2016) in Learn2Synth's tables, in its older and plainer form: Van
Leemput et al., Automated model-based bias field correction / tissue classification of MR images of the brain, IEEE
TMI 1999. The label maps of the training set give the prior probability of each class at each place; the intensities
of a class are one Gaussian whose mean and SD are fitted to the image at hand, with a smooth bias field, by
expectation-maximisation. So the contrast does not matter, beyond the one-Gaussian-a-class model.

Of SAMSEG's parts there are: priors from label maps, Gaussians that several structures may share, log intensities, a
smooth bias field in the loop, and an affine registration of the atlas, here of every slice in its plane and inside the
loop. Missing: the deformable mesh (the atlas fits an individual only as far as an affine map and the smoothing of the
priors reach), several Gaussians a class, priors on their parameters, and the third dimension: a two-dimensional atlas
is one of several levels, chosen by likelihood, and a slice from a place that no training map shows gets the wrong one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
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
SCOUT = 10  # iterations before levels are compared, and between two registrations
ROUNDS = 3  # registrations, a fit after each
STEPS = 15  # of gradient ascent in a registration


@dataclass(frozen=True)
class Atlas:
    """Prior probabilities of the classes at each place, one set for each level (such as the height of the slice)."""

    prior: Tensor
    """(L, N, H, W), adding up to 1 over the N label values."""
    classes: int
    """Values answered are 0 to classes - 1. N may be one more: tissue that the label maps leave unlabelled."""

    @classmethod
    def from_labels(
        cls, labels: Tensor, classes: int, smoothing: float = 1.0, levels: int = 1, floor: float = 0.05
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
    size = min(labels.shape[1], 16), min(labels.shape[2], 16)
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
    """(B, H, W), logarithm of the bias field, with mean 0 over tissue: a constant is not told from the means."""
    log_likelihood: Tensor
    """(B, T) a pixel, before each iteration and at the end, with the log prior of the coefficients; an image that has
    converged repeats its last. It never falls."""
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
    be multiplied. Means and field are updated to their maximum given the SDs, then the SDs, so that the log-likelihood
    never falls (generalised EM; Van Leemput et al. 1999, with cosines in place of polynomials).

    Args:
        images: (B, 1, H, W), [0, 1].
        prior: (B, N, H, W), positive, adding up to 1 over label values.
        gaussians: Gaussian of each label value, N numbers: values that share a number share mean and SD. None: one
            each. Fitted Gaussians are in the order of the numbers.
        bias_order: Highest total frequency of the field, half periods across the image; 0 for no field.
        iterations: At most so many.
        tolerance: An image has converged when its log-likelihood rises by less than this, a pixel.
        start: Where to begin; None begins with the prior as posterior.

    Raises:
        UserError: `gaussians` does not name a Gaussian for each label value.
    """
    count, _, *size = prior.shape
    index = _gaussian_of(prior, gaussians)
    z = _log(images)
    place = _pool(prior, index).flatten(2)  # (B, G, M)
    total = place.shape[1]
    basis = cosines(size, bias_order, z)  # (P, M)
    biased = _biased(index, z)

    if start is None:
        means = z.mean(1, keepdim=True).expand(-1, total)
        variances = z.var(1, keepdim=True).clamp_min(SMALLEST_SD**2).expand(-1, total)
        state = _maximise(z, place, basis, biased, means, variances)
    else:
        state = start.means, start.sds.square(), start.coefficients, start.log_bias.flatten(1)
    log_place = place.log()
    active = torch.ones(count, 1, dtype=torch.bool, device=z.device)
    history: list[Tensor] = []
    for i in range(iterations + 1):
        means, variances, coefficients, log_bias = state
        joint = log_place + _log_density(z, log_bias, biased, means, variances)  # (B, G, M)
        evidence = joint.logsumexp(1)
        weight = (joint - evidence[:, None]).exp()
        objective = evidence.mean(1) - coefficients.square().sum(1) / (2 * BIAS_SD**2 * z.shape[1])
        history.append(objective)
        if i:
            active = active & (objective - history[-2] > tolerance)[:, None]
        if i == iterations or not active.any():
            break
        updated = _maximise(z, weight, basis, biased, means, variances)
        state = tuple(torch.where(active, new, old) for new, old in zip(updated, state, strict=True))
    tissue = (weight * biased).sum(1)  # (B, M)
    level = (tissue * log_bias).sum(1, keepdim=True) / tissue.sum(1, keepdim=True).clamp_min(FEWEST)
    density = _log_density(z, log_bias, biased, means, variances)
    posterior = (prior.flatten(2).log() + density[:, index]).softmax(1)
    return Mixture(
        prior=prior,
        means=means + biased[..., 0] * level,
        sds=variances.sqrt(),
        coefficients=coefficients,
        log_bias=(log_bias - level).unflatten(1, size),
        log_likelihood=torch.stack(history, 1),
        posterior=posterior.unflatten(2, size),
    )


def _gaussian_of(prior: Tensor, gaussians: Sequence[int] | None) -> Tensor:
    """Gaussian of each label value, (N,), numbered without gaps."""
    values = prior.shape[1]
    chosen = range(values) if gaussians is None else gaussians
    if len(chosen) != values:
        raise UserError(f"gaussians names {len(chosen)} Gaussians for {values} label values: give one for each.")
    return torch.tensor(list(chosen), device=prior.device).unique(return_inverse=True)[1]


def _log(images: Tensor) -> Tensor:
    return (images[:, 0].flatten(1) + OFFSET).log()  # (B, M)


def _biased(index: Tensor, like: Tensor) -> Tensor:
    """1 for Gaussians that the bias field multiplies, 0 for that of label 0: (1, G, 1)."""
    return (torch.arange(int(index.max()) + 1, device=index.device) != index[0]).to(like)[None, :, None]


def _pool(prior: Tensor, index: Tensor) -> Tensor:
    """Prior of each Gaussian, (B, G, H, W): the sum of those of its label values."""
    return prior.new_zeros(len(prior), int(index.max()) + 1, *prior.shape[2:]).index_add_(1, index, prior)


def _log_density(z: Tensor, log_bias: Tensor, biased: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Log density of each Gaussian, (B, G, M)."""
    residual = z[:, None] - biased * log_bias[:, None] - means[..., None]
    return -0.5 * (residual.square() / variances[..., None] + (2 * math.pi * variances[..., None]).log())


def _maximise(
    z: Tensor, weight: Tensor, basis: Tensor, biased: Tensor, means: Tensor, variances: Tensor
) -> tuple[Tensor, ...]:
    """Means and bias coefficients given the variances, then the variances, from the posterior weights (B, G, M).

    Means and coefficients are one weighted least-squares problem. (Solved in turns, as Van Leemput et al. do, they
    converge slowly: over the brain, a sum of cosines comes close to the constant that the means have.)

    Returns:
        Means (B, G), variances (B, G), coefficients (B, P), log bias field (B, M).
    """
    gaussians = means.shape[1]
    mass = weight.sum(2)
    fitted = (mass > FEWEST).to(z)  # (B, G)
    precision = weight / variances[..., None]
    slopes = biased * precision
    own = torch.diag_embed(fitted * precision.sum(2) + 1 - fitted)  # (B, G, G)
    both = slopes @ basis.T  # (B, G, P)
    field = (slopes.sum(1)[:, None] * basis) @ basis.T  # (B, P, P)
    field = field + torch.eye(len(basis), device=z.device, dtype=z.dtype) / BIAS_SD**2
    kept = (1 - fitted) * means
    matrix = torch.cat(
        [torch.cat([own, fitted[..., None] * both], 2), torch.cat([(fitted[..., None] * both).mT, field], 2)], 1
    )
    pull = (slopes * (z[:, None] - kept[..., None])).sum(1) @ basis.T  # (B, P)
    target = torch.cat([fitted * (precision * z[:, None]).sum(2) + kept, pull], 1)
    solution = torch.linalg.solve(matrix.double(), target.double()[..., None])[..., 0].to(z)  # small, ill-conditioned
    means, coefficients = solution.split([gaussians, len(basis)], 1)

    log_bias = coefficients @ basis
    residual = z[:, None] - biased * log_bias[:, None] - means[..., None]
    spread = (weight * residual.square()).sum(2) / mass.clamp_min(FEWEST)
    return means, torch.where(fitted > 0, spread.clamp_min(SMALLEST_SD**2), variances), coefficients, log_bias


def place_atlas(prior: Tensor, pose: Tensor) -> Tensor:
    """The prior under an affine map, bilinear, edge values beyond the edge.

    Args:
        prior: (B, N, H, W).
        pose: (B, 6): translation (rows, columns) as a share of the image, then the matrix less the identity, row by
            row, of positions (row, column) in pixels about the image's centre. 0 is no change.
    """
    height, width = prior.shape[-2:]
    down, across, rr, rc, cr, cc = pose.unbind(1)
    theta = torch.stack(  # of (x, y) in halves of the image, as affine_grid has it
        [1 + cc, cr * height / width, 2 * across, rc * width / height, 1 + rr, 2 * down], 1
    )
    grid = F.affine_grid(theta.unflatten(1, (2, 3)), list(prior.shape), align_corners=False)
    return F.grid_sample(prior, grid, padding_mode="border", align_corners=False)


def register(
    images: Tensor, prior: Tensor, fit: Mixture, pose: Tensor, gaussians: Sequence[int] | None = None
) -> Tensor:
    """A pose at which the prior explains the images at least as well as at the given one, Gaussians and field fixed.

    Args:
        images, prior, gaussians: As :func:`fit_mixture`; the prior in no pose.
        fit: Where Gaussians and bias field are taken from.
        pose: (B, 6), see :func:`place_atlas`.

    Returns:
        (B, 6), the best that a few steps of Rprop come by: gradient signs with a step size of each parameter's own.
    """
    index = _gaussian_of(prior, gaussians)
    z = _log(images)
    density = _log_density(z, fit.log_bias.flatten(1), _biased(index, z), fit.means, fit.sds.square())
    place = _pool(prior, index)
    best, highest = pose, torch.full_like(pose[:, 0], -torch.inf)
    moving = pose.clone().requires_grad_()
    optimizer = torch.optim.Rprop([moving], lr=0.005, step_sizes=(1e-4, 0.03))
    for _ in range(STEPS):
        with torch.enable_grad():
            score = (place_atlas(place, moving).flatten(2).log() + density).logsumexp(1).mean(1)  # (B,)
            (moving.grad,) = torch.autograd.grad(-score.sum(), moving)
        better = score.detach() > highest
        best = torch.where(better[:, None], moving.detach(), best)
        highest = torch.where(better, score.detach(), highest)
        optimizer.step()
    return best


def _candidates(images: Tensor, atlas: Atlas, gaussians: Sequence[int] | None, bias_order: int) -> Iterator[Mixture]:
    """A short fit at each level of the atlas from each of two starts, for the last value of the likelihood only.

    A field that is fitted from the beginning may explain anatomy away, one that comes later may find intensities that
    are explained already: which goes wrong depends on the image.
    """
    for level in atlas.prior.to(images):
        prior = level.expand(len(images), -1, -1, -1)
        plain = fit_mixture(images, prior, gaussians, bias_order=0, iterations=SCOUT)
        coefficients = plain.coefficients.new_zeros(len(images), len(cosines((1, 1), bias_order, images)))
        for start in (None, replace(plain, coefficients=coefficients)):
            fit = fit_mixture(images, prior, gaussians, bias_order=bias_order, iterations=SCOUT, start=start)
            yield replace(fit, log_likelihood=fit.log_likelihood[:, -1:])


def _likelier(first: Mixture, second: Mixture) -> Mixture:
    """Of each image, the likelier of two fits."""
    better = (second.log_likelihood > first.log_likelihood)[:, 0]
    pairs = ((name, value, getattr(second, name)) for name, value in vars(first).items())
    return Mixture(**{name: torch.where(better.reshape(-1, *(1,) * (a.ndim - 1)), b, a) for name, a, b in pairs})


@torch.no_grad()
def fit_atlas(
    images: Tensor, atlas: Atlas, gaussians: Sequence[int] | None = None, *, bias_order: int = 3, affine: bool = True
) -> Mixture:
    """Choose each image's level and start by likelihood, then fit the mixture and register the atlas in turns.

    Args:
        images: (B, 1, H, W), [0, 1], as large as the atlas.
        atlas: On any device.
        gaussians, bias_order: As :func:`fit_mixture`.
        affine: Whether to register; the prior is else used in the frame of the training maps.

    Raises:
        UserError: Images and atlas differ in size, or `gaussians` is of the wrong length.
    """
    if images.shape[-2:] != atlas.prior.shape[-2:]:
        raise UserError(
            f"Images of {tuple(images.shape[-2:])} do not fit an atlas of {tuple(atlas.prior.shape[-2:])}: build it "
            "from label maps of the same size."
        )
    fit = reduce(_likelier, _candidates(images, atlas, gaussians, bias_order))
    prior = fit.prior
    history = [fit.log_likelihood]
    pose = images.new_zeros(len(images), 6)
    for _ in range(ROUNDS if affine else 0):
        pose = register(images, prior, fit, pose, gaussians)
        placed = place_atlas(prior, pose)
        fit = fit_mixture(images, placed, gaussians, bias_order=bias_order, iterations=SCOUT, start=fit)
        history.append(fit.log_likelihood)
    fit = fit_mixture(images, fit.prior, gaussians, bias_order=bias_order, start=fit)
    return replace(fit, log_likelihood=torch.cat([*history, fit.log_likelihood], 1))


def segment_by_atlas(
    images: Tensor,
    atlas: Atlas,
    gaussians: Sequence[int] | None = None,
    *,
    bias_order: int = 3,
    affine: bool = True,
    batch: int = 16,
) -> Tensor:
    """Most probable class of each pixel; arguments and errors as :func:`fit_atlas`.

    Returns:
        Label maps (B, H, W), int64, values 0 to classes - 1; unlabelled tissue is answered as 0.
    """
    maps = torch.cat(
        [
            fit_atlas(part, atlas, gaussians, bias_order=bias_order, affine=affine).posterior.argmax(1)
            for part in images.split(batch)
        ]
    )
    return maps.masked_fill(maps == atlas.classes, 0)
