import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.bilevel import Update, adam, exact, hypergradient, sgd, stateless, unrolled

STEPS = 5


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative error among the hyperparameters, each taken as one vector."""
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == wanted[name].shape for name in wanted)
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def fresh(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def batches(problem, steps: int = STEPS):
    """One inner loss a step, each on noise of its own; ``noise`` weighs more from step to step."""

    def loss(k):
        white = problem.white.roll(k, -1)

        def inner_loss(params, hparams):
            rendered = hparams["means"][problem.labels][:, None] + (1 + 0.3 * k) * hparams["noise"] * white
            return nn.functional.cross_entropy(stateless(problem.network, params, rendered), problem.labels)

        return inner_loss

    return [loss(k) for k in range(steps)]


def descend(optimiser, losses, params, hparams) -> None:
    for loss in losses:
        optimiser.zero_grad()
        loss(params, hparams).backward()
        optimiser.step()


def reference(problem, case, earlier, losses, h=1e-6, **more) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hypergradient through steps on ``losses`` that follow steps on ``earlier``, and the parameters at the end: from
    torch's own optimisers and central differences alone."""
    start = fresh(problem.params)
    started = case.optimiser(list(start.values()), **more)
    descend(started, earlier, start, problem.hparams)

    def run(hparams):
        params = fresh(start)
        optimiser = case.optimiser(list(params.values()), **more)
        optimiser.load_state_dict(copy.deepcopy(started.state_dict()))
        descend(optimiser, losses, params, hparams)
        return params

    found = {name: torch.zeros_like(value) for name, value in problem.hparams.items()}
    for name, value in problem.hparams.items():
        for i in range(value.numel()):
            bump = torch.zeros_like(value)
            bump.view(-1)[i] = h
            moved = [problem.hparams | {name: value + s * bump} for s in (1, -1)]
            up, down = (problem.outer_loss(run(hparams), hparams).detach() for hparams in moved)
            found[name].view(-1)[i] = (up - down) / (2 * h)
    return found, {name: p.detach() for name, p in run(problem.hparams).items()}


@pytest.mark.parametrize(
    ("earlier", "more"), [pytest.param(0, {"eps": 1e-3}, id="first"), pytest.param(3, {}, id="later")]
)
def test_hypergradient_is_the_derivative_of_all_steps_together(problem, case, earlier, more):
    more = more if case.adaptive else {}
    losses, update = batches(problem, earlier + STEPS), case.update(**more)
    params, state = problem.params, None
    if earlier:
        before = unrolled(losses[:earlier], problem.outer_loss, params, problem.hparams, update)
        params, state = before.params, before.state
    step = unrolled(losses[earlier:], problem.outer_loss, params, problem.hparams, update, state)
    wanted, end = reference(problem, case, losses[:earlier], losses[earlier:], **more)
    assert distance(step.hypergradient, wanted) < 1e-7
    for name, p in end.items():
        torch.testing.assert_close(step.params[name], p, rtol=1e-10, atol=1e-12)
    assert step.state["step"] == earlier + STEPS
    torch.testing.assert_close(step.inner_loss, losses[earlier](params, problem.hparams).detach())
    torch.testing.assert_close(step.outer_loss, problem.outer_loss(end, problem.hparams))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_step_is_exact(problem, case, checkpoint):
    losses, update = batches(problem), case.update()
    params, state = problem.params, update.init(problem.params)
    for loss in losses:  # from a fresh state and from later ones
        ours = unrolled([loss], problem.outer_loss, params, problem.hparams, update, state, checkpoint=checkpoint)
        theirs = exact(loss, problem.outer_loss, params, problem.hparams, update, state)
        assert distance(ours.hypergradient, theirs.hypergradient) < 1e-14
        torch.testing.assert_close(vars(ours), vars(theirs), rtol=1e-14, atol=1e-16)
        params, state = theirs.params, theirs.state


@pytest.mark.parametrize("truncate", [None, 1, 2, 6])
def test_quadratic_has_a_closed_form(truncate):
    """phi_K - theta = (1 - lr c)^K (phi_0 - theta); through T steps dphi_K/dtheta = 1 - (1 - lr c)^T."""
    c, lr, steps = torch.tensor([0.5, 2.0, 3.0]).double(), 0.2, 6
    phi, theta, target = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = unrolled(
        [lambda p, h: 0.5 * (c * (p["x"] - h["theta"]).square()).sum()] * steps,
        lambda p, h: 0.5 * (p["x"] - target).square().sum() + 3 * h["theta"].sum(),
        {"x": phi},
        {"theta": theta},
        sgd(lr),
        truncate=truncate,
    )
    end = theta + (1 - lr * c) ** steps * (phi - theta)
    wanted = (end - target) * (1 - (1 - lr * c) ** (truncate or steps)) + 3
    torch.testing.assert_close(step.params["x"], end, rtol=1e-13, atol=0)
    torch.testing.assert_close(step.hypergradient["theta"], wanted, rtol=1e-13, atol=0)


