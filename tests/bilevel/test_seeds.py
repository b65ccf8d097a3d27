"""Several seeds as one batched model: what comes out is what each seed gives by itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from synthrepro.bilevel import adam, finite_difference, hypergradient, rmsprop, sgd, stack, stacked, stateless, unstack

SEEDS = 3
ESTIMATORS = [
    {"estimator": "exact"},
    {"estimator": "exact", "recompute": True},
    {"estimator": "finite_difference", "radius": 1e-2},
    {"estimator": "finite_difference", "scheme": "central", "radius": 1e-2},
    {"estimator": "unrolled", "steps": 3},
    {"estimator": "unrolled", "steps": 4, "truncate": 3, "checkpoint": True},
]
NETWORK = nn.Sequential(
    nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.ConvTranspose2d(4, 2, 2, stride=2)
).double()


def problem(seed: int):
    """Parameters, hyperparameters and data of one seed."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in NETWORK.named_parameters()
    }
    hparams = {"noise": torch.tensor(0.1 * (seed + 1)).double(), "greys": torch.tensor([0.2, 0.7]).double()}
    labels = torch.randint(2, (2, 6, 6), generator=generator)
    white = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    return params, hparams, (labels, white)


def inner_loss(params, hparams, labels, white):
    painted = hparams["greys"][labels] + hparams["noise"] * white
    return F.cross_entropy(stateless(NETWORK, params, painted[:, None]), labels)


def outer_loss(params, hparams, labels, white):
    images = labels + 0.3 * white
    return F.cross_entropy(stateless(NETWORK, params, images[:, None]), labels) + 0.1 * hparams["noise"] ** 2


def distance(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


@pytest.mark.parametrize("options", ESTIMATORS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("update", [sgd(0.1, momentum=0.9), adam(0.02), rmsprop(0.02)], ids=["sgd", "adam", "rmsprop"])
def test_seeds_together_are_seeds_one_at_a_time(options, update):
    """Over two steps, so that moments are carried. Finite differences need a length a seed: with one for all, a seed
    would be displaced by what the others' gradients are."""
    params, hparams, data = zip(*map(problem, range(SEEDS)), strict=True)
    all_data = [torch.stack(each) for each in zip(*data, strict=True)]
    losses = stacked(inner_loss, *all_data), stacked(outer_loss, *all_data)
    start, theta, state = stack(params), stack(hparams), None
    for _ in range(2):
        step = hypergradient(*losses, start, theta, update, state, seeds=SEEDS, **options)
        start, state = step.params, step.state
    tolerance = 1e-10 if options["estimator"] == "finite_difference" else 1e-12  # rounding, divided by the radius
    for seed in range(SEEDS):
        alone = [lambda p, h, f=f, s=seed: f(p, h, *data[s]) for f in (inner_loss, outer_loss)]
        phi, single_state = params[seed], None
        for _ in range(2):
            single = hypergradient(*alone, phi, hparams[seed], update, single_state, **options)
            phi, single_state = single.params, single.state
        assert distance(unstack(step.hypergradient, seed), single.hypergradient) < tolerance
        assert distance(unstack(step.params, seed), single.params) < 1e-12
        assert torch.allclose(step.inner_loss[seed], single.inner_loss, rtol=1e-12)
        assert torch.allclose(step.outer_loss[seed], single.outer_loss, rtol=1e-12)
        for name, moment in unstack(step.state, seed).items():
            if isinstance(moment, dict):
                assert distance(moment, single_state[name]) < 1e-12


def test_a_seed_through_which_nothing_passes_leaves_the_others_alone():
    """With outer gradient zero there is no direction to displace the parameters in: 0 / 0 must not spread."""
    weights = torch.tensor([1.0, 0.0])

    def inner(params, hparams):
        return (hparams["a"] * params["x"]).square().sum(-1)

    def outer(params, hparams):
        return weights * params["x"].sum(-1)

    start, theta = {"x": torch.ones(2, 3)}, {"a": torch.full((2, 1), 0.5)}
    found = finite_difference(
        inner, outer, start, theta, sgd(0.1), seeds=2, scheme="central", radius=1e-2
    ).hypergradient["a"]
    assert torch.allclose(found[:, 0], torch.tensor([-0.1 * 2 * 2 * 0.5 * 3, 0.0]), rtol=1e-3)


def test_losses_must_give_one_value_a_seed():
    params, hparams, _ = zip(*map(problem, range(SEEDS)), strict=True)

    def loss(params, hparams):
        return (params["0.weight"] * hparams["noise"].mean()).square().mean()

    with pytest.raises(
        ValueError, match=r"^The inner loss must be a tensor of shape \(3,\), not a tensor of shape \(\)"
    ):
        hypergradient(loss, loss, stack(params), stack(hparams), sgd(0.1), seeds=SEEDS)


def test_states_at_different_steps_are_not_stacked():
    with pytest.raises(ValueError, match="Seeds can be stacked only at the same step"):
        stack([{"step": 1}, {"step": 2}])


def test_dropout_is_drawn_anew_for_each_seed_when_asked():
    params = {"w": torch.ones(4, 50)}

    def loss(params, hparams):
        return F.dropout(params["w"] * hparams["a"]).sum()

    hparams = {"a": torch.ones(4)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert len(set(stacked(loss, randomness="different")(params, hparams).tolist())) > 1
        assert len(set(stacked(loss, randomness="same")(params, hparams).tolist())) == 1
    with pytest.raises(RuntimeError, match="randomness"):
        stacked(loss)(params, hparams)
