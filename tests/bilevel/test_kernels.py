"""Hand-written second derivatives against torch's own."""

import itertools

import pytest
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.bilevel import hypergradient, sgd, stateless, unrolled
from synthrepro.bilevel.kernels import fused_kernels


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


# name: (function, shapes of what it is differentiated in)
OPERATIONS = {
    "conv1d": (F.conv1d, [(2, 3, 9), (4, 3, 3), (4,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 3, 6, 5), (4, 3, 3, 3), (4,)]),
    "conv2d-no-bias": (F.conv2d, [(2, 3, 6, 5), (4, 3, 3, 3)]),
    "conv2d-batch-of-1": (F.conv2d, [(1, 3, 6, 5), (4, 3, 3, 3)]),
    "conv2d-1x1": (F.conv2d, [(2, 3, 6, 5), (4, 3, 1, 1), (4,)]),
    "conv2d-strides": (lambda x, w: F.conv2d(x, w, None, (2, 3), (1, 0)), [(2, 3, 8, 9), (4, 3, 3, 3)]),
    "conv2d-dilation": (lambda x, w: F.conv2d(x, w, dilation=2, padding=2), [(2, 3, 7, 6), (4, 3, 3, 3)]),
    "conv2d-groups": (lambda x, w, b: F.conv2d(x, w, b, groups=2), [(2, 4, 6, 5), (6, 2, 3, 3), (6,)]),
    "conv2d-same": (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 3, 6, 5), (4, 3, 3, 3)]),
    "conv2d-unbatched": (F.conv2d, [(3, 6, 5), (4, 3, 3, 3)]),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, 2, 1), [(2, 2, 5, 4, 5), (3, 2, 3, 3, 3), (3,)]),
    "transposed1d": (F.conv_transpose1d, [(2, 3, 5), (3, 4, 3), (4,)]),
    "transposed2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, output_padding=1),
        [(2, 3, 4, 5), (3, 4, 3, 3), (4,)],
    ),
    "transposed2d-groups": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 2, 2),
        [(2, 4, 4, 5), (4, 3, 3, 3)],
    ),
    "transposed3d": (lambda x, w: F.conv_transpose3d(x, w, stride=2), [(1, 2, 3, 2, 3), (2, 3, 2, 2, 2)]),
    "group-norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(3, 4, 5, 4), (4,), (4,)]),
    "group-norm-plain": (lambda x: F.group_norm(x, 2, eps=0.1), [(3, 4, 5, 4)]),
    "group-norm-1d": (lambda x, w, b: F.group_norm(x, 4, w, b), [(3, 4, 7), (4,), (4,)]),
    "group-norm-3d-batch-of-1": (lambda x, w, b: F.group_norm(x, 1, w, b), [(1, 4, 3, 2, 3), (4,), (4,)]),
    "instance-norm": (F.instance_norm, [(3, 4, 5, 4)]),
    "instance-norm-affine": (lambda x, w, b: F.instance_norm(x, None, None, w, b), [(2, 4, 5, 4), (4,), (4,)]),
    "batch-norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [(3, 4, 5, 4), (4,), (4,)]),
    "batch-norm-plain": (lambda x: F.batch_norm(x, None, None, training=True), [(3, 4, 5)]),
    "relu": (F.relu, [(2, 3, 5, 4)]),
    "leaky-relu": (lambda x: F.leaky_relu(x, 0.2), [(2, 3, 5, 4)]),
    "elu": (F.elu, [(2, 3, 5, 4)]),
    "elu-alpha": (lambda x: F.elu(x, 0.5), [(2, 3, 5, 4)]),
    "silu": (F.silu, [(2, 3, 5, 4)]),
    "gelu": (F.gelu, [(2, 3, 5, 4)]),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), [(2, 3, 5, 4)]),
    "prelu": (F.prelu, [(2, 3, 5, 4), (3,)]),
    "prelu-single": (F.prelu, [(2, 3, 5, 4), (1,)]),
    "in-place": (lambda x: F.silu(x * 1, inplace=True), [(2, 3, 5, 4)]),
    "cat": (lambda a, b: torch.cat([a, b], 1), [(2, 3, 5, 4), (2, 2, 5, 4)]),
    "cat-axis": (lambda a, b: torch.cat([a, b], axis=-1), [(2, 3, 5), (2, 3, 4)]),
    "norm-relu": (lambda x, w, b: F.relu(F.group_norm(x, 2, w, b)), [(3, 4, 5, 4), (4,), (4,)]),
    "norm-silu": (lambda x, w, b: F.silu(F.group_norm(x, 2, w, b)), [(3, 4, 5, 4), (4,), (4,)]),
    "norm-elu": (lambda x: F.elu(F.instance_norm(x)), [(3, 4, 5, 4)]),
    "norm-gelu": (lambda x, w, b: F.gelu(F.batch_norm(x, None, None, w, b, True)), [(3, 4, 5, 4), (4,), (4,)]),
    "norm-prelu": (
        lambda x, w, b, a: F.prelu(F.group_norm(x, 2, w, b), a),
        [(3, 4, 5, 4), (4,), (4,), (4,)],
    ),
    "norm-twice-used": (lambda x: (z := F.group_norm(x, 2)) * F.silu(z), [(3, 4, 5, 4)]),
    "norm-changed-in-place": (lambda x: F.silu(F.group_norm(x, 2).mul_(2)), [(3, 4, 5, 4)]),
    "sliced": (lambda x: F.silu(F.group_norm(x[..., ::2], 2)), [(3, 4, 5, 8)]),
    "unknown": (lambda x: F.softplus(F.avg_pool2d(F.layer_norm(x, (4, 4)), 2)), [(2, 3, 4, 4)]),
}


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= tolerance * wanted.norm().clamp_min(1e-3))