def test_truncation_holds_the_earlier_steps_constant(problem, case):
    losses, update = batches(problem), case.update()

    def estimate(truncate):
        return unrolled(losses, problem.outer_loss, problem.params, problem.hparams, update, truncate=truncate)

    full = estimate(None)
    torch.testing.assert_close(vars(estimate(STEPS)), vars(full), rtol=0, atol=0)
    for truncate in (1, 3):
        short = estimate(truncate)
        torch.testing.assert_close(short.params, full.params, rtol=1e-12, atol=1e-14)  # a graph rounds otherwise
        torch.testing.assert_close(short.inner_loss, full.inner_loss, rtol=1e-14, atol=0)
        before = unrolled(losses[:-truncate], problem.outer_loss, problem.params, problem.hparams, update)
        rest = unrolled(
            losses[-truncate:], problem.outer_loss, before.params, problem.hparams, update, before.state
        )  # fmt: skip
        assert distance(short.hypergradient, rest.hypergradient) < 1e-14
        assert distance(short.hypergradient | {"scale": full.hypergradient["scale"]}, full.hypergradient) > 1e-3
        torch.testing.assert_close(short.hypergradient["scale"], full.hypergradient["scale"])  # the direct part


# Checkpoints


class Saved:
    """Counts the numbers that autograd holds for a backward pass, at the most."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(self, t), lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


class _Held:
    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor.detach()  # with its graph it would hold itself
        saved.live += tensor.numel()
        saved.peak = max(saved.peak, saved.live)

    def __del__(self) -> None:
        self.saved.live -= self.tensor.numel()


@pytest.mark.parametrize(("steps", "truncate"), [(2, None), (7, None), (16, None), (8, 5)])
def test_checkpoint_changes_no_number(problem, case, steps, truncate):
    losses = batches(problem, steps)
    plain, saving = (
        unrolled(
            losses,
            problem.outer_loss,
            problem.params,
            problem.hparams,
            case.update(),
            truncate=truncate,
            checkpoint=checkpoint,
        )
        for checkpoint in (False, True)
    )
    torch.testing.assert_close(vars(saving), vars(plain), rtol=1e-11, atol=1e-13)  # a graph rounds otherwise


def test_memory_grows_with_the_steps_and_with_checkpoints_with_their_root(problem):
    def peak(steps, **options):
        with Saved() as saved:
            unrolled(batches(problem, steps), problem.outer_loss, problem.params, problem.hparams, adam(), **options)
        assert saved.live == 0
        return saved.peak

    four, eight, sixteen = peak(4), peak(8), peak(16)
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=0.01)
    assert eight - four > 0.7 * four  # the rest is the outer pass
    assert peak(16, truncate=4) == pytest.approx(four, rel=0.01)
    assert peak(16, checkpoint=True) < 1.3 * four
    assert peak(25, checkpoint=True) < 1.3 * peak(5)


def test_checkpoint_computes_each_inner_gradient_but_the_last_segments_twice(problem):
    def flops(steps, **options):
        with FlopCounterMode(display=False) as counter:
            unrolled(batches(problem, steps), problem.outer_loss, problem.params, problem.hparams, sgd(0.1), **options)
        return counter.get_total_flops()

    a_step = flops(16, truncate=1) - flops(15, truncate=1)  # an ordinary one
    assert flops(16, checkpoint=True) - flops(16) == 12 * a_step


def test_cost_is_that_of_exact_and_nine_convolutions_for_each_further_step():
    """To a plain step's three; a narrow first layer, whose input a plain step does not differentiate, hardly counts."""
    widths = [1, 64, 64, 64, 64, 64]
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU()) for a, b in itertools.pairwise(widths)]
    network = nn.Sequential(*(module for layer in layers for module in layer))
    white, noise = torch.ones(2, 1, 8, 8), {"noise": torch.tensor(0.1)}
    params = dict(network.named_parameters())

    def inner_loss(params, hparams):
        return stateless(network, params, hparams["noise"] * white).square().mean()

    def outer_loss(params, hparams):
        return stateless(network, params, white).square().mean()

    def flops(steps, **options):
        with FlopCounterMode(display=False) as counter:
            unrolled([inner_loss] * steps, outer_loss, params, noise, sgd(0.1), **options)
        return counter.get_total_flops()

    plain = flops(2, truncate=1) - flops(1)
    assert flops(1) / plain == pytest.approx(11 / 3, rel=0.01)
    assert (flops(4) - flops(3)) / plain == pytest.approx(3, rel=0.01)


