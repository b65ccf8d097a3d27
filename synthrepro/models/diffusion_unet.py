r"""The diffusion UNet, and the segmenter that is made of it.

Huang et al., Label-efficient multi-organ segmentation with a diffusion model, arXiv 2402.15216, sections "Network
Architecture" and "Transfer Strategy". No code was released. The paper's network is ADM's (Dhariwal and Nichol 2021):
its 8448 features a pixel for DDPM-Seg are those of ADM's channel multipliers for its images. It is built of diffusers'
`UNet2DModel`, whose checkpoints it writes and reads. The step t sets a scale and a shift in every ResBlock,

.. math:: h \leftarrow \mathrm{GroupNorm}(h)\,(1 + s(t)) + b(t),

so that with a fixed t they are one affine map of the norm, and :func:`fold` makes them that.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from synthrepro.errors import UserError

STEPS = 1000  # T of the diffusion
STRATEGIES = ("linear", "decoder", "full")


def diffusion_unet(
    size: int,
    channels: int = 128,
    multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
    blocks: int = 2,
    attention: Sequence[int] = (32, 16, 8),
    head_channels: int = 64,
    groups: int = 32,
    dropout: float = 0.0,
) -> UNet2DModel:
    """A UNet in ADM's shape, that predicts the noise in one-channel images (B, 1, H, W) in [-1, 1] at steps (B,).

    The defaults have 138.28 M parameters with 128 channels and 552.80 M with 256. The paper gives the channels and the
    steps' scale and shift; the rest is ADM's for 256 x 256 (but for its learned variance, of which the paper's loss
    knows nothing).

    Args:
        size: The image's larger side, for which `attention` is meant.
        channels: Of the first level, the paper's c.
        multipliers: Of each level.
        blocks: ResBlocks of a level on the way down; there is one more on the way up.
        attention: Sizes of those levels that have self-attention.
        head_channels: Of each head of the attention.
        groups: Of each GroupNorm.

    Raises:
        UserError: The size cannot be halved often enough, or the channels do not divide.
    """
    levels = len(multipliers)
    if size % 2 ** (levels - 1):
        raise UserError(f"Images of {size} pixels cannot be halved {levels - 1} times: give fewer multipliers.")
    for what, divisor in (("groups", groups), ("head_channels", head_channels)):
        if any(channels * m % divisor for m in multipliers) and what == "groups":
            raise UserError(f"{channels} channels times {list(multipliers)} do not divide into {divisor} {what}.")
        if what == "head_channels" and any(
            channels * m % divisor for i, m in enumerate(multipliers) if size >> i in attention
        ):
            raise UserError(f"The channels of a level with attention do not divide into heads of {divisor}.")
    attends = [size >> i in attention for i in range(levels)]
    return UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=tuple(channels * m for m in multipliers),
        layers_per_block=blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=head_channels,
        norm_num_groups=groups,
        dropout=dropout,
    )


def load_unet(folder: Path, like: UNet2DModel) -> UNet2DModel:
    """A UNet as `save_pretrained` wrote it, safetensors only; diffusers alone can read it as well.

    Args:
        like: A network of the shape that is expected.

    Raises:
        UserError: There is no checkpoint, it is of another shape, or keys are missing or too many.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no checkpoint (config.json is missing): pre-train one, or name another folder."
        )
    config = UNet2DModel.load_config(folder)
    for name in ("block_out_channels", "layers_per_block", "down_block_types", "in_channels"):
        there, wanted = config.get(name), like.config[name]
        if (list(there) if isinstance(there, list | tuple) else there) != (
            list(wanted) if isinstance(wanted, list | tuple) else wanted
        ):
            raise UserError(f"{folder} is of another network ({name} is {there}, not {wanted}): name another folder.")
    try:
        unet, info = UNet2DModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read ({str(error).splitlines()[0][:200]}): pre-train again.") from error
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            raise UserError(f"{folder} has {what.replace('_', ' ')}, such as {sorted(info[what])[0]}: pre-train again.")
    return unet


def embed(unet: UNet2DModel, step: Tensor | int) -> Tensor | None:
    """What the ResBlocks are told of the step: (B, 4c), (1, 4c) for one step, None for a UNet without steps.

    Raises:
        UserError: The step is not in 0 ... 999.
    """
    if unet.time_embedding is None:
        return None
    weight = next(unet.time_embedding.parameters())
    steps = torch.as_tensor(step, device=weight.device).reshape(-1)
    if not 0 <= int(steps.min()) <= int(steps.max()) < STEPS:
        raise UserError(f"The step t must be from 0 to {STEPS - 1}, the {STEPS} steps of the schedule, not {step}.")
    return unet.time_embedding(unet.time_proj(steps).to(weight.dtype))


def encode(unet: UNet2DModel, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, ...]:
    """The way down and the middle block.

    Args:
        images: (B, 1, H, W) in [-1, 1].
        embedding: See :func:`embed`.

    Returns:
        The outputs that the way up concatenates, in the order in which they were made, and at the end that of the
        middle block.
    """
    hidden = unet.conv_in(images)
    found = [hidden]
    for block in unet.down_blocks:
        hidden, outputs = block(hidden, embedding)
        found += outputs
    return (*found, unet.mid_block(hidden, embedding))


