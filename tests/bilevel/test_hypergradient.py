import copy
import dataclasses
import warnings
from functools import partial

import pytest
import torch
import torchopt
from torch import Tensor, nn

from synthrepro.bilevel import Step, Update, adam, finite_difference, hypergradient, sgd, stateless

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its sources are of 2021: today's Python warns on compiling them
    import higher

FORWARD = partial(finite_difference, radius=1e-6)  # for float64, as the next
CENTRAL = partial(finite_difference, scheme="central", radius=1e-4)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative error among the hyperparameters, each taken as one vector."""
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == wanted[name].shape for name in wanted)
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def together(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative error of all hyperparameters as one vector."""
    error = sum((found[n] - wanted[n]).square().sum() for n in wanted)
    return float((error / sum(w.square().sum() for w in wanted.values())).sqrt())


def central_differences(outer_after_step, hparams: dict[str, Tensor], h: float = 1e-6) -> dict[str, Tensor]:
    """Derivative of a whole procedure by moving one entry of one hyperparameter at a time."""
    found = {name: torch.zeros_like(value) for name, value in hparams.items()}
    for name, value in hparams.items():
        for i in range(value.numel()):
            bump = torch.zeros_like(value)
            bump.view(-1)[i] = h
            up, down = (outer_after_step(hparams | {name: value + s * bump}) for s in (1, -1))
            found[name].view(-1)[i] = (up - down) / (2 * h)
    return found


def fresh(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


def wander(problem, case, steps: int, **more):
    """Some steps of torch's optimiser; the parameters and the optimiser after them."""
    params = fresh(problem.params)
    optimiser = case.optimiser(list(params.values()), **more)
    for _ in range(steps):
        optimiser.zero_grad()
        problem.inner_loss(params, problem.hparams).backward()
        optimiser.step()
    return params, optimiser


def reference(problem, case, steps: int, **more) -> dict[str, Tensor]:
    """Hypergradient of step number ``steps``, from torch's own optimisers and central differences alone."""
    before, optimiser = wander(problem, case, steps - 1, **more)

    def outer_after_step(hparams):
        params = fresh(before)
        replica = case.optimiser(list(params.values()), **more)
        replica.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        problem.inner_loss(params, hparams).backward()
        replica.step()
        with torch.no_grad():
            return problem.outer_loss(params, hparams)

    return central_differences(outer_after_step, problem.hparams)


def walk(problem, update: Update, steps: int, estimator="exact") -> Step:
    """Several steps, parameters and state carried; the last one's estimate."""
    params, state = problem.params, None
    for n in range(1, steps + 1):
        last = n == steps
        step = hypergradient(
            problem.inner_loss,
            problem.outer_loss,
            params,
            problem.hparams,
            update,
            state,
            estimator if last else "exact",
        )
        params, state = step.params, step.state
    return step


# The first step of an adaptive update from a zero state is nearly the sign of the gradient: its derivative is
# proportional to eps, and with torch's default of 1e-8 smaller than what central differences resolve.
FIRST, FIFTH = (1, {"eps": 1e-3}), (5, {})


@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [
        pytest.param("exact", 1e-7, id="exact"),
        pytest.param(CENTRAL, 1e-6, id="central"),  # of order radius**2 = 1e-8, times the curvature
        pytest.param(FORWARD, 2e-5, id="forward"),  # of order radius = 1e-6, times the curvature
    ],
)
@pytest.mark.parametrize(("steps", "more"), [pytest.param(*FIRST, id="first"), pytest.param(*FIFTH, id="fifth")])
def test_estimate_is_the_derivative_of_the_whole_procedure(problem, case, steps, more, estimator, tolerance):
    more = more if case.adaptive else {}
    step = walk(problem, case.update(**more), steps, estimator)
    assert distance(step.hypergradient, reference(problem, case, steps, **more)) <= tolerance


