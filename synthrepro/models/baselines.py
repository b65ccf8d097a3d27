"""The supervised networks that label-efficient diffusion is compared with (arXiv 2402.15216, Table 3).

The paper took DeepLabV3+, ResU-Net and U-Net++ from segmentation_models_pytorch, with encoders pre-trained on ImageNet,
and Attention U-Net, UNETR and Swin UNETR from MONAI. It names no encoder and no width: the encoder here is the first
library's default, ResNet-34, which makes "ResU-Net" its U-Net on that encoder, and widths are the libraries' defaults.
MONAI has none for Attention U-Net, which gets those of the original U-Net, 64 to 1024.

No network has dropout, which would draw from the global random state at every step; the libraries' defaults have none
either, but for DeepLabV3+, where it is 0.5 after the atrous convolutions.
"""

import pickle
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from monai.networks.nets import UNETR, AttentionUnet
from torch import Tensor, nn

from synthrepro.errors import UserError

from .segmenters import swin_unetr

PRETRAINED = {"deeplabv3plus": smp.DeepLabV3Plus, "resunet": smp.Unet, "unetplusplus": smp.UnetPlusPlus}
FULL = {"attention-unet": 64, "unetr": 768, "swin-unetr": 24}  # features of the others
MULTIPLE = dict.fromkeys(PRETRAINED, 1) | {"attention-unet": 2, "unetr": 12, "swin-unetr": 12}
BASELINES = (*PRETRAINED, *FULL)

HALVINGS = 5  # of the deepest network; a size that fits it fits all
FIRST = 64  # channels of a full ResNet's first stage
LEAST = {"decoder": 16, "unetr": 8}  # channels at full resolution, however narrow the rest: classes must fit through


def baseline(
    name: str,
    classes: int,
    size: tuple[int, int],
    *,
    features: int | None = None,
    weights: Path | None = None,
    in_channels: int = 1,
) -> nn.Module:
    """A network that maps images (B, in_channels, H, W) in [0, 1] to logits (B, classes, H, W).

    In training mode a batch must have two images or more, for DeepLabV3+ normalises an average over the whole image.

    Args:
        name: One of ``BASELINES``.
        classes: Classes, background included.
        size: H and W, multiples of 32; one of them at least 64 for Swin UNETR. UNETR takes images of this size only.
        features: Base width, to build a smaller network; None is the full size. Of the first three, channels of the
            first stage of the encoder, which is then timm's ResNet-18 with a stem of 64 channels, and a quarter of
            those of the decoder's widest level; of Attention U-Net, channels of the first of its five levels, an even
            number; of UNETR, values of a token, a multiple of 12 for its 12 heads; of Swin UNETR, a multiple of 12,
            see :func:`~synthrepro.models.segmenters.swin_unetr`. No decoder gets narrower than 16 channels a level,
            UNETR's not narrower than 8.
        weights: File with the state dict of torchvision's ``resnet34`` as PyTorch saves it, such as
            ``resnet34-b627a593.pth``, for the first three at full size; its classifier ``fc`` is left out, and for
            images of one channel the first kernels are summed over theirs, which is the same as to repeat the channel.
            Images are not standardised by ImageNet's means and SDs: in training mode the first BatchNorm undoes a
            change of scale and offset but for the image's border. None draws all weights; nothing is ever downloaded.
        in_channels: Channels of the image.

    Raises:
        UserError: An unknown name, a size or features that the network cannot have, or weights that do not fit.
    """
    if name not in BASELINES:
        raise UserError(f"There is no baseline {name!r}: take one of {', '.join(BASELINES)}.")
    least = 64 if name == "swin-unetr" else 32
    if min(size) < 1 or any(side % 2**HALVINGS for side in size) or max(size) < least:
        both = "32 x 32" if least == 32 else "32 x 64"
        raise UserError(
            f"{name} cannot take images of {size[0]} x {size[1]}: their sides must be multiples of 32, at least {both}."
        )
    if features is not None and (features < 1 or features % MULTIPLE[name]):
        raise UserError(f"{name} cannot have {features} features: take a positive multiple of {MULTIPLE[name]}.")
    if weights is not None and (name not in PRETRAINED or features is not None):
        raise UserError(
            f"ImageNet weights fit {', '.join(PRETRAINED)} at full size only: leave {weights} out for this {name}, or "
            "the features if it is one of them."
        )
    if name in PRETRAINED:
        return _on_resnet(name, classes, features, weights, in_channels)
    width = features or FULL[name]
    if name == "attention-unet":
        return AttentionUnet(2, in_channels, classes, channels=[width * 2**k for k in range(5)], strides=[2] * 4)
    if name == "unetr":
        return _unetr(in_channels, classes, size, width)
    return swin_unetr(in_channels, classes, width)


def _on_resnet(name: str, classes: int, features: int | None, weights: Path | None, in_channels: int) -> nn.Module:
    """DeepLabV3+, U-Net or U-Net++ on a ResNet."""
    options: dict[str, Any] = {"encoder_name": "resnet34"}
    if features is not None:
        options = {"encoder_name": "tu-resnet18", "channels": [features * 2**k for k in range(4)]}
    if name == "deeplabv3plus":
        options |= {"decoder_channels": 4 * (features or FIRST), "decoder_aspp_dropout": 0.0}
    elif features is not None:
        options["decoder_channels"] = [max(4 * features // 2**k, LEAST["decoder"]) for k in range(HALVINGS)]
    # The file has kernels for three channels; set_in_channels makes them fit afterwards.
    channels = in_channels if weights is None else 3
    network = PRETRAINED[name](encoder_weights=None, in_channels=channels, classes=classes, **options)
    if weights is not None:
        _load(network.encoder, Path(weights))
        network.encoder.set_in_channels(in_channels, pretrained=True)
    return network


def _unetr(in_channels: int, classes: int, size: tuple[int, int], width: int) -> UNETR:
    """UNETR with the proportions of its full size; without the norms that MONAI's blocks have but never use."""
    network = UNETR(
        in_channels,
        classes,
        size,
        feature_size=max(width // 48, LEAST["unetr"]),
        hidden_size=width,
        mlp_dim=4 * width,
        spatial_dims=2,
    )
    for block in network.vit.blocks:
        block.norm_cross_attn = nn.Identity()  # of an attention to something else, which there is not
    return network


def _load(encoder: nn.Module, path: Path) -> None:
    """Load the file's weights, all of them but the classifier's."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: save torchvision's resnet34 weights there, or leave weights out.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no state dict that PyTorch has saved: get torchvision's resnet34 again.") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} holds more than a state dict: save the weights alone, as torchvision does.")
    # A plain dict has no version, and files from before BatchNorm counted its batches are taken as well.
    state = {name: t for name, t in state.items() if name.partition(".")[0] != "fc"}
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit a ResNet-34 ({reason[:200]}): take torchvision's resnet34.") from error
