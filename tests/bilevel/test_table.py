"""The table: every estimator, with every update, in both precisions, against a truth that shares no code with it.

Of the estimators that follow steps the truth is five-point central differences of the whole procedure, with the steps
taken by torch's own optimisers; of the implicit ones it is a dense solve with the Hessian. Two earlier steps leave
their moments behind, for an adaptive optimiser's first step has no derivative to speak of.
"""

from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from synthrepro.bilevel import estimators, exact, fused_kernels, hypergradient

from .conftest import CASES

ESTIMATORS = {
    "exact": {},
    "exact, fused": {"fused": True},
    "exact, recomputed": {"recompute": True},
    "exact, fused, recomputed": {"fused": True, "recompute": True},
    "forward difference": {"estimator": "finite_difference", "radius": 1e-4},
    "central difference": {"estimator": "finite_difference", "scheme": "central", "radius": 1e-2},
    "unrolled": {"estimator": "unrolled", "steps": 3},
    "unrolled, fused": {"estimator": "unrolled", "steps": 3, "fused": True},
    "unrolled, checkpoints": {"estimator": "unrolled", "steps": 3, "checkpoint": True},
    "Neumann series": {"estimator": "neumann", "terms": 4, "lr": 0.05},
    "conjugate gradients": {"estimator": "conjugate_gradient", "damping": 30.0, "tolerance": 1e-9, "iterations": 200},
}
LARGEST = {  # relative error of the hypergradient as a whole
    "forward difference": {torch.float64: 1e-2, torch.float32: 5e-2},
    "central difference": {torch.float64: 1e-3, torch.float32: 1e-2},
}
EXACT = {torch.float64: 1e-8, torch.float32: 1e-3}
EARLIER = 2

NETWORK = nn.Sequential(
    nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1)
).double()


@cache
def problem():
    """Weights, hyperparameters and data, in float64."""
    generator = torch.Generator().manual_seed(4)
    params = {n: 0.5 * torch.randn(p.shape, generator=generator).double() for n, p in NETWORK.named_parameters()}
    hparams = {"noise": torch.tensor(0.3).double(), "greys": torch.tensor([0.3, 0.6]).double()}
    labels = torch.randint(2, (3, 6, 6), generator=generator)
    white, clean = torch.randn(2, 3, 6, 6, generator=generator).double()
    return params, hparams, labels, white, labels + 0.2 * clean


def inner(params, hparams, fused=False):
    _, _, labels, white, _ = problem()
    painted = (hparams["greys"][labels] + hparams["noise"] * white.to(hparams["noise"]))[:, None]
    if not fused:
        return F.cross_entropy(functional_call(NETWORK, params, painted), labels)
    with fused_kernels():
        return F.cross_entropy(functional_call(NETWORK, params, painted), labels)


def outer(params, hparams):
    _, _, labels, _, images = problem()
    logits = functional_call(NETWORK, params, images[:, None].to(params["0.weight"]))
    return F.cross_entropy(logits, labels) + 0.1 * hparams["noise"].square()


def cast(dtype):
    """Weights and hyperparameters."""
    params, hparams, *_ = problem()
    return {n: t.to(dtype) for n, t in params.items()}, {n: t.to(dtype) for n, t in hparams.items()}


@cache
def after_torch(case_name, steps, noise, greys):
    """The outer loss where torch's own optimiser takes the last ``steps`` at these hyperparameters."""
    params, hparams, *_ = problem()
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    optimiser = CASES[case_name].optimiser(list(leaves.values()), **options(case_name))
    moved = {"noise": torch.tensor(noise, dtype=torch.float64), "greys": torch.tensor(greys, dtype=torch.float64)}
    for i in range(EARLIER + steps):
        optimiser.zero_grad()
        inner(leaves, hparams if i < EARLIER else moved).backward()
        optimiser.step()
    stepped = {n: p.detach() for n, p in leaves.items()}
    return stepped, float(outer(stepped, moved))


def options(case_name):
    return {"eps": 1e-3} if CASES[case_name].adaptive else {}


@cache
def truth_of_steps(case_name, steps):
    _, hparams, *_ = problem()
    at = [float(hparams["noise"]), *hparams["greys"].tolist()]
    found = []
    for i in range(3):
        values = []
        for hairs in (-2, -1, 1, 2):
            moved = list(at)
            moved[i] += hairs * 1e-3
            values.append(after_torch(case_name, steps, moved[0], tuple(moved[1:]))[1])
        found.append((values[0] - 8 * values[1] + 8 * values[2] - values[3]) / 12e-3)
    return torch.tensor(found, dtype=torch.float64)


@cache
def truth_of_solution(case_name, estimator):
    """At the weights after one more step: direct part minus mixed derivative times x, with H formed."""
    params, hparams, *_ = problem()
    stepped, _ = after_torch(case_name, 1, float(hparams["noise"]), tuple(hparams["greys"].tolist()))
    shapes = {n: p.shape for n, p in params.items()}

    def unflat(flat, like):
        parts = flat.split([shape.numel() for shape in like.values()])
        return {n: part.view(shape) for (n, shape), part in zip(like.items(), parts, strict=True)}

    like = {n: t.shape for n, t in hparams.items()}
    phi = torch.cat([stepped[n].reshape(-1) for n in shapes])
    theta = torch.cat([hparams[n].reshape(-1) for n in like])
    losses = [lambda p, t, f=f: f(unflat(p, shapes), unflat(t, like)) for f in (inner, outer)]
    hessian = torch.func.jacrev(torch.func.grad(losses[0]))(phi, theta)
    mixed = torch.func.jacrev(torch.func.grad(losses[0]), argnums=1)(phi, theta)  # (parameters, hyperparameters)
    v, direct = torch.func.grad(losses[1], argnums=(0, 1))(phi, theta)
    one = torch.eye(len(phi)).double()
    if estimator == "Neumann series":
        x = 0.05 * sum(torch.linalg.matrix_power(one - 0.05 * hessian, j) for j in range(4)) @ v
    else:
        x = torch.linalg.solve(hessian + 30.0 * one, v)
    return direct - mixed.T @ x


@pytest.mark.filterwarnings("ignore::synthrepro.bilevel.NotConverged")  # in float32, of a tolerance of 1e-9
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimator(estimator, case_name, dtype):
    chosen = dict(ESTIMATORS[estimator])
    fused = chosen.pop("fused", False)

    def loss(params, hparams):
        return inner(params, hparams, fused)

    params, hparams = cast(dtype)
    update, state = CASES[case_name].update(**options(case_name)), None
    for _ in range(EARLIER):
        step = exact(inner, outer, params, hparams, update, state)
        params, state = step.params, step.state
    found = hypergradient(loss, outer, params, hparams, update, state, **chosen).hypergradient
    if chosen.get("estimator") in ("neumann", "conjugate_gradient"):
        wanted = truth_of_solution(case_name, estimator)
    else:
        wanted = truth_of_steps(case_name, chosen.get("steps", 1))
    flat = torch.cat([found["noise"].reshape(1), found["greys"]]).double()
    assert float((flat - wanted).norm() / wanted.norm()) <= LARGEST.get(estimator, EXACT)[dtype]


def test_the_table_is_whole():
    """A new estimator enters it."""
    assert {chosen.get("estimator", "exact") for chosen in ESTIMATORS.values()} == set(estimators.ESTIMATORS)