def test_step_gives_the_parameters_of_torch_and_the_losses_around_it(problem, case):
    params, _ = wander(problem, case, 5)
    step = walk(problem, case.update(), 5)
    for name, p in params.items():
        torch.testing.assert_close(step.params[name], p.detach(), rtol=1e-10, atol=1e-12)
    before, _ = wander(problem, case, 4)
    torch.testing.assert_close(step.inner_loss, problem.inner_loss(before, problem.hparams).detach())
    torch.testing.assert_close(step.outer_loss, problem.outer_loss(params, problem.hparams).detach())


@pytest.mark.parametrize("estimator", ["exact", "finite_difference", CENTRAL])
def test_step_holds_no_graph(problem, case, estimator):
    step = walk(problem, case.update(), 2, estimator)
    moments = [t for moment in step.state.values() if isinstance(moment, dict) for t in moment.values()]
    held = [*step.hypergradient.values(), *step.params.values(), *moments, step.inner_loss, step.outer_loss]
    assert not any(t.requires_grad for t in held)


def test_forward_difference_is_off_in_proportion_to_its_radius_and_central_to_its_square(problem):
    truth = walk(problem, sgd(lr=0.1), 1).hypergradient

    def error(scheme, radius):
        estimator = partial(finite_difference, scheme=scheme, radius=radius)
        return together(walk(problem, sgd(lr=0.1), 1, estimator).hypergradient, truth)

    assert error("forward", 1e-2) / error("forward", 1e-3) == pytest.approx(10, rel=0.1)
    assert error("central", 1e-2) / error("central", 1e-3) == pytest.approx(100, rel=0.1)


def test_default_radius_suits_float32(problem):
    truth = walk(problem, sgd(lr=0.1), 1).hypergradient
    problem.network.float()
    problem = dataclasses.replace(
        problem,
        white=problem.white.float(),
        images=problem.images.float(),
        params={n: p.float() for n, p in problem.params.items()},
        hparams={n: p.float() for n, p in problem.hparams.items()},
    )
    step = walk(problem, sgd(lr=0.1), 1)
    assert all(t.dtype == torch.float32 for t in [*step.hypergradient.values(), *step.params.values()])
    assert together(step.hypergradient, truth) < 1e-5
    assert together(walk(problem, sgd(lr=0.1), 1, "finite_difference").hypergradient, truth) < 1e-2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(sgd(lr=0.1), lambda: torchopt.sgd(0.1), id="sgd"),
        pytest.param(sgd(lr=0.1, momentum=0.9), lambda: torchopt.sgd(0.1, momentum=0.9), id="momentum"),
        # TorchOpt keeps bias corrections in float32: with betas in quarters that rounds nothing away
        pytest.param(adam(0.02, (0.5, 0.75)), lambda: torchopt.adam(0.02, (0.5, 0.75)), id="adam"),
    ],
)
def test_torchopt_agrees(problem, ours, theirs):
    optimiser = theirs()
    params, state = fresh(problem.params), optimiser.init(problem.params)
    for _ in range(5):
        hparams = fresh(problem.hparams)
        params = fresh(params)
        state = torchopt.pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
        names = list(params)
        inner = problem.inner_loss(params, hparams)
        g = dict(zip(names, torch.autograd.grad(inner, list(params.values()), create_graph=True), strict=True))
        updates, state = optimiser.update(g, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = problem.outer_loss(params, hparams)
    theirs_h = dict(zip(hparams, torch.autograd.grad(outer, list(hparams.values())), strict=True))
    assert distance(walk(problem, ours, 5).hypergradient, theirs_h) < 1e-10


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_higher_agrees(problem, momentum):
    ours = walk(problem, sgd(lr=0.1, momentum=momentum), 5).hypergradient
    optimiser = torch.optim.SGD(problem.network.parameters(), lr=0.1, momentum=momentum)
    for _ in range(4):
        optimiser.zero_grad()
        problem.inner_loss(dict(problem.network.named_parameters()), problem.hparams).backward()
        optimiser.step()
    hparams = fresh(problem.hparams)
    with higher.innerloop_ctx(problem.network, optimiser) as (network, differentiable):
        names = [name for name, _ in network.named_parameters()]
        differentiable.step(problem.inner_loss(dict(zip(names, network.parameters(), strict=True)), hparams))
        outer = problem.outer_loss(dict(zip(names, network.parameters(), strict=True)), hparams)
        theirs = dict(zip(hparams, torch.autograd.grad(outer, list(hparams.values())), strict=True))
    assert distance(ours, theirs) < 1e-10


def test_torch_sgd_with_momentum_and_differentiable_is_silently_wrong():
    """Why the updates here are our own: should this test ever fail, torch has mended its SGD."""

    def outer_after_two_steps(theta: Tensor) -> Tensor:
        start = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        phi = start.clone()
        optimiser = torch.optim.SGD([phi], lr=0.1, momentum=0.9, differentiable=True)
        for _ in range(2):
            (phi.grad,) = torch.autograd.grad(theta * phi.square(), phi, create_graph=True)
            optimiser.step()
        return (phi - 1) ** 2

    theta, h = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), 1e-6
    (claimed,) = torch.autograd.grad(outer_after_two_steps(theta), theta)
    true = (outer_after_two_steps(theta + h) - outer_after_two_steps(theta - h)).detach() / (2 * h)
    assert abs(claimed / true - 1) > 0.2