def noisy(problem, generator=None):
    """An inner loss that draws its noise itself."""

    def inner_loss(params, hparams):
        white = torch.randn(problem.white.shape, generator=generator, dtype=torch.float64)
        logits = stateless(problem.network, params, problem.images + hparams["noise"] * white)
        return nn.functional.cross_entropy(logits, problem.labels)

    return inner_loss


def estimate_noisy(problem, generator=None, **options):
    hparams = {"noise": problem.hparams["noise"]}

    def outer_loss(params, hparams):
        return problem.outer_loss(params, problem.hparams)

    return unrolled([noisy(problem, generator)] * 9, outer_loss, problem.params, hparams, sgd(0.1), **options)


def test_checkpoint_replays_the_randomness_and_leaves_it_as_one_evaluation_does(problem):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain, after = estimate_noisy(problem), torch.get_rng_state()
        torch.manual_seed(3)
        saving = estimate_noisy(problem, checkpoint=True)
        assert torch.equal(torch.get_rng_state(), after)
    assert distance(saving.hypergradient, plain.hypergradient) < 1e-13
    generator = torch.Generator().manual_seed(3)
    saving = estimate_noisy(problem, generator, checkpoint=True, generators=[generator])
    assert torch.equal(generator.get_state(), after)
    assert distance(saving.hypergradient, plain.hypergradient) < 1e-13


def test_checkpoint_refuses_noise_that_it_cannot_replay(problem):
    generator = torch.Generator().manual_seed(3)
    with pytest.raises(ValueError, match=r"computes it again: name the generators .* or turn checkpoint off\.$"):
        estimate_noisy(problem, generator, checkpoint=True)


# Other libraries


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_torchopt_agrees(problem, name):
    torchopt = pytest.importorskip("torchopt")
    ours, theirs = {
        "sgd": (sgd(lr=0.1), torchopt.sgd(0.1)),
        "momentum": (sgd(lr=0.1, momentum=0.9), torchopt.sgd(0.1, momentum=0.9)),
        # TorchOpt keeps bias corrections in float32: with betas in quarters that rounds nothing away
        "adam": (adam(0.02, (0.5, 0.75), eps=1e-3), torchopt.adam(0.02, (0.5, 0.75), eps=1e-3)),
    }[name]
    params, hparams, state = fresh(problem.params), fresh(problem.hparams), theirs.init(problem.params)
    for loss in batches(problem):
        g = torch.autograd.grad(loss(params, hparams), list(params.values()), create_graph=True)
        updates, state = theirs.update(dict(zip(params, g, strict=True)), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = problem.outer_loss(params, hparams)
    wanted = dict(zip(hparams, torch.autograd.grad(outer, list(hparams.values())), strict=True))
    found = unrolled(batches(problem), problem.outer_loss, problem.params, problem.hparams, ours)
    assert distance(found.hypergradient, wanted) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9])  # its Adam places eps otherwise
def test_higher_agrees(problem, momentum):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its sources are of 2021: today's Python warns on compiling them
        higher = pytest.importorskip("higher")
    hparams = fresh(problem.hparams)
    optimiser = torch.optim.SGD(problem.network.parameters(), lr=0.1, momentum=momentum)
    with higher.innerloop_ctx(problem.network, optimiser, copy_initial_weights=True) as (network, differentiable):
        for loss in batches(problem):
            differentiable.step(loss(dict(network.named_parameters()), hparams))
        outer = problem.outer_loss(dict(network.named_parameters()), hparams)
        wanted = dict(zip(hparams, torch.autograd.grad(outer, list(hparams.values())), strict=True))
    found = unrolled(batches(problem), problem.outer_loss, problem.params, problem.hparams, sgd(0.1, momentum))
    assert distance(found.hypergradient, wanted) < 1e-12


# What it leaves alone, and mistakes


