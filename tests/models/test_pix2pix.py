"""pix2pix with mixtures of kernel sizes: the mixture is what it stands for, the rest is the released architecture."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import mixture as bench
from synthrepro.bilevel import fused_kernels, stateless
from synthrepro.models import pix2pix
from synthrepro.models.pix2pix import (
    KERNELS,
    Generator,
    MixedConv2d,
    PatchDiscriminator,
    architecture,
    discriminator_loss,
    generator_loss,
    kernel_norms,
    receptive_field,
    weights,
)

KERNEL_SETS = [c for n in (1, 2, 3) for c in itertools.combinations(KERNELS, n)]
SIDES = [False, True]  # transposed


@pytest.fixture(autouse=True)
def as_it_was():
    """Initial weights and dropout are drawn from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def separately(layer: MixedConv2d, x: Tensor, mixture: Tensor) -> Tensor:
    """The sum of torch's own layers, one for each kernel size."""
    kind = nn.ConvTranspose2d if layer.transposed else nn.Conv2d
    total = torch.zeros(())
    for i, (m, k) in enumerate(zip(mixture, layer.kernels, strict=True)):
        own = kind(2, 3, k, stride=2, padding={4: 1, 6: 2, 8: 3}[k], bias=layer.biases is not None)
        given = {"weight": layer.weights[i]} | ({} if layer.biases is None else {"bias": layer.biases[i]})
        total = total + m * torch.func.functional_call(own, given, x)
    return total


