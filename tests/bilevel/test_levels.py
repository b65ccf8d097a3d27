import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthrepro.bilevel import Update, adam, hypergradient, rmsprop, sgd, stateless
from synthrepro.bilevel.levels import ChainStep, Level, chain

ESTIMATORS = ["exact", "finite_difference"]
Tensors = dict[str, Tensor]


def fresh(tensors: Tensors) -> Tensors:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def detached(tensors: Tensors) -> Tensors:
    return {name: t.detach() for name, t in tensors.items()}


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def distance(found: Tensors, wanted: Tensors) -> float:
    """Largest relative error among all components."""
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == wanted[name].shape for name in wanted)
    return float(((flat(found) - flat(wanted)) / flat(wanted)).abs().max())


def together(found: Tensors, wanted: Tensors) -> float:
    """Largest relative error among the hyperparameters, each taken as one vector."""
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def same(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# A GenSeg in small


class Generator(nn.Module):
    """Mask to image: a softmax mixture of three kernels, the architecture its logits, before a head of its own."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(1, 4, size, padding=size // 2, bias=False) for size in (1, 3, 5))
        self.norm = norm(4)
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, mask: Tensor, architecture: Tensor, keep: Tensor | float) -> Tensor:
        shares = architecture.softmax(0)  # (3,)
        mixed = sum(share * kernel(mask) for share, kernel in zip(shares, self.kernels, strict=True))  # (B, 4, H, W)
        return torch.tanh(self.head(F.silu(self.norm(mixed)) * keep))  # (B, 1, H, W)


class Segmenter(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), norm(4)
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, image: Tensor, keep: Tensor | float = 1.0) -> Tensor:
        return self.head(F.silu(self.norm(self.first(image))) * keep)  # logits (B, 2, H, W)


def batch_norm(channels: int) -> nn.Module:
    """With running statistics that differ from those of any batch here."""
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_(0.1, 0.3)
    norm.running_var.uniform_(0.5, 1.5)
    return norm


@dataclasses.dataclass(frozen=True)
class GenSeg:
    """Of the hyperparameters, ``architecture`` (3,) acts in the generator's loss and in the generated image, ``gamma``
    () in the segmenter's loss alone, and ``sharpness`` () in the validation loss alone.

    ``cut`` takes something out of the segmenter's loss: the ``image``'s gradient, that of the generator's stepped
    ``weights``, or that of the ``architecture`` where it acts on the image itself.
    """

    generator: nn.Module
    segmenter: nn.Module
    discriminator: nn.Module
    masks: Tensor  # (B, H, W), as the next
    held_out_masks: Tensor
    images: Tensor  # (B, 1, H, W), as the next
    held_out_images: Tensor
    hparams: Tensors
    dropout: Callable[[], Tensor | float] = lambda: 1.0
    cut: str = ""

    def image(self, params: Tensors, architecture: Tensor) -> Tensor:
        mask = self.masks[:, None].to(self.images)
        return stateless(self.generator, params, mask, architecture, self.dropout())

    def generator_loss(self, params: Tensors, upstream) -> Tensor:
        fake = self.image(params, upstream["hparams"]["architecture"])
        judged = self.discriminator(torch.cat([self.masks[:, None].to(fake), fake], 1))
        return F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged)) + 10 * F.mse_loss(fake, self.images)

    def segmenter_loss(self, params: Tensors, upstream) -> Tensor:
        weights, architecture = upstream["generator"], upstream["hparams"]["architecture"]
        fake = self.image(
            detached(weights) if self.cut == "weights" else weights,
            architecture.detach() if self.cut == "architecture" else architecture,
        )
        fake = fake.detach() if self.cut == "image" else fake
        on_real = F.cross_entropy(stateless(self.segmenter, params, self.images, self.dropout()), self.masks)
        on_fake = F.cross_entropy(stateless(self.segmenter, params, fake, self.dropout()), self.masks)
        return on_real + upstream["hparams"]["gamma"] * on_fake

    def validation_loss(self, upstream) -> Tensor:
        logits = stateless(self.segmenter, upstream["segmenter"], self.held_out_images)
        return F.cross_entropy(upstream["hparams"]["sharpness"] * logits, self.held_out_masks)

    def levels(self, updates: tuple[Update, Update], after: ChainStep | None = None) -> list[Level]:
        losses = {"generator": self.generator_loss, "segmenter": self.segmenter_loss}
        networks = {"generator": self.generator, "segmenter": self.segmenter}
        levels = [
            Level(name, losses[name], dict(networks[name].named_parameters()), update)
            for name, update in zip(losses, updates, strict=True)
        ]
        if after is None:
            return levels
        return [dataclasses.replace(x, params=after.params[x.name], state=after.state[x.name]) for x in levels]

    def step(self, updates: tuple[Update, Update], after: ChainStep | None = None, **options: Any) -> ChainStep:
        return chain(self.levels(updates, after), self.validation_loss, self.hparams, **options)


def genseg(norm: str = "group", **more: Any) -> GenSeg:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = (lambda channels: nn.GroupNorm(2, channels)) if norm == "group" else batch_norm
        networks = [Generator(make), Segmenter(make), nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))]
        for network in networks:
            network.double().train(norm != "batch-eval")
        masks = torch.randint(2, (2, 2, 6, 6))
        images = (0.6 * masks - 0.2)[:, :, None] + 0.2 * torch.randn(2, 2, 1, 6, 6)
    hparams = {
        "architecture": torch.tensor([0.3, -0.5, 0.4], dtype=torch.float64),
        "gamma": torch.tensor(0.8, dtype=torch.float64),
        "sharpness": torch.tensor(1.5, dtype=torch.float64),
    }
    return GenSeg(*networks, *masks, *images.double(), hparams, **more)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One of our updates and the optimiser in torch.optim that it copies, with the same options."""

    ours: Callable[..., Update]
    theirs: type[torch.optim.Optimizer]
    options: dict[str, Any]

    @property
    def update(self) -> Update:
        return self.ours(**self.options)


SGDS = tuple(Pair(sgd, torch.optim.SGD, {"lr": lr, "momentum": 0.5}) for lr in (0.05, 0.5))
ADAM = Pair(adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.5, 0.9)})
RMSPROP = Pair(rmsprop, torch.optim.RMSprop, {"lr": 0.05, "alpha": 0.9, "momentum": 0.5, "weight_decay": 0.01})
PAIRS = {"sgd": SGDS, "adam": (ADAM, ADAM), "rmsprop": (RMSPROP, RMSPROP), "mixed": (ADAM, RMSPROP)}


