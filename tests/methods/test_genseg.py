"""GenSeg's three levels: the hypergradient of the architecture against differences of the whole procedure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthrepro.bilevel import ChainStep, adam, chain, sgd, stateless
from synthrepro.evidence import Context
from synthrepro.methods import genseg
from synthrepro.methods.genseg.algorithm import BETAS, put
from synthrepro.models import pix2pix
from synthrepro.models.segmenters import segmenter
from synthrepro.training import stream

SETTINGS: dict[str, Any] = {
    "size": (16, 16), "generator_features": 3, "discriminator_layers": 1, "search": "both", "dropout": 0.5,
    "pretrain_steps": 3, "pretrain_lr": 1e-3, "l1_weight": 100.0, "batch": 3,
    "steps": 4, "segmenter_lr": 1e-2, "loss": "jaccard", "gamma": 0.7,
    "generator_lr": 1e-2, "architecture_lr": 0.1, "every": 2, "estimator": "exact",
}  # fmt: skip
CLASSES = 2


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def networks(search: str = "both", seed: int = 0) -> tuple[genseg.Gan, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = pix2pix.Generator(1, 1, 16, 3, search)
        for p in pix2pix.architecture(generator).values():  # away from the even mixture
            nn.init.normal_(p)
        return genseg.Gan(generator, pix2pix.PatchDiscriminator(2, 3, 1)), segmenter("unet", 1, 2, features=(4, 8))


def batch(seed: int = 0) -> genseg.Batch:
    draws = stream(seed, "batch")

    def labels() -> Tensor:
        return (torch.rand(3, 16, 16, generator=draws) > 0.6).long()

    def images(labels: Tensor) -> Tensor:
        noise = torch.rand(3, 1, 16, 16, generator=draws, dtype=torch.float64)
        return (0.3 * labels[:, None] + 0.7 * noise).to(torch.get_default_dtype())

    real, masks, held = labels(), labels(), labels()
    return genseg.Batch(images(real), real, masks, (images(held), held), seed)


class Case:
    """Networks some steps into training, so that Adam's moments are no longer those of a fresh state."""

    def __init__(self, update: str, search: str = "both", hyper: str = "architecture", **changes: Any) -> None:
        self.settings = genseg.Settings(**SETTINGS | {"search": search} | changes)
        self.gan, self.segmenter = networks(search)
        named = dict(self.gan.generator.named_parameters())
        wanted = set(pix2pix.architecture(self.gan.generator))
        alpha = set(wanted)
        if hyper == "weights":
            wanted = {name for name in pix2pix.weights(self.gan.generator) if name.startswith("up.0.")}
        self.hparams = {name: named[name].detach().clone() for name in sorted(wanted)}
        self.params = {
            "generator": {n: p.detach().clone() for n, p in named.items() if n not in wanted | alpha},
            "segmenter": {n: p.detach().clone() for n, p in self.segmenter.named_parameters()},
        }
        rate = self.settings.generator_lr
        self.updates = {"generator": adam(rate, BETAS), "segmenter": adam(self.settings.segmenter_lr)}
        if update == "sgd":
            self.updates = {"generator": sgd(1e-3), "segmenter": sgd(1e-1, 0.9)}
        self.state: dict[str, Any] = {name: self.updates[name].init(self.params[name]) for name in self.params}
        for i in range(3):
            levels = genseg.genseg_levels(*self.below(), batch(10 + i), CLASSES, self.settings)
            with genseg.repeatable(i):
                self.params, self.state = genseg.plain_step(levels, self.hparams)

    def below(self) -> tuple[Any, ...]:
        return self.gan, self.segmenter, self.params, self.updates, self.state

    def step(self, hparams: dict[str, Tensor], **options: Any) -> ChainStep:
        gan, network, params, updates, state = self.below()
        return genseg.genseg_step(
            gan, network, params, hparams, updates, state, batch(), CLASSES, self.settings, **options
        )

    def loss_after(self, hparams: dict[str, Tensor], **options: Any) -> float:
        """Validation loss after both steps, by ordinary steps only: what central differences are taken of."""
        levels = genseg.genseg_levels(*self.below(), batch(), CLASSES, self.settings, **options)
        with genseg.repeatable(0):
            params, _ = genseg.plain_step(levels, hparams)
        x, y = batch().validation
        logits = stateless(self.segmenter.train(), params["segmenter"], x)
        return float(genseg.segmentation_loss(logits, y, self.settings.loss).detach())

    def difference(self, direction: dict[str, Tensor], h: float = 1e-7, **options: Any) -> float:
        # small: the losses have kinks (ReLU, L1), and a step across one is no derivative
        ahead, behind = (
            self.loss_after({n: p + side * h * direction[n] for n, p in self.hparams.items()}, **options)
            for side in (1, -1)
        )
        return (ahead - behind) / (2 * h)

    def directions(self, count: int = 3) -> list[dict[str, Tensor]]:
        draws = stream(0, "directions")
        return [
            {n: torch.randn(p.shape, generator=draws, dtype=p.dtype) for n, p in self.hparams.items()}
            for _ in range(count)
        ]


