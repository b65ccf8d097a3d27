r"""Hypergradients through one inner step.

A network with parameters :math:`\phi` takes a step on an inner loss that depends on hyperparameters :math:`\theta`,
and an outer loss looks at the result:

.. math::

    \phi^*(\theta) = U(\phi, g), \qquad g = \nabla_\phi L_\text{inner}(\phi, \theta), \qquad
    h = \frac{d}{d\theta} L_\text{outer}(\phi^*(\theta), \theta)
      = \frac{\partial L_\text{outer}}{\partial\theta}
      + \Bigl(\frac{\partial g}{\partial\theta}\Bigr)^{\!\top}
        \Bigl(\frac{\partial U}{\partial g}\Bigr)^{\!\top} \frac{\partial L_\text{outer}}{\partial \phi^*} .

The mixed derivative :math:`\partial g/\partial\theta` is taken at :math:`\phi`, the parameters *before* the step, and
the learning rate sits in :math:`\partial U/\partial g`: the derivative of the procedure as it runs, which central
differences of the whole procedure confirm (Learn2Synth, Hu et al. 2025, "Hypergradient mechanism"; DARTS, Liu et al.
2019, eq. 7). Released code has differed: the first release of DARTS took it at :math:`\phi^*` (its issue 21, since
mended), and Betty's estimator ``darts`` takes it at :math:`\phi^*` without the learning rate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .guards import check_graph, evaluating, refuse_inference, refuse_wrapped, twice_differentiable
from .processes import Group, averaged
from .updates import State, Tensors, Update

Loss = Callable[[Tensors, Tensors], Tensor]
Gradients = list[Tensor | None]  # one entry a tensor asked for; None where nothing depends on it


@dataclass(frozen=True)
class Step:
    """What one inner step and its hypergradient give; every tensor is detached.

    Attributes:
        hypergradient: Derivative of the outer loss, the direct part included; named and shaped like ``hparams``.
        params: Parameters after the inner step.
        state: State of the update after the inner step; give it to the next call.
        inner_loss: Inner loss before the step, a scalar.
        outer_loss: Outer loss after the step, a scalar.
    """

    hypergradient: Tensors
    params: Tensors
    state: State
    inner_loss: Tensor
    outer_loss: Tensor


@torch.enable_grad()
def exact(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    update: Update,
    state: State | None = None,
    *,
    recompute: bool = False,
    generators: Sequence[torch.Generator] = (),
    seeds: int | None = None,
    group: Group = None,
) -> Step:
    """Exact hypergradient in two phases: an ordinary step and outer gradient, then one vector-Jacobian product.

    Only the inner gradient keeps a graph; step and outer pass are ordinary ones. Where a plain training step costs 3
    convolutions a layer this costs 11, a FLOP ratio of 3.67: 3 for the inner gradient, 3 for the outer one and 5 for
    the product. 4 would do: torch also computes a weight adjoint that nobody reads, and
    :func:`~synthrepro.bilevel.fused_kernels` leave it out. Peak memory is 2.5 to 4 times that of a plain step.

    Args:
        inner_loss, outer_loss, params, hparams, update, state: As in :func:`~synthrepro.bilevel.hypergradient`.
        recompute: Compute the inner gradient twice, with its graph only after the outer pass has freed its own: less
            memory for 3 more convolutions. The second evaluation sees the same randomness as in
            :func:`finite_difference`.
        generators: The generators that the inner loss draws from, if any; read only with ``recompute``.
        seeds, group: As in :func:`~synthrepro.bilevel.hypergradient`.

    Raises:
        ValueError: As in :func:`~synthrepro.bilevel.hypergradient`.
    """
    state = _state(update, params, state)
    params, hparams = _leaves(params), _leaves(hparams)
    random = _random_sources([*params.values(), *hparams.values()], generators)
    before = [source.get_state() for source in random]

    def inner_gradient(graph: bool) -> tuple[Tensor, Tensors]:
        loss, g = _evaluated(inner_loss, (params, hparams), "inner", seeds, towards=[params], graph=graph, group=group)
        return loss, _for_params(g, params, "inner")

    inner, g = inner_gradient(graph=not recompute)
    inner, mean_g = _averaged(inner, g, "inner", group)
    after = _outer_phase(outer_loss, params, hparams, mean_g, update, state, seeds, group)
    if recompute:
        with _replayed(random, before):
            _, g = inner_gradient(graph=True)
    with twice_differentiable():
        indirect = _gradients(g.values(), hparams.values(), weights=after.u.values())
    return Step(_total(hparams, after.direct, indirect, group), after.params, after.state, inner, after.outer)


@torch.enable_grad()
def finite_difference(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    update: Update,
    state: State | None = None,
    *,
    scheme: str = "forward",
    radius: float = 1e-3,
    generators: Sequence[torch.Generator] = (),
    seeds: int | None = None,
    group: Group = None,
) -> Step:
    r"""Hypergradient with the mixed derivative taken as a difference of two ordinary gradients (DARTS, eq. 8).

    With :math:`u = (\partial U/\partial g)^\top\, \partial L_\text{outer}/\partial\phi^*` and
    :math:`\varepsilon = r / \lVert u \rVert`,

    .. math:: h \approx \frac{\partial L_\text{outer}}{\partial\theta} +
        \frac{\nabla_\theta L_\text{inner}(\phi + \varepsilon u, \theta)
            - \nabla_\theta L_\text{inner}(\phi, \theta)}{\varepsilon}.

    No second-order graph: the memory of a plain step, and 8 convolutions to its 3 (10 with ``scheme="central"``).
    The inner loss is evaluated two or three times and must see the same randomness each time, or noise swamps the
    difference: the global random state of torch (CPU, and CUDA where a tensor lies there) and ``generators`` are
    rewound for each repeat and left as one evaluation leaves them. It must also be smooth: the gradient of a network
    with kinks (ReLU, PReLU, max-pooling) jumps, and a jump divided by the radius is no derivative. On a UNet that pools
    by the maximum the result is off by its own length or more, whatever the radius; average pooling, SiLU, GELU and ELU
    are safe.

    Args:
        inner_loss, outer_loss, params, hparams, update, state: As in :func:`~synthrepro.bilevel.hypergradient`.
        scheme: ``"forward"`` (the second gradient is the inner step's own) or ``"central"`` (error of second order
            in the radius, where the first is of first order).
        radius: Length r of the displacement of all parameters together, whatever the length of u. In float32 the
            default is within about 1 % on a smooth UNet, either scheme; central differences do best near DARTS' 1e-2,
            and below 1e-4 rounding takes over. Half precision cannot hold such displacements: keep parameters in
            float32.
        generators: The generators that the inner loss draws from, if any.
        seeds, group: As in :func:`~synthrepro.bilevel.hypergradient`.

    Raises:
        ValueError: An unknown scheme or a radius that is not positive; else as in
            :func:`~synthrepro.bilevel.hypergradient`.
    """
    _check_difference(scheme, radius, hparams)
    state = _state(update, params, state)
    params, hparams = _leaves(params), _leaves(hparams)
    random = _random_sources([*params.values(), *hparams.values()], generators)
    before = [source.get_state() for source in random]
    inner, both = _evaluated(inner_loss, (params, hparams), "inner", seeds, towards=[params, hparams], group=group)
    here = both[len(params) :]  # of the inner loss towards theta, at phi
    inner, g = _averaged(inner, _for_params(both[: len(params)], params, "inner"), "inner", group)
    after = _outer_phase(outer_loss, params, hparams, g, update, state, seeds, group)

    def gradients_at(moved: Tensors) -> Gradients:
        with _replayed(random, before):
            return _evaluated(inner_loss, (moved, hparams), "inner", seeds, towards=[hparams])[1]

    indirect = _difference(gradients_at, here, params, after.u, scheme=scheme, radius=radius, seeds=seeds)
    return Step(_total(hparams, after.direct, indirect, group), after.params, after.state, inner, after.outer)


def stateless(module: nn.Module, params: Tensors, /, *args: Any, **kwargs: Any) -> Any:
    """Call a module with the given parameters, leaving its own parameters and its buffers untouched.

    ``torch.func.functional_call`` alone writes BatchNorm's running statistics into the module; here they go into
    copies, so an evaluation inside a hypergradient leaves no trace. Parameters that are not given are the module's own.

    Raises:
        ValueError: A name that the module has no parameter under, or a network in a data-parallel wrapper.
    """
    refuse_wrapped(module)
    own = dict(module.named_parameters(remove_duplicate=False))
    for name in params:
        if name not in own:
            raise ValueError(f"{type(module).__name__} has no parameter {name!r}: give those of named_parameters().")
    values = {id(own[name]): p for name, p in params.items()} | {id(b): b.clone() for b in module.buffers()}
    # Every place once: torch's own tie_weights does not put back what a module under two names holds.
    places = {
        f"{prefix}.{name}" if prefix else name: values[id(t)]
        for prefix, part in module.named_modules()
        for name, t in (*part._parameters.items(), *part._buffers.items())
        if id(t) in values
    }
    return functional_call(module, places, args, kwargs, tie_weights=False)


@dataclass(frozen=True)
class _After:
    """What the inner step led to."""

    params: Tensors
    state: State
    outer: Tensor
    u: Tensors  # (dU/dg)^T d outer / d phi*, what the inner gradient is to be multiplied with
    direct: Gradients  # d outer / d theta with phi* held fixed


def _outer_phase(
    outer_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    g: Tensors,
    update: Update,
    state: State,
    seeds: int | None,
    group: Group,
) -> _After:
    """Take the step, and carry the outer gradient back through the step alone: no network lies in that graph."""
    g = _leaves(g)
    stepped, new_state = update.step({name: p.detach() for name, p in params.items()}, g, state)
    _check_like(stepped, params, "The update returned", "an update keeps names and shapes")
    new_params = _leaves(stepped)
    given = new_params, hparams
    outer, both = _evaluated(outer_loss, given, "outer", seeds, towards=given, group=group)
    outer, v = _averaged(outer, _for_params(both[: len(params)], new_params, "outer"), "outer", group)
    u = _gradients([stepped[name] for name in g], g.values(), weights=[v[name] for name in g])
    return _After(
        params={name: p.detach() for name, p in stepped.items()},
        state=_detached(new_state),
        outer=outer,
        u={name: torch.zeros_like(d) if w is None else w for (name, d), w in zip(g.items(), u, strict=True)},
        direct=both[len(params) :],
    )


def _evaluated(
    loss: Callable[..., Tensor],
    given: Sequence[Tensors],
    which: str,
    seeds: int | None = None,
    *,
    towards: Sequence[Tensors],
    graph: bool = False,
    group: Group = None,
) -> tuple[Tensor, Gradients]:
    """A loss of what is given and its gradient, under watch; with ``graph`` the gradient is differentiated again.

    In a group it is the average whose finiteness :func:`_averaged` checks, so that all processes stop together.
    """
    with evaluating(*given), twice_differentiable() if graph else nullcontext():
        value = _value(loss(*given), which, seeds)
        if group is None:
            _check_finite(value, which)
        check_graph(value, twice=graph)
        inputs = [t for tensors in towards for t in tensors.values()]
        return value, _gradients([value], inputs, create_graph=graph)


def _gradients(
    outputs: Iterable[Tensor],
    inputs: Iterable[Tensor],
    weights: Iterable[Tensor] | None = None,
    create_graph: bool = False,
) -> Gradients:
    """Gradient of the (weighted) sum of outputs towards each input; None where there is no dependence at all."""
    inputs, outputs = list(inputs), list(outputs)
    weights = [torch.ones_like(o) for o in outputs] if weights is None else weights
    linked = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not linked:
        return [None] * len(inputs)
    outputs, weights = zip(*linked, strict=True)
    return list(torch.autograd.grad(outputs, inputs, weights, create_graph=create_graph, allow_unused=True))


def _for_params(gradients: Gradients, params: Tensors, which: str) -> Tensors:
    """Name the gradients; zero where a loss does not use a parameter."""
    if all(d is None for d in gradients):
        raise ValueError(f"The {which} loss depends on no parameter: compute it from the params it is called with.")
    return {n: torch.zeros_like(p) if d is None else d for (n, p), d in zip(params.items(), gradients, strict=True)}


def _total(hparams: Tensors, direct: Gradients, indirect: Gradients, group: Group) -> Tensors:
    both = [[d for d in parts if d is not None] for parts in zip(direct, indirect, strict=True)]
    sums = [torch.stack(parts).sum(0) if parts else None for parts in both]
    total: Tensors = {}
    for name, found in zip(hparams, averaged(sums, list(hparams.values()), group), strict=True):
        if found is None:
            raise ValueError(
                f"Neither the outer loss nor the inner gradient depends on hyperparameter {name!r}: "
                "use it in a loss, or leave it out of hparams."
            )
        total[name] = found
    return total


def _averaged(loss: Tensor, gradients: Tensors, which: str, group: Group) -> tuple[Tensor, Tensors]:
    """Loss and gradients, detached, averaged over the processes in one reduction."""
    found = [t.detach() for t in (loss, *gradients.values())]
    mean, *means = (t for t in averaged(found, found, group) if t is not None)
    _check_finite(mean, which)
    return mean, dict(zip(gradients, means, strict=True))


def _check_difference(scheme: str, radius: float, hparams: Tensors) -> None:
    if scheme not in ("forward", "central"):
        raise ValueError(f"Unknown scheme {scheme!r} of finite differences: choose forward or central.")
    if not radius > 0:
        raise ValueError(f"The radius of finite differences must be positive, not {radius}.")
    for name, t in hparams.items():
        if t.is_floating_point() and torch.finfo(t.dtype).bits < 32:
            raise ValueError(
                f"{name!r} is {t.dtype}, in which two gradients that differ by little are the same: "
                "give float32 or float64, or take the estimator exact."
            )


def _difference(
    gradients_at: Callable[[Tensors], Gradients],
    here: Gradients,
    params: Tensors,
    u: Tensors,
    *,
    scheme: str,
    radius: float,
    seeds: int | None = None,
) -> Gradients:
    """The mixed derivative times u as a difference of gradients; ``here`` are those at params."""
    length = _length(u, seeds)
    if not length.any() or all(d is None for d in here):  # nothing passes through the step
        return [None if d is None else torch.zeros_like(d) for d in here]
    unit = {name: t / _like(torch.where(length > 0, length, 1.0), t) for name, t in u.items()}

    def displaced(by: float) -> Gradients:
        return gradients_at({name: (p + by * unit[name]).detach() for name, p in params.items()})

    there, back, scale = displaced(radius), here, length / radius
    if scheme == "central":
        back, scale = displaced(-radius), scale / 2
    return [None if a is None or b is None else (a - b) * _like(scale, a) for a, b in zip(there, back, strict=True)]


def _length(u: Tensors, seeds: int | None) -> Tensor:
    """Length of all tensors together, shape () or (seeds,); the largest entry is taken out, lest squares overflow."""
    rows = [t.reshape(1 if seeds is None else seeds, -1) for t in u.values() if t.numel()]
    peak = torch.stack([t.abs().amax(1).to(rows[0].device) for t in rows]).amax(0)
    safe = torch.where(peak > 0, peak, 1.0)
    length = peak * torch.stack([(t / safe.to(t)[:, None]).norm(dim=1).to(peak) for t in rows]).norm(dim=0)
    return length[0] if seeds is None else length


def _like(value: Tensor, t: Tensor) -> Tensor:
    """A value a seed, shape (seeds,), or one for all, shape (), ready to be multiplied with t."""
    return value.reshape(value.shape + (1,) * (t.dim() - value.dim())).to(t)


def _leaves(tensors: Tensors) -> Tensors:
    """The same values as leaves of a new graph: what is given is neither written to nor given a gradient."""
    refuse_inference(tensors)
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(
                f"{name!r} is {t.dtype}, which cannot be differentiated: give floating-point tensors "
                "(dict(network.named_parameters()), not its state_dict)."
            )
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def _detached(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _detached(value) for key, value in state.items()}
    if isinstance(state, tuple):  # parameters and state
        return tuple(_detached(value) for value in state)
    return state.detach() if isinstance(state, Tensor) else state


def _value(loss: Tensor, which: str, seeds: int | None) -> Tensor:
    wanted, remedy = (
        ("a scalar tensor", "reduce it, for instance by its mean")
        if seeds is None
        else (f"a tensor of shape ({seeds},)", "give one value a seed")
    )
    if not isinstance(loss, Tensor) or loss.shape != (() if seeds is None else (seeds,)):
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"The {which} loss must be {wanted}, not {got}: {remedy}.")
    return loss


def _check_finite(loss: Tensor, which: str) -> None:
    if not torch.isfinite(loss).all():
        raise ValueError(
            f"The {which} loss is {loss.tolist()}: look for a division by zero, or a learning rate that is too high."
        )


def _state(update: Update, params: Tensors, state: State | None) -> State:
    """A fresh state unless one is given, which must fit the update and the parameters."""
    fresh = update.init(params)
    _refuse_sequences(fresh)
    if state is None:
        return fresh
    _check_state(state, fresh)
    return _detached(state)


def _check_state(state: State, fresh: State) -> None:
    if state.keys() != fresh.keys():
        raise ValueError(
            f"The state holds {', '.join(state)} where this update keeps {', '.join(fresh)}: "
            "give the state that the same update returned, or None to start afresh."
        )
    for key, moment in fresh.items():
        if isinstance(moment, dict):
            _check_like(state[key], moment, f"The state's {key!r} has", "start afresh when the network changes")


def _refuse_sequences(state: Any) -> None:
    """Tensors in lists would be neither detached nor differentiated."""
    for value in state.values():
        if isinstance(value, dict):
            _refuse_sequences(value)
        elif isinstance(value, (list, tuple)):
            raise ValueError("The state of an update holds a list or tuple: keep its tensors in dictionaries.")


def _check_like(found: Tensors, wanted: Tensors, what: str, remedy: str) -> None:
    def shape(tensors: Tensors, name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "nothing"

    for name in [*wanted, *found]:
        if shape(found, name) != shape(wanted, name):
            raise ValueError(
                f"{what} {shape(found, name)} for parameter {name!r}, which has {shape(wanted, name)}: {remedy}."
            )


def _random_sources(tensors: Sequence[Tensor], generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    return [torch.default_generator, *(torch.cuda.default_generators[d] for d in devices), *generators]


@contextmanager
def _replayed(sources: Sequence[torch.Generator], states: Sequence[Tensor]) -> Iterator[None]:
    """Wind the sources of randomness back to ``states``; leave them as they were."""
    now = [source.get_state() for source in sources]
    for source, state in zip(sources, states, strict=True):
        source.set_state(state)
    try:
        yield
    finally:
        for source, state in zip(sources, now, strict=True):
            source.set_state(state)
