"""The segmentation networks of GenSeg: UNet, DeepLabV3 and a Swin transformer.

Zhang et al., Nature Communications 2025, Methods. The released code has a UNet of its own, DeepLabV3 from torch.hub and
Swin-Unet (Cao et al., ECCV Workshops 2022). Here they are MONAI's UNet, torchvision's DeepLabV3 and MONAI's Swin
UNETR (Hatamizadeh et al. 2022), which has the same kind of encoder but a decoder of convolutions.

All have second derivatives and can be called through :func:`synthrepro.bilevel.stateless`. DeepLabV3 has BatchNorm,
whose statistics such calls leave alone: before its eval mode is used, refresh them over the training images with
``torch.optim.swa_utils.update_bn(batches, network)``. The other two need none of that.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from synthrepro.errors import UserError

from .unet import unet

SEGMENTERS = ("unet", "deeplabv3-resnet50", "swin-unetr")


def segmenter(
    name: str,
    in_channels: int,
    classes: int,
    *,
    features: Sequence[int] | int | None = None,
    depths: Sequence[int] | None = None,
    weights: Path | None = None,
) -> nn.Module:
    """A network that maps images (B, in_channels, H, W) in [0, 1] to logits (B, classes, H, W).

    Args:
        name: One of ``SEGMENTERS``.
        in_channels: Channels of the image; DeepLabV3 takes 1 or 3.
        classes: Classes, background included.
        features: Of the UNet, the channels of each level; of Swin UNETR, the channels of the first level, a multiple
            of 12. None is the default of :func:`~synthrepro.models.unet` or :func:`swin_unetr`.
        depths: Blocks of each of the four stages of DeepLabV3's ResNet or of Swin UNETR's encoder. None is the default
            of :class:`DeepLabV3` or :func:`swin_unetr`.
        weights: File of ImageNet weights, for DeepLabV3 alone; None draws all weights.

    Raises:
        UserError: An unknown name, an option that the network does not have, or a file that does not fit.
    """
    if name not in SEGMENTERS:
        raise UserError(f"There is no segmenter {name!r}: take one of {', '.join(SEGMENTERS)}.")
    if weights is not None and name != "deeplabv3-resnet50":
        raise UserError(f"No ImageNet weights fit {name}: leave {weights} out, or take deeplabv3-resnet50.")
    if name == "unet":
        if depths is not None or isinstance(features, int):
            raise UserError("The unet has no depths, and its features are one number a level: change its options.")
        return unet(in_channels, classes) if features is None else unet(in_channels, classes, features)
    if name == "deeplabv3-resnet50":
        if features is not None:
            raise UserError("The features of deeplabv3-resnet50 are fixed: leave them out, or choose depths.")
        return DeepLabV3(in_channels, classes, depths or RESNET50, weights)
    if not isinstance(features, int | None):
        raise UserError("The features of swin-unetr are one number, those of its first level: give that alone.")
    return swin_unetr(in_channels, classes, features or 24, depths or (2, 2, 2, 2))


RESNET50 = (3, 4, 6, 3)


class DeepLabV3(nn.Module):
    """torchvision's DeepLabV3 (Chen et al. 2017) on a dilated ResNet-50, of output stride 8, without auxiliary head.

    Maps images (B, in_channels, H, W) to logits (B, classes, H, W), interpolated from H/8 x W/8. A single channel is
    repeated three times, which is one channel with the sum of the first kernels over theirs, so that ImageNet weights
    fit as they are. Images are not standardised by ImageNet's means and SDs: in training mode the BatchNorm after the
    first convolution undoes a change of scale and offset but for the image's border. In training mode a batch must
    have two images or more, for one branch averages over the whole image before it normalises.

    Args:
        in_channels: 1 or 3.
        classes: Classes, background included.
        depths: Blocks of each stage of the ResNet.
        weights: File with the state dict of torchvision's ``resnet50`` as PyTorch saves it, such as
            ``resnet50-0676ba61.pth``, of which the classifier ``fc`` is left out. Nothing is ever downloaded.

    Raises:
        UserError: The number of channels is another; the file is missing or does not fit.
    """

    def __init__(
        self, in_channels: int, classes: int, depths: Sequence[int] = RESNET50, weights: Path | None = None
    ) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise UserError(f"deeplabv3-resnet50 takes images of 1 or 3 channels, not {in_channels}: convert them.")
        resnet = ResNet(Bottleneck, list(depths), replace_stride_with_dilation=[False, True, True])
        self.backbone = IntermediateLayerGetter(resnet, {"layer4": "out"})
        if weights is not None:
            _load(self.backbone, Path(weights))
        self.classifier = DeepLabHead(512 * Bottleneck.expansion, classes)
        _out_of_place(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images.expand(-1, 3, -1, -1))["out"]  # (B, 2048, H/8, W/8)
        return F.interpolate(self.classifier(features), size=images.shape[-2:], mode="bilinear")


def swin_unetr(in_channels: int, classes: int, features: int = 24, depths: Sequence[int] = (2, 2, 2, 2)) -> SwinUNETR:
    """MONAI's Swin UNETR in 2-D; its attention is written in plain products, which have second derivatives.

    Maps images (B, in_channels, H, W) to logits (B, classes, H, W). H and W must be multiples of 32 (MONAI raises
    ValueError), and one of them at least 64, since the lowest level has H/32 x W/32 values to normalise.

    ImageNet weights of torchvision's ``swin_t`` do not fit. Its tokens stand for 4 x 4 pixels and have a LayerNorm of
    their own, here they stand for 2 x 2 without one, and larger ones would break the decoder, which doubles the size
    once for each halving; it merges tokens three times, here there are four mergings; and merging concatenates the
    four neighbours in another order. At ``features=96, depths=(2, 2, 6, 2)`` only its attention blocks would fit in
    shape, at twice the resolution they were trained for.

    Args:
        in_channels: Channels of the image.
        classes: Classes, background included.
        features: Channels of the first level, a multiple of 12; each further one has twice as many.
        depths: Attention blocks of each stage; every other one has shifted windows.
    """
    network = SwinUNETR(in_channels, classes, feature_size=features, depths=depths, spatial_dims=2)
    _out_of_place(network)
    return network


def _out_of_place(network: nn.Module) -> None:
    """Let no activation act in place, where fused_kernels would leave it to torch."""
    for part in network.modules():
        if isinstance(part, nn.ReLU | nn.LeakyReLU):
            part.inplace = False


def _load(backbone: nn.Module, path: Path) -> None:
    """Load the file's weights, all of them but the classifier's."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: save torchvision's resnet50 weights there, or leave weights out.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no state dict that PyTorch has saved: get torchvision's resnet50 again.") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} holds more than a state dict: save the weights alone, as torchvision does.")
    # A plain dict has no version, and files from before BatchNorm counted its batches are taken as well.
    state = {name: t for name, t in state.items() if name.partition(".")[0] != "fc"}
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"{path} does not fit the network's ResNet ({reason[:200]}): take torchvision's resnet50 and its depths."
        ) from error
