r"""Hypergradients through several inner steps.

The inner problem takes K steps from parameters :math:`\phi_0` and an optimiser state :math:`s_0` (moments), each on a
loss of its own, for instance of its own batch; the outer loss looks at the end:

.. math::

    (\phi_{k+1}, s_{k+1}) = U(\phi_k, g_k, s_k), \qquad g_k = \nabla_\phi L_k(\phi_k, \theta), \qquad
    k = 0, \dots, K - 1, \qquad h = \frac{d}{d\theta} L_\text{outer}(\phi_K(\theta), \theta) .

Reverse mode (Maclaurin et al. 2015; Franceschi et al. 2017, "reverse-HG") carries the adjoints :math:`\alpha` of the
parameters and :math:`\sigma` of the state backwards, from :math:`\alpha_K = \partial L_\text{outer}/\partial\phi_K`
and :math:`\sigma_K = 0`:

.. math::

    \begin{aligned}
    u_k &= \Bigl(\frac{\partial \phi_{k+1}}{\partial g_k}\Bigr)^{\!\top} \alpha_{k+1}
         + \Bigl(\frac{\partial s_{k+1}}{\partial g_k}\Bigr)^{\!\top} \sigma_{k+1}, \\
    \sigma_k &= \Bigl(\frac{\partial \phi_{k+1}}{\partial s_k}\Bigr)^{\!\top} \alpha_{k+1}
         + \Bigl(\frac{\partial s_{k+1}}{\partial s_k}\Bigr)^{\!\top} \sigma_{k+1}, \\
    \alpha_k &= \Bigl(\frac{\partial \phi_{k+1}}{\partial \phi_k}\Bigr)^{\!\top} \alpha_{k+1}
         + \Bigl(\frac{\partial s_{k+1}}{\partial \phi_k}\Bigr)^{\!\top} \sigma_{k+1}
         + \Bigl(\frac{\partial g_k}{\partial \phi_k}\Bigr)^{\!\top} u_k, \\
    h &= \frac{\partial L_\text{outer}}{\partial\theta}
         + \sum_{k = K - T}^{K - 1} \Bigl(\frac{\partial g_k}{\partial\theta}\Bigr)^{\!\top} u_k .
    \end{aligned}

The partial derivatives of :math:`U` hold its other two arguments fixed; :math:`\partial s_{k+1}/\partial\phi_k` is
there for weight decay that passes through the moments. With T = K this is the derivative of the whole procedure; with
T < K it is truncated back-propagation (Shaban et al. 2019, section 3), which takes :math:`\phi_{K-T}` and
:math:`s_{K-T}` for constants. With K = 1 it is :func:`~synthrepro.bilevel.exact`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .guards import twice_differentiable
from .hypergradient import (
    Gradients,
    Loss,
    Step,
    _averaged,
    _check_like,
    _detached,
    _evaluated,
    _for_params,
    _gradients,
    _leaves,
    _random_sources,
    _replayed,
    _state,
    _total,
)
from .processes import Group, averaged
from .updates import State, Tensors, Update


@torch.enable_grad()
def unrolled(
    inner_loss: Loss | Sequence[Loss],
    outer_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    update: Update,
    state: State | None = None,
    *,
    steps: int | None = None,
    truncate: int | None = None,
    checkpoint: bool = False,
    generators: Sequence[torch.Generator] = (),
    seeds: int | None = None,
    group: Group = None,
) -> Step:
    """Take K inner steps and differentiate the outer loss after them with respect to the hyperparameters.

    As in :func:`~synthrepro.bilevel.exact`, only the inner gradients keep graphs, one a step; an ordinary outer pass
    follows, then one vector-Jacobian product a step. The first step costs what ``exact`` costs, 3.67 times a plain
    training step in FLOPs, and each further one 3 times (4 times with ``checkpoint``). Memory grows by the graph of an
    inner gradient with each step that is differentiated. The steps before the last ``truncate`` are plain ones that
    keep nothing.

    An adaptive update from a fresh state has a first step whose derivative is an artefact of its ``eps`` (see
    :func:`~synthrepro.bilevel.adam`): carry the state from call to call.

    Args:
        inner_loss: K losses ``(params, hparams) -> scalar``, one an inner step, in the order of the steps, for instance
            on a batch each; or one loss, for ``steps`` steps.
        outer_loss: ``(params, hparams) -> scalar``, evaluated at the parameters after all K steps.
        params: Named tensors, any shapes, floating point; neither written to nor given a ``.grad``.
        hparams: Named tensors, any shapes, floating point; neither written to nor given a ``.grad``.
        update: The inner step; it is evaluated again in the backward sweep, which a pure function may be.
        state: State of the update as an earlier :class:`Step` returned it, a constant of the derivative; a fresh one
            unless given.
        steps: Number K of inner steps; only with a single inner loss.
        truncate: Number T of last steps to differentiate through, 1 to K; all K unless given.
        checkpoint: Keep graphs for about sqrt(T) steps at a time instead of T, and parameters and state at about
            sqrt(T) of the steps; all but about sqrt(T) of the inner gradients are then computed twice. The second
            evaluation must see the same randomness: the global random state of torch (CPU, and CUDA where a tensor
            lies there) and ``generators`` are rewound for it and left as one evaluation leaves them.
        generators: The generators that the inner losses draw from, if any; read only with ``checkpoint``.
        seeds, group: As in :func:`~synthrepro.bilevel.hypergradient`.

    Returns:
        A :class:`Step` whose ``params`` and ``state`` are those after all K steps, ready for the next call, whose
        ``inner_loss`` is that of the first step, at the given ``params``, and whose ``outer_loss`` follows the last.

    Raises:
        ValueError: No inner loss, ``steps`` missing or not wanted, ``truncate`` out of range, or an inner loss that
            came out differently the second time (see ``checkpoint``); else as in
            :func:`~synthrepro.bilevel.hypergradient`. A hyperparameter that only steps before the last ``truncate``
            use counts as used by neither loss.
    """
    if callable(inner_loss) == (steps is None):
        raise ValueError("Give either one inner loss and the number of steps, or a sequence with a loss for each step.")
    inner_losses = [inner_loss] * (steps or 0) if callable(inner_loss) else inner_loss
    if not inner_losses:
        raise ValueError("There are no inner losses to unroll: give one for each inner step.")
    steps = len(inner_losses)
    if truncate is not None and not 1 <= truncate <= steps:
        raise ValueError(f"truncate must be from 1 to the number of inner steps, which is {steps}, not {truncate}.")
    state = _state(update, params, state)
    params, hparams = _detached(_leaves(params)), _leaves(hparams)

    constant = 0 if truncate is None else steps - truncate
    segments = _segments(inner_losses[constant:], checkpoint)
    walk = partial(_walk, hparams=hparams, update=update, seeds=seeds, group=group)
    losses: list[Tensor] = []
    for taken in walk(inner_losses[:constant], params, state=state, graph=False):
        losses.append(taken.loss)
        params, state = taken.params_after, taken.state_after
    random = _random_sources([*params.values(), *hparams.values()], generators)
    starts = []  # of every segment but the last, whose graphs are kept at once
    for segment in segments[:-1]:
        starts.append((params, state, [source.get_state() for source in random], len(losses)))
        for taken in walk(segment, params, state=state, graph=False):
            losses.append(taken.loss)
            params, state = taken.params_after, taken.state_after
    history = list(walk(segments[-1], params, state=state, graph=True))
    losses += [taken.loss for taken in history]
    params, state = history[-1].params_after, history[-1].state_after

    last = _leaves(params)
    outer, both = _evaluated(outer_loss, (last, hparams), "outer", seeds, towards=[last, hparams], group=group)
    direct = both[len(last) :]
    outer, v = _averaged(outer, _for_params(both[: len(last)], last, "outer"), "outer", group)
    alpha = list(v.values())
    sigma = [torch.zeros_like(t) for t in _moments(state)]
    indirect: Gradients = [None] * len(hparams)
    while True:
        while history:
            taken = history.pop()
            oldest = not history and not starts
            through, alpha, sigma = _pull_back(taken, hparams, update, alpha, sigma, oldest, group)
            indirect = [_sum(a, b) for a, b in zip(indirect, through, strict=True)]
        if not starts:
            break
        before, state_before, random_before, first = starts.pop()
        with _replayed(random, random_before):
            history = list(walk(segments[len(starts)], before, state=state_before, graph=True))
        _check_repeated([taken.loss for taken in history], losses[first : first + len(history)])
    return Step(_total(hparams, direct, indirect, group), params, state, losses[0], outer)


@dataclass(frozen=True)
class _Taken:
    """One inner step."""

    params: Tensors  # before the step; leaves of the graph of g, where it has one
    state: State  # before the step
    g: Tensors  # inner gradient, of this process
    mean_g: Tensors  # of all processes, without a graph
    loss: Tensor
    params_after: Tensors
    state_after: State


def _walk(
    inner_losses: Sequence[Loss],
    params: Tensors,
    hparams: Tensors,
    update: Update,
    state: State,
    *,
    graph: bool,
    seeds: int | None,
    group: Group,
) -> Iterator[_Taken]:
    """Take steps; with ``graph`` each inner gradient keeps its graph towards parameters and hyperparameters."""
    hparams = hparams if graph else _detached(hparams)
    for inner_loss in inner_losses:
        before = _leaves(params)
        given = before, hparams
        loss, found = _evaluated(inner_loss, given, "inner", seeds, towards=[before], graph=graph, group=group)
        g = _for_params(found, before, "inner")
        loss, mean_g = _averaged(loss, g, "inner", group)
        stepped, new_state = _detached(update.step(params, mean_g, state))
        _check_like(stepped, params, "The update returned", "an update keeps names and shapes")
        yield _Taken(before, state, g, mean_g, loss, stepped, new_state)
        params, state = stepped, new_state


def _pull_back(
    taken: _Taken,
    hparams: Tensors,
    update: Update,
    alpha: list[Tensor],
    sigma: list[Tensor],
    oldest: bool,
    group: Group,
) -> tuple[Gradients, list[Tensor], list[Tensor]]:
    """Adjoints before a step from those after it, and what the step adds to the hypergradient.

    Before the oldest step everything is constant: its adjoints are left out.
    """
    names, g = list(taken.params), _leaves(taken.mean_g)
    params = _detached(taken.params) if oldest else taken.params
    state = taken.state if oldest else _moment_leaves(taken.state)
    stepped, new_state = update.step(params, g, state)  # elementwise: cheaper to repeat than to keep
    into = [*g.values()] if oldest else [*g.values(), *params.values(), *_moments(state)]
    outputs, weights = [*(stepped[name] for name in names), *_moments(new_state)], [*alpha, *sigma]
    back = _filled(_gradients(outputs, into, weights=weights), into)
    u, alpha, sigma = back[: len(g)], back[len(g) : 2 * len(g)], back[2 * len(g) :]

    into = [*hparams.values()] if oldest else [*hparams.values(), *params.values()]
    with twice_differentiable():
        both = _gradients(taken.g.values(), into, weights=u)
    through, curvature = both[: len(hparams)], averaged(both[len(hparams) :], into[len(hparams) :], group)
    return through, [a if c is None else a + c for a, c in zip(alpha, curvature, strict=True)], sigma


def _segments(losses: Sequence[Loss], checkpoint: bool) -> list[Sequence[Loss]]:
    size = math.isqrt(len(losses) - 1) + 1 if checkpoint else len(losses)  # the square root, rounded up
    return [losses[i : i + size] for i in range(0, len(losses), size)]


def _moments(state: Any) -> list[Tensor]:
    """The differentiable tensors of a state, in a fixed order."""
    if isinstance(state, dict):
        return [t for value in state.values() for t in _moments(value)]
    return [state] if isinstance(state, Tensor) and state.is_floating_point() else []


def _moment_leaves(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _moment_leaves(value) for key, value in state.items()}
    return state.detach().requires_grad_() if isinstance(state, Tensor) and state.is_floating_point() else state


def _filled(gradients: Gradients, like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if d is None else d for d, t in zip(gradients, like, strict=True)]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _check_repeated(again: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for a, b in zip(again, before, strict=True):
        if not torch.allclose(a, b, rtol=torch.finfo(b.dtype).eps ** 0.5, atol=0.0):  # rounding may differ on a GPU
            raise ValueError(
                f"An inner loss was {_short(b)} and is {_short(a)} when checkpoint=True computes it again: "
                "name the generators it draws from in generators, or turn checkpoint off."
            )


def _short(loss: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in loss.reshape(-1).tolist())