@pytest.mark.parametrize("estimator", ["exact", "finite_difference", CENTRAL])
def test_outer_loss_alone_may_use_the_hyperparameters(estimator):
    def inner(params, hparams):
        return params["x"].square()

    def outer(params, hparams):
        return hparams["scale"] * params["x"]

    start, scale = {"x": torch.tensor(3.0)}, {"scale": torch.tensor(2.0)}
    step = hypergradient(inner, outer, start, scale, sgd(lr=0.25), estimator=estimator)
    assert step.hypergradient["scale"] == 1.5


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_parameter_without_gradient_gives_no_nan_and_changes_nothing(problem, case, estimator):
    plain = walk(problem, case.update(), 2, estimator)
    unused = {"unused": torch.ones(3, dtype=torch.float64), "dead": torch.ones(2, dtype=torch.float64)}

    def inner(params, hparams):
        return (
            problem.inner_loss({n: p for n, p in params.items() if n not in unused}, hparams)
            + 0 * params["dead"].square().sum() * hparams["noise"]
        )

    def outer(params, hparams):
        dead = 1e-3 * params["dead"].sum() + 1e-3 * params["unused"].sum()
        return problem.outer_loss({n: p for n, p in params.items() if n not in unused}, hparams) + dead

    params, state = problem.params | unused, None
    for kind in ("exact", estimator):
        step = hypergradient(inner, outer, params, problem.hparams, case.update(), state, kind)
        params, state = step.params, step.state
    assert all(t.isfinite().all() for t in [*step.params.values(), *step.hypergradient.values()])
    tolerance = 1e-12 if estimator == "exact" else 1e-2
    assert distance(step.hypergradient, plain.hypergradient) < tolerance


def test_what_is_given_is_left_as_it_was(problem):
    hparams = fresh(problem.hparams)
    given = [*problem.params.values(), *hparams.values()]
    assert all(t.is_leaf and t.requires_grad for t in given)
    copies = [t.detach().clone() for t in given]
    for estimator in ("exact", "finite_difference"):
        hypergradient(problem.inner_loss, problem.outer_loss, problem.params, hparams, estimator=estimator)
    for t, copy_ in zip(given, copies, strict=True):
        assert torch.equal(t, copy_)
        assert t.grad is None


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_hyperparameters_may_be_computed_and_gradients_switched_off(problem, estimator):
    plain = hypergradient(problem.inner_loss, problem.outer_loss, problem.params, problem.hparams, estimator=estimator)
    raw = torch.logit(problem.hparams["noise"]).requires_grad_()
    with torch.no_grad():
        again = hypergradient(
            problem.inner_loss,
            problem.outer_loss,
            problem.params,
            problem.hparams | {"noise": torch.sigmoid(raw)},
            estimator=estimator,
        )
    torch.testing.assert_close(again.hypergradient, plain.hypergradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_precisions_may_differ_between_tensors(problem, estimator):
    params = problem.params | {"3.bias": problem.params["3.bias"].float()}
    hparams = problem.hparams | {"noise": problem.hparams["noise"].float()}

    def widened(loss):
        return lambda params, hparams: loss(params | {"3.bias": params["3.bias"].double()}, hparams)

    inner, outer = widened(problem.inner_loss), widened(problem.outer_loss)
    step = hypergradient(inner, outer, params, hparams, sgd(lr=0.1), estimator=estimator)
    truth = walk(problem, sgd(lr=0.1), 1)
    for found, given in ((step.params, params), (step.hypergradient, hparams)):
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in given.items()}
    assert together(step.hypergradient, truth.hypergradient) < 1e-3


