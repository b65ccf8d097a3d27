r"""Pre-training on unlabelled images: a denoising diffusion model, and sampling from it.

Sections "Diffusion Model" and "Experiment Settings" of the paper: T = 1000 steps, beta from 1e-4 to 0.02 linearly,

.. math:: x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \qquad
          L = \lVert \epsilon - \epsilon_\theta(x_t, t) \rVert^2 / N \quad \text{(Eqs. 2 and 5)},

Adam, a rate that falls linearly from 2e-4 to 2e-5, an exponential moving average of decay 0.9999, and flips from left
to right. The paper also speaks of "a cosine annealing scheduler", which contradicts both its betas and its rate; we
read it as a slip. It gives no batch size.
"""

import os
import shutil
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F

from synthrepro.data import load_task
from synthrepro.evidence import Config, Context
from synthrepro.models.diffusion_unet import STEPS, diffusion_unet
from synthrepro.training import seeded, stream

BETAS: dict[str, Any] = {
    "num_train_timesteps": STEPS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
Objective = Literal["noise", "image"]
Sampler = Literal["ddpm", "ddim", "dpm-solver"]


class UNetSettings(Config):
    """Shape of the UNet but for its channels; see :func:`~synthrepro.models.diffusion_unet.diffusion_unet`."""

    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    head_channels: int
    groups: int


class PretrainSettings(Config):
    """How a UNet is pre-trained.

    Attributes:
        steps: iterations; 300,000 in the paper.
        batch: images an iteration; all processes together.
        lr, last_lr: where the rate starts and ends.
        ema: decay of the moving average; in its first steps it is lower, (1 + k) / (10 + k).
        checkpoints: iterations after which the moving average is kept besides the last.
        precision: "no" for float32 or "bf16" for autocast to bfloat16.
        compile: whether torch.compile goes over the UNet.
        processes: over how many the batch is split, one GPU each; 1 takes the current process.
    """

    steps: int
    batch: int
    lr: float
    last_lr: float
    ema: float
    checkpoints: tuple[int, ...]
    precision: Literal["no", "bf16"]
    compile: bool
    processes: int


def diffuse(images: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """Eq. 2: images (B, 1, H, W) in [-1, 1] brought to steps (B,) by standard normal noise of their shape."""
    return DDPMScheduler(**BETAS).add_noise(images, noise, steps)


def batch_of(images: Tensor, batch: int, seed: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What iteration k looks at: images in [-1, 1], half of them flipped, their noise and their steps.

    All of it is drawn for the whole batch from the seed and k: a killed run, or one on several GPUs, draws the same.
    """
    draws = stream(seed, f"pre-training {k}")
    rows = torch.randint(len(images), (batch,), generator=draws)
    flip = torch.rand(batch, generator=draws) < 0.5
    steps = torch.randint(STEPS, (batch,), generator=draws)
    noise = torch.randn(batch, *images.shape[1:], generator=draws)
    x = images[rows]
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    return 2 * x - 1, noise, steps


def loss_of(unet: UNet2DModel, x: Tensor, noise: Tensor, steps: Tensor, objective: Objective) -> Tensor:
    """Eq. 5; or, as a control, how well the same network gives back a clean image: a plain autoencoder."""
    if objective == "image":
        return F.mse_loss(unet(x, torch.zeros_like(steps)).sample.float(), x)
    return F.mse_loss(unet(diffuse(x, noise, steps), steps).sample.float(), noise)


def pretrain(
    unet: UNet2DModel,
    images: Tensor,
    config: PretrainSettings,
    objective: Objective,
    seed: int,
    context: Context,
    keep: Callable[[UNet2DModel, int], None],
) -> list[float]:
    """Train the UNet; `keep(unet, k)` is called with the moving average after each of the asked iterations.

    Resumes from the context's checkpoint, bit for bit on a CPU. Under several processes all call this together.

    Args:
        images: (N, 1, H, W) in [0, 1].

    Returns:
        The mean loss of each hundredth of the iterations.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training that an error ended
    accelerator = Accelerator(mixed_precision=config.precision, cpu=context.device.type == "cpu")
    device, share = accelerator.device, slice(accelerator.process_index, None, accelerator.num_processes)
    unet.train().to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    optimiser: torch.optim.Optimizer = torch.optim.Adam(unet.parameters(), lr=config.lr, fused=device.type == "cuda")
    average = EMAModel(unet.parameters(), decay=config.ema)
    average.to(device)
    losses: list[float] = []
    start = 0
    if saved := context.load("checkpoint"):
        unet.load_state_dict(saved["unet"])
        optimiser.load_state_dict(saved["optimiser"])
        average.load_state_dict(saved["average"])
        average.to(device)
        losses, start = saved["losses"], saved["step"]
    network, optimiser = accelerator.prepare(torch.compile(unet) if config.compile else unet, optimiser)
    every = max(1, config.steps // 100)
    running = torch.zeros((), device=device)
    for k in context.progress(range(start, config.steps), "pre-training"):
        for group in optimiser.param_groups:
            group["lr"] = config.lr + (config.last_lr - config.lr) * k / config.steps
        x, noise, steps = (part[share].to(device) for part in batch_of(images, config.batch, seed, k))
        with accelerator.autocast():
            loss = loss_of(network, x, noise, steps, objective)
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()
        average.step(unet.parameters())
        running += loss.detach()
        if (k + 1) % every == 0:
            losses.append(float(running) / every)
            running.zero_()
        if k + 1 in {*config.checkpoints, config.steps} and accelerator.is_main_process:
            average.store(unet.parameters())
            average.copy_to(unet.parameters())
            keep(unet, k + 1)
            average.restore(unet.parameters())
        if (k + 1) % every == 0 and context.checkpoint_due() and accelerator.is_main_process:
            state = {"unet": unet.state_dict(), "optimiser": optimiser.state_dict(), "average": average.state_dict()}
            context.save("checkpoint", state | {"losses": losses, "step": k + 1})
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)  # else the next training must have the same precision
    return losses


def train_ddpm(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `ddpm`: a pre-trained UNet, shared by all cells that start from it.

    Args:
        spec: task, options (of the task), channels, objective, seed, unet (:class:`UNetSettings`), config
            (:class:`PretrainSettings`), data (hash of the labelled samples). Only the split "unlabelled" is looked at.
        folder: Gets `step-<k>`, the moving average after k iterations as `save_pretrained` writes it, for each of the
            asked k, and `losses.pt`.
    """
    processes = PretrainSettings(**spec["config"]).processes
    if processes == 1:
        work(0, spec, context)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(process, (spec, context, processes, port), processes)
    for path in sorted(context.folder.glob("step-*")):
        shutil.copytree(path, folder / path.name)  # not moved: a process killed in between must find them again
    torch.save(context.load("losses"), folder / "losses.pt")


def process(rank: int, spec: dict[str, Any], context: Context, processes: int, port: int) -> None:
    """One of several processes: tells accelerate, through the environment, which."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    work(rank, spec, context)


def work(rank: int, spec: dict[str, Any], context: Context) -> None:
    """Pre-train as the spec says and leave `step-<k>` in the context's folder."""
    config = PretrainSettings(**spec["config"])
    images = load_task(spec["task"], **spec["options"]).splits["unlabelled"].images
    unet = unet_of((images.shape[-2], images.shape[-1]), spec["channels"], UNetSettings(**spec["unet"]), spec["seed"])

    def keep(unet: UNet2DModel, k: int) -> None:
        partial = context.folder / f"partial-{k}"
        shutil.rmtree(partial, ignore_errors=True)
        unet.save_pretrained(partial, safe_serialization=True)
        shutil.rmtree(context.folder / f"step-{k}", ignore_errors=True)
        partial.rename(context.folder / f"step-{k}")

    losses = pretrain(unet, images, config, spec["objective"], spec["seed"], context, keep)
    if rank == 0:
        context.save("losses", losses)


def unet_of(size: tuple[int, int], channels: int, settings: UNetSettings, seed: int) -> UNet2DModel:
    """A UNet as a seed starts it."""
    shape = settings.model_dump()
    return seeded(lambda: diffusion_unet(max(size), channels, **shape), stream(seed, "weights"))


def scheduler_of(sampler: Sampler) -> Any:
    """diffusers' scheduler of this name, over the paper's steps."""
    if sampler == "ddpm":
        return DDPMScheduler(**BETAS)
    if sampler == "ddim":
        return DDIMScheduler(**BETAS)
    # thresholding clips what is predicted of the clean image to [-1, 1], as the other two do
    return DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++", thresholding=True)


@torch.no_grad()
def sample(
    unet: UNet2DModel,
    n: int,
    size: Sequence[int],
    sampler: Sampler,
    steps: int,
    seed: int,
    context: Context,
    batch: int = 64,
) -> Tensor:
    """Draw images from a pre-trained UNet: (n, 1, H, W) in [0, 1].

    Args:
        sampler: "ddpm" is Eqs. 3 and 4 with the fixed variance of the posterior; "ddim" (Song et al. 2021) and
            "dpm-solver" (Lu et al. 2022) take far fewer steps.
        steps: Evaluations of the network an image.
    """
    device = unet.device
    unet.eval()
    found = []
    for first in context.progress(range(0, n, batch), "sampling"):
        scheduler = scheduler_of(sampler)
        with warnings.catch_warnings(action="ignore"):  # diffusers 0.42 hands tensors to NumPy in an outdated way
            scheduler.set_timesteps(steps)
        draws = stream(seed, f"sample {first}")
        x = torch.randn(min(batch, n - first), 1, *size, generator=draws).to(device)
        # diffusers draws the noise of a step from a generator on the CPU as well, and moves it
        options = {"generator": draws} if sampler != "dpm-solver" else {}
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t.to(device)).sample, t, x, **options).prev_sample
        found.append((x.clamp(-1, 1) + 1).cpu() / 2)
    return torch.cat(found)