def derivatives(function, inputs: list[Tensor], layout: torch.memory_format) -> tuple[Tensor, ...]:
    """Value, gradient, and what the gradient's product with fixed weights has as gradient."""
    generator = torch.Generator().manual_seed(1)
    given = [t.contiguous(memory_format=layout) if t.dim() == 4 and i == 0 else t for i, t in enumerate(inputs)]
    y = function(*given)
    weights = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    g = torch.autograd.grad((weights * y.sin()).sum(), inputs, create_graph=True)
    u = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in g]
    second = torch.autograd.grad(g, inputs, u)
    return y.detach(), *(t.detach() for t in g), *second


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_the_value_and_both_derivatives_of_torch(name, layout):
    torch.manual_seed(0)
    function, shapes = OPERATIONS[name]
    inputs = [rand(*shape) for shape in shapes]
    wanted = derivatives(function, inputs, layout)
    with fused_kernels():
        found = derivatives(function, inputs, layout)
    assert all(close(a, b, 1e-12) for a, b in zip(found[:-1], wanted[:-1], strict=True))
    assert all(close(a, b, 1e-10) for a, b in zip(found, wanted, strict=True))


def test_each_derivative_can_be_asked_for_alone():
    """What is left out of one pass must not be lost in another."""
    torch.manual_seed(0)
    x, w, a, b = rand(2, 3, 5, 5), rand(4, 3, 3, 3), rand(4), rand(4)
    inputs = [x, w, a, b]

    def gradient() -> tuple[Tensor, ...]:
        y = F.silu(F.group_norm(F.conv2d(x, w, a, padding=1), 2, a, b))
        return torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)

    wanted = [torch.autograd.grad(gradient()[i].square().sum(), t) for i, t in itertools.product(range(4), inputs)]
    with fused_kernels():
        g = gradient()
    for (i, t), (one,) in zip(itertools.product(range(4), inputs), wanted, strict=True):
        (found,) = torch.autograd.grad(g[i].square().sum(), t, retain_graph=True)
        assert close(found, one, 1e-10)


