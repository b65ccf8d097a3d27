from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.bilevel import (
    NotConverged,
    adam,
    after_step,
    conjugate_gradient,
    hypergradient,
    neumann,
    sgd,
    stateless,
    unrolled,
)

ALL = partial(conjugate_gradient, tolerance=1e-12, iterations=20)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative error among the hyperparameters, each taken as one vector."""
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == wanted[name].shape for name in wanted)
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def derivatives(value: Tensor, hparams: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(hparams, torch.autograd.grad(value, list(hparams.values())), strict=True))


@dataclass(frozen=True)
class Ridge:
    """Weighted ridge regression: its solution, Hessian and hypergradient are known in closed form.

    The data weights and the penalty act in the inner problem, ``scale`` in the outer loss alone. The four parameters
    are split over two tensors.
    """

    x: Tensor  # (12, 4)
    y: Tensor  # (12,)
    held_out: Tensor  # (5, 4)
    target: Tensor  # (5,)
    hparams: dict[str, Tensor]

    def inner_loss(self, params, hparams):
        w = torch.cat([params["a"].reshape(-1), params["b"]])
        residuals = hparams["weights"] * (self.x @ w - self.y).square()
        return 0.5 * residuals.sum() + 0.5 * hparams["penalty"].exp() * w.square().sum()

    def outer_loss(self, params, hparams):
        w = torch.cat([params["a"].reshape(-1), params["b"]])
        return 0.5 * hparams["scale"] * (self.held_out @ w - self.target).square().sum()

    def hessian(self, hparams) -> Tensor:
        return self.x.T @ (hparams["weights"][:, None] * self.x) + hparams["penalty"].exp() * torch.eye(4).double()

    def solution(self, hparams) -> dict[str, Tensor]:
        w = torch.linalg.solve(self.hessian(hparams), self.x.T @ (hparams["weights"] * self.y))
        return {"a": w[:2].reshape(1, 2), "b": w[2:]}

    def truth(self) -> dict[str, Tensor]:
        hparams = {name: h.clone().requires_grad_() for name, h in self.hparams.items()}
        return derivatives(self.outer_loss(self.solution(hparams), hparams), hparams)

    def at_solution(self, solver, **options):
        return solver(self.inner_loss, self.outer_loss, self.solution(self.hparams), self.hparams, **options)


@pytest.fixture
def ridge() -> Ridge:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hparams = {
        "weights": 0.1 + torch.rand(12, generator=generator, dtype=torch.float64),
        "penalty": torch.tensor(-1.0, dtype=torch.float64),
        "scale": torch.tensor(2.0, dtype=torch.float64),
    }
    return Ridge(normal(12, 4), normal(12), normal(5, 4), normal(5), hparams)


def extremes(ridge: Ridge) -> tuple[float, float]:
    values = torch.linalg.eigvalsh(ridge.hessian(ridge.hparams))
    return float(values[0]), float(values[-1])


# At a solution


def test_conjugate_gradient_is_the_derivative_of_the_solution_in_as_many_products_as_parameters(ridge):
    found = ridge.at_solution(ALL)
    assert distance(found.hypergradient, ridge.truth()) < 1e-11
    assert found.iterations <= 4
    assert found.residual < 1e-12
    solution = ridge.solution(ridge.hparams)
    torch.testing.assert_close(found.outer_loss, ridge.outer_loss(solution, ridge.hparams))
    torch.testing.assert_close(found.inner_loss, ridge.inner_loss(solution, ridge.hparams))


def test_neumann_series_tends_to_the_derivative_of_the_solution(ridge):
    lowest, highest = extremes(ridge)
    lr = 1 / highest
    errors = [distance(ridge.at_solution(neumann, terms=n, lr=lr).hypergradient, ridge.truth()) for n in (1, 50, 1000)]
    assert errors[0] > 0.1
    assert errors[1] < 3 * (1 - lr * lowest) ** 50
    assert errors[2] < 1e-12


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_terms_are_steps_of_gradient_descent_from_the_solution(ridge, terms):
    """Lorraine et al. (2020), theorem 2; Shaban et al. (2019), section 3."""
    series = ridge.at_solution(neumann, terms=terms, lr=0.03)
    steps = ridge.at_solution(lambda inner, *rest: unrolled([inner] * terms, *rest, sgd(0.03)))
    assert distance(series.hypergradient, steps.hypergradient) < 1e-13
    assert series.iterations == terms - 1


def test_unrolling_from_afar_tends_to_the_implicit_hypergradient(ridge):
    lowest, highest = extremes(ridge)
    lr = 1 / highest
    start = {"a": torch.ones(1, 2).double(), "b": torch.ones(2).double()}
    implicit = ridge.at_solution(ALL).hypergradient

    def error(steps, update):
        losses = [ridge.inner_loss] * steps
        return distance(unrolled(losses, ridge.outer_loss, start, ridge.hparams, update).hypergradient, implicit)

    assert error(1, sgd(lr)) > 0.1
    assert error(30, sgd(lr)) < 300 * (1 - lr * lowest) ** 30  # K times the rate to the K, and a constant
    assert error(150, sgd(lr)) < 1e-12
    assert error(200, sgd(lr, momentum=0.5)) < 1e-12


def test_residual_is_that_of_the_linear_system(ridge):
    solution = ridge.solution(ridge.hparams)
    w = {name: p.requires_grad_() for name, p in solution.items()}
    gradients = torch.autograd.grad(ridge.outer_loss(w, ridge.hparams), list(w.values()))
    v = torch.cat([d.reshape(-1) for d in gradients])
    hessian, eye = ridge.hessian(ridge.hparams), torch.eye(4).double()
    for terms in (1, 5):
        left = torch.linalg.matrix_power(eye - 0.05 * hessian, terms) @ v
        found = ridge.at_solution(neumann, terms=terms, lr=0.05)
        assert found.residual == pytest.approx(float(left.norm() / v.norm()), rel=1e-12)
    with pytest.warns(NotConverged):
        found = ridge.at_solution(conjugate_gradient, damping=0.7, tolerance=0.0, iterations=1)
    damped = hessian + 0.7 * eye
    left = v - damped @ v * (v @ v) / (v @ damped @ v)
    assert found.residual == pytest.approx(float(left.norm() / v.norm()), rel=1e-12)


def test_damping_is_a_quadratic_term_that_the_inner_loss_leaves_out(ridge):
    """The inner problem of a proximal term or weight decay, on a loss without it."""
    damping = 0.8

    def penalised(params, hparams):
        squares = sum(p.square().sum() for p in params.values())
        return ridge.inner_loss(params, hparams) + 0.5 * damping * squares

    anywhere = {"a": torch.ones(1, 2).double(), "b": -torch.ones(2).double()}
    found = ALL(ridge.inner_loss, ridge.outer_loss, anywhere, ridge.hparams, damping=damping)
    wanted = ALL(penalised, ridge.outer_loss, anywhere, ridge.hparams)
    assert distance(found.hypergradient, wanted.hypergradient) < 1e-12
    undamped = ALL(ridge.inner_loss, ridge.outer_loss, anywhere, ridge.hparams)
    assert distance(undamped.hypergradient | {"scale": torch.ones(())}, found.hypergradient) > 0.1


def test_a_curved_inner_problem_agrees_with_solving_it_anew():
    """Logistic regression: no closed form, and a Hessian that depends on the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64) > 0).double()
    held_out = torch.randn(6, 3, generator=generator, dtype=torch.float64)

    def inner_loss(params, hparams):
        penalty = (hparams["penalty"].exp() * params["w"].square()).sum()
        return nn.functional.binary_cross_entropy_with_logits(x @ params["w"], y) + penalty

    def outer_loss(params, hparams):
        return (held_out @ params["w"]).tanh().sum() + hparams["penalty"].square().sum()

    def solve(hparams):
        w = torch.zeros(3, dtype=torch.float64)
        for _ in range(20):  # Newton

            def loss(w):
                return inner_loss({"w": w}, hparams)

            w = w - torch.linalg.solve(torch.func.jacrev(torch.func.grad(loss))(w), torch.func.grad(loss)(w))
        return {"w": w}

    penalty = torch.tensor([-2.0, -1.5, -1.0], dtype=torch.float64)
    moved = [({"penalty": penalty + s}, {"penalty": penalty - s}) for s in 1e-5 * torch.eye(3).double()]
    wanted = [(outer_loss(solve(up), up) - outer_loss(solve(down), down)) / 2e-5 for up, down in moved]
    found = ALL(inner_loss, outer_loss, solve({"penalty": penalty}), {"penalty": penalty})
    assert distance(found.hypergradient, {"penalty": torch.stack(wanted)}) < 1e-8


