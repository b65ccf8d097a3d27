"""Inner updates: one optimiser step as a pure function of parameters, gradients and state.

Each function here returns an :class:`Update` whose ``step`` takes the same step as the optimiser of that name in
``torch.optim`` (to rounding), but returns new tensors instead of writing into old ones, and is differentiable in the
gradients. That is all a hypergradient needs of an optimiser: the derivative of the stepped parameters with respect to
the inner gradient, at fixed parameters and state.

``torch.optim.SGD(momentum=..., differentiable=True)`` cannot be used for this: it starts its momentum buffer from a
detached gradient, and the hypergradient that comes out is silently wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
State = dict[str, Any]  # {"step": int, and per moment a dict of tensors named like the parameters}


@dataclass(frozen=True)
class Update:
    """An optimiser as two pure functions.

    Attributes:
        init: ``params -> state``, the state before the first step.
        step: ``(params, gradients, state) -> (params, state)``; the dicts hold tensors of equal names and shapes.
    """

    init: Callable[[Tensors], State]
    step: Callable[[Tensors, Tensors, State], tuple[Tensors, State]]


def sgd(lr: float, momentum: float = 0.0, *, nesterov: bool = False, weight_decay: float = 0.0) -> Update:
    """Stochastic gradient descent, as ``torch.optim.SGD`` (dampening 0).

    Raises:
        ValueError: Nesterov momentum without momentum, as in torch.
    """
    if nesterov and momentum <= 0:
        raise ValueError("sgd: Nesterov momentum needs momentum > 0; give one or leave nesterov off.")

    def init(params: Tensors) -> State:
        return {"step": 0} | ({"momentum": _zeros(params)} if momentum else {})

    def step(params: Tensors, gradients: Tensors, state: State) -> tuple[Tensors, State]:
        stepped: Tensors = {}
        buffers: Tensors = {}
        for name, p in params.items():
            d = gradients[name] + weight_decay * p if weight_decay else gradients[name]
            if momentum:
                # torch starts the buffer at the first gradient; from a zero buffer that is the same expression
                buffers[name] = b = momentum * state["momentum"][name] + d
                d = d + momentum * b if nesterov else b
            stepped[name] = p - lr * d
        return stepped, {"step": state["step"] + 1} | ({"momentum": buffers} if momentum else {})

    return Update(init, step)


def adam(
    lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), *, eps: float = 1e-8, weight_decay: float = 0.0
) -> Update:
    """Adam, as ``torch.optim.Adam`` (L2 weight decay added to the gradient).

    The first step from a zero state is ``-lr * g / (|g| + eps)``: the sign of the gradient, whose derivative
    ``-lr * eps / (|g| + eps)**2`` is proportional to ``eps``. A hypergradient through it is an artefact of ``eps``, so
    carry the state from step to step, and differentiate a first step only with ``eps`` of the order of the gradients
    (1e-3 or more).
    """
    return _adam(lr, betas, eps, weight_decay, decoupled=False)


def adamw(
    lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), *, eps: float = 1e-8, weight_decay: float = 1e-2
) -> Update:
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``; see :func:`adam` for its first step."""
    return _adam(lr, betas, eps, weight_decay, decoupled=True)


def rmsprop(
    lr: float = 1e-2, alpha: float = 0.99, *, eps: float = 1e-8, momentum: float = 0.0, weight_decay: float = 0.0
) -> Update:
    """RMSprop, as ``torch.optim.RMSprop`` (not centred); its first step is as degenerate as :func:`adam`'s."""

    def init(params: Tensors) -> State:
        return {"step": 0, "square": _zeros(params)} | ({"momentum": _zeros(params)} if momentum else {})

    def step(params: Tensors, gradients: Tensors, state: State) -> tuple[Tensors, State]:
        stepped: Tensors = {}
        squares: Tensors = {}
        buffers: Tensors = {}
        for name, p in params.items():
            g = gradients[name] + weight_decay * p if weight_decay else gradients[name]
            squares[name] = v = alpha * state["square"][name] + (1 - alpha) * g * g
            d = g / (_root(v) + eps)
            if momentum:
                buffers[name] = d = momentum * state["momentum"][name] + d
            stepped[name] = p - lr * d
        new = {"step": state["step"] + 1, "square": squares}
        return stepped, new | ({"momentum": buffers} if momentum else {})

    return Update(init, step)


def _adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, *, decoupled: bool) -> Update:
    beta1, beta2 = betas

    def init(params: Tensors) -> State:
        return {"step": 0, "mean": _zeros(params), "square": _zeros(params)}

    def step(params: Tensors, gradients: Tensors, state: State) -> tuple[Tensors, State]:
        t = state["step"] + 1
        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        stepped: Tensors = {}
        means: Tensors = {}
        squares: Tensors = {}
        for name, p in params.items():
            g = gradients[name]
            if weight_decay and decoupled:
                p = p * (1 - lr * weight_decay)
            elif weight_decay:
                g = g + weight_decay * p
            means[name] = m = beta1 * state["mean"][name] + (1 - beta1) * g
            squares[name] = v = beta2 * state["square"][name] + (1 - beta2) * g * g
            stepped[name] = p - lr / correction1 * m / (_root(v) / correction2**0.5 + eps)
        return stepped, {"step": t, "mean": means, "square": squares}

    return Update(init, step)


def _zeros(params: Tensors) -> Tensors:
    return {name: torch.zeros_like(p) for name, p in params.items()}


def _root(v: Tensor) -> Tensor:
    """Square root with slope zero at zero, not infinity: a parameter without gradient must not give NaN."""
    return v.clamp_min(torch.finfo(v.dtype).tiny).sqrt()