def mixed(kernels: tuple[int, ...], transposed: bool, bias: bool = True) -> MixedConv2d:
    layer = MixedConv2d(2, 3, kernels, bias=bias, transposed=transposed).double()
    for i, p in enumerate(layer.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    return layer


class TestMixture:
    @pytest.mark.parametrize("kernels", KERNEL_SETS)
    @pytest.mark.parametrize("transposed", SIDES)
    def test_it_is_the_weighted_sum_of_the_convolutions(self, kernels: tuple[int, ...], transposed: bool):
        """Values and all gradients, on maps on which parts of the kernels meet no pixel too."""
        for bias, (h, w) in itertools.product(
            (True, False), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 7), (1, 9), (12, 10)]
        ):
            if min(h, w) == 1 and not transposed:
                continue  # half of one pixel is none
            layer = mixed(kernels, transposed, bias)
            x, mixture = randn(2, 2, h, w).requires_grad_(), randn(len(kernels)).softmax(0).requires_grad_()
            found, expected = layer(x, mixture), separately(layer, x, mixture)
            assert found.shape[-2:] == ((2 * h, 2 * w) if transposed else (h // 2, w // 2))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            towards, g = [x, mixture, *layer.parameters()], randn(*found.shape, seed=1)
            pairs = zip(*(torch.autograd.grad(y, towards, g) for y in (found, expected)), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("transposed", SIDES)
    @pytest.mark.parametrize("side", [2, 5])
    def test_second_derivatives(self, transposed: bool, side: int):
        layer = mixed((4, 8), transposed)
        names, values = zip(*layer.named_parameters(), strict=True)

        def call(x: Tensor, mixture: Tensor, *params: Tensor) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x, mixture)).square()

        towards = [randn(1, 2, side, side), torch.tensor([0.3, 0.7]).double(), *(p.detach() for p in values)]
        towards = [t.requires_grad_() for t in towards]
        assert torch.autograd.gradcheck(call, towards, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, towards, fast_mode=True)

    @pytest.mark.parametrize("transposed", SIDES)
    def test_seeds_can_be_batched(self, transposed: bool):
        """As parameters of three seeds, with second derivatives."""
        layer, x = mixed(KERNELS, transposed), randn(2, 2, 4, 4)
        mixtures = randn(3, 3).softmax(1).requires_grad_()
        kernels = {name: torch.stack([p, 2 * p, -p]).detach() for name, p in layer.named_parameters()}
        kernels = {name: p.requires_grad_() for name, p in kernels.items()}

        def call(params: dict[str, Tensor], mixture: Tensor) -> Tensor:
            return torch.func.functional_call(layer, params, (x, mixture)).square().mean()

        each = [call({name: p[i] for name, p in kernels.items()}, mixtures[i]) for i in range(3)]
        found = []
        for losses in (vmap(call)(kernels, mixtures), torch.stack(each)):
            gradients = torch.autograd.grad(losses.sum(), list(kernels.values()), create_graph=True)
            length = sum(g.square().sum() for g in gradients)
            found.append([losses, *gradients, *torch.autograd.grad(length, [mixtures, *kernels.values()])])
        for together, alone in zip(*found, strict=True):
            torch.testing.assert_close(together, alone)

    def test_it_costs_one_convolution_of_the_largest_kernel(self):
        """In FLOPs of both passes; at the level where the map is 2 x 2 and at one where it is large."""
        for before, after, side in ((8, 4, 32), (16, 8, 2)):
            work = {name: bench.flops(call) for name, call in bench.level_methods(before, after, side).items()}
            assert work[bench.MIXTURE] <= 1.01 * work[bench.LARGEST]
            assert work[bench.SEPARATE] == pytest.approx((16 + 36 + 64) / 64 * work[bench.LARGEST], rel=0.01)

    @pytest.mark.parametrize("kernels", [(), (4, 5), (8, 4), (4, 4), (0, 2)])
    def test_other_kernels_are_refused(self, kernels: tuple[int, ...]):
        with pytest.raises(ValueError, match="even and ascending"):
            MixedConv2d(1, 1, kernels)


class TestGenerator:
    def test_without_search_it_is_the_released_network(self):
        """Parameters of ``unet_256`` with 64 features, 3 to 3 channels, as its script prints them."""
        with torch.device("meta"):
            network = Generator(3, 3, 256, search="none")
        assert sum(p.numel() for p in network.parameters()) == 54_413_955
        assert architecture(network) == {}
        assert [m.out_channels for m in network.down] == [64, 128, 256, 512, 512, 512, 512, 512]
        assert sum(isinstance(m, nn.Dropout) for m in network.modules()) == 3

    @pytest.mark.parametrize("search", pix2pix.SEARCHES)
    @pytest.mark.parametrize("size", [16, 64])
    def test_it_paints_masks(self, search: str, size: int):
        network = Generator(2, 3, size, 4, search)
        images = network(torch.rand(1, 2, size, size))  # one image, which BatchNorm must bear
        assert images.shape == (1, 3, size, size)
        assert 0 < images.abs().max() < 1

    def test_names_tell_architecture_from_weights(self):
        network = Generator(1, 1, 32, 4, "both")
        assert {n: tuple(p.shape) for n, p in architecture(network).items()} == {
            "down_architecture": (5, 3),
            "up_architecture": (5, 3),
        }
        assert architecture(network) | weights(network) == dict(network.named_parameters())
        assert set(architecture(nn.ModuleDict({"g": Generator(1, 1, 16, 4)}))) == {"g.up_architecture"}
        start = torch.cat([a.flatten() for a in architecture(Generator(1, 1, 512, 1, "both")).values()])
        assert 0.6e-3 < start.std() < 1.4e-3

    def test_initial_weights(self):
        network = Generator(3, 3, 32, 16, "up")
        kernels = torch.cat([p.flatten() for p in network.parameters() if p.dim() == 4])
        assert float(kernels.detach().std()) == pytest.approx(0.02, rel=0.01)
        gains = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)]).detach()
        assert float(gains.mean()) == pytest.approx(1, abs=0.01)
        assert float(gains.std()) == pytest.approx(0.02, rel=0.15)
        assert all(not p.any() for n, p in network.named_parameters() if "bias" in n)

    def test_skip_connections_bring_detail_around_the_bottleneck(self):
        """With the bottleneck cut off, the generated image still follows the mask."""
        network = Generator(1, 1, 16, 4, "none")
        nn.init.zeros_(network.up[-1].weight)
        a, b = (network(randn(1, 1, 16, 16, seed=s).float()) for s in (0, 1))
        assert (a - b).abs().max() > 0

    @pytest.mark.parametrize("search", ["up", "down"])
    def test_an_architecture_that_has_decided_is_the_generator_with_that_kernel(self, search: str):
        searched = Generator(1, 2, 16, 4, search, dropout=0).double()
        fixed = Generator(1, 2, 16, 4, "none", dropout=0).double()
        with torch.no_grad():
            architecture(searched)[f"{search}_architecture"].copy_(torch.tensor([50.0, 0, 0]))
        state = {
            n.replace("weights.0", "weight").replace("biases.0", "bias"): t for n, t in searched.state_dict().items()
        }
        fixed.load_state_dict({name: state[name] for name in fixed.state_dict()})
        masks = randn(2, 1, 16, 16)
        torch.testing.assert_close(searched(masks), fixed(masks), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("fused", [False, True])
    def test_hypergradients_pass_through_a_stateless_call(self, fused: bool):
        """d/d alpha of the length of the gradient, against central differences; the module is left as it was."""
        network = Generator(1, 1, 16, 2, "both", dropout=0).double()
        before = {name: t.clone() for name, t in network.state_dict().items()}
        masks, real = randn(2, 1, 16, 16), randn(2, 1, 16, 16, seed=1).tanh()
        own = {name: p.detach() for name, p in weights(network).items()}
        alphas = {name: randn(*p.shape, seed=2) for name, p in architecture(network).items()}

        def length(alphas: dict[str, Tensor]) -> Tensor:
            params = {name: p.clone().requires_grad_() for name, p in own.items()}
            with fused_kernels() if fused else torch.enable_grad():
                loss = (stateless(network, params | alphas, masks) - real).square().mean()
            g = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            return sum(t.square().sum() for t in g)  # type: ignore[return-value]

        leaves = {name: a.clone().requires_grad_() for name, a in alphas.items()}
        slopes = torch.autograd.grad(length(leaves), list(leaves.values()))
        along = [randn(*a.shape, seed=3) for a in alphas.values()]
        step = 1e-6
        ends = [
            length({n: a + sign * step * d for (n, a), d in zip(alphas.items(), along, strict=True)})
            for sign in (1, -1)
        ]
        expected = float((ends[0] - ends[1]).detach()) / (2 * step)
        assert float(sum((s * d).sum() for s, d in zip(slopes, along, strict=True))) == pytest.approx(
            expected, rel=1e-4
        )
        assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())

    def test_kernel_norms(self):
        network = Generator(1, 1, 16, 4, "up", kernels=(4, 8))
        with torch.no_grad():
            for level in network.up:
                level.weights[0].zero_()[0, 0, 0, 0] = 3
                level.weights[1].zero_()[0, 0, :2, 0] = 2
            architecture(network)["up_architecture"].copy_(torch.tensor([0.25, 0.75]).log())
        found = kernel_norms(network)
        assert set(found) == {"up_mixed", "up_kernel"}
        torch.testing.assert_close(found["up_kernel"], torch.tensor([3, 8**0.5]).expand(4, 2))
        torch.testing.assert_close(found["up_mixed"], torch.tensor([0.75, 0.75 * 8**0.5]).expand(4, 2))
        assert kernel_norms(Generator(1, 1, 16, 4, "none")) == {}

    def test_what_it_cannot_be_is_refused(self):
        for wrong in ({"size": 48}, {"size": 8}, {"search": "sideways"}, {"fixed_kernel": 5}):
            with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
                Generator(**{"in_channels": 1, "out_channels": 1, "size": 16, "features": 2} | wrong)
        with pytest.raises(ValueError, match="not 32 x 16"):
            Generator(1, 1, 16, 2)(torch.zeros(1, 1, 32, 16))