def along(gradient: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    return float(sum((gradient[n] * d).sum() for n, d in direction.items()))


# ----- the hypergradient


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("update", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("search", "hyper"), [("up", "architecture"), ("down", "architecture"), ("both", "architecture"), ("up", "weights")]
)
def test_the_hypergradient_is_that_of_central_differences_and_is_not_zero(update: str, search: str, hyper: str) -> None:
    case = Case(update, search, hyper)
    step = case.step(case.hparams)
    assert all(float(d.norm()) > 0 for d in step.hypergradient.values())
    for direction in case.directions():
        expected = case.difference(direction)
        assert abs(expected) > 1e-7
        assert along(step.hypergradient, direction) == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.usefixtures("double")
def test_both_ways_of_the_architecture_count() -> None:
    case = Case("adam")
    step = case.step(case.hparams)
    for part in (step.direct, step.through_weights):
        assert float(torch.stack([d.norm() for d in part.values()]).norm()) > 0


@pytest.mark.usefixtures("double")
def test_as_coded_nothing_passes_to_the_architecture() -> None:
    case = Case("adam")
    step = case.step(case.hparams, as_coded=True)
    assert all(not d.any() for d in step.hypergradient.values())
    assert all(not d.any() for part in step.parts.values() for d in part.values())  # each way, not their sum alone


@pytest.mark.usefixtures("double")
def test_without_generated_pairs_nothing_passes_either() -> None:
    case = Case("adam", gamma=0.0)
    step = case.step(case.hparams)
    assert all(not d.any() for d in step.hypergradient.values())
    assert case.difference(case.directions(1)[0]) == 0


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("as_coded", [False, True])
def test_a_step_with_a_hypergradient_steps_the_networks_as_a_plain_one(as_coded: bool) -> None:
    case = Case("adam")
    step = case.step(case.hparams, as_coded=as_coded)
    levels = genseg.genseg_levels(*case.below(), batch(), CLASSES, case.settings, as_coded=as_coded)
    with genseg.repeatable(0):
        params, state = genseg.plain_step(levels, case.hparams)
    for level in params:
        torch.testing.assert_close(step.params[level], params[level], rtol=1e-10, atol=1e-12)
        assert step.state[level]["step"] == state[level]["step"]


@pytest.mark.usefixtures("double")
def test_finite_differences_agree_at_a_tiny_radius_alone() -> None:
    """The generator's loss has kinks everywhere near (ReLU, 100 x L1): at a usual radius, no derivative of its step."""
    case = Case("adam")
    exact = torch.cat([d.flatten() for d in case.step(case.hparams).hypergradient.values()])
    levels = genseg.genseg_levels(*case.below(), batch(), CLASSES, case.settings)
    x, y = batch().validation

    def outer_loss(upstream: Any) -> Tensor:
        logits = stateless(case.segmenter.train(), upstream["segmenter"], x)
        return genseg.segmentation_loss(logits, y, case.settings.loss)

    cosine = {}
    for radius in (1e-7, 1e-2):
        with genseg.repeatable(0):
            step = chain(levels, outer_loss, case.hparams, estimator="finite_difference", radius=radius)
        found = torch.cat([d.flatten() for d in step.hypergradient.values()])
        cosine[radius] = float(torch.cosine_similarity(exact, found, dim=0))
    assert cosine[1e-7] > 0.999
    assert cosine[1e-2] < 0.9


@pytest.mark.usefixtures("double")
def test_the_discriminator_is_a_constant() -> None:
    case = Case("adam")
    before = {n: p.detach().clone() for n, p in case.gan.discriminator.named_parameters()}
    case.step(case.hparams)
    for name, p in case.gan.discriminator.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


# ----- training


def jointly(drive: Any, folder: Path, hyper: str = "architecture", **changes: Any) -> tuple[Any, ...]:
    gan, network = networks("up")
    before = {n: p.detach().clone() for n, p in gan.generator.named_parameters()}
    names = set(pix2pix.architecture(gan.generator)) if drive in ("validation", "gan") else set()
    if hyper == "weights":
        names = {n for n in pix2pix.weights(gan.generator) if n.startswith("up.0.")}
    settings = genseg.Settings(**SETTINGS | {"search": "up"} | changes)
    trail = genseg.train_jointly(gan, network, batch, CLASSES, settings, drive, names.__contains__, Context(folder))
    return gan, network, before, trail


@pytest.mark.parametrize(
    ("drive", "hyper", "moves"),
    [
        ("validation", "architecture", True),
        ("gan", "architecture", True),
        ("none", "architecture", False),
        ("as-coded", "architecture", False),
        ("validation", "weights", False),
    ],
)
def test_what_moves_the_architecture(drive: Any, hyper: str, moves: bool, tmp_path: Path) -> None:
    gan, _, before, trail = jointly(drive, tmp_path, hyper)
    name = "up_architecture"
    assert torch.equal(gan.generator.up_architecture, before[name]) != moves
    moved = {n for n, p in gan.generator.named_parameters() if not torch.equal(p, before[n])}
    assert moved >= set(pix2pix.weights(gan.generator))  # all weights train, those the hypergradient moves too
    assert len(trail) == (2 if drive == "validation" else 0)


def test_as_coded_the_segmenter_learns_from_validation_images(tmp_path: Path) -> None:
    gan, network = networks("up")
    settings = genseg.Settings(**SETTINGS | {"search": "up", "steps": 1, "segmenter_lr": 0.0, "architecture_lr": 1e-6})
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    genseg.train_jointly(gan, network, batch, CLASSES, settings, "as-coded", lambda name: False, Context(tmp_path))
    x, y = batch().validation
    start = {n: p.requires_grad_() for n, p in before.items()}
    loss = genseg.segmentation_loss(stateless(network.train(), start, x), y, settings.loss)
    gradients = dict(zip(start, torch.autograd.grad(loss, list(start.values())), strict=True))
    length = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    for name, p in network.named_parameters():
        expected = before[name] - 0.01 * gradients[name] / length
        torch.testing.assert_close(p, expected.detach(), rtol=0, atol=3e-6)  # and Adam's 1e-6


@pytest.mark.parametrize("drive", ["validation", "as-coded", "gan"])
def test_a_killed_run_goes_on_where_it_was(drive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jointly(drive, tmp_path / "whole")

    class Killed(Exception):
        pass

    def dies(step: int) -> genseg.Batch:
        if step == 3:
            raise Killed
        return batch(step)

    monkeypatch.setattr(Context, "checkpoint_due", lambda self: True)
    gan, network = networks("up")
    settings = genseg.Settings(**SETTINGS | {"search": "up"})
    names = {"up_architecture"} if drive != "as-coded" else set()
    arguments = CLASSES, settings, drive, names.__contains__, Context(tmp_path / "cut")
    with pytest.raises(Killed):
        genseg.train_jointly(gan, network, dies, *arguments)
    gan, network = networks("up", seed=5)  # other weights: all must come from the checkpoint but the untouched
    put(gan.generator, whole[2])
    trail = genseg.train_jointly(gan, network, batch, *arguments)
    torch.testing.assert_close(dict(gan.generator.named_parameters()), dict(whole[0].generator.named_parameters()))
    torch.testing.assert_close(dict(network.named_parameters()), dict(whole[1].named_parameters()))
    assert len(trail) == len(whole[3])


def test_pretraining_leaves_the_architecture_and_nears_the_real_images(tmp_path: Path) -> None:
    gan, _ = networks("up")
    before = {n: p.detach().clone() for n, p in gan.generator.named_parameters()}
    settings = genseg.GanSettings(
        **{k: v for k, v in SETTINGS.items() if k in genseg.GanSettings.model_fields}
        | {"pretrain_steps": 60, "pretrain_lr": 2e-3}
    )
    one = batch()

    def distance() -> float:
        with genseg.repeatable(0):
            weights = dict(gan.generator.named_parameters())
            return float((genseg.paint(gan.generator, weights, one.labels, CLASSES) - one.images).abs().mean().detach())

    start = distance()
    genseg.pretrain(gan, lambda i: (one.images, one.labels), CLASSES, settings, 0, Context(tmp_path))
    assert torch.equal(gan.generator.up_architecture, before["up_architecture"])
    assert distance() < 0.7 * start


# ----- parts


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_the_loss_is_binary_cross_entropy_and_soft_overlap_of_the_foreground(share: float) -> None:
    logits = torch.randn(2, 2, 8, 8, generator=stream(0, "logits"))
    labels = (torch.rand(2, 8, 8, generator=stream(0, "labels")) < share).long()
    p, y = (logits[:, 1] - logits[:, 0]).sigmoid(), labels.float()
    entropy = nn.functional.binary_cross_entropy(p, y)
    overlap, both = (p * y).sum((1, 2)), (p + y).sum((1, 2))
    jaccard = 1 - ((overlap + 1) / (both - overlap + 1)).mean()
    dice = 1 - ((2 * overlap + 1) / (both + 1)).mean()
    for kind, expected in (("dice", dice), ("jaccard", jaccard)):
        assert float(genseg.segmentation_loss(logits, labels, kind)) == pytest.approx(
            float(entropy + expected), rel=1e-5
        )


def test_label_maps_are_painted_from_their_foreground_classes() -> None:
    labels = torch.tensor([[[0, 1], [2, 1]]])
    assert genseg.encode(labels, 3).tolist() == [[[[-1, 1], [-1, 1]], [[-1, -1], [1, -1]]]]


def test_dropout_repeats_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    with genseg.repeatable(3):
        one = torch.rand(2)
    with genseg.repeatable(3):
        other = torch.rand(2)
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
