"""What GenSeg's released scripts do to generated images before the segmenter sees them, which cuts its gradient off.

Source: importZL/GenSeg, the end-to-end scripts of ISIC and JSRT; the paper (Zhang et al., Nature Communications 2025)
has the segmenter's loss reach the generator and mentions none of this.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, spawn, uniform

Kind = Literal["isic", "jsrt", "none"]

CHANCE = 0.5  # of equalization, sharpness and contrast each
BITS = 4  # that posterization leaves
SHARPNESS = 0.3  # below 1 blurs
SATURATION = (0.5, 1.5)
GAMMA = 0.5


def released_postprocessing(images: Tensor, generator: torch.Generator, kind: Kind) -> Tensor:
    """Generated images as the released scripts hand them to the segmenter: :func:`draw`, then :func:`apply`.

    Args:
        images: (B, C, H, W), floating point, of any range.
        generator: On the CPU; one number a sample is taken from it, whatever the kind.
        kind: Of images: see :func:`apply`.

    Returns:
        (B, C, H, W), float32, [0, 1], without a graph.

    Raises:
        UserError: The generator is not on the CPU, or there is no such kind.
    """
    return apply(images, draw(len(images), generator), kind)


def draw(count: int, generator: torch.Generator) -> Draw:
    """What is random about the post-processing of ISIC images.

    The released script draws once for the whole batch (of two), here every sample has its own draw.

    Returns:
        On the CPU: ``equalize``, ``sharpness``, ``contrast`` (B,) bool; ``saturation`` (B,) factors.
    """
    samples = spawn(count, generator)
    chances = uniform(samples, (3,)) < CHANCE
    equalize, sharpness, contrast = chances.unbind(1)
    return Draw(equalize=equalize, sharpness=sharpness, contrast=contrast, saturation=uniform(samples, (), SATURATION))


@torch.no_grad()
def apply(images: Tensor, draw: Draw, kind: Kind) -> Tensor:
    """The images of a draw, arguments as :func:`released_postprocessing`.

    All kinds: the smallest and the largest value of the *whole batch*, all channels, become 0 and 255, and values
    are rounded to whole numbers; an image so depends on those that happen to be in its batch. A constant batch becomes
    0 (there it is not a number).

    "isic" (RGB): histogram equalization with chance 0.5; posterization to 4 bits; sharpness 0.3, which blurs, with
    chance 0.5; automatic contrast with chance 0.5; saturation times U(0.5, 1.5). Grey images have no saturation
    to change. "jsrt" (grey): histogram equalization, then gamma 0.5; nothing of the draw is used. "none": no more.
    """
    if kind not in get_args(Kind):
        raise UserError(f"There is no released post-processing {kind!r}: choose one of {', '.join(get_args(Kind))}.")
    if len(draw) != len(images):
        raise UserError(f"This draw has {len(draw)} samples for {len(images)} images: draw for this batch.")
    values = images.detach().float()
    lowest, highest = values.aminmax()
    tiny = torch.finfo(values.dtype).tiny
    bytes_ = ((values - lowest) / (highest - lowest).clamp_min(tiny) * 255 + 0.5).to(torch.uint8)
    if kind == "isic":
        bytes_ = torch.stack([_isic(image, draw[i]) for i, image in enumerate(bytes_)])
    elif kind == "jsrt":
        bytes_ = F.adjust_gamma(F.equalize(bytes_), GAMMA)
    return bytes_.float() / 255


def _isic(image: Tensor, draw: Draw) -> Tensor:
    """One image (C, H, W), uint8, and its draw."""
    if draw.equalize:
        image = F.equalize(image)
    image = F.posterize(image, BITS)
    if draw.sharpness:
        image = F.adjust_sharpness(image, SHARPNESS)
    if draw.contrast:
        image = F.autocontrast(image)
    return F.adjust_saturation(image, draw.saturation.item())  # which leaves a single channel as it is