@pytest.fixture(params=PAIRS)
def pairs(request: pytest.FixtureRequest) -> tuple[Pair, Pair]:
    return PAIRS[request.param]


def updates(pairs: tuple[Pair, Pair]) -> tuple[Update, Update]:
    return pairs[0].update, pairs[1].update


EARLIER = 2


def walk(problem: GenSeg, pairs: tuple[Pair, Pair], **options: Any) -> ChainStep:
    """The step after EARLIER ones, with the states that they left; the randomness starts anew with each step."""
    step = None
    for _ in range(EARLIER + 1):
        torch.manual_seed(5)
        step = problem.step(updates(pairs), step, **options)
    return step


class Procedure:
    """The step after EARLIER ones as a function of the hyperparameters: torch's own optimisers, no derivative of ours.

    The generator's step and everything after it may be given hyperparameters of their own.
    """

    def __init__(self, problem: GenSeg, pairs: tuple[Pair, Pair]) -> None:
        self.problem = problem
        levels = problem.levels(updates(pairs))
        self.params = {level.name: fresh(level.params) for level in levels}
        self.optimisers = {
            level.name: pair.theirs(list(self.params[level.name].values()), **pair.options)
            for level, pair in zip(levels, pairs, strict=True)
        }
        for _ in range(EARLIER):
            self.run(problem.hparams, problem.hparams)

    def run(self, of_generator: Tensors, of_rest: Tensors) -> Tensor:
        torch.manual_seed(5)
        generator, segmenter = self.params["generator"], self.params["segmenter"]
        self._descend("generator", self.problem.generator_loss(generator, {"hparams": of_generator}))
        upstream = {"hparams": of_rest, "generator": detached(generator)}
        self._descend("segmenter", self.problem.segmenter_loss(segmenter, upstream))
        return self.problem.validation_loss(upstream | {"segmenter": detached(segmenter)}).detach()

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimisers[name].zero_grad()
        loss.backward(inputs=list(self.params[name].values()))
        self.optimisers[name].step()

    def slope(self, moved: tuple[bool, bool] = (True, True), h: float = 3e-4) -> Tensors:
        """Derivative by central differences of fourth order: the rounding of h = 1e-6 would be too coarse here."""
        found = {name: torch.zeros_like(value) for name, value in self.problem.hparams.items()}
        for name, value in self.problem.hparams.items():
            for i in range(value.numel()):
                bump = torch.zeros_like(value)
                bump.view(-1)[i] = h
                for by, weight in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)):
                    there = self.problem.hparams | {name: value + by * bump}
                    outer = copy.deepcopy(self).run(*(there if move else self.problem.hparams for move in moved))
                    found[name].view(-1)[i] += weight * outer / h
        return found


