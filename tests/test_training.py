import pytest
import torch
from torch import nn

from synthrepro.models import unet
from synthrepro.training import logit_mse_loss, seeded, segment, soft_dice_loss, stream


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(3, (2, 8, 8), generator=torch.Generator().manual_seed(0))


def logits_of(labels: torch.Tensor, size: float) -> torch.Tensor:
    return size * (2.0 * nn.functional.one_hot(labels, 3).movedim(-1, 1).float() - 1.0)


def test_soft_dice_of_confident_truth_is_zero_and_of_its_opposite_near_one(labels: torch.Tensor) -> None:
    assert soft_dice_loss(logits_of(labels, 50.0), labels) < 1e-6
    wrong = soft_dice_loss(logits_of((labels + 1) % 3, 50.0), labels)
    # no overlap: 1 - smooth / (pixels in truth + pixels in prediction + smooth), a mean over classes and cases
    smooth = 64 / 3
    sizes = torch.stack([(labels == k).sum((1, 2)) + ((labels + 1) % 3 == k).sum((1, 2)) for k in range(3)])
    assert torch.isclose(wrong, (1 - smooth / (sizes + smooth)).mean(), rtol=1e-5)


def test_soft_dice_follows_the_released_formula(labels: torch.Tensor) -> None:
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    p, t = logits.softmax(1), nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    smooth = 64 / 3
    top = 2 * (p * t).sum((2, 3)) + smooth
    bottom = (p * p).sum((2, 3)) + (t * t).sum((2, 3)) + smooth
    assert torch.isclose(soft_dice_loss(logits, labels), (1 - top / bottom).mean(), rtol=1e-5)


def test_logit_mse_is_zero_at_plus_and_minus_five_only(labels: torch.Tensor) -> None:
    assert logit_mse_loss(logits_of(labels, 5.0), labels) == 0
    assert logit_mse_loss(logits_of(labels, 4.0), labels) == pytest.approx(1.0)


def test_a_seeded_network_depends_on_its_generator_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (seeded(lambda: nn.Linear(3, 2), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_streams_of_a_seed_are_told_apart_by_name() -> None:
    draws = {torch.rand((), generator=stream(s, n)).item() for s in (0, 1) for n in ("weights", "synthesis")}
    assert len(draws) == 4
    assert torch.equal(torch.rand(3, generator=stream(0, "real")), torch.rand(3, generator=stream(0, "real")))


def test_segment_gives_label_maps_and_leaves_the_training_mode_as_it_was() -> None:
    network = unet(1, 4, features=(4, 8)).train()
    maps = segment(network, torch.rand(5, 1, 8, 16), batch=2)
    assert maps.shape == (5, 8, 16)
    assert maps.dtype == torch.int64
    assert network.training
