import pytest
import torch

from synthrepro.models import unet


@pytest.mark.parametrize("norm", ["instance", None])
@pytest.mark.parametrize("convs", [0, 2])
def test_the_unet_keeps_the_image_size_and_can_be_differentiated_twice(norm: str | None, convs: int) -> None:
    network = unet(1, 4, (4, 8, 8), convs=convs, norm=norm)
    x = torch.rand(2, 1, 8, 12, requires_grad=True)
    logits = network(x)  # (B, 4, H, W)
    assert logits.shape == (2, 4, 8, 12)
    gradients = torch.autograd.grad(logits.square().mean(), list(network.parameters()), create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_the_default_width_is_the_one_the_released_script_ran_with() -> None:
    network = unet(1, 24)
    widths = {p.shape[0] for n, p in network.named_parameters() if n.endswith("conv.weight") and p.dim() == 4}
    assert {16, 24, 32, 48, 64} <= widths
