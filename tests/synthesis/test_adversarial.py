"""Adversarial augmentation: harder than chance, within its bounds, and leaving the network alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from synthrepro.errors import UserError
from synthrepro.models import unet
from synthrepro.synthesis import adversarial
from synthrepro.synthesis.adversarial import Bounds, adversarial_images, ascend, consistency_loss, draw, probabilities
from synthrepro.training import seeded, soft_dice_loss

OFF = Bounds(0, 0, 0, 0, 0, 0)
SIZE = (32, 24)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def discs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of a bright ring around a brighter disc, at random places, with noise, and their labels."""
    g = generator(seed)
    centre = torch.rand(count, 2, 1, 1, generator=g) * 6 + torch.tensor([13.0, 9.0])[:, None, None]
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    distance = (rows - centre[:, 0]).hypot(columns - centre[:, 1])
    labels = (distance < 8).long() + (distance < 4).long()
    images = torch.tensor([0.1, 0.5, 0.8])[labels] + 0.05 * torch.randn(labels.shape, generator=g)
    return images.clamp(0, 1)[:, None], labels


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network that knows the discs."""
    network = seeded(lambda: unet(1, 3, (8, 8)), generator())
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(60):
        images, labels = discs(8, step + 1)
        optimizer.zero_grad()
        soft_dice_loss(network(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network


SINGLE = {
    "noise": Bounds(0.1, 0, 0, 0, 0, 0),
    "bias": Bounds(0, 0.5, 0, 0, 0, 0),
    "velocity": Bounds(0, 0, 3, 0, 0, 0),
    "affine": Bounds(0, 0, 0, 20, 0.3, 0.1),
    "chain": Bounds(),
}


@pytest.mark.parametrize("bounds", SINGLE.values(), ids=SINGLE.keys())
@pytest.mark.parametrize("kind", ["supervised", "consistency"])
def test_what_is_found_is_harder_than_its_random_start(network, bounds, kind):
    images, labels = discs(32)
    targets, loss = labels, soft_dice_loss
    if kind == "consistency":
        targets, loss = probabilities(network, images), consistency_loss
    values = []
    for steps in (0, 1):
        hard, hard_targets = adversarial_images(network, images, targets, loss, bounds, steps, generator=generator(3))
        values.append(float(loss(network(hard).detach(), hard_targets)))
    assert values[1] > 1.5 * values[0]


def test_noise_along_the_gradient_is_harder_than_chance_by_far(network):
    images, labels = discs(16)
    found = []
    for steps in (0, 1, 3):
        hard, _ = adversarial_images(
            network, images, labels, soft_dice_loss, SINGLE["noise"], steps, generator=generator(1)
        )
        found.append(float(soft_dice_loss(network(hard).detach(), labels)))
    clean = float(soft_dice_loss(network(images).detach(), labels))
    assert found[1] - clean > 2 * (found[0] - clean)
    assert found[2] > found[1]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_bounds_hold_exactly(network, steps):
    bounds = Bounds()
    images, labels = discs(6)
    found = ascend(network, images, labels, soft_dice_loss, draw(images, bounds, generator()), bounds, steps)
    assert found.noise.square().mean((1, 2, 3)).sqrt().max() <= bounds.noise
    for name in ("bias", "velocity", "rotation", "zoom", "translation"):
        assert getattr(found, name).abs().max() <= getattr(bounds, name), name
        if steps:
            assert (getattr(found, name).abs() == getattr(bounds, name)).any(), name
    field = adversarial.transform(torch.ones_like(images), adversarial.Draw(**{**vars(found), "noise": 0})).log()
    assert field.abs().max() <= bounds.bias + 1e-6
    flow = adversarial.integrate(found.velocity, images.shape[-2:])
    assert flow.abs().max() <= bounds.velocity + 1e-6
    hard, _ = adversarial_images(network, images, labels, soft_dice_loss, bounds, steps, generator=generator())
    assert hard.min() >= 0
    assert hard.max() <= 1


def test_nothing_happens_at_bounds_of_0(network):
    images, labels = discs(2)
    hard, targets = adversarial_images(network, images, labels, soft_dice_loss, OFF, generator=generator())
    torch.testing.assert_close(hard, images, atol=1e-5, rtol=0)
    assert torch.equal(targets, labels)


def test_label_maps_and_probabilities_move_with_the_image():
    _, labels = discs(8)
    images = labels[:, None] / 2
    start = draw(images, Bounds(0, 0, 2.0, 15, 0.2, 0.05), generator())
    moved, warped = adversarial.deform(labels, start), adversarial.transform(images, start)
    away = (moved != labels).float().mean()
    assert ((2 * warped[:, 0]).round() != moved).float().mean() < 0.4 * away  # only along edges
    assert ((2 * warped[:, 0]) - moved).abs().max() <= 2
    one_hot = nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    torch.testing.assert_close(adversarial.deform(one_hot, start).sum(1), torch.ones(8, *SIZE))
    torch.testing.assert_close(
        adversarial.deform(one_hot, start)[:, 1] / 2 + one_hot_disc(one_hot, start), warped[:, 0]
    )


def one_hot_disc(one_hot: Tensor, start: adversarial.Draw) -> Tensor:
    return adversarial.deform(one_hot, start)[:, 2]


def test_the_answer_is_warped_back_to_the_clean_image():
    """Positions sent forward and back are where they were; what is out of view is zero."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    planes = torch.stack([rows, columns])[None].expand(8, -1, -1, -1) + 1
    start = draw(planes[:, :1], Bounds(0, 0, 2.0, 15, 0.2, 0.1), generator())
    there = adversarial.deform(planes, start)
    back = adversarial.undo(there, start)
    seen = (adversarial.undo(torch.ones_like(there), start) > 0).all(1)
    inner = seen[:, 8:-8, 8:-8]  # near the border, positions beyond the edge were held at it
    error = (back - planes).abs().amax(1)[:, 8:-8, 8:-8]
    assert inner.float().mean() > 0.7
    assert error[inner].mean() < 0.1
    assert (back.movedim(1, -1)[~seen] == 0).all()


