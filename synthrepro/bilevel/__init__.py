"""Bilevel optimisation: hypergradients through an inner training step."""

from .hypergradient import Step, exact, finite_difference, hypergradient, stateless
from .updates import Update, adam, adamw, rmsprop, sgd

__all__ = [
    "Step",
    "Update",
    "adam",
    "adamw",
    "exact",
    "finite_difference",
    "hypergradient",
    "rmsprop",
    "sgd",
    "stateless",
]