def test_outer_loss_at_its_own_minimum_leaves_the_direct_part(ridge):
    solution = ridge.solution(ridge.hparams)

    def outer_loss(params, hparams):
        return (params["b"] - solution["b"]).square().sum() + 3 * hparams["scale"]

    for solver in (ALL, partial(neumann, terms=3, lr=0.1)):
        found = solver(ridge.inner_loss, outer_loss, solution, ridge.hparams)
        assert found.residual == 0
        assert found.hypergradient["scale"] == 3
        assert found.hypergradient["weights"].abs().max() == 0


def test_inner_loss_is_evaluated_once_so_each_product_sees_the_same_noise(problem):
    generator, calls = torch.Generator().manual_seed(0), []

    def inner_loss(params, hparams):
        calls.append(1)
        white = torch.randn(problem.white.shape, generator=generator, dtype=torch.float64)
        logits = stateless(problem.network, params, problem.images + hparams["noise"] * white)
        return nn.functional.cross_entropy(logits, problem.labels)

    hparams = {"noise": problem.hparams["noise"]}
    found = neumann(
        inner_loss, lambda p, h: problem.outer_loss(p, problem.hparams), problem.params, hparams, terms=4, lr=0.1
    )
    assert calls == [1]
    generator.manual_seed(0)
    white = torch.randn(problem.white.shape, generator=generator, dtype=torch.float64)

    def fixed(params, hparams):
        logits = stateless(problem.network, params, problem.images + hparams["noise"] * white)
        return nn.functional.cross_entropy(logits, problem.labels)

    again = neumann(
        fixed, lambda p, h: problem.outer_loss(p, problem.hparams), problem.params, hparams, terms=4, lr=0.1
    )
    assert torch.equal(found.hypergradient["noise"], again.hypergradient["noise"])