def test_batch_norm_keeps_its_running_statistics():
    torch.manual_seed(0)
    x, statistics = rand(3, 4, 5, 5), {}
    for name in ("torch", "ours"):
        norm = nn.BatchNorm2d(4, momentum=0.3).double()
        with fused_kernels() if name == "ours" else torch.enable_grad():
            y = norm(x)
        norm.eval()
        statistics[name] = [y, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm(x)]
    for found, wanted in zip(statistics["ours"], statistics["torch"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


NETWORKS = {
    "prelu-instance": lambda: UNet(2, 1, 3, channels=(8, 16, 16), strides=(2, 2), num_res_units=2),
    "elu-group": lambda: UNet(2, 1, 3, (8, 16, 16), (2, 2), act="ELU", norm=("GROUP", {"num_groups": 4})),
    "gelu-batch": lambda: UNet(2, 1, 3, (8, 16, 16), (2, 2), num_res_units=1, act="GELU", norm="BATCH"),
    "leaky-in-place-3d": lambda: UNet(3, 1, 3, (8, 16), (2,), act=("leakyrelu", {"inplace": True})),
}


def losses(network: nn.Module, dtype: torch.dtype):
    """Inner and outer loss of a segmenter on (2, 1, 16, 16) or (2, 1, 8, 8, 8) images with noise and a bias field."""
    network.to(dtype)
    shape = (8, 8, 8) if any(isinstance(m, nn.Conv3d) for m in network.modules()) else (16, 16)
    labels = torch.randint(3, (2, *shape))
    base, white = labels[:, None].to(dtype), torch.randn(2, 1, *shape, dtype=dtype)
    hparams = {"noise": torch.tensor(0.3, dtype=dtype), "field": torch.zeros(1, 1, *shape, dtype=dtype)}

    def loss(logits: Tensor) -> Tensor:
        p, one_hot = logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1).to(dtype)
        return F.cross_entropy(logits, labels) + 1 - (p * one_hot).sum() / (p + one_hot).sum()

    def inner(params, hparams):
        with fused_kernels():
            return plain_inner(params, hparams)

    def plain_inner(params, hparams):
        return loss(stateless(network, params, base * hparams["field"].exp() + hparams["noise"] * white))

    def outer(params, hparams):
        return loss(stateless(network, params, base))

    return inner, plain_inner, outer, dict(network.named_parameters()), hparams


@pytest.mark.parametrize("name", NETWORKS)
def test_hypergradient_of_a_unet_is_the_same(name):
    torch.manual_seed(0)
    inner, plain, outer, params, hparams = losses(NETWORKS[name](), torch.float64)
    found, wanted = (hypergradient(loss, outer, params, hparams).hypergradient for loss in (inner, plain))
    assert all(close(found[key], wanted[key], 1e-11) for key in wanted)


def test_hypergradient_in_float32_is_the_same():
    torch.manual_seed(0)
    inner, plain, outer, params, hparams = losses(NETWORKS["elu-group"](), torch.float32)
    found, wanted = (hypergradient(loss, outer, params, hparams).hypergradient for loss in (inner, plain))
    assert all(close(found[key], wanted[key], 1e-5) for key in wanted)


def test_unrolled_steps_are_the_same():
    """Between steps the adjoint goes down to the parameters too."""
    torch.manual_seed(0)
    inner, plain, outer, params, hparams = losses(NETWORKS["elu-group"](), torch.float64)
    update = sgd(0.1, 0.9)
    found, wanted = (unrolled([loss] * 3, outer, params, hparams, update).hypergradient for loss in (inner, plain))
    assert all(close(found[key], wanted[key], 1e-11) for key in wanted)


def stride_one(width: int) -> nn.Module:
    widths = [1, *[width] * 5]
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_cost_is_ten_convolutions_a_layer_to_three():
    """A narrow first layer, whose input a plain step does not differentiate, hardly counts."""
    network, white = stride_one(64), torch.ones(2, 1, 16, 16)
    params, hparams = dict(network.named_parameters()), {"noise": torch.tensor(0.1)}

    def plain(params, hparams):
        return stateless(network, params, hparams["noise"] * white).square().mean()

    def inner(params, hparams):
        with fused_kernels():
            return plain(params, hparams)

    def outer(params, hparams):
        return stateless(network, params, white).square().mean()

    one = flops(lambda: torch.autograd.grad(plain(params, hparams), list(params.values())))
    assert flops(lambda: hypergradient(inner, outer, params, hparams)) / one == pytest.approx(10 / 3, rel=0.01)


def kept(function) -> int:
    """Bytes of distinct memory that a graph holds on to."""
    found = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = (t, t.untyped_storage().nbytes())  # held, so that no address recurs
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        graph = function()
    del graph
    return sum(size for _, size in found.values())


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_the_graph_of_the_inner_gradient_keeps_two_thirds(layout):
    """4 maps a layer of convolution, norm and activation to torch's 6."""
    dtype = torch.float64 if layout == "channels first" else torch.float32
    network, x = stride_one(16).to(dtype), torch.randn(2, 1, 32, 32, dtype=dtype)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(network(x).square().mean(), list(network.parameters()), create_graph=True)

    wanted = kept(gradient)
    with fused_kernels():
        found = kept(gradient)
    assert found < 0.7 * wanted


def test_nothing_is_left_outside_of_the_context():
    x, w = rand(2, 3, 5, 5), rand(4, 3, 3, 3)
    with fused_kernels():
        inside = F.silu(F.conv2d(x, w))
    outside = F.silu(F.conv2d(x, w))
    assert type(outside.grad_fn).__name__ == "SiluBackward0"
    assert type(outside.grad_fn.next_functions[0][0]).__name__ == "ConvolutionBackward0"
    assert type(inside.grad_fn).__name__ != "SiluBackward0"


def test_under_no_grad_and_autocast_torch_acts():
    x, w = rand(2, 3, 5, 5).detach().float(), rand(4, 3, 3, 3).detach().float().requires_grad_()
    with fused_kernels(), torch.no_grad():
        assert F.conv2d(x, w).grad_fn is None
    with fused_kernels(), torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["conv2d", "silu", "norm-silu", "cat"])