def test_the_network_is_left_as_it_was():
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
    network = nn.Sequential(*layers)
    network[1].eval()  # a frozen part stays frozen, the others stay in training mode
    images, labels = discs(4)
    soft_dice_loss(network[4](network[0](images)), labels).backward()  # some have a gradient, some none
    random_state = torch.get_rng_state()
    modes = [module.training for module in network.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    state = copy.deepcopy(network.state_dict())

    probabilities(network, images)
    adversarial_images(network, images, labels, soft_dice_loss, Bounds(), 2, generator=generator())
    with pytest.raises(RuntimeError, match="stop"):
        adversarial_images(network, images, labels, stop, Bounds(), generator=generator())

    assert modes == [module.training for module in network.modules()]
    for p, before in zip(network.parameters(), gradients, strict=True):
        assert p.requires_grad
        assert (p.grad is None) if before is None else torch.equal(p.grad, before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(random_state, torch.get_rng_state())


def stop(*_: Tensor) -> Tensor:
    raise RuntimeError("stop")


def test_the_same_generator_finds_the_same(network):
    images, labels = discs(4)
    first, second, other = (
        adversarial_images(network, images, labels, soft_dice_loss, Bounds(), generator=generator(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert not first[0].requires_grad
    alone, _ = adversarial_images(network, images[:2], labels[:2], soft_dice_loss, Bounds(), generator=generator())
    torch.testing.assert_close(alone, first[0][:2], atol=1e-4, rtol=0)
    with torch.no_grad():
        still, _ = adversarial_images(network, images, labels, soft_dice_loss, Bounds(), generator=generator())
    assert torch.equal(still, first[0])


def test_images_and_targets_must_fit(network):
    images, labels = discs(3)
    with pytest.raises(UserError, match="as many and as large"):
        adversarial_images(network, images, labels[:2], soft_dice_loss, Bounds(), generator=generator())
