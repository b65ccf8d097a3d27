r"""DDPM-Seg: an ensemble of MLPs that label a pixel by what a frozen diffusion UNet's way up holds there.

Baranchuk et al., Label-Efficient Semantic Segmentation with Diffusion Models, ICLR 2022 (arXiv 2112.03126), section 4,
and its released code (yandex-research/ddpm-segmentation, train_interpreter.py and src/). The image is noised to a few
steps t, by a noise that all images share; the outputs of a few of the UNet's output blocks are resized to the image
and concatenated to D numbers a pixel; ten MLPs are trained on pixels drawn from all labelled images, and vote.

The numbers are the released code's. Its memory is not: it holds every labelled pixel's features in RAM as float32. Here

- they stand in a file of n H W rows of D numbers, a pixel a row, of which a batch reads the rows it needs. The order
  of the pixels stays a shuffle of all of them, one for each MLP and epoch;
- the MLPs are trained side by side, as one batched product. Each has its own first weights, its own order and its own
  stop; the released code trains them in turn;
- for prediction, an MLP's first layer is applied to each block's output at that block's own size, and the results are
  resized and added. Both are linear, so this is the same up to rounding, and D numbers a pixel are never made.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from synthrepro.errors import UserError
from synthrepro.evidence import Config, Context
from synthrepro.models.diffusion_unet import STEPS, decode, embed, encode
from synthrepro.training import stream

PIXELS = 2**16  # so many, an image of the paper, are written or labelled at once


class DdpmSegSettings(Config):
    """What DDPM-Seg depends on beside its images.

    Attributes:
        blocks: Output blocks of the way up, counted from 0; 5, 6, 7, 8 and 12 as released.
        steps: Steps t of the diffusion, 0 to 999; 50, 150 and 250.
        models: MLPs that vote; 10.
        lr: Of Adam; 1e-3.
        batch: Pixels; 64.
        first_epochs: Epochs that are always trained; 4. From then on, the loss of each batch is compared.
        patience: An MLP stops after more than so many batches in a row that did not lower its loss; 50. It keeps its
            last weights, not its best.
        max_epochs: 100.
        smallest: A class with fewer pixels in an image than this is not trained on in that image; 20.
        precision: Of the features in the file. The release has float32.
    """

    blocks: tuple[int, ...] = Field(min_length=1)
    steps: tuple[int, ...] = Field(min_length=1)
    models: PositiveInt
    lr: PositiveFloat
    batch: int = Field(ge=2)
    first_epochs: int = Field(ge=0)
    patience: int = Field(ge=0)
    max_epochs: PositiveInt
    smallest: int = Field(ge=0)
    precision: Literal["float16", "float32"]


def shared_noise(height: int, width: int) -> Tensor:
    """The noise (1, 1, H, W) that every image is given, of seed 0 as released."""
    return torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(0))


def widths(unet: UNet2DModel, blocks: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Channels of each part of a pixel's features, in their order; they add up to D.

    In the paper's shape with c channels, blocks 5, 6, 7, 8 and 12 have 4c, 2c, 2c, 2c and c: 11c a step.

    Raises:
        UserError: There is no such block, or no such step.
    """
    found = [resnet.out_channels for up in unet.up_blocks for resnet in up.resnets]
    for block in blocks:
        if not 0 <= block < len(found):
            raise UserError(
                f"There is no output block {block}: this UNet has {len(found)}, counted from 0 to {len(found) - 1}."
            )
    for step in steps:
        if not 0 <= step < STEPS:
            raise UserError(f"The step t must be from 0 to {STEPS - 1}, the {STEPS} steps of the schedule, not {step}.")
    return [found[block] for _ in steps for block in sorted(blocks)]


