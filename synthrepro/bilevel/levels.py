r"""Hypergradients through a chain of problems, each of which sees what the earlier ones led to.

Multilevel optimisation as in GenSeg (Zhang et al. 2025, "Generative AI enables medical image segmentation in ultra
low-data regimes", its three optimisation stages): a generator takes a step on its GAN loss, a segmenter takes a step
on real and generated images, and the segmenter's validation loss drives the generator's architecture
:math:`\theta`. In general level i has parameters :math:`\phi_i` and a loss :math:`L_i`, and takes one step with an
update :math:`U_i`, in the order i = 1, ..., m:

.. math::

    \phi_i' = U_i(\phi_i, g_i), \qquad g_i = \nabla_{\phi_i} L_i(\phi_i;\, \theta, \phi_1', \dots, \phi_{i-1}'), \qquad
    h = \frac{d}{d\theta} L_\text{outer}(\theta, \phi_1', \dots, \phi_m') .

Every later loss sees everything upstream, :math:`\theta` included: a generated image depends on the architecture
directly and through the stepped weights of the generator. What Betty (Choe et al. 2023) composes are the
best-response Jacobians :math:`d\phi_i'/d(\cdot)`, one for each arrow of the problem graph; with one step for the best
response they factor into :math:`\partial U_i/\partial g_i` and mixed derivatives :math:`\partial g_i/\partial(\cdot)`,
and in reverse order the sum over all paths takes one product a level. With the adjoints :math:`a_i` of
:math:`\phi_i'`, for i = m, ..., 1:

.. math::

    \begin{aligned}
    a_i &= \frac{\partial L_\text{outer}}{\partial\phi_i'}
         + \sum_{k = i + 1}^{m} \Bigl(\frac{\partial g_k}{\partial\phi_i'}\Bigr)^{\!\top} u_k, \qquad
    u_i = \Bigl(\frac{\partial U_i}{\partial g_i}\Bigr)^{\!\top} a_i, \\
    h &= \frac{\partial L_\text{outer}}{\partial\theta}
         + \sum_{i = 1}^{m} \Bigl(\frac{\partial g_i}{\partial\theta}\Bigr)^{\!\top} u_i .
    \end{aligned}

The partial derivatives of :math:`g_i` are taken at :math:`\phi_i`, *before* the step, and hold everything else
upstream fixed. The first term of h and that of level m are the *direct* part, all that is left where the parameters of
earlier levels are held fixed; the others pass *through the weights* of these. With m = 1 this is
:func:`~synthrepro.bilevel.hypergradient`.

Released code has differed. The main 2-D scripts of GenSeg detach the generated image and round it to bytes, so that
both parts of the architecture's gradient are exactly zero, and hand the architecture to no optimiser: it never moves.
Betty's estimator ``darts``, on which they run, takes the mixed derivatives at the weights after the step and without
the learning rate.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .guards import twice_differentiable
from .hypergradient import (
    Gradients,
    _averaged,
    _check_difference,
    _check_finite,
    _check_like,
    _detached,
    _difference,
    _evaluated,
    _for_params,
    _gradients,
    _leaves,
    _random_sources,
    _replayed,
    _state,
)
from .processes import Group, averaged
from .unrolled import _filled, _sum
from .updates import State, Tensors, Update

Upstream = Mapping[str, Tensors]  # "hparams", and the stepped parameters of earlier levels by the level's name

_RESERVED = ("hparams", "outer", "direct", "through_weights")


@dataclass(frozen=True)
class Level:
    """One problem of a chain.

    Attributes:
        name: Name under which later losses find the stepped parameters; ``"hparams"``, ``"outer"``, ``"direct"`` and
            ``"through_weights"`` are taken.
        loss: ``(params, upstream) -> scalar``, the loss that the level's step descends. ``upstream["hparams"]`` holds
            the hyperparameters, ``upstream[name]`` the stepped parameters of an earlier level.
        params: Named tensors, any shapes, floating point; neither written to nor given a ``.grad``.
        update: The level's step; it is evaluated again in the backward sweep, which a pure function may be.
        state: State of the update as an earlier :class:`ChainStep` returned it, a constant of the derivative; a fresh
            one unless given.
    """

    name: str
    loss: Callable[[Tensors, Upstream], Tensor]
    params: Tensors
    update: Update
    state: State | None = None


@dataclass(frozen=True)
class ChainStep:
    """What one step of every level and the hypergradient give; every tensor is detached.

    Attributes:
        hypergradient: Derivative of the outer loss, the sum of the parts; named and shaped like ``hparams``.
        params: Parameters after the step, a dict for each level's name.
        state: State of the update after the step, for each level's name; give it to the next call.
        losses: Loss before the level's step, a scalar for each level's name.
        outer_loss: Outer loss after all steps, a scalar.
        parts: The terms of the hypergradient, each named and shaped like ``hparams``: ``"outer"`` is the derivative
            with everything stepped held fixed, a level's name stands for what passes through that level's gradient.
            Zero where nothing passes.
    """

    hypergradient: Tensors
    params: dict[str, Tensors]
    state: dict[str, State]
    losses: dict[str, Tensor]
    outer_loss: Tensor
    parts: dict[str, Tensors]

    @property
    def direct(self) -> Tensors:
        """The outer part and that of the last level: with the parameters of all earlier levels held fixed."""
        return _added([self.parts["outer"], self.parts[list(self.params)[-1]]])

    @property
    def through_weights(self) -> Tensors:
        """The rest, which passes through the stepped parameters of earlier levels; zero in a chain of one level."""
        none = {name: torch.zeros_like(d) for name, d in self.hypergradient.items()}
        return _added([none, *(self.parts[name] for name in list(self.params)[:-1])])

    @property
    def cosines(self) -> dict[str, float]:
        """Cosine, from -1 to 1, of each part, of ``"direct"`` and of ``"through_weights"`` with the hypergradient.

        All hyperparameters together are one vector. NaN where the part or the hypergradient is zero and has no
        direction: a cosine of 0 would call it orthogonal.
        """
        vectors = self.parts | {"direct": self.direct, "through_weights": self.through_weights}
        return {name: _cosine(part, self.hypergradient) for name, part in vectors.items()}


@torch.enable_grad()
def chain(
    levels: Sequence[Level],
    outer_loss: Callable[[Upstream], Tensor],
    hparams: Tensors,
    *,
    estimator: str = "exact",
    scheme: str = "forward",
    radius: float = 1e-3,
    generators: Sequence[torch.Generator] = (),
    group: Group = None,
) -> ChainStep:
    r"""Step each level once, in order, and differentiate the outer loss after them towards the hyperparameters.

    ``"exact"`` keeps the graph of every level's gradient until the backward sweep has passed it, and takes one
    vector-Jacobian product a level. ``"finite_difference"`` keeps none: it takes each product as a difference of
    ordinary gradients towards everything upstream, at :math:`\phi_i + \varepsilon_i u_i` with
    :math:`\varepsilon_i = r/\lVert u_i\rVert` and at :math:`\phi_i` (or, central, on both sides of it), with the
    randomness of the level's own evaluation; see :func:`~synthrepro.bilevel.finite_difference` for the smoothness it
    asks of the losses. The error of a level is carried to all earlier ones.

    A level that no later loss depends on is no error, and its part is zero: so is the whole hypergradient where a
    generated image is detached. The last level is the exception, for the outer loss alone could use it.

    An adaptive update from a fresh state has a first step whose derivative is an artefact of its ``eps`` (see
    :func:`~synthrepro.bilevel.adam`): carry the states from call to call.

    Args:
        levels: The problems, in the order of their steps.
        outer_loss: ``upstream -> scalar``, evaluated at the stepped parameters of all levels.
        hparams: Named tensors, any shapes, floating point; neither written to nor given a ``.grad``.
        estimator: ``"exact"`` or ``"finite_difference"``.
        scheme: ``"forward"`` or ``"central"``; read only by the finite difference, as the next two are.
        radius: Length r of the displacement of all parameters of a level together.
        generators: The generators that the levels' losses draw from, if any.
        group: As in :func:`~synthrepro.bilevel.hypergradient`; two all-reduces a level and one
            for the outer loss.

    Raises:
        ValueError: No level, a name that is taken or reserved, a loss that is not a finite scalar or that depends on
            no parameter of its level, an outer loss that depends on no parameter of the last level, a state or an
            update that does not fit the parameters, a hyperparameter that no loss uses (one that a loss does use but
            that no path leads from to the outer loss has hypergradient zero), a tensor that is not floating point, or
            an unknown estimator or option of it.
    """
    _check_names(levels)
    theta = _leaves(hparams)
    starts = [_start(level) for level in levels]
    if estimator == "exact":
        gradient: Callable[[Level, Tensors, Upstream], _Gradient] = _exact
    elif estimator == "finite_difference":
        _check_difference(scheme, radius, hparams)
        random = _random_sources([*theta.values(), *(p for params, _ in starts for p in params.values())], generators)
        gradient = partial(_finite_difference, scheme=scheme, radius=radius, random=random)
    else:
        raise ValueError(f"Unknown estimator {estimator!r}: choose one of exact, finite_difference.")

    upstream: dict[str, Tensors] = {"hparams": theta}
    used: set[str] = set()
    losses: dict[str, Tensor] = {}
    new_state: dict[str, State] = {}
    history = []
    for level, (params, state) in zip(levels, starts, strict=True):
        taken = gradient(level, params, upstream)
        losses[level.name], g = _averaged(taken.loss, taken.g, _which(level), group)
        taken = replace(taken, g=g)
        stepped, moments = level.update.step(_detached(params), taken.g, state)
        _check_like(stepped, params, f"The update of level {level.name!r} returned", "an update keeps names and shapes")
        history.append((level, _detached(params), state, taken, upstream))
        used |= taken.used
        new_state[level.name] = _detached(moments)
        upstream = upstream | {level.name: _leaves({name: stepped[name] for name in params})}

    outer, adjoint = _evaluated(
        lambda *_: outer_loss(upstream),
        list(upstream.values()),
        "outer",
        towards=list(upstream.values()),
        group=group,
    )
    one = torch.ones_like(outer)  # a process may use a hyperparameter that another does not
    flags = [one if name in used else None for name in theta]
    found = [outer.detach(), *adjoint, *flags]
    outer_mean, *rest = averaged(found, [outer, *_flat(upstream), *(one for _ in theta)], group)
    assert outer_mean is not None  # for mypy: a loss is never missing
    adjoint, flags = rest[: -len(theta)], rest[-len(theta) :]
    _check_finite(outer_mean, "outer")
    adjoints = _split(adjoint, upstream)
    if all(d is None for d in adjoints[levels[-1].name]):
        raise ValueError(
            f"The outer loss depends on no parameter of the last level, {levels[-1].name!r}: compute it from those "
            "that it finds upstream, or leave the level out."
        )
    parts = {"outer": adjoints.pop("hparams")}
    for name, *uses in zip(theta, parts["outer"], flags, strict=True):
        used |= {name for use in uses if use is not None}
    _check_used(theta, used)
    while history:  # popped, so that each level's graph goes when it has served
        level, params, state, taken, seen = history.pop()
        a = adjoints.pop(level.name)
        back: dict[str, Gradients] = {"hparams": [None] * len(theta)}
        if any(d is not None for d in a):
            u = _through_step(level.update, params, taken.g, state, a)
            back = _split(averaged(taken.mixed(u), _flat(seen), group), seen)
        parts[level.name] = back.pop("hparams")
        for name, more in back.items():
            adjoints[name] = [_sum(one, other) for one, other in zip(adjoints[name], more, strict=True)]

    filled = {
        name: dict(zip(theta, (d.clone() for d in _filled(parts[name], list(theta.values()))), strict=True))
        for name in ["outer", *(level.name for level in levels)]
    }
    return ChainStep(
        hypergradient=_added(list(filled.values())),
        params={level.name: _detached(upstream[level.name]) for level in levels},
        state=new_state,
        losses=losses,
        outer_loss=outer_mean,
        parts=filled,
    )


@dataclass(frozen=True)
class _Gradient:
    """A level's gradient g before its step, and what the backward sweep needs of it."""

    loss: Tensor
    g: Tensors  # detached
    used: set[str]  # the hyperparameters that the loss depends on
    mixed: Callable[[Tensors], Gradients]  # u -> (dg/dx)^T u for every tensor x upstream, in the order of _flat


