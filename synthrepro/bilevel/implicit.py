r"""Hypergradients by the implicit function theorem, at a solution of the inner problem.

Where the inner problem is solved, :math:`\nabla_\phi L_\text{inner}(\phi^*(\theta), \theta) = 0`, the path of the
optimiser no longer matters:

.. math::

    h = \frac{d}{d\theta} L_\text{outer}(\phi^*(\theta), \theta)
      = \frac{\partial L_\text{outer}}{\partial\theta}
      - \Bigl(\frac{\partial^2 L_\text{inner}}{\partial\phi\,\partial\theta}\Bigr)^{\!\top} x, \qquad
    H x = v, \qquad
    H = \frac{\partial^2 L_\text{inner}}{\partial\phi^2}, \quad v = \frac{\partial L_\text{outer}}{\partial\phi} .

Neither matrix is formed: the inner gradient is computed once with its graph, and each product with :math:`H` is one
vector-Jacobian product of it, with the same batch, noise and dropout each time. In FLOPs of a plain training step that
is 4 and 2 more for each product; memory is that of :func:`exact`, however many products. Two ways to solve for x:

- :func:`conjugate_gradient` (Pedregosa 2016; Rajeswaran et al. 2019) needs :math:`H + \lambda I` positive definite
  and few products;
- :func:`neumann` (Lorraine et al. 2020, algorithm 3) sums a geometric series and needs a learning rate. Its sum of J
  terms is, at a solution, what J steps of gradient descent with that learning rate give (:func:`unrolled`).

The theorem asks for a solution. At a network that is still learning these are estimates of unknown error, and an
indefinite H, which a network has until late, breaks both solvers; they say so with a warning. The residual that comes
back is that of the linear system alone and says nothing of how far the inner problem is from solved.

Weight decay belongs to H: put it into the inner loss, or, for one coefficient, into ``damping``. Released code has
differed: the conjugate gradients of ``hypergrad`` 0.0.1 update their direction with the old residual, a relative error
of 0.5 after as many iterations as there are parameters and more after twice as many.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .guards import twice_differentiable
from .hypergradient import (
    Gradients,
    Loss,
    Step,
    _averaged,
    _check_finite,
    _check_like,
    _detached,
    _evaluated,
    _for_params,
    _leaves,
    _state,
    _total,
)
from .processes import Group, averaged
from .updates import State, Tensors, Update


class NotConverged(RuntimeWarning):
    """The linear system behind an implicit hypergradient is not solved; the message has the relative residual."""


@dataclass(frozen=True)
class Implicit:
    """An implicit hypergradient and how well its linear system was solved; every tensor is detached.

    Attributes:
        hypergradient: Derivative of the outer loss, the direct part included; named and shaped like ``hparams``.
        inner_loss: Inner loss at the given parameters, a scalar.
        outer_loss: Outer loss at the given parameters, a scalar.
        residual: ``|(H + damping I) x - v| / |v|``, computed from x itself; 0 if v is zero, 1 if x is.
        iterations: Products with H that the solver took; one more, for the residual, is not counted.
    """

    hypergradient: Tensors
    inner_loss: Tensor
    outer_loss: Tensor
    residual: float
    iterations: int


def neumann(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    *,
    terms: int,
    lr: float,
    group: Group = None,
) -> Implicit:
    r"""Implicit hypergradient by a truncated Neumann series (Lorraine et al. 2020).

    .. math:: x = \eta \sum_{j=0}^{J-1} (I - \eta H)^j\, v

    It converges where every eigenvalue of H lies between 0 and :math:`2/\eta`, and its residual is then the length of
    :math:`(I - \eta H)^J v` over that of v. One term is the estimate of Luketina et al. (2016), H replaced by
    :math:`I/\eta`; no product with H is needed for it.

    Args:
        inner_loss: ``(params, hparams) -> scalar``, the loss that the parameters minimise.
        outer_loss: ``(params, hparams) -> scalar``.
        params: Named tensors, any shapes, floating point, at a minimum of the inner loss; not written to.
        hparams: Named tensors, any shapes, floating point; not written to.
        terms: Number J of terms, at least 1.
        lr: Learning rate :math:`\eta` of the series, in general that of the inner optimiser.
        group: As in :func:`~synthrepro.bilevel.hypergradient`; each product is then one all-reduce.

    Warns:
        NotConverged: The residual is above 1: the series diverges, and more terms make it worse.

    Raises:
        ValueError: Fewer than one term, a learning rate that is not positive, or a series that overflows; else as in
            :func:`~synthrepro.bilevel.hypergradient`.
    """
    if terms < 1:
        raise ValueError(f"The Neumann series needs at least one term, not {terms}.")
    if not lr > 0:
        raise ValueError(f"The learning rate of the Neumann series must be positive, not {lr}.")
    at = _linearised(inner_loss, outer_loss, params, hparams, group)
    term = lr * at.v
    x = term
    for _ in range(terms - 1):
        term = term - lr * at.product(term)
        x = x + term
    found = at.solved(x, 0.0, terms - 1)
    remedy = f"an eigenvalue of the inner Hessian is negative or above 2 / lr = {2 / lr:.3g}: lower lr"
    if not found.residual < float("inf"):
        raise ValueError(f"The Neumann series overflows within {terms} terms: {remedy}, or take fewer terms.")
    if found.residual > 1 + 1e-3:  # 1 itself, up to rounding, is a v that H does not reach
        _warn(
            f"The Neumann series diverges, relative residual {found.residual:.3g} after {terms} terms: "
            f"{remedy}, or train the inner problem further."
        )
    return found


def conjugate_gradient(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    *,
    damping: float = 0.0,
    tolerance: float,
    iterations: int,
    group: Group = None,
) -> Implicit:
    r"""Implicit hypergradient by conjugate gradients on :math:`(H + \lambda I)\, x = v`, from x = 0.

    Args:
        inner_loss: ``(params, hparams) -> scalar``, the loss that the parameters minimise.
        outer_loss: ``(params, hparams) -> scalar``.
        params: Named tensors, any shapes, floating point, at a minimum of the inner loss; not written to.
        hparams: Named tensors, any shapes, floating point; not written to.
        damping: :math:`\lambda`, at least 0. It biases the hypergradient unless it stands for a term of the inner
            problem, as a weight decay or a proximal term (Rajeswaran et al. 2019) that the inner loss leaves out.
        tolerance: Relative residual to stop at, at least 0.
        iterations: Largest number of products with H, at least 1.
        group: As in :func:`~synthrepro.bilevel.hypergradient`; each product is then one all-reduce.

    Warns:
        NotConverged: The tolerance was not reached: too few iterations, a direction without positive curvature (the
            solver stops there: H + damping I is not positive definite), or rounding. The estimate is then from x as
            far as it got; without positive curvature along v itself, x is 0 and the direct part is all that is left.

    Raises:
        ValueError: An option out of range; else as in :func:`~synthrepro.bilevel.hypergradient`.
    """
    if not damping >= 0:
        raise ValueError(f"The damping of conjugate gradients must be at least 0, not {damping}.")
    if not tolerance >= 0:
        raise ValueError(f"The tolerance of conjugate gradients must be at least 0, not {tolerance}.")
    if iterations < 1:
        raise ValueError(f"Conjugate gradients need at least one iteration, not {iterations}.")
    at = _linearised(inner_loss, outer_loss, params, hparams, group)
    x, r = torch.zeros_like(at.v), at.v
    p, rr = r, float(r @ r)
    goal = tolerance * rr**0.5
    taken, curvature = 0, 1.0
    while rr**0.5 > goal and taken < iterations:
        hp = at.product(p) + damping * p
        taken += 1
        curvature = float(p @ hp)
        if not curvature > 0:
            break
        step = rr / curvature
        x, r = x + step * p, r - step * hp
        rr, before = float(r @ r), rr
        p = r + rr / before * p
    found = at.solved(x, damping, taken)
    if not curvature > 0:
        _warn(
            f"Conjugate gradients stopped at iteration {taken} with a relative residual of {found.residual:.3g}, "
            f"at a direction of curvature {curvature / float(p @ p) - damping:.3g}, "
            f"not above -damping = {0.0 - damping:.3g}: "
            "train the inner problem further, or give more damping."
        )
    elif rr**0.5 > goal:
        _warn(
            f"Conjugate gradients stopped after {taken} iterations with a relative residual of {found.residual:.3g}, "
            f"above the tolerance of {tolerance:.3g}: give more iterations or more damping."
        )
    elif found.residual > 2 * tolerance:  # r is a running sum and drifts away from v - (H + damping I) x
        _warn(
            f"Conjugate gradients have a relative residual of {found.residual:.3g} where they reckon {tolerance:.3g}: "
            f"{at.v.dtype} holds no more digits; give a larger tolerance, or parameters in float64."
        )
    return found


def after_step(solver: Callable[..., Implicit]) -> Callable[..., Step]:
    """Make an implicit hypergradient an estimator like the others, which takes a step first.

    The estimator takes an ordinary inner step and gives the implicit hypergradient at the parameters after it, on the
    same inner loss: Lorraine et al. (2020), algorithm 1, with one inner step to each outer step. The inner loss is
    evaluated twice; one that draws randomness inside draws anew. A network that is still learning makes the solvers
    warn at nearly every step; ``warnings.simplefilter("ignore", NotConverged)`` silences them.

    Args:
        solver: :func:`neumann` or :func:`conjugate_gradient`, whose options the estimator takes as its own.

    Example:
        ``hypergradient(..., estimator="neumann", terms=5, lr=0.1)``, which is ``after_step(neumann)(...)``.
    """

    def estimator(
        inner_loss: Loss,
        outer_loss: Loss,
        params: Tensors,
        hparams: Tensors,
        update: Update,
        state: State | None = None,
        *,
        group: Group = None,
        **options: Any,
    ) -> Step:
        state = _state(update, params, state)
        inner, g = _inner_gradient(inner_loss, params, hparams, group)
        stepped, new_state = _detached(update.step(_detached(params), g, state))
        _check_like(stepped, params, "The update returned", "an update keeps names and shapes")
        found = solver(inner_loss, outer_loss, stepped, hparams, group=group, **options)
        return Step(found.hypergradient, stepped, new_state, inner, found.outer_loss)

    return estimator


@torch.enable_grad()
def _inner_gradient(inner_loss: Loss, params: Tensors, hparams: Tensors, group: Group) -> tuple[Tensor, Tensors]:
    params = _leaves(params)
    hparams = _detached(hparams)
    inner, g = _evaluated(inner_loss, (params, hparams), "inner", towards=[params], group=group)
    return _averaged(inner, _for_params(g, params, "inner"), "inner", group)


@dataclass(frozen=True)
class _Linearised:
    """Inner gradient, with its graph, and outer gradient at one point; vectors of all parameters together are flat."""

    params: Tensors
    hparams: Tensors
    g: Tensors
    inner: Tensor
    outer: Tensor
    v: Tensor  # (n,) d outer / d phi
    direct: Gradients  # d outer / d theta
    group: Group

    def product(self, x: Tensor) -> Tensor:
        """H x, shape (n,)."""
        return self._flat(self._averaged(self._through(x, list(self.params.values()), keep=True)))

    def solved(self, x: Tensor, damping: float, iterations: int) -> Implicit:
        """The hypergradient that x gives. One pass gives H x as well, hence the residual; it frees the graph."""
        both = self._through(x, [*self.hparams.values(), *self.params.values()], keep=False)
        indirect: Gradients = [None if d is None else -d for d in both[: len(self.hparams)]]
        error = self._flat(self._averaged(both[len(self.hparams) :])) + damping * x - self.v
        length = float(self.v.norm())
        return Implicit(
            hypergradient=_total(self.hparams, self.direct, indirect, self.group),
            inner_loss=self.inner,
            outer_loss=self.outer,
            residual=float(error.norm()) / length if length else 0.0,
            iterations=iterations,
        )

    def _through(self, x: Tensor, inputs: list[Tensor], *, keep: bool) -> Gradients:
        """Vector-Jacobian product of the inner gradient with x; the Hessian is symmetric."""
        sizes = [p.numel() for p in self.params.values()]
        parts = {n: part.view_as(p).to(p) for (n, p), part in zip(self.params.items(), x.split(sizes), strict=True)}
        linked = [name for name in self.g if self.g[name].requires_grad]
        if not linked:
            return [None] * len(inputs)
        g, weights = [self.g[name] for name in linked], [parts[name] for name in linked]
        with twice_differentiable():
            return list(torch.autograd.grad(g, inputs, weights, retain_graph=keep, allow_unused=True))

    def _averaged(self, gradients: Gradients) -> Gradients:
        return averaged(gradients, list(self.params.values()), self.group)

    def _flat(self, gradients: Gradients) -> Tensor:
        like = zip(self.params.values(), gradients, strict=True)
        return _flattened([torch.zeros_like(p) if d is None else d for p, d in like])


@torch.enable_grad()
def _linearised(inner_loss: Loss, outer_loss: Loss, params: Tensors, hparams: Tensors, group: Group) -> _Linearised:
    params, hparams = _leaves(params), _leaves(hparams)
    outer, both = _evaluated(outer_loss, (params, hparams), "outer", towards=[params, hparams], group=group)
    v = _for_params(both[: len(params)], params, "outer")
    inner, found = _evaluated(inner_loss, (params, hparams), "inner", towards=[params], graph=True, group=group)
    g = _for_params(found, params, "inner")
    outer, mean = _averaged(outer, {"inner loss": inner} | v, "outer", group)
    inner = mean.pop("inner loss")
    _check_finite(inner, "inner")
    if not all(t.isfinite().all() for t in mean.values()):
        raise ValueError("The gradient of the outer loss is not finite: look for a square root or logarithm at zero.")
    return _Linearised(params, hparams, g, inner, outer, _flattened(list(mean.values())), both[len(params) :], group)


def _flattened(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _warn(message: str) -> None:
    warnings.warn(message, NotConverged, stacklevel=3)  # the line that called the solver
