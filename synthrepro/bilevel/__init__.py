"""Bilevel optimisation: hypergradients through an inner training step."""

from .estimators import hypergradient
from .hypergradient import Step, exact, finite_difference, stateless
from .implicit import Implicit, NotConverged, after_step, conjugate_gradient, neumann
from .kernels import fused_kernels
from .levels import ChainStep, Level, chain
from .seeds import stack, stacked, unstack
from .unrolled import unrolled
from .updates import Update, adam, adamw, rmsprop, sgd

__all__ = [
    "ChainStep",
    "Implicit",
    "Level",
    "NotConverged",
    "Step",
    "Update",
    "adam",
    "adamw",
    "after_step",
    "chain",
    "conjugate_gradient",
    "exact",
    "finite_difference",
    "fused_kernels",
    "hypergradient",
    "neumann",
    "rmsprop",
    "sgd",
    "stack",
    "stacked",
    "stateless",
    "unrolled",
    "unstack",
]