def test_third_derivatives_are_refused(name):
    torch.manual_seed(0)
    function, shapes = OPERATIONS[name]
    inputs = [rand(*shape) for shape in shapes]
    with fused_kernels():
        (g,) = torch.autograd.grad(function(*inputs).sin().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no third derivatives: leave create_graph=True out of the second\."):
        torch.autograd.grad(g, inputs[0], torch.ones_like(g), create_graph=True)


def test_a_norm_whose_output_is_looked_at_is_not_fused():
    """A hook on it, or its gradient kept, must see what torch shows."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)

    def hooked():
        z = F.group_norm(x, 2)
        z.register_hook(lambda g: 2 * g)
        return torch.autograd.grad(F.silu(z).square().sum(), x)[0]

    def kept():
        z = F.group_norm(x, 2)
        z.retain_grad()
        F.silu(z).square().sum().backward()
        return z.grad

    for look in (hooked, kept):
        wanted = look()
        with fused_kernels():
            assert torch.allclose(look(), wanted, rtol=1e-12)


def test_it_works_inside_a_checkpoint():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3)).double()
    x, params = torch.randn(2, 1, 8, 8).double(), dict(network.named_parameters())

    def block(x):
        with fused_kernels():
            return stateless(network, params, x)

    def second(forward):
        given = x.clone().requires_grad_()
        g = torch.autograd.grad(forward(given).square().sum(), list(params.values()), create_graph=True)
        return torch.autograd.grad(g, given, [torch.ones_like(d) for d in g])[0]

    checkpointed = second(lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))
    assert torch.allclose(checkpointed, second(block), rtol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: F.group_norm(x, 4),
        lambda x: F.group_norm(x, 3, weight=torch.ones(1)),
        lambda x: F.group_norm(x[:1, :, :1, :1], 6),
        lambda x: F.instance_norm(x, weight=torch.ones(2), bias=torch.ones(2)),
        lambda x: F.batch_norm(x, None, None, weight=torch.ones(2), training=True),
    ],
)
def test_what_torch_refuses_is_refused(layer):
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    with pytest.raises((RuntimeError, ValueError)) as wanted:
        layer(x)
    with fused_kernels(), pytest.raises(wanted.type) as found:
        layer(x)
    assert str(found.value) == str(wanted.value)
