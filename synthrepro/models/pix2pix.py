r"""pix2pix, with convolutions whose kernel sizes can be learned: the generator of GenSeg and its discriminator.

Isola et al., Image-to-image translation with conditional adversarial networks, CVPR 2017, section 3.2 and appendix 6.1,
in the layout of the released PyTorch code, ``unet_256``. GenSeg (Zhang et al., Nature Communications 2025, Fig. 1 and
Methods) puts a mixture of three kernel sizes in the place of each convolution and calls the softmax weights of the
mixtures the generator's architecture. Its text searches the convolutions and the up-convolutions; its released 2-D
code has mixtures in the up-convolutions alone. :class:`Generator` does either.

Images and masks are as the caller gives them, generated images in (-1, 1): scale real images by ``2 * x - 1`` before
a loss compares the two.

BatchNorm and dropout stay in training mode also where pix2pix generates images (section 3.4 there: dropout is its only
noise), so leave the generator in training mode. Dropout, like the initial weights, is drawn from torch's global
generator, as torch's own modules do.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNELS = (4, 6, 8)
SEARCHES = ("up", "down", "both", "none")
ARCHITECTURE = ("down_architecture", "up_architecture")


class MixedConv2d(nn.Module):
    r"""A mixture of convolutions of stride 2, computed as one.

    Convolution is linear in its kernel, so the weighted sum of the outputs is the output of the weighted sum of the
    kernels, each padded with zeros to the size of the largest:

    .. math:: \sum_k m_k \, (W_k * x) = \Bigl(\sum_k m_k \operatorname{pad} W_k\Bigr) * x .

    Maps (B, in_channels, H, W) to (B, out_channels, H // 2, W // 2) or, transposed, (B, out_channels, 2 H, 2 W),
    whatever the kernel. GenSeg's released code computes every convolution and adds up the outputs.

    Args:
        in_channels, out_channels: Channels.
        kernels: Kernel sizes K, even and ascending; size k goes with a padding of (k - 2) / 2.
        bias: Whether each kernel has a bias vector, mixed like the kernels.
        transposed: Whether these are transposed convolutions.

    Raises:
        ValueError: Kernel sizes that are not even and ascending.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernels: Sequence[int] = KERNELS,
        *,
        bias: bool = True,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if not kernels or any(k < 2 or k % 2 for k in kernels) or list(kernels) != sorted(set(kernels)):
            raise ValueError(f"Kernel sizes must be even and ascending, not {tuple(kernels)}.")
        self.kernels, self.transposed = tuple(kernels), transposed
        channels = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        # With channels last, or the middle of a kernel would be rows of four values.
        empty = partial(torch.empty, memory_format=torch.channels_last)
        self.weights = nn.ParameterList(nn.init.normal_(empty(*channels, k, k), 0, 0.02) for k in kernels)
        self.biases = nn.ParameterList(torch.zeros(out_channels) for _ in kernels) if bias else None

    def forward(self, x: Tensor, mixture: Tensor) -> Tensor:
        """Convolve; the mixture weights (K,) are used as they are."""
        # Taps that lie further out meet no pixel, wherever the kernel is put.
        reach = 2 * max(x.shape[-2:]) * (2 if self.transposed else 1) - 2
        kernel = _Mixed.apply(mixture, min(self.kernels[-1], reach), *self.weights)
        bias = None if self.biases is None else mixture @ torch.stack([*self.biases])
        convolve = F.conv_transpose2d if self.transposed else F.conv2d
        return convolve(x, kernel, bias, stride=2, padding=(kernel.shape[-1] - 2) // 2)


class _Mixed(torch.autograd.Function):
    """The weighted sum of kernels (O, I, k, k) about their common centre, cut to (O, I, size, size).

    By hand, for on small maps it takes as long as the convolution, and longer where autograd keeps every product.
    It has second derivatives, but none in forward mode.
    """

    @staticmethod
    def forward(mixture: Tensor, size: int, *kernels: Tensor) -> Tensor:
        mixed = mixture[-1] * _resized(kernels[-1], size)
        for share, kernel in zip(mixture[:-1], kernels[:-1], strict=True):
            kernel = _resized(kernel, min(size, kernel.shape[-1]))
            edge = (size - kernel.shape[-1]) // 2
            mixed[..., edge : size - edge, edge : size - edge].addcmul_(kernel, share)
        return mixed

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        mixture, _, *kernels = inputs
        ctx.save_for_backward(mixture, *kernels)

    @staticmethod
    def vmap(info: Any, dims: Any, *given: Any) -> tuple[Tensor, int]:  # no addcmul_ there
        def one(i: int) -> list[Any]:
            return [value if dim is None else value.select(dim, i) for value, dim in zip(given, dims, strict=True)]

        return torch.stack([_Mixed.apply(*one(i)) for i in range(info.batch_size)]), 0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # of operations that can be differentiated again
        mixture, *kernels = ctx.saved_tensors
        parts = [_resized(g, min(g.shape[-1], kernel.shape[-1])) for kernel in kernels]
        pairs = list(zip(mixture, kernels, parts, strict=True))
        to_mixture, _, *wanted = ctx.needs_input_grad
        shares = [_inner(_resized(kernel, part.shape[-1]), part) for _, kernel, part in pairs if to_mixture]
        slopes = [
            _resized(share * part, kernel.shape[-1]) if want else None
            for want, (share, kernel, part) in zip(wanted, pairs, strict=True)
        ]
        return torch.stack(shares) if to_mixture else None, None, *slopes


def _resized(kernel: Tensor, size: int) -> Tensor:
    """Cut a kernel, or pad it with zeros, to size x size taps about its centre."""
    return kernel if kernel.shape[-1] == size else F.pad(kernel, 4 * [(size - kernel.shape[-1]) // 2])


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, without copies of what lies with channels last."""
    return torch.dot(a.movedim(1, -1).flatten(), b.movedim(1, -1).flatten())


class Generator(nn.Module):
    """The U-Net of pix2pix: down to 1 x 1 and up again, with a skip connection at each level.

    Level 0 is the one next to the image, at the lowest the map is 1 x 1; channels are 1, 2, 4, 8, 8, ... times
    ``features``. BatchNorm everywhere but next to the image and after the innermost down-convolution, whose map of
    1 x 1 it could not normalise in a batch of one. Dropout at the levels that have 8 times ``features`` on both sides,
    the innermost excepted: three of them at size 256, none at 32 and below. (The paper's first, Lua code drops out at
    the innermost up-convolution and the next two.)

    The parameters ``up_architecture`` and ``down_architecture``, (levels, K) each and there only if searched, start at
    1e-3 N(0, 1); the softmax over a row gives the mixture at that level. :func:`architecture` and :func:`weights` tell
    them from the others.

    Args:
        in_channels: Channels of the masks, such as the foreground classes one-hot.
        out_channels: Channels of the images.
        size: Height and width of masks and images, a power of two, 16 to 512.
        features: Channels at level 0.
        search: Where the kernel size is learned: ``"up"``, ``"down"``, ``"both"`` or ``"none"``.
        kernels: Kernel sizes K that are mixed where it is.
        fixed_kernel: Kernel size elsewhere, even.
        dropout: Probability that a channel value is dropped.

    Raises:
        ValueError: A size, search or kernel size other than these.
    """

    down_architecture: nn.Parameter | None
    up_architecture: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        features: int = 64,
        search: str = "up",
        kernels: Sequence[int] = KERNELS,
        fixed_kernel: int = 4,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if size not in (16, 32, 64, 128, 256, 512):
            raise ValueError(f"The generator's size must be a power of two from 16 to 512, not {size}.")
        if search not in SEARCHES:
            raise ValueError(f"Unknown search {search!r}: take one of {', '.join(SEARCHES)}.")
        if fixed_kernel < 2 or fixed_kernel % 2:
            raise ValueError(f"The fixed kernel size must be even, not {fixed_kernel}.")
        self.size = size
        levels = int(math.log2(size))
        factors = [min(2**level, 8) for level in range(levels)]
        inner = [features * factor for factor in factors]  # channels below each level's down-convolution
        last = levels - 1

        def convolution(before: int, after: int, bias: bool, transposed: bool) -> nn.Module:
            if search in ("both", "up" if transposed else "down"):
                return MixedConv2d(before, after, kernels, bias=bias, transposed=transposed)
            kind = nn.ConvTranspose2d if transposed else nn.Conv2d
            return kind(before, after, fixed_kernel, 2, (fixed_kernel - 2) // 2, bias=bias)

        down, up, down_norm, up_after = [], [], [], []
        for level in range(levels):
            outer = inner[level - 1] if level else 0
            down.append(convolution(outer or in_channels, inner[level], False, False))
            down_norm.append(nn.BatchNorm2d(inner[level]) if 0 < level < last else nn.Identity())
            skip = inner[level] if level < last else 0
            up.append(convolution(inner[level] + skip, outer or out_channels, level == 0, True))
            after: list[nn.Module] = [nn.BatchNorm2d(outer)] if level else [nn.Tanh()]
            if level < last and level and factors[level - 1] == 8:
                after.append(nn.Dropout(dropout))
            up_after.append(nn.Sequential(*after))
        self.down, self.down_norm = nn.ModuleList(down), nn.ModuleList(down_norm)
        self.up, self.up_after = nn.ModuleList(up), nn.ModuleList(up_after)
        for side in ("down", "up"):
            searched = search in ("both", side)
            start = nn.Parameter(1e-3 * torch.randn(levels, len(kernels))) if searched else None
            self.register_parameter(f"{side}_architecture", start)
        initialise(self)

    def forward(self, masks: Tensor) -> Tensor:
        """Generate images (B, out_channels, H, W) in (-1, 1) from masks (B, in_channels, H, W), H = W = size."""
        if masks.shape[-2:] != (self.size, self.size):
            raise ValueError(f"Masks must be {self.size} x {self.size}, not {' x '.join(map(str, masks.shape[-2:]))}.")
        down, up = (_mixtures(a, len(self.down)) for a in (self.down_architecture, self.up_architecture))
        x, skips = masks, []
        for level, (convolve, norm) in enumerate(zip(self.down, self.down_norm, strict=True)):
            x = norm(convolve(F.leaky_relu(x, 0.2) if level else x, *down[level]))
            skips.append(x)
        skips.pop()
        for level in reversed(range(len(self.up))):
            x = self.up_after[level](self.up[level](F.relu(x), *up[level]))
            x = torch.cat([skips.pop(), x], 1) if skips else x
        return x.contiguous()  # channels first, whatever the kernels lie like


def architecture(module: nn.Module) -> dict[str, nn.Parameter]:
    """The architecture parameters of a module or its submodules, by their names."""
    return {name: p for name, p in module.named_parameters() if name.rpartition(".")[2] in ARCHITECTURE}


def weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that are no architecture, by their names."""
    return {name: p for name, p in module.named_parameters() if name.rpartition(".")[2] not in ARCHITECTURE}


@torch.no_grad()
def kernel_norms(generator: Generator) -> dict[str, Tensor]:
    r"""How large each kernel is, with and without its share in the mixture.

    A mixture's weights alone do not say what a kernel contributes, for training can shift any factor between
    :math:`m_k` and :math:`W_k`; the product :math:`m_k \lVert W_k \rVert` is what the generator computes with.

    Returns:
        For each searched side, ``"up"`` or ``"down"``: ``"up_mixed"``, the product, and ``"up_kernel"``, the
        Frobenius norm of the kernels alone. (levels, K) each, level 0 next to the image.
    """
    found: dict[str, Tensor] = {}
    for side in ("down", "up"):
        alpha = getattr(generator, f"{side}_architecture")
        if alpha is not None:
            norms = torch.stack([torch.stack([w.norm() for w in level.weights]) for level in getattr(generator, side)])
            found |= {f"{side}_mixed": alpha.softmax(1) * norms, f"{side}_kernel": norms}
    return found


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix (section 3.3): a logit for every overlapping patch, positive for real.

    Args:
        channels: Channels of mask and image together.
        features: Channels after the first layer.
        layers: Convolutions of stride 2, before two of stride 1: 3 makes patches of 70 x 70 pixels
            (:func:`receptive_field`); take fewer for small images.
    """

    def __init__(self, channels: int, features: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [features * min(2**layer, 8) for layer in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride, 1, bias=False),
                nn.BatchNorm2d(widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        initialise(self)

    def forward(self, masks: Tensor, images: Tensor) -> Tensor:
        """Judge images (B, C, H, W), given their masks (B, C', H, W): logits (B, 1, h, w)."""
        return self.layers(torch.cat([masks, images], 1))


def receptive_field(layers: int) -> int:
    """Side of the patch, pixels, that a logit of :class:`PatchDiscriminator` sees."""
    side = 1
    for stride in (1, 1, *[2] * layers):  # from the logit back to the image
        side = (side - 1) * stride + 4
    return side


def discriminator_loss(
    discriminator: Callable[[Tensor, Tensor], Tensor], masks: Tensor, real: Tensor, fake: Tensor
) -> Tensor:
    """Binary cross-entropy of real and generated images, halved (section 3.3).

    Real and generated images are two batches, as in the released code: BatchNorm sees them apart. Nothing is
    detached: give ``fake.detach()`` where no gradient is to reach the generator.

    Args:
        discriminator: A :class:`PatchDiscriminator`, or the same with other parameters.
        masks: (B, C', H, W), scaled like the generator's.
        real, fake: Images (B, C, H, W) in [-1, 1].
    """
    on_real, on_fake = discriminator(masks, real), discriminator(masks, fake)
    return 0.5 * (F.softplus(-on_real).mean() + F.softplus(on_fake).mean())


def generator_loss(logits: Tensor, fake: Tensor, real: Tensor, l1_weight: float = 100.0) -> Tensor:
    """Binary cross-entropy towards "real" plus weighted L1 distance (equation 4, in its non-saturating form).

    Args:
        logits: Of the discriminator for the generated images, (B, 1, h, w).
        fake, real: Generated images and the real ones of the same masks, (B, C, H, W) in [-1, 1].
        l1_weight: Weight of the L1 distance, the paper's lambda.
    """
    return F.softplus(-logits).mean() + l1_weight * F.l1_loss(fake, real)


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Draw all kernels from N(0, 0.02) and gains of BatchNorm from N(1, 0.02), biases are 0 (appendix 6.2).

    :class:`MixedConv2d` draws its own.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            nn.init.normal_(part.weight, float(isinstance(part, nn.BatchNorm2d)), 0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _mixtures(alpha: Tensor | None, levels: int) -> list[tuple[Tensor, ...]]:
    """What each level's convolution takes besides the map: its mixture (K,), or nothing."""
    return [()] * levels if alpha is None else [(m,) for m in alpha.softmax(1)]