def test_update_of_ones_own_may_leave_parameters_where_they_are(problem):
    def step(params, gradients, state):
        return {n: p if n.startswith("0.") else p - 0.1 * gradients[n] for n, p in params.items()}, state

    frozen = hypergradient(
        problem.inner_loss, problem.outer_loss, problem.params, problem.hparams, Update(lambda params: {}, step)
    )

    def outer_after_step(hparams):
        params = fresh(problem.params)
        names = [n for n in params if not n.startswith("0.")]
        moved = torch.autograd.grad(problem.inner_loss(params, hparams), [params[n] for n in names])
        stepped = {n: params[n] - 0.1 * d for n, d in zip(names, moved, strict=True)}
        return problem.outer_loss(params | stepped, hparams).detach()

    assert distance(frozen.hypergradient, central_differences(outer_after_step, problem.hparams)) < 1e-6


# Randomness and buffers


@pytest.mark.parametrize("estimator", ["exact", "finite_difference", CENTRAL])
def test_evaluation_leaves_the_network_as_it_was(problem, estimator):
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)).double()

    def loss(params, hparams):
        noisy = problem.images + hparams["noise"] * problem.white
        return nn.functional.cross_entropy(stateless(network, params, noisy), problem.labels)

    before = {name: t.clone() for name, t in network.state_dict().items()}
    params, noise = dict(network.named_parameters()), {"noise": problem.hparams["noise"]}
    hypergradient(loss, loss, params, noise, estimator=estimator)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    torch.func.functional_call(network, params, problem.images)  # what stateless is there to prevent
    assert not torch.equal(network[1].running_mean, before["1.running_mean"])


def test_stateless_passes_keyword_arguments_on():
    attention = nn.MultiheadAttention(4, 1, batch_first=True)
    x = torch.ones(1, 3, 4)
    output, weights = stateless(attention, dict(attention.named_parameters()), x, x, x, need_weights=False)
    assert weights is None
    assert output.shape == x.shape


@pytest.fixture
def dropout(problem):
    """A loss with dropout, which draws from the global random state; the state is put back after the test."""
    network = nn.Sequential(problem.network, nn.Dropout(0.5)).train()

    def loss(params, hparams):
        noisy = problem.images + hparams["noise"] * problem.white
        return nn.functional.cross_entropy(stateless(network, params, noisy), problem.labels)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield loss, dict(network.named_parameters()), {"noise": problem.hparams["noise"]}


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_finite_differences_replay_dropout_and_leave_the_global_state_as_one_evaluation_does(problem, dropout, scheme):
    loss, params, noise = dropout
    start = torch.get_rng_state()

    def outer(params, hparams):
        return problem.outer_loss({n.removeprefix("0."): p for n, p in params.items()}, problem.hparams)

    truth = hypergradient(loss, outer, params, noise, sgd(lr=0.1))
    after_one = torch.get_rng_state()
    torch.set_rng_state(start)
    loss(params, noise)
    assert torch.equal(torch.get_rng_state(), after_one)
    torch.set_rng_state(start)
    estimator = partial(finite_difference, scheme=scheme)
    found = hypergradient(loss, outer, params, noise, sgd(lr=0.1), estimator=estimator)
    assert torch.equal(torch.get_rng_state(), after_one)
    assert distance(found.hypergradient, truth.hypergradient) < 1e-2


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_finite_differences_replay_the_generators_they_are_told_of(problem, scheme):
    generator = torch.Generator()
    noise = {"noise": problem.hparams["noise"]}

    def inner(params, hparams):
        white = torch.randn(problem.white.shape, generator=generator, dtype=torch.float64)
        logits = stateless(problem.network, params, problem.images + hparams["noise"] * white)
        return nn.functional.cross_entropy(logits, problem.labels)

    def outer(params, hparams):
        return problem.outer_loss(params, problem.hparams)

    def estimate(estimator):
        generator.manual_seed(5)
        step = hypergradient(inner, outer, problem.params, noise, sgd(lr=0.1), estimator=estimator)
        return step.hypergradient, generator.get_state()

    truth, after_one = estimate("exact")
    replayed, state = estimate(partial(finite_difference, scheme=scheme, generators=[generator]))
    assert torch.equal(state, after_one)
    assert distance(replayed, truth) < 1e-2
    swamped, _ = estimate(partial(finite_difference, scheme=scheme))
    assert distance(swamped, truth) > 10


