"""What turns images into the features that :mod:`synthrepro.generation` compares.

Each image gives pooled features, for FID, precision and recall, and spatial ones, for sFID (Nash et al., ICML 2021):
the first seven channels of a map in the middle of the network, flattened, as in guided-diffusion's evaluator.
"""

import copy
import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.models import inception_v3
from torchvision.models.feature_extraction import create_feature_extractor

from synthrepro.errors import UserError

CHANNELS = 7  # of the spatial features

Features = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Extractor:
    """A network that gives features, and its name for tables.

    Attributes:
        name: Says what the features are of; scores of extractors with other names cannot be compared.
        network: In eval mode, on the device that computes.
        features: From the network and images (B, C, H, W) to pooled (B, D) and spatial (B, d) features.
    """

    name: str
    network: nn.Module
    features: Callable[[nn.Module, Tensor], Features]

    def to(self, device: torch.device | str) -> "Extractor":
        """Move the network, and return the extractor."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 32) -> Features:
        """Pooled (B, D) and spatial (B, d) features, float32 on the CPU, of images (B, C, H, W) in [0, 1].

        Args:
            images: On any device; samples of a diffusion model must be mapped back from [-1, 1] and clamped.
            batch: So many images at once; no feature depends on it but in its last digits.

        Raises:
            ValueError: A value outside [0, 1].
        """
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Images must be in [0, 1], not in [{low:.3g}, {high:.3g}]: map and clamp them.")
        device = next(self.network.parameters()).device
        parts = [self.features(self.network, some.float().to(device)) for some in images.split(batch)]
        pooled, spatial = (torch.cat([part.float().cpu() for part in kind]) for kind in zip(*parts, strict=True))
        return pooled, spatial


def inception(weights: Path) -> Extractor:
    """torchvision's Inception v3 (Szegedy et al., CVPR 2016), for images of one channel, which is repeated, or three.

    Images are resized to 299 x 299, bilinearly with antialiasing. Pooled: the 2048 features before the classifier.
    Spatial: 7 x 17 x 17 = 2023, of ``Mixed_6d``, whose first channels are those of its 1 x 1 branch; this is
    ``mixed_6/conv`` in the TensorFlow graph of guided-diffusion's evaluator, which counts from ``mixed`` where
    torchvision says ``Mixed_5b``.

    That graph has other weights, another head's 1008 classes and a resizing without antialiasing, and Huang et al. do
    not say what they used. So a score from here can be set beside theirs, but not compared to the digit.

    Args:
        weights: File with the state dict of torchvision's ``inception_v3`` as PyTorch saves it, such as
            ``inception_v3_google-0cc3c7bd.pth``. The name has the first digits of its SHA-256, as the file has.
            Nothing is ever downloaded.

    Raises:
        UserError: The file is missing or does not fit.
    """
    path = Path(weights)
    with torch.device("meta"):  # draws nothing
        network = inception_v3(aux_logits=False, init_weights=False)
    _load(network, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    maps = create_feature_extractor(network.float().eval(), {"flatten": "pooled", "Mixed_6d.cat": "spatial"})
    return Extractor(
        f"Inception v3 (torchvision's, weights file of sha256 {digest[:8]})",
        maps.requires_grad_(False),
        _inception_features,
    )


def _inception_features(network: nn.Module, images: Tensor) -> Features:
    resized = F.interpolate(images.expand(-1, 3, -1, -1), size=(299, 299), mode="bilinear", antialias=True)
    # To [-1, 1]: ImageNet's means and SDs, as for torchvision's weights, and their undoing by transform_input
    maps = network(2 * resized - 1)
    return maps["pooled"], maps["spatial"][:, :CHANNELS].flatten(1)


def unet_extractor(network: UNet) -> Extractor:
    """The encoder of a segmenter, built by :func:`synthrepro.models.unet` and trained on the labelled images.

    The substitute where no weights of Inception are at hand. A copy is kept: the network may be trained on.

    Raises:
        ValueError: The network has instance norm, which takes each image's own contrast away: samples half as bright
            as the real images would have the features of perfect ones.
    """
    if any(isinstance(part, _InstanceNorm) for part in network.modules()):
        raise ValueError("With instance norm features do not see contrast: build the unet with norm='batch'.")
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    return Extractor("encoder of a segmenter trained on the labelled images", frozen, unet_features)


def unet_features(network: nn.Module, images: Tensor) -> Features:
    """Features in the encoder of MONAI's UNet.

    Args:
        network: The UNet, which nests its levels: each is a way down, a skip connection around the next, a way up.
        images: (B, C, H, W), as the network takes them.

    Returns:
        Pooled (B, channels of the bottom level), its mean over the image; and spatial (B, 7 h w), the first channels of
        the map in the middle: of five levels the third, of size H/8 x W/8.
    """
    level: Any = network.model
    maps, x = [], images
    while type(level) is nn.Sequential:  # MONAI's convolutions are of subclasses
        down, skip, _ = level
        x = down(x)
        maps.append(x)
        level = skip.submodule
    maps.append(level(x))
    return maps[-1].mean((2, 3)), maps[len(maps) // 2][:, :CHANNELS].flatten(1)


def _load(network: nn.Module, path: Path) -> None:
    """Load the file's weights into a network without any, all of them but the auxiliary head's."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: save torchvision's inception_v3 weights there, or leave them out.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no state dict that PyTorch saved: get torchvision's inception_v3 again.") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} holds more than a state dict: save the weights alone, as torchvision does.")
    # A plain dict has no version, and files from before BatchNorm counted its batches are taken as well.
    state = {name: t for name, t in state.items() if name.partition(".")[0] != "AuxLogits"}
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"{path} does not fit Inception v3 ({reason[:200]}): take torchvision's inception_v3."
        ) from error
