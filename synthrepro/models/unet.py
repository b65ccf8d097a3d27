"""The segmentation UNet."""

from collections.abc import Sequence

from monai.networks.nets import UNet


def unet(
    in_channels: int,
    classes: int,
    features: Sequence[int] = (16, 24, 32, 48, 64),
    *,
    convs: int = 0,
    norm: str | None = "instance",
) -> UNet:
    """MONAI's 2-D UNet with ELU, twice differentiable.

    Maps images (B, in_channels, H, W) to logits (B, classes, H, W); H and W must be multiples of
    ``2 ** (len(features) - 1)``.

    Args:
        in_channels: Channels of the image.
        classes: Classes, background included.
        features: Channels of each level. Learn2Synth's script asks for (24, 48, 96, 192, 384, 768), but passes them
            under a name its UNet ignores, so that its runs used the default, which is ours too.
        convs: Convolutions of a residual unit at each level; 0 is one plain convolution a level.
        norm: MONAI's name of a normalisation, or None (the paper's network has none; without it the first few hundred
            steps of a short training are lost to finding the scale).
    """
    strides = [2] * (len(features) - 1)
    return UNet(2, in_channels, classes, features, strides, num_res_units=convs, act="ELU", norm=norm)  # type: ignore[arg-type]