def test_each_product_costs_two_plain_steps_and_the_residual_no_product(problem):
    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def solve(terms):
        return neumann(problem.inner_loss, problem.outer_loss, problem.params, problem.hparams, terms=terms, lr=1e-3)

    inner = problem.inner_loss(problem.params, problem.hparams)
    backward = flops(lambda: torch.autograd.grad(inner, list(problem.params.values())))
    product = flops(lambda: solve(3)) - flops(lambda: solve(2))
    exact = flops(lambda: hypergradient(problem.inner_loss, problem.outer_loss, problem.params, problem.hparams))
    assert flops(lambda: solve(6)) - flops(lambda: solve(2)) == 4 * product
    assert product <= 3 * backward  # six convolutions to two
    assert flops(lambda: solve(1)) - exact < 0.4 * product


# Where the linear system is not solved


def test_too_few_iterations_are_told_with_the_residual(ridge):
    with pytest.warns(NotConverged, match="after 2 iterations with a relative residual of") as told:
        found = ridge.at_solution(conjugate_gradient, tolerance=1e-8, iterations=2)
    assert found.iterations == 2
    assert 1e-8 < found.residual < 1
    assert f"relative residual of {found.residual:.3g}, above the tolerance of 1e-08" in str(told[0].message)
    assert told[0].filename == __file__ or "test_implicit" in told[0].filename