@pytest.fixture(autouse=True)
def _own_randomness():
    with torch.random.fork_rng(devices=[]):
        yield


# BatchNorm uses the statistics of the batch in train mode and its running ones, held constant, in eval mode.
@pytest.mark.parametrize("norm", ["group", "batch-train", "batch-eval"])
def test_hypergradient_is_the_derivative_of_the_whole_procedure(norm, pairs):
    problem = genseg(norm)
    step, procedure = walk(problem, pairs), Procedure(problem, pairs)
    assert distance(step.hypergradient, procedure.slope()) <= 1e-7


def test_finite_difference_is_off_in_proportion_to_its_radius_and_central_to_its_square(pairs):
    problem = genseg("batch-train")
    truth = walk(problem, pairs).hypergradient

    def error(scheme, radius):
        found = walk(problem, pairs, estimator="finite_difference", scheme=scheme, radius=radius)
        return together(found.hypergradient, truth)

    assert error("forward", 1e-3) < 0.05  # the default
    assert error("forward", 1e-3) / error("forward", 1e-4) == pytest.approx(10, rel=0.1)
    assert error("central", 1e-3) < 1e-4
    assert error("central", 1e-3) / error("central", 1e-4) == pytest.approx(100, rel=0.1)


def test_direct_is_the_derivative_with_the_generators_step_held_fixed_and_the_rest_passes_through_it(pairs):
    problem = genseg("batch-train")
    step, procedure = walk(problem, pairs), Procedure(problem, pairs)
    assert distance(step.direct, procedure.slope(moved=(False, True))) <= 1e-7
    through, wanted = step.through_weights, procedure.slope(moved=(True, False))
    assert distance({"architecture": through["architecture"]}, {"architecture": wanted["architecture"]}) <= 1e-7
    for name in ("gamma", "sharpness"):  # which the generator's loss does not use
        assert through[name] == 0
        assert wanted[name].abs() < 1e-12


def test_step_gives_what_the_optimisers_of_torch_give(pairs):
    problem = genseg("batch-train")
    step, procedure = walk(problem, pairs), Procedure(problem, pairs)
    before = copy.deepcopy(procedure.params)
    outer = procedure.run(problem.hparams, problem.hparams)
    torch.testing.assert_close(step.outer_loss, outer)
    for name, params in procedure.params.items():
        torch.testing.assert_close(step.params[name], detached(params), rtol=1e-9, atol=1e-11)
        assert step.state[name]["step"] == EARLIER + 1
    upstream = {"hparams": problem.hparams, "generator": procedure.params["generator"]}
    torch.testing.assert_close(step.losses["generator"], problem.generator_loss(before["generator"], upstream).detach())
    torch.testing.assert_close(step.losses["segmenter"], problem.segmenter_loss(before["segmenter"], upstream).detach())


