"""Several seeds at once: small networks of the same shape trained as one batched model.

A small network leaves a device idle, and five seeds of it are five times the same work on different numbers. Stacked
along a first axis and mapped over by ``torch.func.vmap`` they are one computation. The seeds do not see one another, so
the gradient of the sum of their losses is the gradient of each by itself: what
:func:`~synthrepro.bilevel.hypergradient` gives with ``seeds=S`` is, up to rounding, what it gives one seed at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .hypergradient import Loss
from .updates import Tensors


def stack(seeds: Sequence[Any]) -> Any:
    """One dictionary of tensors (S, ...) from S dictionaries of tensors (...); also of states, which are nested.

    Raises:
        ValueError: Values that are no tensors, such as a state's number of steps, differ between seeds.
    """
    first = seeds[0]
    if isinstance(first, dict):
        return {key: stack([seed[key] for seed in seeds]) for key in first}
    if isinstance(first, Tensor):
        return torch.stack(list(seeds))
    if any(seed != first for seed in seeds):
        raise ValueError(f"Seeds can be stacked only at the same step, not at {', '.join(map(str, seeds))}.")
    return first


def unstack(stacked: Any, seed: int) -> Any:
    """What :func:`stack` made one of, without its first axis."""
    if isinstance(stacked, dict):
        return {key: unstack(value, seed) for key, value in stacked.items()}
    return stacked[seed] if isinstance(stacked, Tensor) else stacked


def stacked(loss: Any, *data: Any, randomness: str = "error") -> Loss:
    """A loss of all seeds, one value each, from the loss of one.

    Args:
        loss: ``(params, hparams, *data) -> scalar`` of one seed. Modules inside are called through
            :func:`~synthrepro.bilevel.stateless`. Draws from a ``torch.Generator`` cannot be mapped: draw outside, and
            give what was drawn as data.
        data: Tensors (S, ...), or dictionaries and sequences of them: each seed's own images, labels and draws.
        randomness: For losses that use the global generator, such as dropout: ``"different"`` for each seed or
            ``"same"`` for all, as ``torch.func.vmap`` takes it.

    Returns:
        ``(params, hparams) -> (S,)``, with params and hparams (S, ...), for ``hypergradient(..., seeds=S)``.
    """

    def losses(params: Tensors, hparams: Tensors) -> Tensor:
        return torch.func.vmap(loss, randomness=randomness)(params, hparams, *data)

    return losses
