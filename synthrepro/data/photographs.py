"""Photographs to train on that are no task's: those scikit-image ships in its wheel, divided without supervision.

They train a small promptable model on natural images where SAM's weights cannot be had. No task, no medical image and
no download: the files are read where scikit-image is installed, and none is copied into this project.

Used, with the licence that scikit-image's documentation states:

    astronaut            public domain (NASA)
    brick                CC0 (CC0Textures)
    camera               CC0 (Lav Varshney)
    chelsea              CC0 (Stefan van der Walt)
    clock_motion         public domain (Stefan van der Walt)
    coffee               CC0 (Rachel Michetti)
    coins                no known copyright restrictions (Brooklyn Museum)
    grass                CC0 (linolafett, DeviantArt)
    gravel               CC0 (CC0Textures)
    motorcycle_left      no licence stated; Middlebury 2014 stereo benchmark (Scharstein et al., GCPR 2014)
    rocket               public domain (SpaceX; its page on Flickr says CC BY-NC 2.0, scikit-image issue 5095)

Not used, though in the wheel:

    cell, ihc, microaneurysms, retina, phantom (and lfw_subset, faces)
                         medical, biological or of people's faces: nothing like a task's images may train the baseline
    chessboard_GRAY, chessboard_RGB, color, horse, logo, multipage, multipage_rgb, no_time_for_that_tiny
                         drawn, not photographed
    hubble_deep_field    galaxies of a few pixels, in noise: a segmentation does not follow them
    page, text           writing: a segmentation follows its lines, not things
    moon                 neither source nor licence is stated
    motorcycle_right     the same scene as the left one, seen from 193 mm further
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.segmentation import felzenszwalb
from torch import Tensor

from synthrepro.errors import UserError

FOLDER = Path(skimage.__file__).parent / "data"
FILES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
NAMES = tuple(file.partition(".")[0] for file in FILES)

SIDE = 384  # pixels of the longest side, to which larger photographs are reduced
SCALES = (50, 100, 200)  # of the segmentations that crops come with, fine to coarse
SIGMA = 0.8  # pixels of smoothing before a segmentation, as its authors have it


@cache
def photographs() -> dict[str, Tensor]:
    """The photographs, by name and in the order of `NAMES`: (3, H, W) float32 in [0, 1], H and W at most `SIDE`.

    Grey ones have three equal channels. Read once a process and shared: do not write into them.

    Raises:
        UserError: scikit-image is installed without one of the files.
    """
    return {name: read(file) for name, file in zip(NAMES, FILES, strict=True)}


def read(file: str) -> Tensor:
    """One of scikit-image's pictures, reduced to `SIDE`: (3, H, W) float32 in [0, 1].

    Raises:
        UserError: scikit-image is installed without it.
    """
    # Not by skimage.data.<name>(), which downloads what it does not find.
    if not (FOLDER / file).is_file():
        raise UserError(f"{FOLDER} has no {file}: install scikit-image from its wheel, which ships it.")
    with Image.open(FOLDER / file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).movedim(-1, 0).contiguous()


@cache
def regions(name: str, scale: int) -> Tensor:
    """A photograph divided into connected regions by their edges: (H, W) int64, values 1, 2, ...; no pixel is 0.

    Made once a process and shared: do not write into it.

    Args:
        scale: the method's k, for intensities from 0 to 255: the larger, the larger the regions. No region has fewer
            pixels than this.

    Raises:
        ValueError: there is no photograph of that name.

    Source: Felzenszwalb and Huttenlocher, "Efficient graph-based image segmentation", IJCV 59(2), 2004, by
    scikit-image. The authors choose the smallest region apart from k; here one number sets both.
    """
    if name not in NAMES:
        raise ValueError(f"there is no photograph {name!r}; there are {', '.join(NAMES)}")
    picture = photographs()[name].movedim(0, -1).double().numpy()
    return torch.from_numpy(felzenszwalb(picture, scale=scale, sigma=SIGMA, min_size=scale)).long() + 1


@dataclass(frozen=True)
class Draw:
    """Everything random about a batch of crops: tensors on the CPU whose first axis is the sample."""

    photograph: Tensor
    """(B,) int64, which of `NAMES`."""
    scale: Tensor
    """(B,) int64, which of `SCALES`."""
    extent: Tensor
    """(B,) side of the crop, fraction of the largest that fits."""
    place: Tensor
    """(B, 2) in [0, 1), from the uppermost place to the lowest and from the leftmost to the rightmost."""
    flip: Tensor
    """(B,) bool, whether left and right are exchanged."""

    def __len__(self) -> int:
        return len(self.photograph)


@dataclass(frozen=True)
class Crops:
    """Random crops of the photographs, with the regions in them; every photograph and scale is equally likely."""

    extent: tuple[float, float] = (0.3, 1.0)
    """Bounds of the uniform draw of a crop's side, fraction of the largest crop of its shape that fits."""

    def __post_init__(self) -> None:
        if not 0 < self.extent[0] <= self.extent[1] <= 1:
            raise UserError(f"extent is {self.extent}: give bounds above 0 and up to 1, the smaller first.")

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw `count` crops; sample i depends on the state of a CPU generator and on i alone, not on `count`."""
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        low, high = self.extent
        return Draw(
            photograph=torch.stack([torch.randint(len(NAMES), (), generator=g) for g in own]),
            scale=torch.stack([torch.randint(len(SCALES), (), generator=g) for g in own]),
            extent=torch.stack([torch.rand((), generator=g) for g in own]) * (high - low) + low,
            place=torch.stack([torch.rand(2, generator=g) for g in own]),
            flip=torch.stack([torch.rand((), generator=g) < 0.5 for g in own]),
        )

    def apply(self, draw: Draw, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The crops of a draw at a size (h, w), on the CPU: images by linear, regions by nearest interpolation.

        Reducing an image averages (no aliasing); a crop smaller than `size` is enlarged. A crop may lie within one
        region, and parts of one region may be apart in it.

        Returns:
            Images (B, 3, h, w), float32 in [0, 1]; label maps (B, h, w), int64, with the values of `regions`.

        Raises:
            UserError: see `photographs`.
        """
        images, maps = [], []
        for index in range(len(draw)):
            name, scale = NAMES[int(draw.photograph[index])], SCALES[int(draw.scale[index])]
            picture, parts = photographs()[name], regions(name, scale)  # (3, H, W), (H, W)
            pixel = min(there / wanted for there, wanted in zip(parts.shape, size, strict=True))
            pixel *= float(draw.extent[index])
            spans = []
            for there, wanted, place in zip(parts.shape, size, draw.place[index].tolist(), strict=True):
                length = max(1, round(pixel * wanted))
                start = int(place * (there - length + 1))
                spans.append(slice(start, start + length))
            rows, columns = spans
            picture, parts = picture[:, rows, columns], parts[rows, columns]
            if draw.flip[index]:
                picture, parts = picture.flip(-1), parts.flip(-1)
            images.append(F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0])
            r, c = (((torch.arange(n) + 0.5) * (there / n)).long() for n, there in zip(size, parts.shape, strict=True))
            maps.append(parts[r[:, None], c])
        return torch.stack(images).clamp_(0, 1), torch.stack(maps)