@pytest.mark.parametrize("checkpoint", [False, True])
def test_nothing_given_is_touched_and_nothing_returned_holds_a_graph(problem, case, checkpoint):
    params, hparams = fresh(problem.params), fresh(problem.hparams)
    before = copy.deepcopy([params, hparams])
    with torch.no_grad():
        step = unrolled(batches(problem), problem.outer_loss, params, hparams, case.update(), checkpoint=checkpoint)
    torch.testing.assert_close([params, hparams], before, rtol=0, atol=0)
    assert all(t.grad is None for t in [*params.values(), *hparams.values()])
    moments = [t for moment in step.state.values() if isinstance(moment, dict) for t in moment.values()]
    held = [*step.hypergradient.values(), *step.params.values(), *moments, step.inner_loss, step.outer_loss]
    assert not any(t.requires_grad for t in held)


def test_update_of_ones_own_may_freeze_parameters_and_keep_any_state(problem):
    """Descent along the difference to an average of the parameters themselves: a state that depends on them."""

    def init(params):
        return {"average": {n: p.detach() for n, p in params.items()}, "note": "mine"}

    def step(params, gradients, state):
        average = {n: 0.7 * a + 0.3 * params[n] for n, a in state["average"].items()}
        stepped = {n: params[n] - 0.1 * d + 0.2 * (average[n] - params[n]) for n, d in gradients.items()}
        return {n: p if n.startswith("0.") else stepped[n] for n, p in params.items()}, state | {"average": average}

    update = Update(init, step)
    params, hparams, state = fresh(problem.params), fresh(problem.hparams), init(problem.params)
    for loss in batches(problem):
        g = torch.autograd.grad(loss(params, hparams), list(params.values()), create_graph=True)
        params, state = step(params, dict(zip(params, g, strict=True)), state)
    outer = problem.outer_loss(params, hparams)
    wanted = dict(zip(hparams, torch.autograd.grad(outer, list(hparams.values())), strict=True))
    for checkpoint in (False, True):
        found = unrolled(
            batches(problem), problem.outer_loss, problem.params, problem.hparams, update, checkpoint=checkpoint
        )
        assert distance(found.hypergradient, wanted) < 1e-12
        assert found.state["note"] == "mine"


def test_it_is_an_estimator_like_the_others(problem):
    """One loss and a number of steps, or a loss a step; the table of names leads here."""
    given = problem.outer_loss, problem.params, problem.hparams, sgd(lr=0.1), None
    wanted = unrolled([problem.inner_loss] * 3, *given, truncate=2)
    for estimator in ("unrolled", unrolled):
        found = hypergradient(problem.inner_loss, *given, estimator, steps=3, truncate=2)
        assert distance(found.hypergradient, wanted.hypergradient) == 0
        assert found.state["step"] == 3
    for losses, steps in ((problem.inner_loss, None), ([problem.inner_loss] * 3, 3)):
        with pytest.raises(ValueError, match="Give either one inner loss and the number of steps, or a sequence"):
            unrolled(losses, *given, steps=steps)


def value(params, hparams):
    return (hparams["a"] * params["x"]).square().sum()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"inner_loss": []}, "There are no inner losses to unroll"),
        ({"truncate": 0}, "truncate must be from 1 to the number of inner steps, which is 3, not 0"),
        ({"truncate": 4}, "truncate must be from 1 to the number of inner steps, which is 3, not 4"),
        ({"inner_loss": [value, lambda p, h: p["x"]]}, r"The inner loss must be a scalar tensor, not a .* \(2,\)"),
        ({"outer_loss": lambda p, h: value(p, h) / 0}, "The outer loss is inf"),
        ({"hparams": {"a": torch.ones(2), "b": torch.ones(1)}}, "depends on hyperparameter 'b': use it in a loss"),
        ({"params": {"x": torch.ones(2).long()}}, "'x' is torch.int64, which cannot be differentiated"),
        ({"state": {"step": 1}}, "The state holds step where this update keeps step, momentum"),
        (
            {"update": Update(lambda p: {}, lambda p, g, s: ({"x": p["x"][:1]}, s))},
            r"The update returned \(1,\) for parameter 'x', which has \(2,\)",
        ),
    ],
)
def test_mistake_is_told_in_one_sentence(mistake, message):
    options = {
        "inner_loss": [value] * 3,
        "outer_loss": value,
        "params": {"x": torch.ones(2)},
        "hparams": {"a": torch.ones(2)},
        "update": sgd(0.1, momentum=0.9),
    }
    with pytest.raises(ValueError, match=message) as error:
        unrolled(**options | mistake)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