class TestDiscriminator:
    def test_it_is_the_released_network(self):
        network = PatchDiscriminator(6)
        assert sum(p.numel() for p in network.parameters()) == 2_768_705
        assert network(torch.zeros(2, 3, 256, 256), torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)

    @pytest.mark.parametrize("layers", [1, 2, 3])
    def test_the_receptive_field_is_what_a_logit_sees(self, layers: int):
        assert receptive_field(3) == 70  # "the 70 x 70 PatchGAN"
        network = PatchDiscriminator(2, 2, layers).eval()
        x = torch.zeros(1, 1, 128, 128, requires_grad=True)
        logits = network(torch.zeros(1, 1, 128, 128), x)
        middle = logits.shape[-1] // 2
        (slope,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
        seen = slope[0, 0].abs().sum(0).nonzero()
        assert int(seen.max() - seen.min()) + 1 == receptive_field(layers)

    def test_losses_are_binary_cross_entropies(self):
        masks, real, fake = (randn(2, 1, 32, 32, seed=s).float() for s in range(3))
        network = PatchDiscriminator(2, 4, 2).eval()
        logits = [network(masks, images) for images in (real, fake)]
        parts = [
            F.binary_cross_entropy_with_logits(x, torch.full_like(x, target))
            for x, target in zip(logits, (1.0, 0.0), strict=True)
        ]
        torch.testing.assert_close(discriminator_loss(network, masks, real, fake), sum(parts) / 2)
        fooled = F.binary_cross_entropy_with_logits(logits[1], torch.ones_like(logits[1]))
        expected = fooled + 100 * (fake - real).abs().mean()
        torch.testing.assert_close(generator_loss(logits[1], fake, real), expected)
        torch.testing.assert_close(generator_loss(logits[1], fake, real, l1_weight=0), fooled)


class TestBenchmark:
    def test_what_is_compared_computes_the_same(self):
        methods = bench.generator_methods(16, 2)
        one, separate = methods[bench.MIXTURE](), methods[bench.SEPARATE]()
        assert len(one) == len(separate)
        for a, b in zip(one, separate, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)
        with FlopCounterMode(display=False) as counter:
            methods[bench.MIXTURE]()
        assert counter.get_total_flops() <= bench.flops(methods[bench.LARGEST])

    def test_it_prints_a_table(self, capsys: pytest.CaptureFixture[str]):
        bench.table(16, 2, 1, "cpu")
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        assert len(rows) == 1 + 4 + 1  # head, levels, whole
        assert all(row.count("|") == 7 for row in rows)
