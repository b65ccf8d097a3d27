"""GenSeg's segmenters at sizes of a test: shapes, second derivatives, stateless calls, ImageNet weights."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

from synthrepro.bilevel import fused_kernels, stateless
from synthrepro.errors import UserError
from synthrepro.models.segmenters import SEGMENTERS, DeepLabV3, segmenter

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"features": (4, 8, 8)},
    "deeplabv3-resnet50": {"depths": (1, 1, 1, 1)},
    "swin-unetr": {"features": 12, "depths": (1, 1, 1, 2)},
}


@pytest.fixture(autouse=True)
def as_it_was():
    """Initial weights and dropout are drawn from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SEGMENTERS)
class TestAll:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_become_logits(self, name: str, channels: int):
        network = segmenter(name, channels, 4, **SMALL[name])
        with torch.no_grad():
            assert network(images(2, channels, 64, 32)).shape == (2, 4, 64, 32)

    @pytest.mark.parametrize("fused", [False, True])
    def test_hypergradients_pass_through_a_stateless_call(self, name: str, fused: bool):
        """u . d gradient / d image, in training mode and float64, against differences; no buffer is written."""
        network = segmenter(name, 1, 2, **SMALL[name]).double().train()
        for part in network.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        before = {key: t.clone() for key, t in network.state_dict().items()}
        params = {key: p.detach().requires_grad_() for key, p in network.named_parameters()}
        some = [p for p in params.values() if p.numel() < 10_000]  # in all layers; DeepLabV3 has millions
        g = torch.Generator().manual_seed(1)
        x = images(3, 1, 64 if name == "swin-unetr" else 32, 32).double().requires_grad_()
        direction, *u = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (x, *some))

        def gradient(x: Tensor, graph: bool) -> Sequence[Tensor]:
            with fused_kernels() if fused and graph else nullcontext():
                loss = stateless(network, params, x).square().mean()
            return torch.autograd.grad(loss, some, create_graph=graph)

        (found,) = torch.autograd.grad(gradient(x, True), x, u)
        step = 1e-9  # so short that no ReLU changes its side
        ends = [gradient(x.detach() + sign * step * direction, False) for sign in (1, -1)]
        expected = sum(float(((a - b) * w).sum()) for a, b, w in zip(*ends, u, strict=True)) / (2 * step)
        assert float((found * direction).sum()) == pytest.approx(expected, rel=1e-3)
        assert all(torch.equal(t, before[key]) for key, t in network.state_dict().items())


def test_what_a_segmenter_does_not_have_is_refused(tmp_path: Path):
    for match, name, options in (
        ("no segmenter 'vit'", "vit", {}),
        ("No ImageNet weights fit unet", "unet", {"weights": tmp_path}),
        ("No ImageNet weights fit swin-unetr", "swin-unetr", {"weights": tmp_path}),
        ("has no depths", "unet", {"depths": (1, 1, 1, 1)}),
        ("one number a level", "unet", {"features": 12}),
        ("are fixed", "deeplabv3-resnet50", {"features": 12}),
        ("one number, those of", "swin-unetr", {"features": (12, 24)}),
    ):
        with pytest.raises(UserError, match=match):
            segmenter(name, 1, 2, **options)
    with pytest.raises(UserError, match="1 or 3 channels"):
        segmenter("deeplabv3-resnet50", 2, 2)


def test_swin_unetr_says_which_sizes_it_takes():
    network = segmenter("swin-unetr", 1, 2, **SMALL["swin-unetr"])
    with pytest.raises(ValueError, match=r"divisible by 2\*\*5"):
        network(images(1, 1, 48, 64))


class TestDeepLab:
    def test_by_default_it_is_a_resnet_of_50_layers(self):
        with torch.device("meta"):
            network, reference = segmenter("deeplabv3-resnet50", 3, 2), resnet50()
        own = {name: t.shape for name, t in network.backbone.state_dict().items()}
        assert own == {name: t.shape for name, t in reference.state_dict().items() if not name.startswith("fc.")}

    def test_a_single_channel_is_repeated(self):
        network = DeepLabV3(1, 2, (1, 1, 1, 1)).eval()
        x = images(1, 1, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(network(x), network(x.repeat(1, 3, 1, 1)))

    def test_statistics_are_refreshed_by_update_bn(self):
        """Stateless steps leave them where they began; one line puts right what eval mode sees."""
        network = DeepLabV3(1, 2, (1, 1, 1, 1))
        norm = network.backbone.bn1
        batches = [images(4, 1, 32, 32), images(4, 1, 32, 32) + 1]
        for batch in batches:
            stateless(network, {}, batch)
        assert not norm.running_mean.any()
        update_bn(batches, network)
        with torch.no_grad():
            means = [network.backbone.conv1(b.expand(-1, 3, -1, -1)).mean((0, 2, 3)) for b in batches]
        torch.testing.assert_close(norm.running_mean, (means[0] + means[1]) / 2)


class TestWeights:
    """The file is torchvision's state dict of a ResNet, here of one block a stage."""

    DEPTHS = (1, 1, 1, 1)

    @pytest.fixture
    def state(self) -> dict[str, Tensor]:
        return ResNet(Bottleneck, list(self.DEPTHS)).state_dict()

    def load(self, state: object, path: Path, depths: tuple[int, ...] = DEPTHS) -> nn.Module:
        torch.save(state, path)
        return segmenter("deeplabv3-resnet50", 1, 2, depths=depths, weights=path)

    @pytest.mark.parametrize("counted", [True, False])
    def test_all_but_the_classifier_is_taken(self, state: dict[str, Tensor], counted: bool, tmp_path: Path):
        """Also from files of the time before BatchNorm counted its batches."""
        given = type(state)((n, t) for n, t in state.items() if counted or "num_batches" not in n)
        network = self.load(given, tmp_path / "resnet.pth")
        own = network.backbone.state_dict()
        assert set(own) == {name for name in state if not name.startswith("fc.")}
        assert all(torch.equal(t, state[name]) for name, t in own.items())

    def test_what_does_not_fit_is_said_in_a_sentence(self, state: dict[str, Tensor], tmp_path: Path):
        path = tmp_path / "resnet.pth"
        few = {name: t for name, t in state.items() if "layer4" not in name}
        wide = state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
        for given, match in (
            (few, r"does not fit the network's ResNet \(Missing key.*layer4"),
            (state | {"other": torch.zeros(1)}, r"\(Unexpected key.*other"),
            (wide, r"\(size mismatch for conv1.weight"),
            ({"state_dict": few}, "holds more than a state dict"),
        ):
            with pytest.raises(UserError, match=match):
                self.load(given, path)
        path.write_bytes(b"no weights")
        with pytest.raises(UserError, match="no state dict that PyTorch has saved"):
            segmenter("deeplabv3-resnet50", 1, 2, depths=self.DEPTHS, weights=path)
        with pytest.raises(UserError, match="There is no file"):
            segmenter("deeplabv3-resnet50", 1, 2, depths=self.DEPTHS, weights=tmp_path / "none.pth")