def test_tolerance_is_where_it_stops(ridge):
    found = ridge.at_solution(conjugate_gradient, tolerance=0.5, iterations=20)
    assert found.residual <= 0.5
    assert found.iterations < 4


def bowl(curvatures, hparams=None):
    """Inner problem with these curvatures, outer gradient of ones: (inner_loss, outer_loss, params, hparams)."""
    c = torch.tensor(curvatures, dtype=torch.float64)
    return (
        lambda p, h: 0.5 * (c * (p["x"] - h["centre"]).square()).sum(),
        lambda p, h: p["x"].sum() + 5 * h["centre"].sum(),
        {"x": torch.zeros_like(c)},
        {"centre": torch.zeros_like(c)},
    )


def test_no_positive_curvature_at_the_start_leaves_the_direct_part():
    with pytest.warns(NotConverged, match="stopped at iteration 1 with a relative residual of 1, at a direction"):
        found = conjugate_gradient(*bowl([1.0, -1.0]), tolerance=1e-8, iterations=5)
    assert found.residual == 1
    torch.testing.assert_close(found.hypergradient["centre"], torch.full((2,), 5.0).double())


def test_no_positive_curvature_later_keeps_what_is_solved():
    with pytest.warns(NotConverged, match=r"curvature -0\.\d+, not above -damping = 0: ") as told:
        found = conjugate_gradient(*bowl([3.0, 1.0, -0.5]), tolerance=1e-8, iterations=5)
    assert found.iterations == 2
    assert f"residual of {found.residual:.3g}" in str(told[0].message)
    step = 3 / 3.5  # v.v / v.Hv
    torch.testing.assert_close(found.hypergradient["centre"], 5 + step * torch.tensor([3.0, 1.0, -0.5]).double())
    damped = conjugate_gradient(*bowl([3.0, 1.0, -0.5]), damping=0.6, tolerance=1e-8, iterations=5)
    wanted = 5 + torch.tensor([3 / 3.6, 1 / 1.6, -0.5 / 0.1], dtype=torch.float64)
    torch.testing.assert_close(damped.hypergradient["centre"], wanted)


def test_an_inner_gradient_without_curvature_is_told():
    def linear(params, hparams):
        return (params["x"] * hparams["a"]).sum()

    def outer(params, hparams):
        return params["x"].square().sum()

    with pytest.warns(NotConverged, match="curvature 0, not above"):
        conjugate_gradient(linear, outer, {"x": torch.ones(2)}, {"a": torch.ones(2)}, tolerance=0.1, iterations=3)


@pytest.mark.parametrize(("curvatures", "lr"), [([1.0, 5.0], 0.5), ([1.0, -0.1], 0.5)])
def test_diverging_series_is_told_with_the_residual(curvatures, lr):
    with pytest.warns(NotConverged, match=r"diverges, relative residual .* above 2 / lr = 4: lower lr") as told:
        found = neumann(*bowl(curvatures), terms=20, lr=lr)
    wanted = ((1 - lr * torch.tensor(curvatures).double()) ** 20).norm() / 2**0.5
    assert found.residual == pytest.approx(float(wanted))
    assert f"relative residual {found.residual:.3g} after 20 terms" in str(told[0].message)


def test_slow_series_is_not_a_diverging_one():
    assert neumann(*bowl([1.0, 0.0]), terms=200, lr=0.5).residual == pytest.approx(0.5**0.5)
    assert neumann(*bowl([0.0, 0.0]), terms=5, lr=0.5).residual == 1


def test_overflowing_series_is_refused():
    with pytest.raises(ValueError, match=r"overflows within 1000 terms: .* or take fewer terms\.$"):
        neumann(*bowl([1.0, 50.0]), terms=1000, lr=0.5)


