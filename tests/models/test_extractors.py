"""Feature extractors: which maps they read, on what input, and what they refuse."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import inception_v3
from torchvision.transforms.v2.functional import normalize

from synthrepro.errors import UserError
from synthrepro.models import unet
from synthrepro.models.extractors import Extractor, inception, unet_extractor


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn weights in the form of torchvision's file, auxiliary head and statistics of BatchNorm included."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(inception_v3(init_weights=False).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(file: Path) -> Extractor:
    before = torch.random.get_rng_state()
    made = inception(file)
    assert torch.equal(torch.random.get_rng_state(), before)  # building it has drawn nothing
    return made


class TestInception:
    def test_features_are_those_of_torchvisions_own_network(self, extractor: Extractor, file: Path):
        """On its own route: normalised by ImageNet, transform_input; images of the right size stay as they are."""
        with torch.device("meta"):
            network = inception_v3(transform_input=True, init_weights=False)
        network.load_state_dict(torch.load(file, weights_only=True), assign=True)
        seen: dict[str, Tensor] = {}
        network.Mixed_6d.branch1x1.register_forward_hook(lambda part, inputs, out: seen.update(spatial=out))
        network.fc = nn.Identity()
        x = images(1, 3, 299, 299)
        with torch.no_grad():
            pooled = network.eval()(normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        found = extractor(x)
        assert [tuple(t.shape) for t in found] == [(1, 2048), (1, 7 * 17 * 17)]
        assert pooled.std() > 0
        for own, expected in zip(found, (pooled, seen["spatial"][:, :7].flatten(1)), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))

    def test_a_single_channel_is_repeated_and_batches_change_nothing(self, extractor: Extractor):
        x = images(2, 1, 32, 32)
        whole = extractor(x)
        for found, expected in zip(extractor(x.repeat(1, 3, 1, 1), batch=1), whole, strict=True):
            assert found.dtype == torch.float32
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
        assert not torch.allclose(whole[0][0], whole[0][1], rtol=1e-3)

    def test_the_name_has_the_files_digest(self, extractor: Extractor, file: Path):
        assert f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:8]})" in extractor.name

    def test_files_that_do_not_fit_are_refused(self, tmp_path: Path):
        path = tmp_path / "weights.pth"
        with pytest.raises(UserError, match="There is no file"):
            inception(path)
        path.write_bytes(b"no weights")
        with pytest.raises(UserError, match="is no state dict"):
            inception(path)
        torch.save({"epoch": 3}, path)
        with pytest.raises(UserError, match="holds more than a state dict"):
            inception(path)
        torch.save({"conv1.weight": torch.zeros(3)}, path)
        with pytest.raises(UserError, match=r"does not fit Inception v3 \(Missing key"):
            inception(path)


class TestEncoder:
    def network(self, features: tuple[int, ...] = (4, 8, 9, 10, 11), norm: str | None = "batch", convs: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return unet(1, 3, features, norm=norm, convs=convs)

    @pytest.mark.parametrize("convs", [0, 2])
    def test_maps_are_those_of_the_bottom_and_the_middle(self, convs: int):
        network = self.network(convs=convs)
        x = images(3, 1, 32, 64)
        with torch.no_grad():
            network(x)  # moves the running statistics away from where they began
            first = network.model
            second = first[1].submodule
            third = second[1].submodule
            fourth = third[1].submodule
            middle = third[0].eval()(second[0].eval()(first[0].eval()(x)))
            bottom = fourth[1].submodule.eval()(fourth[0].eval()(middle))
        pooled, spatial = unet_extractor(network)(x, batch=2)
        assert pooled.shape == (3, 11)
        assert spatial.shape == (3, 7 * 4 * 8)
        torch.testing.assert_close(pooled, bottom.mean((2, 3)))
        torch.testing.assert_close(spatial, middle[:, :7].flatten(1))

    def test_all_channels_where_there_are_fewer_than_seven(self):
        pooled, spatial = unet_extractor(self.network((2, 3, 4)))(images(2, 1, 16, 16))
        assert (pooled.shape, spatial.shape) == ((2, 4), (2, 3 * 4 * 4))

    def test_the_network_is_left_as_it_was_and_may_be_trained_on(self):
        network = self.network()
        x = images(4, 1, 32, 32)
        extractor = unet_extractor(network)
        before = extractor(x)
        assert network.training
        assert all(p.requires_grad for p in network.parameters())
        with torch.no_grad():
            network(x)
            for p in network.parameters():
                p.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(extractor(x), before, strict=True))

    def test_instance_norm_is_refused_for_it_hides_contrast(self):
        """The reason for the refusal is checked as well: half the contrast, and nothing but epsilon changes."""
        x = images(4, 1, 32, 32)
        seen = {}
        for norm in ("instance", "batch"):
            network = self.network(norm=norm)
            with torch.no_grad():
                network(x)
                a, b = (network.eval().model[0](some) for some in (x, x / 2))
            seen[norm] = float((a - b).abs().max() / a.std())
        assert seen["instance"] < 1e-2
        assert seen["batch"] > 0.1
        with pytest.raises(ValueError, match="norm='batch'"):
            unet_extractor(self.network(norm="instance"))

    def test_the_name(self):
        assert "segmenter" in unet_extractor(self.network()).name

    def test_it_moves_to_a_device(self):
        extractor = unet_extractor(self.network()).to("meta")
        assert {p.device.type for p in extractor.network.parameters()} == {"meta"}


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_images_outside_their_range_are_refused(wrong: float):
    x = images(2, 1, 32, 32)
    x[1, 0, 3, 3] = wrong
    extractor = Extractor("pixels", nn.Linear(1, 1), lambda network, some: (some.flatten(1), some.flatten(1)))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        extractor(x)