# Errors: one sentence each


def value(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
    return (hparams["a"] * params["x"]).square().sum()


def attempt(inner=value, outer=value, params=None, hparams=None, **options) -> Step:
    params = {"x": torch.ones(2)} if params is None else params
    hparams = {"a": torch.ones(2)} if hparams is None else hparams
    return hypergradient(inner, outer, params, hparams, **options)


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            {"inner": lambda p, h: h["a"] * p["x"]},
            r"The inner loss must be a scalar tensor, not a .* \(2,\)",
        ),
        (
            {"outer": lambda p, h: h["a"] * p["x"]},
            r"The outer loss must be a scalar tensor, not a .* \(2,\)",
        ),
        ({"outer": lambda p, h: p["x"].sum().item()}, "The outer loss must be a scalar tensor, not a float"),
        ({"inner": lambda p, h: value(p, h) / 0}, "The inner loss is inf"),
        ({"outer": lambda p, h: value(p, h) * float("nan")}, "The outer loss is nan"),
        ({"inner": lambda p, h: h["a"].sum()}, "The inner loss depends on no parameter"),
        ({"inner": lambda p, h: torch.tensor(1.0)}, "The inner loss depends on no parameter"),
        ({"outer": lambda p, h: h["a"].sum()}, "The outer loss depends on no parameter"),
        ({"hparams": {"a": torch.ones(2), "b": torch.ones(1)}}, "depends on hyperparameter 'b': use it in a loss"),
        ({"params": {"x": torch.ones(2), "n": torch.tensor(1)}}, "'n' is torch.int64, which cannot be differentiated"),
        ({"hparams": {"a": torch.ones(2).long()}}, "'a' is torch.int64, which cannot be differentiated"),
        (
            {"update": Update(lambda p: {}, lambda p, g, s: ({"x": p["x"][:1]}, s))},
            r"The update returned \(1,\) for parameter 'x', which has \(2,\)",
        ),
        (
            {"update": Update(lambda p: {}, lambda p, g, s: ({}, s))},
            r"The update returned nothing for parameter 'x', which has \(2,\)",
        ),
        (
            {"state": {"step": 1, "momentum": {"x": torch.ones(3)}}},
            r"The state's 'momentum' has \(3,\) for parameter 'x', which has \(2,\)",
        ),
        (
            {"state": {"step": 1, "momentum": {"x": torch.ones(2), "y": torch.ones(4)}}},
            r"The state's 'momentum' has \(4,\) for parameter 'y', which has nothing",
        ),
        (
            {"state": adam().init({"x": torch.ones(2)})},
            "The state holds step, mean, square where this update keeps step, momentum",
        ),
    ],
)
def test_mistake_is_told_in_one_sentence(mistake, message, estimator):
    with pytest.raises(ValueError, match=message) as error:
        attempt(**mistake, estimator=estimator)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("unroled", "Unknown estimator 'unroled': choose one of exact, finite_difference, unrolled, neumann, conjug"),
        (partial(finite_difference, scheme="backward"), "Unknown scheme 'backward'"),
        (partial(finite_difference, radius=0.0), "radius of finite differences must be positive, not 0.0"),
        (partial(finite_difference, radius=float("nan")), "radius of finite differences must be positive, not nan"),
    ],
)
def test_unknown_estimator_scheme_or_radius_is_refused(estimator, message):
    with pytest.raises(ValueError, match=message):
        attempt(estimator=estimator)


