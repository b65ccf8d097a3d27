"""Bilevel optimisation: hypergradients through an inner training step."""

from .estimators import hypergradient
from .hypergradient import Step, exact, finite_difference, stateless
from .implicit import Implicit, NotConverged, after_step, conjugate_gradient, neumann
from .seeds import stack, stacked, unstack
from .unrolled import unrolled
from .updates import Update, adam, adamw, rmsprop, sgd

__all__ = [
    "Implicit",
    "NotConverged",
    "Step",
    "Update",
    "adam",
    "adamw",
    "after_step",
    "conjugate_gradient",
    "exact",
    "finite_difference",
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