@torch.no_grad()
def activations(
    unet: UNet2DModel, images: Tensor, blocks: Sequence[int], steps: Sequence[int], noise: Tensor
) -> Iterator[Tensor]:
    """The outputs (B, C, h, w) of the blocks at each step: the first step's blocks from low to high, the second's, ...

    Args:
        unet: Is put into evaluation mode. Nothing of it runs above the highest block.
        images: (B, 1, H, W) in [0, 1].
        noise: (1, 1, H, W), see :func:`shared_noise`.

    Raises:
        UserError: There is no such block, or no such step.
        ValueError: The noise is of another size than the images.
    """
    widths(unet, blocks, steps)
    if noise.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"The noise is {tuple(noise.shape[-2:])} and the images are {tuple(images.shape[-2:])}.")
    unet.eval()
    images = 2 * images.to(unet.device) - 1
    noise = noise.to(images).expand_as(images)
    schedule = DDPMScheduler(num_train_timesteps=STEPS, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    for step in steps:
        noisy = schedule.add_noise(images, noise, torch.tensor([step], device=images.device))
        embedding = embed(unet, step)
        outputs = decode(unet, encode(unet, noisy, embedding), embedding)
        for i, output in zip(range(max(blocks) + 1), outputs, strict=False):
            if i in blocks:
                yield output


@torch.no_grad()
def pixel_features(
    unet: UNet2DModel, images: Tensor, blocks: Sequence[int], steps: Sequence[int], noise: Tensor
) -> Tensor:
    """What the MLPs see of each pixel: all of :func:`activations`, resized to the image with linear interpolation.

    Args:
        images: (B, 1, H, W) in [0, 1].
        noise: (1, 1, H, W), the same for all images.

    Returns:
        (B, D, H, W), float32: the largest tensor there is here, so it is filled part by part.

    Raises:
        UserError: There is no such block, or no such step.
    """
    parts = widths(unet, blocks, steps)
    found = torch.empty(len(images), sum(parts), *images.shape[-2:], device=unet.device)  # (B, D, H, W)
    outputs = activations(unet, images, blocks, steps, noise)
    for target, output in zip(found.split(parts, dim=1), outputs, strict=True):
        target.copy_(F.interpolate(output, images.shape[-2:], mode="bilinear"))
    return found


class FeatureFile:
    """The features of n images in an ``.npy`` file (n H W, D): a row a pixel, image by image and row by row.

    Rows are read with plain reads, not through a memory map: pages of a map count as the process's memory for as long
    as they are mapped, and shuffled rows touch all of them. The operating system may still cache what it has room for.

    Args:
        path: An existing file that :meth:`create` made; others may map it (``np.load(path, mmap_mode="r")``).
    """

    def __init__(self, path: Path) -> None:
        layout = np.load(path, mmap_mode="r")
        self.path, self.dtype, (self.rows, self.dim), self.offset = path, layout.dtype, layout.shape, layout.offset
        self.stride = self.dim * self.dtype.itemsize

    @staticmethod
    def create(path: Path, rows: int, dim: int, precision: str) -> "FeatureFile":
        """A file of so many rows, all zero; on most file systems it takes up room only as it is filled."""
        np.lib.format.open_memmap(path, "w+", np.dtype(precision), (rows, dim))
        return FeatureFile(path)

    def write(self, image: int, features: Tensor) -> None:
        """Fill in an image's features (D, H, W).

        Raises:
            UserError: A feature does not fit into the file's precision.
        """
        pixels = features.flatten(1)  # (D, H W)
        with self.path.open("r+b") as file:
            file.seek(self.offset + image * pixels.shape[1] * self.stride)
            for part in pixels.split(2**12, dim=1):
                rows = part.T.contiguous().cpu().to(getattr(torch, self.dtype.name))
                if not rows.isfinite().all():
                    raise UserError(
                        f"Image {image} has features beyond the range of {self.dtype}: give a UNet whose features are "
                        "finite, and precision float32 if they are too large."
                    )
                file.write(rows.numpy())

    def read(self, rows: Tensor) -> Tensor:
        """Features (b, D) of the pixels with these numbers (b,), on the CPU and in the file's precision."""
        found = np.empty((len(rows), self.dim), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            for target, row in zip(found, rows.tolist(), strict=True):
                file.seek(self.offset + row * self.stride)
                file.readinto(target)
        return torch.from_numpy(found)


def file_bytes(images: int, height: int, width: int, dim: int, precision: str) -> int:
    """Of the features of so many images."""
    return images * height * width * dim * np.dtype(precision).itemsize


def write_features(
    unet: UNet2DModel, images: Tensor, settings: DdpmSegSettings, noise: Tensor, context: Context
) -> FeatureFile:
    """The features of images (n, 1, H, W), in the context's folder; a killed run goes on with the image it was at.

    Raises:
        UserError: The disk has no room for them; there is no such block or step.
    """
    path, dim = context.folder / "features.npy", sum(widths(unet, settings.blocks, settings.steps))
    n, _, height, width = images.shape
    done = int((context.load("features") or {"images": 0})["images"])
    needed = file_bytes(n - done, height, width, dim, settings.precision)
    if (free := shutil.disk_usage(context.folder).free) < needed:
        raise UserError(
            f"The features of {n - done} images need {needed / 1e9:.1f} GB in {context.folder}, which has "
            f"{free / 1e9:.1f} GB left: make room, or take fewer images, blocks or steps."
        )
    found = FeatureFile(path) if done else FeatureFile.create(path, n * height * width, dim, settings.precision)
    for i in context.progress(range(done, n), "features"):
        image = images[i : i + 1]
        found.write(i, pixel_features(unet, image, settings.blocks, settings.steps, noise)[0])
        context.save("features", {"images": i + 1})
    return found


class Ensemble(nn.Module):
    """M pixel MLPs side by side: two times linear, ReLU and BatchNorm, and a linear layer, all with M as first axis.

    The hidden layers have 128 and 32 units, or 256 and 128 from 30 classes on. Weights start as normal draws of
    standard deviation 0.02, biases at 0. The released code means to draw BatchNorm's weights as well, but names the
    module for images and never does.

    Args:
        dim: D, of a pixel's features.
        classes: C, background included.
        seed: Of MLP k's first weights, which do not depend on how many there are.
    """

    def __init__(self, models: int, dim: int, classes: int, seed: int) -> None:
        super().__init__()
        sizes = [dim, *((128, 32) if classes < 30 else (256, 128)), classes]
        draws = [stream(seed, f"pixel MLP {k}") for k in range(models)]
        self.weights, self.biases, self.scales, self.shifts = (nn.ParameterList() for _ in range(4))
        for i, (before, after) in enumerate(itertools.pairwise(sizes)):
            first = [0.02 * torch.randn(after, before, generator=g) for g in draws]
            self.weights.append(nn.Parameter(torch.stack(first)))
            self.biases.append(nn.Parameter(torch.zeros(models, after)))
            if i < 2:
                self.scales.append(nn.Parameter(torch.ones(models, after)))
                self.shifts.append(nn.Parameter(torch.zeros(models, after)))
                self.register_buffer(f"mean{i}", torch.zeros(models, after))
                self.register_buffer(f"variance{i}", torch.ones(models, after))

    def forward(self, features: Tensor) -> Tensor:
        """Features (M, P, D) of P pixels, or (P, D) for all MLPs alike, to logits (M, P, C)."""
        return self.rest(features @ self.weights[0].mT + self.biases[0][:, None])

    def rest(self, hidden: Tensor) -> Tensor:
        """What comes after the first linear layer: (M, P, 128) to logits (M, P, C)."""
        for i in (0, 1):
            weight, bias = self.weights[i + 1], self.biases[i + 1]  # (M, 32, 128), (M, 32); (M, C, 32), (M, C)
            mean, variance = getattr(self, f"mean{i}"), getattr(self, f"variance{i}")  # (M, 128); (M, 32)
            hidden = hidden.relu()
            if self.training:
                # To BatchNorm, the units of all MLPs are channels, each with the statistics of its own pixels.
                norm = (mean.view(-1), variance.view(-1), self.scales[i].view(-1), self.shifts[i].view(-1))
                normed = F.batch_norm(hidden.transpose(0, 1).flatten(1), *norm, training=True)  # (P, 128 M)
                hidden = normed.unflatten(1, mean.shape).transpose(0, 1)
            else:  # with fixed statistics it is part of the next linear layer, which saves a pass over all pixels
                scale = self.scales[i] / (variance + 1e-5).sqrt()
                bias = bias + (weight @ (self.shifts[i] - scale * mean)[..., None])[..., 0]
                weight = weight * scale[:, None]
            hidden = hidden @ weight.mT + bias[:, None]
        return hidden


def usable(labels: Tensor, classes: int, smallest: int) -> Tensor:
    """Numbers of the pixels to train on, counted through labels (n, H, W): not those of a class with too few."""
    counts = F.one_hot(labels.flatten(1), classes).sum(1)  # (n, C)
    return (counts.gather(1, labels.flatten(1)) >= smallest).flatten().nonzero()[:, 0]


def train_ensemble(
    features: FeatureFile, labels: Tensor, classes: int, settings: DdpmSegSettings, seed: int, context: Context
) -> Ensemble:
    """Train the MLPs with cross-entropy and Adam on batches of pixels.

    A last batch of a single pixel, which has no variance for BatchNorm and ends the released training, is left out.

    Args:
        labels: (n, H, W), int64, of the images in the file.
        classes: Background included.

    Returns:
        The MLPs in evaluation mode, on the context's device.

    Raises:
        UserError: No two pixels are left to train on.
    """
    pixels = usable(labels, classes, settings.smallest)
    if len(pixels) < 2:
        raise UserError(
            f"No class has {settings.smallest} pixels in an image: lower 'smallest', or label other images."
        )
    of, device = labels.flatten(), context.device
    network = Ensemble(settings.models, features.dim, classes, seed).to(device)
    optimiser = torch.optim.Adam(network.parameters(), settings.lr, fused=True)
    start, kept = 0, {name: value.clone() for name, value in network.state_dict().items()}
    running = [True] * settings.models
    best, waited = [math.inf] * settings.models, [0] * settings.models
    if saved := context.load("pixel MLPs"):
        start, running, best, waited = saved["step"], saved["running"], saved["best"], saved["waited"]
        kept = {name: value.to(device) for name, value in saved["kept"].items()}
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
    batches = len(pixels) // settings.batch + (len(pixels) % settings.batch > 1)
    orders: list[Tensor] = []

    for step in context.progress(range(start, batches * settings.max_epochs), "pixel MLPs"):
        epoch, batch = divmod(step, batches)
        if batch == 0 or not orders:
            draws = (stream(seed, f"pixels {k} {epoch}") for k in range(settings.models))
            orders = [pixels[torch.randperm(len(pixels), generator=g)].int() for g in draws]
        chosen = torch.stack([o[batch * settings.batch : (batch + 1) * settings.batch] for o in orders])  # (M, b)
        x = features.read(chosen.flatten()).to(device).float().unflatten(0, chosen.shape)  # (M, b, D)
        target = of[chosen.long()].to(device)
        optimiser.zero_grad()
        losses = F.cross_entropy(network(x).flatten(0, 1), target.flatten(), reduction="none")
        losses = losses.view(chosen.shape).mean(1)  # (M,)
        losses.sum().backward()
        optimiser.step()
        if epoch >= settings.first_epochs:
            for k, loss in enumerate(losses.tolist()):
                waited[k] = 0 if loss < best[k] else waited[k] + 1
                best[k] = min(loss, best[k])
                if running[k] and waited[k] > settings.patience:
                    running[k] = False
                    keep(network, kept, k)
            if not any(running):
                break
        if context.checkpoint_due():
            states = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "kept": kept}
            context.save("pixel MLPs", {"step": step + 1, "running": running, "best": best, "waited": waited} | states)

    for k in range(settings.models):
        if running[k]:
            keep(network, kept, k)
    network.load_state_dict(kept)
    return network.eval()


def keep(network: Ensemble, kept: dict[str, Tensor], k: int) -> None:
    """Copy what MLP k has become; it is trained on beside those that have not stopped, to no effect."""
    for name, value in network.state_dict().items():
        kept[name][k] = value[k]


def vote(answers: Tensor, classes: int) -> Tensor:
    """The class that most MLPs answer; the lowest of several, as the released code's mode. (M, P) to (P,)."""
    votes = torch.zeros(classes, answers.shape[1], dtype=torch.int32, device=answers.device)
    return votes.scatter_add_(0, answers, torch.ones_like(answers, dtype=torch.int32)).argmax(0)


@torch.no_grad()
def predict(unet: UNet2DModel, ensemble: Ensemble, images: Tensor, settings: DdpmSegSettings, noise: Tensor) -> Tensor:
    """Label maps (N, H, W), int64, on the CPU, of images (N, 1, H, W) in [0, 1].

    Holds what belongs to one image at a time, or to as many as have the pixels of one of 256 x 256.
    """
    n, _, height, width = images.shape
    weight = ensemble.weights[0]  # (M, 128, D)
    parts = weight.flatten(0, 1).split(widths(unet, settings.blocks, settings.steps), dim=1)  # (128 M, C) each
    maps = torch.empty(n, height, width, dtype=torch.int64)
    for rows in torch.arange(n).split(max(1, PIXELS // (height * width))):
        found: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        outputs = activations(unet, images[rows], settings.blocks, settings.steps, noise)
        for part, output in zip(parts, outputs, strict=True):
            found.setdefault(tuple(output.shape[-2:]), []).append((part, output))
        sizes = []  # of each size: all its weights (128 M, C) and outputs (B, C, h, w)
        for pairs in found.values():
            sizes.append((torch.cat([part for part, _ in pairs], 1), torch.cat([output for _, output in pairs], 1)))
        for i, image in enumerate(rows.tolist()):
            hidden = ensemble.biases[0].flatten().repeat(height, width, 1)  # (H, W, 128 M)
            for part, output in sizes:
                product = output[i].movedim(0, -1) @ part.T  # (h, w, 128 M)
                # With the channels last in memory, as they are here, this is many times faster than with them first.
                resized = F.interpolate(product[None].movedim(-1, 1), (height, width), mode="bilinear")
                hidden += resized[0].movedim(0, -1)
            logits = ensemble.rest(hidden.view(height * width, *weight.shape[:2]).transpose(0, 1))  # (M, H W, C)
            maps[image] = vote(logits.argmax(2), logits.shape[2]).view(height, width).cpu()
    return maps


def ddpm_seg(
    unet: UNet2DModel,
    images: Tensor,
    labels: Tensor,
    classes: int,
    settings: DdpmSegSettings,
    seed: int,
    context: Context,
) -> Callable[[Tensor], Tensor]:
    """Train DDPM-Seg on labelled images, with a file of their features that goes when the MLPs are trained.

    Args:
        unet: Pre-trained; is moved to the context's device and put into evaluation mode, and stays as it is.
        images: (n, 1, H, W) in [0, 1].
        labels: (n, H, W), int64.
        classes: Background included.

    Returns:
        From images (N, 1, H, W) in [0, 1] of the same size to label maps (N, H, W), int64.

    Raises:
        UserError: There is no such block or step, no room on the disk, or nothing to train on.
    """
    unet.to(context.device)
    noise = shared_noise(*images.shape[-2:])
    if saved := context.load("ensemble"):
        dim = sum(widths(unet, settings.blocks, settings.steps))
        ensemble = Ensemble(settings.models, dim, classes, seed).to(context.device).eval()
        ensemble.load_state_dict(saved)
    else:
        features = write_features(unet, images, settings, noise, context)
        ensemble = train_ensemble(features, labels, classes, settings, seed, context)
        context.save("ensemble", ensemble.state_dict())
    (context.folder / "features.npy").unlink(missing_ok=True)
    return lambda unseen: predict(unet, ensemble, unseen, settings, noise)