def test_rounding_is_told():
    """Float32 and condition number 1e8: the running residual falls below the tolerance, the true one does not."""
    inner, outer, params, hparams = bowl([1e4, 3e3, 1.0, 1e-3])
    params, hparams = {"x": params["x"].float()}, {"centre": hparams["centre"].float()}

    def inner32(params, hparams):
        return inner({"x": params["x"].double()}, {"centre": hparams["centre"].double()}).float()

    with pytest.warns(NotConverged, match=r"torch\.float32 holds no more digits"):
        found = conjugate_gradient(inner32, outer, params, hparams, tolerance=1e-9, iterations=100)
    assert found.residual > 1e-9


# In a training loop


SOLVERS = [
    pytest.param(partial(neumann, terms=5, lr=0.1), id="neumann"),
    pytest.param(partial(conjugate_gradient, damping=1.0, tolerance=1e-6, iterations=30), id="cg"),
]

UNSOLVED = pytest.mark.filterwarnings("ignore::synthrepro.bilevel.NotConverged")  # an untrained network


@UNSOLVED
@pytest.mark.parametrize("solver", SOLVERS)
def test_estimator_takes_the_step_of_exact_and_differentiates_after_it(problem, case, solver):
    params, state = problem.params, None
    args = problem.hparams, case.update()
    for _ in range(3):
        step = hypergradient(problem.inner_loss, problem.outer_loss, params, *args, state, after_step(solver))
        exact = hypergradient(problem.inner_loss, problem.outer_loss, params, *args, state)
        torch.testing.assert_close(
            vars(step) | {"hypergradient": 0}, vars(exact) | {"hypergradient": 0}, rtol=1e-9, atol=1e-12
        )
        found = solver(problem.inner_loss, problem.outer_loss, step.params, problem.hparams)
        torch.testing.assert_close(step.hypergradient, found.hypergradient, rtol=0, atol=0)
        params, state = step.params, step.state


@UNSOLVED
@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_given_is_touched_and_nothing_returned_holds_a_graph(problem, solver):
    before = {name: p.detach().clone() for name, p in problem.params.items()}
    with torch.no_grad():
        found = solver(problem.inner_loss, problem.outer_loss, problem.params, problem.hparams)
        step = hypergradient(
            problem.inner_loss, problem.outer_loss, problem.params, problem.hparams, adam(), None, after_step(solver)
        )
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in problem.params.items())
    held = [*found.hypergradient.values(), found.inner_loss, found.outer_loss, *step.params.values()]
    held += [*step.hypergradient.values(), *step.state["mean"].values(), step.inner_loss, step.outer_loss]
    assert not any(t.requires_grad for t in held)


@UNSOLVED
@pytest.mark.parametrize("solver", SOLVERS)
def test_precisions_may_differ_between_tensors(problem, solver):
    params = problem.params | {"3.bias": problem.params["3.bias"].float()}

    def widened(loss):
        return lambda params, hparams: loss(params | {"3.bias": params["3.bias"].double()}, hparams)

    found = solver(widened(problem.inner_loss), widened(problem.outer_loss), params, problem.hparams)
    wanted = solver(problem.inner_loss, problem.outer_loss, problem.params, problem.hparams)
    assert distance(found.hypergradient, wanted.hypergradient) < 1e-5


# Another library


@pytest.mark.filterwarnings("ignore:We.ve integrated functorch:FutureWarning")
def test_torchopt_agrees(ridge):
    torchopt = pytest.importorskip("torchopt")

    def optimality(w, *hparams):
        return torch.func.grad(lambda w: ridge.inner_loss(named(w), dict(zip(ridge.hparams, hparams, strict=True))))(w)

    def named(w):
        return {"a": w[0], "b": w[1]}

    @torchopt.diff.implicit.custom_root(
        optimality, argnums=(1, 2, 3), solve=torchopt.linear_solve.solve_cg(maxiter=20, atol=1e-12)
    )
    def solve(w, *hparams):
        return tuple(ridge.solution(dict(zip(ridge.hparams, hparams, strict=True))).values())

    hparams = {name: h.clone().requires_grad_() for name, h in ridge.hparams.items()}
    start = tuple(p.requires_grad_() for p in ridge.solution(ridge.hparams).values())
    wanted = derivatives(ridge.outer_loss(named(solve(start, *hparams.values())), hparams), hparams)
    assert distance(ridge.at_solution(ALL).hypergradient, wanted) < 1e-9