def _exact(level: Level, params: Tensors, upstream: Upstream) -> _Gradient:
    loss, found = _loss(level, params, upstream, towards=[params], graph=True)
    g = _for_params(found, params, _which(level))

    def mixed(u: Tensors) -> Gradients:
        with twice_differentiable():
            return _gradients(g.values(), _flat(upstream), weights=[u[name] for name in g])

    return _Gradient(loss.detach(), _detached(g), _reached(loss, upstream["hparams"]), mixed)


def _finite_difference(
    level: Level,
    params: Tensors,
    upstream: Upstream,
    *,
    scheme: str,
    radius: float,
    random: Sequence[torch.Generator],
) -> _Gradient:
    before = [source.get_state() for source in random]
    loss, both = _loss(level, params, upstream, towards=[params, *upstream.values()])
    g, here = _for_params(both[: len(params)], params, _which(level)), both[len(params) :]

    def gradients_at(moved: Tensors) -> Gradients:
        with _replayed(random, before):
            return _loss(level, moved, upstream, towards=list(upstream.values()))[1]

    def mixed(u: Tensors) -> Gradients:
        return _difference(gradients_at, here, params, u, scheme=scheme, radius=radius)

    towards = _split(here, upstream)["hparams"]
    used = {name for name, d in zip(upstream["hparams"], towards, strict=True) if d is not None}
    return _Gradient(loss.detach(), g, used, mixed)


