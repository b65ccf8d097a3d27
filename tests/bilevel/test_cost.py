"""Cost in floating-point operations, which no machine's mood changes."""

import itertools
from functools import partial

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.bilevel import exact, finite_difference, hypergradient, sgd, stateless

ESTIMATORS = {
    "exact": exact,
    "forward": finite_difference,
    "central": partial(finite_difference, scheme="central"),
}


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ratios(network: nn.Module) -> dict[str, float]:
    """FLOPs of each estimator over those of a plain training step on the same (2, 1, 16, 16) images."""
    white = torch.ones(2, 1, 16, 16)
    params, hparams = dict(network.named_parameters()), {"noise": torch.tensor(0.1)}

    def inner_loss(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        return stateless(network, params, hparams["noise"] * white).square().mean()

    def outer_loss(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        return stateless(network, params, white).square().mean()

    def step(estimator) -> int:
        return flops(lambda: hypergradient(inner_loss, outer_loss, params, hparams, sgd(0.1), estimator=estimator))

    plain = flops(lambda: torch.autograd.grad(inner_loss(params, hparams), list(params.values())))
    return {name: step(estimator) / plain for name, estimator in ESTIMATORS.items()}


def test_cost_on_stride_one_convolutions_is_what_counting_by_hand_gives():
    """11, 8 and 10 convolutions a layer to a plain step's 3; a narrow first layer, whose input a plain step does not
    differentiate, hardly counts."""
    widths = [1, 64, 64, 64, 64, 64]
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU()) for a, b in itertools.pairwise(widths)]
    found = ratios(nn.Sequential(*(module for layer in layers for module in layer)))
    assert 3.64 <= found["exact"] <= 3.67
    assert 2.64 <= found["forward"] <= 2.67
    assert 3.31 <= found["central"] <= 3.34


def test_cost_on_the_unet_of_monai():
    network = UNet(2, 1, 4, channels=(32, 64, 128), strides=(2, 2), num_res_units=2)
    found = ratios(network)
    assert found["exact"] <= 3.95
    assert found["forward"] <= 2.67
