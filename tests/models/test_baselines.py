"""The supervised baselines, most of them small: shapes, gradients, ImageNet weights, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet34
from torchvision.models.resnet import BasicBlock, ResNet

from synthrepro.errors import UserError
from synthrepro.models.baselines import BASELINES, PRETRAINED, baseline

SMALL = {
    "deeplabv3plus": 12,
    "resunet": 12,
    "unetplusplus": 8,
    "attention-unet": 8,
    "unetr": 48,
    "swin-unetr": 12,
}
SIZE = (32, 64)


@pytest.fixture(autouse=True)
def as_it_was():
    """Initial weights are drawn from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", BASELINES)
class TestAll:
    @pytest.mark.parametrize("size", [(32, 32), (32, 64)])
    def test_images_become_logits_and_gradients_reach_all_parameters(self, name: str, size: tuple[int, int]):
        if name == "swin-unetr":
            size = (size[0], 2 * size[1])  # its smallest, and another
        network = baseline(name, 5, size, features=SMALL[name])
        assert 1e5 < parameters(network) < 2e6
        x = images(4, 1, *size)
        logits = network.train()(x)
        assert logits.shape == (4, 5, *size)
        (logits * torch.randn_like(logits)).sum().backward()
        assert [key for key, p in network.named_parameters() if p.grad is None] == []
        # The first weights and the last: the whole network lies between the image and its logits.
        every = list(network.parameters())
        for p in (every[0], every[-1]):
            assert p.grad is not None
            assert p.grad.abs().max() > 0
        with torch.no_grad():
            alone, together = network.eval()(x[:1]), network(x)
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)  # a sample does not know its batch

    def test_logits_are_not_limited(self, name: str):
        """No sigmoid, softmax or ReLU at the end."""
        logits = baseline(name, 5, SIZE, features=SMALL[name])(images(2, 1, *SIZE))
        assert logits.min() < 0 < logits.max()
        assert (logits.sum(1) - 1).abs().max() > 1e-2

    def test_the_global_random_state_is_left_alone_once_it_is_built(self, name: str):
        """In training mode, too: no dropout, no stochastic depth."""
        network = baseline(name, 3, SIZE, features=SMALL[name]).train()
        before = torch.get_rng_state()
        network(images(2, 1, *SIZE))
        assert torch.equal(torch.get_rng_state(), before)

    def test_several_channels(self, name: str):
        network = baseline(name, 3, SIZE, features=SMALL[name], in_channels=3)
        assert network(images(2, 3, *SIZE)).shape == (2, 3, *SIZE)

    def test_more_features_are_more_parameters_and_none_is_the_most(self, name: str):
        full = baseline(name, 3, SIZE)
        small, middle = (parameters(baseline(name, 3, SIZE, features=k * SMALL[name])) for k in (1, 2))
        assert small < middle <= parameters(full)
        assert parameters(full) > 5e6
        if name in PRETRAINED:
            with torch.device("meta"):
                reference = resnet34().state_dict()
            shapes = {key: t.shape for key, t in reference.items() if not key.startswith("fc.")}
            shapes["conv1.weight"] = torch.Size([64, 1, 7, 7])
            assert {key: t.shape for key, t in full.encoder.state_dict().items()} == shapes

    def test_sizes_and_features_it_cannot_have(self, name: str):
        least = 64 if name == "swin-unetr" else 32
        for size in ((48, 64), (64, 16), (0, 64), (least // 2, least // 2)):
            with pytest.raises(UserError, match=rf"{name} .* {size[0]} x {size[1]}.*least 32 x {least}"):
                baseline(name, 3, size)
        for features in (0, -12) if name in PRETRAINED else (0, -12, 7):
            with pytest.raises(UserError, match=f"{name} cannot have {features} features"):
                baseline(name, 3, SIZE, features=features)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"no baseline 'unet': take one of deeplabv3plus, resunet, .*swin-unetr"):
        baseline("unet", 2, SIZE)


@pytest.mark.parametrize(("name", "channels"), [("deeplabv3plus", 256), ("unetr", 16), ("attention-unet", 64)])
def test_channels_before_the_logits_at_full_size(name: str, channels: int):
    with torch.device("meta"):
        last = [m for m in baseline(name, 14, (64, 64)).modules() if isinstance(m, nn.Conv2d)][-1]
    assert (last.in_channels, last.out_channels) == (channels, 14)


@pytest.fixture(scope="module")
def reference() -> ResNet:
    """A ResNet-34 of weights drawn at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = resnet34()
        for key, t in network.state_dict().items():
            if "running_mean" in key:
                t.normal_(std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def file(reference: ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its state dict, as torchvision publishes those of trained ones."""
    path = tmp_path_factory.mktemp("weights") / "resnet34.pth"
    torch.save(reference.state_dict(), path)
    return path


class TestWeights:
    @pytest.mark.parametrize("name", PRETRAINED)
    def test_the_encoder_computes_what_torchvision_computes_on_the_repeated_channel(
        self, name: str, reference: ResNet, file: Path
    ):
        network = baseline(name, 3, SIZE, weights=file).eval()
        x = images(1, 1, *SIZE)
        with torch.no_grad():
            assert network(x).shape == (1, 3, *SIZE)
            found = network.encoder(x)
            stem = reference.relu(reference.bn1(reference.conv1(x.repeat(1, 3, 1, 1))))
            torch.testing.assert_close(found[1], stem, rtol=1e-4, atol=1e-5)
            deep = reference.layer1(reference.maxpool(stem))
            for k, stage in enumerate([reference.layer2, reference.layer3, reference.layer4], 2):
                torch.testing.assert_close(found[k], deep, rtol=1e-4, atol=1e-4)
                deep = stage(deep)
            if name != "deeplabv3plus":  # there the last stage is dilated instead of strided
                torch.testing.assert_close(found[5], deep, rtol=1e-4, atol=1e-4)
        own, given = network.encoder.state_dict(), reference.state_dict()
        assert set(own) == {key for key in given if not key.startswith("fc.")}
        assert all(torch.equal(t, given[key]) for key, t in own.items() if key != "conv1.weight")

    def test_of_three_channels_the_file_is_taken_as_it_is(self, reference: ResNet, file: Path):
        network = baseline("resunet", 3, SIZE, weights=file, in_channels=3)
        assert torch.equal(network.encoder.conv1.weight, reference.conv1.weight)
        assert network(images(2, 3, *SIZE)).shape == (2, 3, *SIZE)

    def test_files_from_before_batchnorm_counted_are_taken(self, reference: ResNet, tmp_path: Path):
        path = tmp_path / "old.pth"
        torch.save({k: t for k, t in reference.state_dict().items() if "num_batches" not in k}, path)
        network = baseline("resunet", 3, SIZE, weights=path)
        assert torch.equal(network.encoder.layer4[2].conv2.weight, reference.layer4[2].conv2.weight)

    def test_what_does_not_fit_is_said_in_a_sentence(self, tmp_path: Path):
        path = tmp_path / "resnet.pth"
        short = ResNet(BasicBlock, [1, 1, 1, 1]).state_dict()
        cases: tuple[tuple[Any, str], ...] = (
            (short, r"does not fit a ResNet-34 \(Missing key.*layer"),
            ({"state_dict": short}, "holds more than a state dict"),
            ([1], "holds more than a state dict"),
        )
        for given, match in cases:
            torch.save(given, path)
            with pytest.raises(UserError, match=match):
                baseline("resunet", 3, SIZE, weights=path)
        path.write_bytes(b"no weights")
        with pytest.raises(UserError, match="no state dict that PyTorch has saved"):
            baseline("resunet", 3, SIZE, weights=path)
        with pytest.raises(UserError, match="There is no file"):
            baseline("resunet", 3, SIZE, weights=tmp_path / "none.pth")

    @pytest.mark.parametrize(("name", "features"), [("resunet", 12), ("unetr", None), ("attention-unet", None)])
    def test_other_networks_take_none(self, name: str, features: int | None, tmp_path: Path):
        with pytest.raises(UserError, match=f"full size only: leave {tmp_path} out for this {name}"):
            baseline(name, 3, SIZE, features=features, weights=tmp_path)