# Mistakes


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (partial(neumann, terms=0, lr=0.1), "at least one term, not 0"),
        (partial(neumann, terms=1, lr=0.0), r"learning rate of the Neumann series must be positive, not 0\.0"),
        (partial(neumann, terms=1, lr=float("nan")), "must be positive, not nan"),
        (partial(conjugate_gradient, tolerance=-1.0, iterations=1), r"tolerance .* at least 0, not -1\.0"),
        (partial(conjugate_gradient, tolerance=0.1, iterations=0), "at least one iteration, not 0"),
        (partial(conjugate_gradient, damping=-0.1, tolerance=0.1, iterations=1), r"damping .* at least 0, not -0\.1"),
    ],
)
def test_option_out_of_range_is_refused(ridge, solver, message):
    with pytest.raises(ValueError, match=message) as error:
        ridge.at_solution(solver)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def value(params, hparams):
    return (hparams["a"] * params["x"]).square().sum()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"inner_loss": lambda p, h: p["x"]}, r"The inner loss must be a scalar tensor, not a .* \(2,\)"),
        ({"outer_loss": lambda p, h: value(p, h) / 0}, "The outer loss is inf"),
        (
            {"outer_loss": lambda p, h: (p["x"] - 1).norm() + (p["x"] - 1).abs().sqrt().sum()},
            "gradient of the outer loss",
        ),
        ({"outer_loss": lambda p, h: h["a"].sum()}, "The outer loss depends on no parameter"),
        ({"hparams": {"a": torch.ones(2), "b": torch.ones(1)}}, "depends on hyperparameter 'b': use it in a loss"),
        ({"params": {"x": torch.ones(2).long()}}, "'x' is torch.int64, which cannot be differentiated"),
    ],
)
def test_mistake_is_told_in_one_sentence(mistake, message, solver):
    options = {
        "inner_loss": value,
        "outer_loss": value,
        "params": {"x": torch.ones(2)},
        "hparams": {"a": torch.ones(2)},
    }
    options |= mistake
    with pytest.raises(ValueError, match=message) as error:
        solver(*options.values())
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.filterwarnings("ignore::synthrepro.bilevel.NotConverged")  # one term solves nothing, and says so
@pytest.mark.parametrize("update", [sgd(lr=0.3), adam(lr=0.02)], ids=["sgd", "adam"])
def test_the_two_conventions_that_people_confuse(problem, update):
    """Before the step and with the learning rate (`exact`); after it and without (Betty's ``darts``: the mixed
    derivative at the stepped weights times the outer gradient there), which is a Neumann series of one term, lr=1."""
    given = problem.inner_loss, problem.outer_loss, problem.params, problem.hparams, update, None
    before, after = hypergradient(*given), hypergradient(*given, "neumann", terms=1, lr=1.0)
    phi = {name: p.clone().requires_grad_() for name, p in after.params.items()}
    theta = {name: t.clone().requires_grad_() for name, t in problem.hparams.items()}
    outer = problem.outer_loss(phi, theta)
    direct = torch.autograd.grad(outer, list(theta.values()), retain_graph=True, allow_unused=True)
    v = torch.autograd.grad(outer, list(phi.values()))
    g = torch.autograd.grad(problem.inner_loss(phi, theta), list(phi.values()), create_graph=True)
    mixed = torch.autograd.grad(g, list(theta.values()), v, allow_unused=True)
    for name, *parts in zip(theta, direct, mixed, strict=True):
        wanted = (0 if parts[0] is None else parts[0]) - (0 if parts[1] is None else parts[1])
        assert torch.allclose(after.hypergradient[name], wanted, rtol=1e-12, atol=1e-15)
    assert (after.hypergradient["means"] - before.hypergradient["means"]).norm() > before.hypergradient["means"].norm()