def _loss(
    level: Level, params: Tensors, upstream: Upstream, *, towards: Sequence[Tensors], graph: bool = False
) -> tuple[Tensor, Gradients]:
    given = (params, *upstream.values())
    return _evaluated(lambda *_: level.loss(params, upstream), given, _which(level), towards=towards, graph=graph)


def _through_step(update: Update, params: Tensors, g: Tensors, state: State, a: Gradients) -> Tensors:
    """u = (dU/dg)^T a; no network lies in that graph."""
    g = _leaves(g)
    stepped, _ = update.step(params, g, state)  # elementwise: cheaper to repeat than to keep
    outputs = [stepped[name] for name in params]
    into = [g[name] for name in params]
    u = _filled(_gradients(outputs, into, weights=_filled(a, outputs)), into)
    return dict(zip(params, u, strict=True))


def _start(level: Level) -> tuple[Tensors, State]:
    """A level's parameters as leaves, and the state of its update."""
    with _naming(level):
        params = _leaves(level.params)
        return params, _state(level.update, _detached(params), level.state)


def _reached(loss: Tensor, leaves: Tensors) -> set[str]:
    """Names of the leaves that lie in a loss's graph: which it depends on, without the cost of a gradient."""
    nodes, found = [loss.grad_fn], set()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        found.add(id(getattr(node, "variable", None)))  # the leaf, where the node is that of one
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        nodes += new
    return {name for name, leaf in leaves.items() if id(leaf) in found}


