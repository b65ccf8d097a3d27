"""Every estimator of a hypergradient behind one signature."""

from collections.abc import Callable, Sequence
from typing import Any

from .hypergradient import Loss, Step, exact, finite_difference
from .implicit import after_step, conjugate_gradient, neumann
from .processes import Group
from .unrolled import unrolled
from .updates import State, Tensors, Update, sgd

ESTIMATORS: dict[str, Callable[..., Step]] = {
    "exact": exact,
    "finite_difference": finite_difference,
    "unrolled": unrolled,
    "neumann": after_step(neumann),
    "conjugate_gradient": after_step(conjugate_gradient),
}


def hypergradient(
    inner_loss: Loss | Sequence[Loss],
    outer_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    update: Update = sgd(lr=0.1, momentum=0.9),  # noqa: B008 (immutable)
    state: State | None = None,
    estimator: str | Callable[..., Step] = "exact",
    *,
    group: Group = None,
    **options: Any,
) -> Step:
    r"""Take an inner step and differentiate the outer loss after it with respect to the hyperparameters.

    With the step :math:`\phi^* = \phi - \eta\, g(\phi, \theta)` and :math:`v = \partial L_\text{outer}/\partial\phi^*`,
    the estimators add to the direct part :math:`\partial L_\text{outer}/\partial\theta`

    =========================  =====================================================================================
    ``exact``                  :math:`-\eta\, (\partial g/\partial\theta)^\top v`, at the weights *before* the step
                               and *with* the learning rate: the derivative of the step that is taken
    ``finite_difference``      the same, as a difference of two gradients
    ``unrolled``               the same through several steps
    ``neumann``                :math:`-\eta \sum_j (\partial g/\partial\theta)^\top (I - \eta H)^j v`, at the weights
                               *after* the step: the derivative of a solution, not of a step
    ``conjugate_gradient``     :math:`-(\partial g/\partial\theta)^\top (H + \lambda I)^{-1} v`, after the step too
    =========================  =====================================================================================

    The estimator that Betty (Choe et al. 2023) calls ``darts`` is none of the first three: it takes the mixed
    derivative *after* the step and *without* the learning rate, :math:`-(\partial g/\partial\theta)^\top v`, which is
    ``neumann`` with ``terms=1, lr=1`` (Luketina et al. 2016, their T1-T2). Released code that is built on Betty
    computes that, whatever its paper writes.

    Args:
        inner_loss: ``(params, hparams) -> scalar``, the loss that the inner step descends; for ``unrolled`` also a
            sequence of losses, one a step.
        outer_loss: ``(params, hparams) -> scalar``, evaluated at the stepped parameters.
        params: Named tensors, any shapes, floating point; neither written to nor given a ``.grad``.
        hparams: Named tensors, any shapes, floating point; neither written to nor given a ``.grad``.
        update: The inner step.
        state: State of the update as an earlier :class:`Step` returned it, a constant of the derivative; a fresh one
            unless given.
        estimator: A name from the table, or a function with the same signature.
        group: Processes that each evaluate both losses on their share of the batch; gradients are averaged over them
            (see :mod:`synthrepro.bilevel.processes`). ``None`` for one process alone.
        options: Of the estimator, by name: see :func:`exact`, :func:`finite_difference`, :func:`unrolled`,
            :func:`neumann` and :func:`conjugate_gradient`. The first three take ``seeds``, a number S of independent
            problems stacked along the first axis of every tensor, for which both losses return a value each, shape
            (S,) (see :func:`~synthrepro.bilevel.stacked`).

    Raises:
        ValueError: A loss that is not finite, not of the shape asked for, or that depends on no parameter, a state or
            an update that does not fit the parameters, a hyperparameter that neither loss uses, a tensor that is not
            floating point, or an unknown estimator.
        ConnectionError: A process of the group is lost.
    """
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise ValueError(f"Unknown estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}.")
        estimator = ESTIMATORS[estimator]
    if group is not None:
        options["group"] = group
    return estimator(inner_loss, outer_loss, params, hparams, update, state, **options)
