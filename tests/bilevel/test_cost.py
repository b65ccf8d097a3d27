"""Cost in floating-point operations, which no machine's mood changes."""

from functools import partial

import pytest
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.bilevel import finite_difference, hypergradient, sgd, stateless


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ratios(network: nn.Module, channels: int, size: int) -> dict[str, float]:
    """FLOPs of each estimator over those of a plain training step on the same images."""
    clean, white = torch.zeros(2, channels, size, size), torch.ones(2, channels, size, size)
    params, hparams = dict(network.named_parameters()), {"noise": torch.tensor(0.1)}

    def loss(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        return stateless(network, params, clean + hparams["noise"] * white).square().mean()

    def outer_loss(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        return stateless(network, params, clean).square().mean()

    plain = flops(lambda: torch.autograd.grad(loss(params, hparams), list(params.values())))
    estimators = {"exact": "exact", "forward": "finite_difference"} | {
        "central": partial(finite_difference, scheme="central")
    }
    return {
        name: flops(lambda e=e: hypergradient(loss, outer_loss, params, hparams, sgd(0.1, 0.9), estimator=e)) / plain
        for name, e in estimators.items()
    }


def test_cost_on_stride_one_convolutions_is_that_of_counting_by_hand():
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())]
    found = ratios(nn.Sequential(*layers), channels=16, size=16)
    print(found)
    assert found["exact"] <= 3.67
    assert found["forward"] <= 2.67
    assert found["central"] <= 10 / 3


def test_cost_on_the_unet_of_monai():
    network = UNet(2, 1, 4, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="instance")
    found = ratios(network, channels=1, size=32)
    print(found)
    assert found["exact"] <= 3.95
    assert found["forward"] <= 2.67