# What each path carries, by cutting it


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_detached_image_leaves_exactly_zero(pairs, estimator):
    """As in the main 2-D scripts that GenSeg released."""
    problem = genseg("batch-train")
    whole, cut = (walk(p, pairs, estimator=estimator) for p in (problem, dataclasses.replace(problem, cut="image")))
    zero = torch.zeros(3, dtype=torch.float64)
    assert not torch.equal(whole.hypergradient["architecture"], zero)
    for found in [cut.hypergradient, cut.direct, cut.through_weights, *cut.parts.values()]:
        assert torch.equal(found["architecture"], zero)
    assert same(cut.parts["generator"], {name: torch.zeros_like(t) for name, t in problem.hparams.items()})
    for name in ("gamma", "sharpness"):
        assert torch.equal(cut.hypergradient[name], whole.hypergradient[name])
    assert math.isnan(cut.cosines["generator"])
    assert math.isnan(cut.cosines["through_weights"])
    assert cut.cosines["direct"] == pytest.approx(1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_generators_weights_held_fixed_leave_exactly_the_direct_part(pairs, estimator):
    problem = genseg("batch-train")
    whole, cut = (walk(p, pairs, estimator=estimator) for p in (problem, dataclasses.replace(problem, cut="weights")))
    assert same(cut.hypergradient, whole.direct)
    assert not cut.through_weights["architecture"].any()
    assert together(cut.hypergradient, whole.hypergradient) > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_architecture_detached_in_the_image_leaves_exactly_what_passes_through_the_weights(pairs, estimator):
    problem = genseg("batch-train")
    whole, cut = (
        walk(p, pairs, estimator=estimator) for p in (problem, dataclasses.replace(problem, cut="architecture"))
    )
    assert torch.equal(cut.hypergradient["architecture"], whole.through_weights["architecture"])
    assert not cut.direct["architecture"].any()
    assert not torch.equal(cut.hypergradient["architecture"], whole.hypergradient["architecture"])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parts_add_up_and_cosines_are_theirs(pairs, estimator):
    step = walk(genseg(), pairs, estimator=estimator)
    assert list(step.parts) == ["outer", "generator", "segmenter"]
    sums = {
        "parts": sum(flat(part) for part in step.parts.values()),
        "two": flat(step.direct) + flat(step.through_weights),
    }
    for found in sums.values():
        torch.testing.assert_close(found, flat(step.hypergradient), rtol=1e-14, atol=1e-16)
    named = step.parts | {"direct": step.direct, "through_weights": step.through_weights}
    assert step.cosines.keys() == named.keys()
    for name, part in named.items():
        wanted = F.cosine_similarity(flat(part), flat(step.hypergradient), dim=0, eps=0.0)
        assert step.cosines[name] == pytest.approx(float(wanted), rel=1e-12)


def test_cosines_are_those_of_vectors_known_by_hand():
    """Outer part (0, 3), through the level (4, 0): the whole is (4, 3)."""
    level = Level("x", lambda p, up: -p["x"] * up["hparams"]["a"], {"x": torch.tensor(2.0)}, sgd(lr=0.5))

    def outer_loss(upstream):
        return 8 * upstream["x"]["x"] + 3 * upstream["hparams"]["b"]

    step = chain([level], outer_loss, {"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
    assert step.hypergradient == {"a": torch.tensor(4.0), "b": torch.tensor(3.0)}
    assert step.cosines["outer"] == pytest.approx(0.6)
    assert step.cosines["x"] == pytest.approx(0.8)
    assert step.cosines["direct"] == pytest.approx(1)
    assert math.isnan(step.cosines["through_weights"])


# Randomness


def global_dropout() -> Tensor:
    return F.dropout(torch.ones(2, 4, 6, 6, dtype=torch.float64), 0.3)


def drawn_dropout(generator: torch.Generator) -> Tensor:
    return torch.rand(2, 4, 6, 6, generator=generator, dtype=torch.float64).gt(0.3) / 0.7


CENTRAL = {"estimator": "finite_difference", "scheme": "central", "radius": 1e-4}


def test_dropout_of_the_whole_procedure(pairs):
    """The generator drops in its own loss and, with other units, in the segmenter's, which drops twice itself."""
    problem = genseg("batch-train", dropout=global_dropout)
    step, wanted = walk(problem, pairs), Procedure(problem, pairs).slope()
    assert distance(step.hypergradient, wanted) <= 1e-7
    after = torch.get_rng_state()
    for options in ({"estimator": "finite_difference"}, CENTRAL):
        found = walk(problem, pairs, **options)
        assert together(found.hypergradient, wanted) < (1e-5 if "scheme" in options else 0.05)
        assert torch.equal(torch.get_rng_state(), after)  # as one evaluation of each loss leaves it


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_given_generators_are_replayed_too(scheme):
    generator = torch.Generator()
    problem, pairs = genseg(dropout=partial(drawn_dropout, generator)), PAIRS["sgd"]

    def step(**options):
        generator.manual_seed(7)
        found = problem.step(updates(pairs), **options)
        return found.hypergradient, generator.get_state()

    exact, after = step()
    options = {"estimator": "finite_difference", "scheme": scheme, "radius": 1e-5}
    replayed, after_too = step(**options, generators=[generator])
    assert together(replayed, exact) < 1e-4
    assert torch.equal(after_too, after)
    noisy, _ = step(**options)
    assert together(noisy, exact) > 1


# One level, and closed forms


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_level_is_a_hypergradient(problem, case, estimator):
    update = case.update()
    level = Level("network", lambda p, up: problem.inner_loss(p, up["hparams"]), problem.params, update)
    state = None
    for _ in range(3):
        wanted = hypergradient(
            problem.inner_loss, problem.outer_loss, level.params, problem.hparams, update, state, estimator
        )
        found = chain(
            [level], lambda up: problem.outer_loss(up["network"], up["hparams"]), problem.hparams, estimator=estimator
        )
        if estimator == "exact":
            assert same(found.hypergradient, wanted.hypergradient)
        else:  # a quotient by a number and by a tensor round differently
            assert distance(found.hypergradient, wanted.hypergradient) < 1e-13
        assert same(found.direct, found.hypergradient)
        assert not flat(found.through_weights).any()
        assert same(found.params["network"], wanted.params)
        assert found.losses["network"] == wanted.inner_loss
        assert found.outer_loss == wanted.outer_loss
        torch.testing.assert_close(found.state["network"], wanted.state, rtol=0, atol=0)
        level = dataclasses.replace(level, params=wanted.params, state=wanted.state)
        state = wanted.state


@pytest.mark.parametrize(
    ("estimator", "tolerance"), [("exact", 1e-13), ("finite_difference", 1e-9)]
)  # gradients are linear in the displaced parameters: a difference is off by its rounding alone
def test_four_levels_have_a_closed_form(estimator, tolerance):
    """x1 follows t; x2 follows x1 + t; x3 follows x1 x2, without t; x4 follows x3 t."""
    x, rates, t, goal = [0.7, -0.4, 1.2, 0.5], [0.3, 0.4, 0.2, 0.6], 1.3, 0.9

    def level(i, target):
        def loss(params, upstream):
            assert list(upstream) == ["hparams", *(f"x{j}" for j in range(1, i + 1))]
            seen = [upstream["hparams"]["t"], *(upstream[f"x{j}"]["x"] for j in range(1, i + 1))]
            return 0.5 * (params["x"] - target(*seen)).square()

        return Level(f"x{i + 1}", loss, {"x": torch.tensor(x[i], dtype=torch.float64)}, sgd(rates[i]))

    targets = [lambda t: t, lambda t, x1: x1 + t, lambda t, x1, x2: x1 * x2, lambda t, x1, x2, x3: x3 * t]

    def outer_loss(upstream):
        x1, x4 = upstream["x1"]["x"], upstream["x4"]["x"]
        return 0.5 * (x4 - goal).square() + x1 * x4 * upstream["hparams"]["t"]

    step = chain(
        [level(i, target) for i, target in enumerate(targets)],
        outer_loss,
        {"t": torch.tensor(t, dtype=torch.float64)},
        estimator=estimator,
    )
    # forward, with the derivatives d of the stepped parameters towards t
    b1, b2, b3, b4 = rates
    x1, d1 = x[0] + b1 * (t - x[0]), b1
    x2, d2 = x[1] + b2 * (x1 + t - x[1]), b2 * (d1 + 1)
    x3, d3 = x[2] + b3 * (x1 * x2 - x[2]), b3 * (d1 * x2 + x1 * d2)
    x4, d4 = x[3] + b4 * (x3 * t - x[3]), b4 * (d3 * t + x3)
    pull = x4 - goal + x1 * t  # on x4
    whole = pull * d4 + d1 * x4 * t + x1 * x4
    on_x2 = pull * b4 * t * b3 * x1
    parts = {"outer": x1 * x4, "x2": on_x2 * b2, "x3": 0.0, "x4": pull * b4 * x3}
    parts["x1"] = whole - sum(parts.values())
    close = partial(pytest.approx, rel=tolerance, abs=1e-15)
    assert float(step.hypergradient["t"]) == close(whole)
    assert {name: float(part["t"]) for name, part in step.parts.items()} == close(parts)
    assert float(step.direct["t"]) == close(parts["outer"] + parts["x4"])
    assert float(step.through_weights["t"]) == close(parts["x1"] + parts["x2"])
    assert [float(step.params[f"x{i}"]["x"]) for i in range(1, 5)] == pytest.approx([x1, x2, x3, x4], rel=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hyperparameter_that_no_path_leads_from_has_zero_if_a_loss_uses_it(estimator):
    theta = {"a": torch.tensor(2.0), "additive": torch.tensor(1.0)}

    def loss(params, upstream):
        return params["x"].square() * upstream["hparams"]["a"] + upstream["hparams"]["additive"]

    lonely = Level("lonely", loss, {"x": torch.tensor(1.0)}, sgd(0.1))
    last = Level("last", lambda p, up: p["x"].square(), {"x": torch.tensor(1.0)}, sgd(0.1))
    step = chain([lonely, last], lambda up: up["last"]["x"], theta, estimator=estimator)
    for found in (step.hypergradient, *step.parts.values()):
        assert found == {"a": torch.tensor(0.0), "additive": torch.tensor(0.0)}
    assert all(math.isnan(cosine) for cosine in step.cosines.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_level_passes_nothing_on(estimator):
    """Its update leaves the parameters where they are, whatever the gradient."""
    problem = genseg()
    still = Update(lambda params: {}, lambda params, gradients, state: (dict(params), state))
    step = problem.step((still, sgd(0.3)), estimator=estimator)
    assert not step.through_weights["architecture"].any()
    assert same(step.hypergradient, step.direct)
    assert step.direct["architecture"].all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_in_which_an_update_names_its_tensors_does_not_matter(estimator):
    def reversed_(update):
        def step(params, gradients, state):
            stepped, state = update.step(params, gradients, state)
            return dict(reversed(stepped.items())), state

        return Update(update.init, step)

    problem, pair = genseg(), updates(PAIRS["mixed"])
    plain, other = (problem.step(given, estimator=estimator) for given in (pair, tuple(map(reversed_, pair))))
    assert same(other.hypergradient, plain.hypergradient)
    assert all(same(other.params[name], plain.params[name]) for name in ("generator", "segmenter"))


# What it leaves alone, and mistakes


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_given_is_touched_and_nothing_returned_holds_a_graph(pairs, estimator):
    problem = genseg("batch-train")
    problem = dataclasses.replace(problem, hparams=fresh(problem.hparams))
    networks = [problem.generator, problem.segmenter, problem.discriminator]
    before_step = problem.step(updates(pairs))
    held = [*(p for network in networks for p in network.parameters()), *problem.hparams.values()]
    copies = copy.deepcopy([problem.hparams, before_step, [network.state_dict() for network in networks]])
    with torch.no_grad():
        problem.step(updates(pairs), estimator=estimator)
        step = problem.step(updates(pairs), before_step, estimator=estimator)
    assert all(t.grad is None and t.requires_grad for t in held)
    now = [problem.hparams, before_step, [network.state_dict() for network in networks]]
    torch.testing.assert_close(vars(now.pop(1)), vars(copies.pop(1)), rtol=0, atol=0)
    torch.testing.assert_close(now, copies, rtol=0, atol=0)

    def tensors(value):
        if isinstance(value, dict):
            return [t for each in value.values() for t in tensors(each)]
        return [value] if isinstance(value, Tensor) else []

    returned = tensors(vars(step)) + tensors(step.direct) + tensors(step.through_weights)
    assert len(returned) > 20
    assert not any(t.requires_grad for t in returned)


def one(**more: Any) -> Level:
    given = {"name": "first", "params": {"x": torch.tensor(2.0)}, "update": sgd(0.1)} | more
    return Level(**{"loss": lambda p, up: p["x"].square() * up["hparams"]["a"]} | given)


def two(**more: Any) -> list[Level]:
    return [one(), one(**{"name": "second"} | more)]


def bent(params, gradients, state):
    return {"x": torch.zeros(2)}, state


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], r"no levels to step: give at least one\.$"),
        ([one(), one()], r"Two levels are called 'first': give each a name of its own\.$"),
        ([one(name="hparams")], r"A level is called 'hparams'.* another name\.$"),
        ([one(name="outer")], r"A level is called 'outer'"),
        ([one(name="through_weights")], r"A level is called 'through_weights'"),
        (two(loss=lambda p, up: up["first"]["x"]), r"The 'second' level's loss depends on no parameter: .*\.$"),
        (two(loss=lambda p, up: p["x"] / 0), r"The 'second' level's loss is inf: .*\.$"),
        (two(loss=lambda p, up: p["x"].expand(2)), r"The 'second' level's loss must be a scalar"),
        (two(state={"step": 3, "mean": {}}), r"^Level 'second': The state holds step, mean where .*\.$"),
        (two(update=sgd(0.1, 0.9), state={"step": 1, "momentum": {}}), r"^Level 'second': The state's 'momentum' has"),
        (two(params={"x": torch.tensor(2)}), r"^Level 'second': 'x' is torch.int64, .*\.$"),
        (two(update=Update(lambda params: {}, bent)), r"^The update of level 'second' returned \(2,\)"),
        ([*two(), one(name="spare")], r"depends on no parameter of the last level, 'spare': .*\.$"),
    ],
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mistakes_name_the_level(levels, message, estimator):
    def outer_loss(upstream):
        return upstream["first"]["x"] + (upstream["second"]["x"] if "second" in upstream else 0)

    with pytest.raises(ValueError, match=message):
        chain(levels, outer_loss, {"a": torch.tensor(1.0)}, estimator=estimator)


@pytest.mark.parametrize(
    ("hparams", "options", "message"),
    [
        ({"b": 1.0}, {}, r"^No loss uses hyperparameter 'b': use it in one, or leave it out of hparams\.$"),
        ({}, {"estimator": "darts"}, r"^Unknown estimator 'darts': choose one of exact, finite_difference\.$"),
        ({}, {"estimator": "finite_difference", "scheme": "both"}, r"^Unknown scheme 'both'"),
        ({}, {"estimator": "finite_difference", "radius": 0.0}, r"^The radius .* must be positive, not 0\.0\.$"),
    ],
)
def test_mistakes_of_the_call(hparams, options, message):
    hparams = {name: torch.tensor(value) for name, value in ({"a": 1.0} | hparams).items()}
    with pytest.raises(ValueError, match=message):
        chain([one()], lambda up: up["first"]["x"], hparams, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unused_hyperparameter_is_reported_by_either_estimator(estimator):
    with pytest.raises(ValueError, match="No loss uses hyperparameter 'b'"):
        chain(
            two(), lambda up: up["second"]["x"], {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, estimator=estimator
        )


@pytest.mark.parametrize("outer", [lambda up: up["first"]["x"] / 0, lambda up: torch.tensor(math.nan)])
def test_outer_loss_must_be_finite(outer):
    with pytest.raises(ValueError, match=r"^The outer loss is (inf|nan): "):
        chain([one()], outer, {"a": torch.tensor(1.0)})