def _flat(upstream: Upstream) -> list[Tensor]:
    return [t for tensors in upstream.values() for t in tensors.values()]


def _split(gradients: Gradients, upstream: Upstream) -> dict[str, Gradients]:
    """Undo :func:`_flat`."""
    rest = iter(gradients)
    return {name: [next(rest) for _ in tensors] for name, tensors in upstream.items()}


def _added(terms: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([term[name] for term in terms]).sum(0) for name in terms[0]}


def _cosine(a: Tensors, b: Tensors) -> float:
    def dot(one: Tensors, other: Tensors) -> float:
        return sum(float((one[name].double() * other[name].double()).sum()) for name in one)

    lengths = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return max(-1.0, min(1.0, dot(a, b) / lengths)) if lengths else math.nan


def _which(level: Level) -> str:
    return f"{level.name!r} level's"


@contextmanager
def _naming(level: Level) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Level {level.name!r}: {error}") from error


def _check_names(levels: Sequence[Level]) -> None:
    if not levels:
        raise ValueError("There are no levels to step: give at least one.")
    names = [level.name for level in levels]
    for i, name in enumerate(names):
        if name in _RESERVED:
            raise ValueError(f"A level is called {name!r}, which stands for something else here: give it another name.")
        if name in names[:i]:
            raise ValueError(f"Two levels are called {name!r}: give each a name of its own.")


def _check_used(hparams: Tensors, used: set[str]) -> None:
    for name in hparams:
        if name not in used:
            raise ValueError(f"No loss uses hyperparameter {name!r}: use it in one, or leave it out of hparams.")