def decode(unet: UNet2DModel, encoded: Sequence[Tensor], embedding: Tensor | None) -> Iterator[Tensor]:
    """The way up: the output of each of its ResBlocks (with its attention, and the ResBlock that doubles the size).

    ADM counts these as output blocks from 0; with the paper's shape there are 18, the last one (B, c, H, W).
    """
    skips, hidden = list(encoded[:-1]), encoded[-1]
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for i, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), embedding)
            if attention is not None:
                hidden = attention(hidden)
            if i == len(block.resnets) - 1:
                for upsampler in block.upsamplers or []:
                    hidden = upsampler(hidden, embedding)
            yield hidden


def without_steps(unet: UNet2DModel) -> UNet2DModel:
    """The same UNet, changed in place, with all that belongs to the step taken out: the paper's "plain U-Net"."""
    unet.time_embedding = None
    for block in resblocks(unet):
        block.time_emb_proj, block.time_embedding_norm = None, "default"
    return unet


def resblocks(unet: nn.Module) -> list[Any]:
    """diffusers' `ResnetBlock2D`s."""
    return [module for module in unet.modules() if hasattr(module, "time_emb_proj")]


def classification_head(channels: int, hidden: int, classes: int) -> nn.Sequential:
    """Figure 2: two times convolution, BatchNorm and ReLU, and a convolution; all of 3 x 3 but the last, of 1 x 1."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, classes, 1),
    )


class Segmenter(nn.Module):
    """The diffusion UNet as segmenter: fed a clean image and one fixed step, with a head in place of its output layer.

    Its output layer (norm, SiLU and convolution) is left out; the head sees the last ResBlock's c channels.

    Args:
        unet: See :func:`diffusion_unet`; or :func:`without_steps`, and the step is ignored.
        classes: Background included.
        hidden: Channels within the head: 128 in the paper's S, 256 in its M and L.
        step: The paper's t.
        layers: Output blocks of the way up that the head sees besides the last, resized to the image. The paper has
            none; its discussion asks what the features of other layers hold.
        noise: (1, H, W), or None for a clean image. With it, the image is brought to step t of the diffusion, always
            by the same noise: what the network was pre-trained to see.

    Raises:
        UserError: A step out of the schedule.
    """

    noise: Tensor | None

    def __init__(
        self,
        unet: UNet2DModel,
        classes: int,
        hidden: int,
        step: int = 0,
        layers: Sequence[int] = (),
        noise: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.step, self.layers = unet, step, tuple(layers)
        for block in unet.modules():  # no dropout in fine-tuning
            if isinstance(block, nn.Dropout):
                block.p = 0.0
        if unet.time_embedding is not None:
            embed(unet, step)
        widths = [b.out_channels for up in unet.up_blocks for b in up.resnets]
        self.head = classification_head(widths[-1] + sum(widths[i] for i in self.layers), hidden, classes)
        self.register_buffer("noise", noise, persistent=False)
        del unet.conv_norm_out, unet.conv_out

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, H, W) in [0, 1] to logits (B, classes, H, W)."""
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the frozen part makes of images (B, 1, H, W) in [0, 1]: see :func:`encode`."""
        x = 2 * images - 1
        if self.noise is not None:
            kept = float(torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64).neg().add(1)[: self.step + 1].prod())
            x = kept**0.5 * x + (1 - kept) ** 0.5 * self.noise
        return encode(self.unet, x, embed(self.unet, self.step))

    def decode(self, encoded: Sequence[Tensor]) -> Tensor:
        """Logits from what :meth:`encode` gave."""
        return self.head(self.features(encoded))

    def features(self, encoded: Sequence[Tensor]) -> Tensor:
        """What the head sees, (B, channels, H, W), from what :meth:`encode` gave."""
        *skips, hidden = encoded
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # torch 2.12 crashes on a CPU where a GroupNorm's weights want a gradient and its input does not
            hidden = hidden.detach().requires_grad_()
        outputs = list(decode(self.unet, (*skips, hidden), embed(self.unet, self.step)))
        seen = [outputs[-1]]
        for i in self.layers:
            seen.append(F.interpolate(outputs[i], outputs[-1].shape[-2:], mode="bilinear"))
        return torch.cat(seen, dim=1)


def freeze(segmenter: Segmenter, strategy: str) -> None:
    """Let gradients reach what the strategy trains (Figure 3), and nothing else.

    "linear" trains the head; "decoder" the way up as well, with each ResBlock's own projection of the step; "full"
    everything. What is frozen includes the middle block, which we count to the encoder (the paper does not say), and
    the MLP that embeds the step.

    Raises:
        UserError: No such strategy.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"There is no strategy {strategy!r}: take one of {', '.join(STRATEGIES)}.")
    segmenter.requires_grad_(strategy == "full")
    segmenter.head.requires_grad_(True)
    if strategy == "decoder":
        segmenter.unet.up_blocks.requires_grad_(True)


@torch.no_grad()
def fold(segmenter: Segmenter) -> Segmenter:
    """A copy for inference whose norms hold the fixed step's scale and shift.

    GroupNorm's own weight w and bias v become w (1 + s) and v (1 + s) + b; the step's MLP and the projections go.
    """
    folded = copy.deepcopy(segmenter)
    embedding = embed(folded.unet, folded.step)
    if embedding is None:
        return folded
    for block in resblocks(folded.unet):
        scale, shift = block.time_emb_proj(F.silu(embedding))[0].chunk(2)  # (C,) each
        block.norm2.weight.mul_(1 + scale)
        block.norm2.bias.mul_(1 + scale).add_(shift)
    without_steps(folded.unet)
    return folded
