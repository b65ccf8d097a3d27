"""What the tests of hypergradients share: every update beside its optimiser in torch, and one small problem."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthrepro.bilevel import Update, adam, adamw, rmsprop, sgd, stateless

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One of our updates and the optimiser in torch.optim that it copies, with the same options."""

    ours: Callable[..., Update]
    theirs: type[torch.optim.Optimizer]
    options: dict[str, Any]

    @property
    def adaptive(self) -> bool:
        return self.ours is not sgd

    def update(self, **more: Any) -> Update:
        return self.ours(**self.options | more)

    def optimiser(self, parameters: list[Tensor], **more: Any) -> torch.optim.Optimizer:
        return self.theirs(parameters, **self.options | more)


CASES = {
    "sgd": Case(sgd, torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": Case(sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-nesterov": Case(sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd-all": Case(sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    "adam": Case(adam, torch.optim.Adam, {"lr": 0.02}),
    "adam-all": Case(adam, torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.05}),
    "adamw": Case(adamw, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.05}),
    "rmsprop": Case(rmsprop, torch.optim.RMSprop, {"lr": 0.02}),
    "rmsprop-all": Case(
        rmsprop, torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.05}
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@dataclass(frozen=True)
class Problem:
    """A Learn2Synth in small: the inner loss is on images rendered from label maps, the outer one on given images.

    Of the hyperparameters, ``means`` (3,) acts in the inner loss only, ``scale`` (3, 1, 1) in the outer only, and
    ``noise`` () in both.
    """

    network: nn.Module
    labels: Tensor  # (B, H, W)
    white: Tensor  # (B, 1, H, W), the inner loss's noise, drawn once
    images: Tensor  # (B, 1, H, W)
    params: Tensors
    hparams: Tensors

    def inner_loss(self, params: Tensors, hparams: Tensors) -> Tensor:
        rendered = hparams["means"][self.labels][:, None] + hparams["noise"] * self.white  # (B, 1, H, W)
        return F.cross_entropy(stateless(self.network, params, rendered), self.labels)

    def outer_loss(self, params: Tensors, hparams: Tensors) -> Tensor:
        logits = hparams["scale"] * stateless(self.network, params, self.images)  # (B, 3, H, W)
        return F.cross_entropy(logits, self.labels) + 0.1 * hparams["noise"].square()


@pytest.fixture
def problem() -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1)
        ).double()
        labels = torch.randint(3, (2, 6, 6))
        white = torch.randn(2, 1, 6, 6, dtype=torch.float64)
        images = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)[labels][:, None]
        images = images + 0.1 * torch.randn(2, 1, 6, 6, dtype=torch.float64)
    hparams = {
        "means": torch.tensor([0.3, 0.5, 0.6], dtype=torch.float64),
        "noise": torch.tensor(0.2, dtype=torch.float64),
        "scale": torch.tensor([1.0, 1.5, 0.5], dtype=torch.float64)[:, None, None],
    }
    return Problem(network, labels, white, images, dict(network.named_parameters()), hparams)