def test_random_state_is_put_back_when_a_displaced_loss_fails():
    generator, calls = torch.Generator().manual_seed(0), []

    def inner(params, hparams):
        calls.append(torch.rand((), generator=generator))
        return value(params, hparams) * (float("nan") if len(calls) == 2 else 1)

    with pytest.raises(ValueError, match="The inner loss is nan"):
        attempt(inner=inner, estimator=partial(finite_difference, generators=[generator]))
    assert calls[0] == calls[1]
    wanted = torch.Generator().manual_seed(0)
    torch.rand((), generator=wanted)
    assert torch.equal(generator.get_state(), wanted.get_state())


def test_a_module_under_two_names_keeps_its_parameters():
    """torch's functional_call puts a plain tensor in their place, and an optimiser then moves nothing."""
    with torch.random.fork_rng(devices=[]):
        shared = nn.Linear(3, 3).double()
        network = nn.Sequential(shared, nn.BatchNorm1d(3).double(), shared, nn.Tanh())
        network.append(network[1])
        x = torch.randn(4, 3).double()
    own, statistics = dict(network.named_parameters()), network[1].running_mean
    params = {name: p.detach() + 0.1 for name, p in own.items()}

    def loss(params, hparams):
        return stateless(network, params, hparams["a"] * x).square().mean()

    hypergradient(loss, loss, params, {"a": torch.tensor(1.0).double()}, sgd(0.1))
    assert all(now is own[name] for name, now in network.named_parameters())
    assert network[1].running_mean is statistics
    assert not statistics.any()
    moved = copy.deepcopy(network)
    moved.load_state_dict(params, strict=False)
    assert torch.equal(stateless(network, params, x), moved(x))
    with pytest.raises(ValueError, match=r"Sequential has no parameter '0\.weigth': give those of named_parameters"):
        stateless(network, {"0.weigth": params["0.weight"]}, x)


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_finite_difference_does_not_depend_on_the_size_of_the_outer_loss(size, scheme):
    """Squares of small or large gradients leave the range of float32."""
    params, hparams = {"x": torch.tensor([1.0, 2.0])}, {"a": torch.tensor(0.5)}

    def inner(params, hparams):
        return (hparams["a"] * params["x"]).square().sum()

    def outer(params, hparams):
        return size * params["x"].sum()

    found = hypergradient(
        inner, outer, params, hparams, sgd(0.1), estimator="finite_difference", scheme=scheme, radius=1e-2
    )
    assert found.hypergradient["a"] / size == pytest.approx(-0.1 * 4 * 0.5 * 3, rel=1e-2)


def test_finite_difference_refuses_hyperparameters_in_which_differences_drown():
    hparams = {"a": torch.tensor(0.5, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"'a' is torch\.bfloat16, in which two gradients that differ by little"):
        hypergradient(value, value, {"x": torch.ones(2)}, hparams, estimator="finite_difference")


@pytest.mark.parametrize("estimator", ["exact", "unrolled"])
def test_a_state_with_lists_is_refused(estimator):
    update = Update(lambda params: {"buffers": [torch.zeros(2)]}, sgd(0.1).step)
    options = {"steps": 2} if estimator == "unrolled" else {}
    with pytest.raises(ValueError, match="The state of an update holds a list or tuple: keep its tensors in dict"):
        hypergradient(value, value, {"x": torch.ones(2)}, {"a": torch.ones(2)}, update, None, estimator, **options)
