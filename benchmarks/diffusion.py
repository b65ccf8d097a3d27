"""How fast is the diffusion UNet pre-trained, what does folding its step save, and how long do its samplers take?

    pip install -e . && python benchmarks/diffusion.py            # the paper's c = 128 and 256 x 256, for a GPU
    pip install -e . && python benchmarks/diffusion.py --small    # the `cpu` profile's: minutes on one core

Prints three Markdown tables, on the GPU where there is one (wall time), else on one CPU thread (CPU time, which leaves
out waiting for others). Shapes and images are those of a profile of the chapter, weights and images random.

Training: iterations of `pretrain` beside those of two loops that people start from, with the same batch:

* diffusers' example for unconditional generation, as its script writes it: AdamW, gradients clipped, a cosine rate, a
  moving average, a loss that is logged at every step. It is given our network, which is built of diffusers' blocks; its
  fp32 is what "plain loop" means here, its bf16 what its option `--mixed_precision` does.
* MONAI's `DiffusionModelUNet` with its `DiffusionInferer`, scheduler and Adam, as in MONAI's tutorial: no moving
  average, no logging. Multipliers, ResBlocks, attention and heads are ours; but it adds the step's embedding where ours
  scales and shifts, so that it has fewer parameters.

Every loop is a process of its own, so that its memory is its own, and they take turns within every round, so that a
busy machine slows all of them alike; a turn's first iteration is not counted. Memory is all that a loop takes: weights,
gradients, optimiser, moving average and activations. FLOPs are those of convolutions and matrix products, forward and
backward.

Sampling: `--checkpoint FOLDER --task NAME` also gives the FID that each sampler reaches, from as many images and with
the same features as experiment `generation`; FOLDER is one that `save_pretrained` wrote, of the profile's image size.
"""

import argparse
import gc
import importlib.metadata
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler as MonaiScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from synthrepro.evidence import Cell, Context, load_profile
from synthrepro.generation import frechet_distance
from synthrepro.methods.ddpm.arms import task_of
from synthrepro.methods.ddpm.experiments import extractor_for, task_of_unlabelled, train_extractor
from synthrepro.methods.ddpm.pretraining import BETAS, STEPS, PretrainSettings, UNetSettings, pretrain, sample, unet_of
from synthrepro.models.diffusion_unet import Segmenter, fold, load_unet

EXAMPLE, OURS, MONAI = "diffusers' example", "ours", "MONAI"
PLAIN = f"{EXAMPLE}, fp32"
ENDLESS = 10**6  # iterations a loop is told that it has; it is stopped before
CLASSES, HIDDEN = 14, 128  # of the paper's segmenter S
SAMPLERS = (("ddpm", 1000), ("ddim", 50), ("dpm-solver", 50))

# Dense bf16 with fp32 accumulation, FLOP/s, from NVIDIA's data sheets; the first name that fits. Others have no share.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Problem:
    """Square images of `size` pixels, and a UNet for them."""

    size: int
    channels: int
    batch: int
    unet: UNetSettings
    device: str

    def images(self) -> Tensor:
        """(32 batches, 1, H, W), uniform in [0, 1]."""
        shape = 32 * self.batch, 1, self.size, self.size
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))


# --- Networks and loops -----------------------------------------------------------------------------------------------


def our_unet(p: Problem) -> UNet2DModel:
    return unet_of((p.size, p.size), p.channels, p.unet, 0)


def monai_unet(p: Problem) -> DiffusionModelUNet:
    """MONAI's network of the shape that is nearest to ours; attention by torch's kernel, as in ours."""
    levels = len(p.unet.multipliers)
    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=[p.channels * m for m in p.unet.multipliers],
        num_res_blocks=p.unet.blocks,
        attention_levels=[p.size >> i in p.unet.attention for i in range(levels)],
        norm_num_groups=p.unet.groups,
        num_head_channels=[p.unet.head_channels] * levels,
        resblock_updown=True,
        use_flash_attention=True,
    )


Loop = Callable[[Problem, Tensor, Any], None]  # a training on images that asks the last, a context, for iterations


def ours(precision: str, *, compiled: bool = False, contiguous: bool = False) -> Loop:
    """`pretrain`: on CUDA its weights are in channels-last and its Adam is fused."""
    config = {"steps": ENDLESS, "lr": 2e-4, "last_lr": 2e-5, "ema": 0.9999, "checkpoints": (), "processes": 1}

    def loop(p: Problem, images: Tensor, context: Any) -> None:
        unet = our_unet(p)
        if contiguous:  # what channels-last alone brings: the request for it is ignored
            unet.to = lambda device, **_: UNet2DModel.to(unet, device)
        settings = PretrainSettings(**config, batch=p.batch, precision=precision, compile=compiled)
        pretrain(unet, images, settings, "noise", 0, context, lambda *_: None)

    return loop


@dataclass(frozen=True)
class Prepared(Dataset):
    """Images as the peers look at them: half of them flipped, in [-1, 1]."""

    images: Tensor
    prepare: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.prepare(self.images[i])


def batches(p: Problem, images: Tensor) -> DataLoader:
    prepare = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.Normalize([0.5], [0.5])])
    return DataLoader(Prepared(images, prepare), p.batch, shuffle=True)


def epochs(loader: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader


def example(precision: str) -> Loop:
    """diffusers' `examples/unconditional_image_generation/train_unconditional.py`, with its default values."""

    def loop(p: Problem, images: Tensor, context: Any) -> None:
        accelerator = Accelerator(mixed_precision=precision, cpu=p.device == "cpu")
        model = our_unet(p).train()
        average = EMAModel(
            model.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=3 / 4,
            model_cls=UNet2DModel,
            model_config=model.config,
        )
        scheduler = DDPMScheduler(**BETAS)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        rates = get_scheduler("cosine", optimizer=optimiser, num_warmup_steps=500, num_training_steps=ENDLESS)
        model, optimiser, loader, rates = accelerator.prepare(model, optimiser, batches(p, images), rates)
        average.to(accelerator.device)
        for k, clean in zip(context.progress(range(ENDLESS), "training"), epochs(loader), strict=False):
            noise = torch.randn(clean.shape, device=clean.device)
            steps = torch.randint(0, STEPS, (len(clean),), device=clean.device).long()
            noisy = scheduler.add_noise(clean, noise, steps)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy, steps).sample.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                rates.step()
                optimiser.zero_grad()
            if accelerator.sync_gradients:
                average.step(model.parameters())
            accelerator.log({"loss": loss.detach().item(), "lr": rates.get_last_lr()[0]}, step=k)
        accelerator.end_training()

    return loop


def monai(precision: str) -> Loop:
    """MONAI's tutorial `2d_ddpm`, without its validation; its mixed precision is fp16, which is bf16 here."""

    def loop(p: Problem, images: Tensor, context: Any) -> None:
        model = monai_unet(p).to(p.device).train()
        inferer = DiffusionInferer(MonaiScheduler(num_train_timesteps=STEPS))
        optimiser = torch.optim.Adam(model.parameters(), lr=2.5e-5)
        loader = epochs(batches(p, images))
        mixed = torch.autocast(p.device, torch.bfloat16) if precision == "bf16" else nullcontext()
        for _, clean in zip(context.progress(range(ENDLESS), "training"), loader, strict=False):
            clean = clean.to(p.device)
            optimiser.zero_grad(set_to_none=True)
            with mixed:
                noise = torch.randn_like(clean)
                steps = torch.randint(0, STEPS, (len(clean),), device=p.device).long()
                predicted = inferer(inputs=clean, diffusion_model=model, noise=noise, timesteps=steps)
                loss = F.mse_loss(predicted.float(), noise.float())
            loss.backward()
            optimiser.step()

    return loop


LOOPS: dict[str, Loop] = {
    PLAIN: example("no"),
    f"{EXAMPLE}, bf16": example("bf16"),
    f"{OURS}, fp32": ours("no"),
    f"{OURS}, bf16, contiguous": ours("bf16", contiguous=True),
    f"{OURS}, bf16": ours("bf16"),
    f"{OURS}, bf16, compiled": ours("bf16", compiled=True),
    f"{MONAI}, fp32": monai("no"),
    f"{MONAI}, bf16": monai("bf16"),
}
CUDA_ONLY = (f"{OURS}, bf16, contiguous", f"{OURS}, bf16, compiled")  # elsewhere ours is contiguous; compiling is slow


# --- Measures ---------------------------------------------------------------------------------------------------------


def clock(device: str) -> float:
    """Seconds, all work that was asked for done: of the wall with a GPU, else of this process."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> int:
    """Most bytes that this process has had: in tensors on the GPU, else in RAM."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had in RAM
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Turns:
    """In place of a loop's `Context`: gives as many iterations as the pipe asks for, and tells it the seconds of one.

    The first iteration of a turn is not counted: it fills the caches that other loops' turns have emptied.
    """

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, torch.device(device)

    def progress(self, items: Iterable[int], desc: str) -> Iterator[int]:
        items = iter(items)
        while iterations := self.pipe.recv():
            yield next(items)
            start = clock(self.device.type)
            yield from itertools.islice(items, iterations)
            self.pipe.send((clock(self.device.type) - start) / iterations)
            gc.collect()
            torch.cuda.empty_cache()  # the memory is the next one's; without a GPU it does nothing

    def load(self, name: str) -> None:
        return None

    def checkpoint_due(self) -> bool:
        return False


def work(name: str, p: Problem, pipe: Connection) -> None:
    """One loop, in a process of its own: a turn at a time, and at last its peak memory beyond what there was before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    images = p.images()
    before = peak_memory(p.device)
    LOOPS[name](p, images, Turns(pipe, p.device))
    pipe.send(peak_memory(p.device) - before)


@dataclass(frozen=True)
class Measured:
    """Seconds of an iteration, one value a round, and the peak of memory in bytes."""

    seconds: list[float]
    memory: int


def measure(names: Sequence[str], p: Problem, rounds: int, iterations: int) -> dict[str, Measured]:
    """Let the loops take turns, after a round that is not counted."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in names:  # all at once, for each takes its time to import
        pipes[name], theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(name, p, theirs))
        process.daemon = True  # goes when this one does
        process.start()
        theirs.close()  # so that a process that dies ends the pipe
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.monotonic()
    for k in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(iterations)
            times[name].append(pipe.recv())
        if k == 0:
            minutes = (time.monotonic() - started) * rounds / 60
            print(f"Training takes {minutes:.0f} more minutes at most.", file=sys.stderr)
    found = {}
    for name, pipe in pipes.items():
        pipe.send(0)
        found[name] = Measured(times[name][1:], pipe.recv())
    return found


def flops(call: Callable[[], Any]) -> int:
    """Of convolutions and matrix products, those of the attention included on every device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def training_flops(build: Callable[[Problem], nn.Module], p: Problem) -> tuple[int, int]:
    """Parameters, and FLOPs an image of a forward and a backward pass; nothing is computed."""
    network = build(p).to("meta")
    image = torch.empty(1, 1, p.size, p.size, device="meta")
    step = torch.zeros(1, dtype=torch.int64, device="meta")

    def call() -> None:
        found = network(image, step)
        (found if isinstance(found, Tensor) else found.sample).sum().backward()

    return parameters(network), flops(call)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def bf16_peak() -> float | None:
    """FLOP/s of this GPU, where we know them."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


# --- Tables -----------------------------------------------------------------------------------------------------------


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown whose first column is words and whose others are numbers."""
    print(f"**{title}**\n")
    print("| " + " | ".join(head) + " |")
    print("|---|" + "--:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def training(p: Problem, rounds: int, iterations: int) -> None:
    names = [name for name in LOOPS if p.device == "cuda" or name not in CUDA_ONLY]
    counted = {kind: training_flops(build, p) for kind, build in ((OURS, our_unet), (MONAI, monai_unet))}
    found, limit, rows = measure(names, p, rounds, iterations), bf16_peak(), []
    speeds = {name: p.batch / statistics.median(m.seconds) for name, m in found.items()}
    for name in names:
        count, work = counted[MONAI if name.startswith(MONAI) else OURS]
        row = [name, f"{count / 1e6:.2f}", f"{work / 1e9:.4g}", f"{speeds[name]:.3g}"]
        row += [f"{speeds[name] / speeds[PLAIN]:.2f}", f"{found[name].memory / 1e6:.0f}"]
        share = f"{speeds[name] * work / limit:.0%}" if limit else "–"
        rows.append([*row, share])
    title = f"Training: c = {p.channels}, {p.size} x {p.size}, batch of {p.batch}, medians of {rounds} rounds"
    head = ["loop", "parameters, M", "GFLOPs/image", "images/s", "times the plain loop", "peak memory, MB"]
    table(title, [*head, "share of bf16 peak"], rows)


@torch.no_grad()
def folding(p: Problem, rounds: int) -> None:
    """The segmenter's forward pass with the step's scale and shift, and with them in the norms."""
    segmenter = Segmenter(our_unet(p), CLASSES, HIDDEN).to(p.device).eval()
    networks = {"before": segmenter, "after": fold(segmenter)}
    images = p.images()[: p.batch].to(p.device)
    outputs = {name: network(images) for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, network in networks.items():
            start = clock(p.device)
            network(images)
            seconds[name].append((clock(p.device) - start) / p.batch)
    rows = []
    for name, network in networks.items():
        work = flops(lambda network=network: network(images[:1]))
        rows.append([parameters(network) / 1e6, work / 1e9, statistics.median(seconds[name]) * 1e3])
    saved = [f"{1 - after / before:.2%}" for before, after in zip(*rows, strict=True)]
    shown = [[name, *(f"{value:.6g}" for value in row)] for name, row in zip(networks, rows, strict=True)]
    head = ["folding", "parameters, M", "GFLOPs/image", "ms/image"]
    table(f"One forward pass of the segmenter, batch of {p.batch}", head, [*shown, ["saved", *saved]])
    difference, largest = ((outputs["before"] - after).abs().max() for after in (outputs["after"], 0))
    print(f"Outputs differ by {float(difference):.1e} at most, where the largest is {float(largest):.2g}.\n")


@dataclass(frozen=True)
class Judge:
    """What gives samples an FID: how many are wanted, and the score of such a number of images (N, 1, H, W)."""

    images: int
    fid: Callable[[Tensor], float]


def judge_of(name: str, config: Any, context: Context) -> Judge:
    """As experiment `generation` compares images; its extractor is trained in the context's folder where it needs one.

    Args:
        name: Of the task.
        config: The experiment's.
    """
    task = context.data(task_of(name, config))
    real = task_of_unlabelled(name, config).splits["unlabelled"].images
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: config.images]
    extract = extractor_for(Cell("any", name, 0), len(task.classes), config, context)
    pooled = extract(real[rows])[0]
    return Judge(len(rows), lambda images: frechet_distance(pooled, extract(images)[0]))


def sampling(unet: UNet2DModel, p: Problem, context: Context, judge: Judge | None) -> None:
    """Seconds an image of every sampler, and the FID of as many images as there are real ones."""
    n = judge.images if judge else p.batch
    unet, rows = unet.to(p.device), []
    sample(unet, p.batch, (p.size, p.size), "ddim", 2, 0, context)  # what is loaded once, at first use
    for name, evaluations in SAMPLERS:
        start = clock(p.device)
        images = sample(unet, n, (p.size, p.size), name, evaluations, 0, context)  # type: ignore[arg-type]
        seconds = (clock(p.device) - start) / n
        fid = f"{judge.fid(images):.4g}" if judge else "–"
        rows.append([name, str(evaluations), f"{seconds:.3g}", fid])
    words = "with a checkpoint" if judge else "random weights; the records of experiment `generation` have the FID"
    title = f"Sampling {n} images of {p.size} x {p.size} in fp32, {words}"
    table(title, ["sampler", "evaluations", "s/image", "FID"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profile", choices=["cpu", "gpu", "paper"], default="paper", help="shape, and data for the FID"
    )
    parser.add_argument("--small", dest="profile", action="store_const", const="cpu", help="the same as --profile cpu")
    parser.add_argument("--size", type=int, help="of the images; the profile's if not given")
    parser.add_argument("--channels", type=int, help="the least that the profile has if not given")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--checkpoint", type=Path, help="folder that save_pretrained wrote: also gives the FID")
    parser.add_argument("--task", default="abdomen", help="whose unlabelled images the checkpoint was trained on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    config: Any = load_profile("ddpm", options.profile)["generation"]
    if options.checkpoint and options.size not in (None, config.size[0]):
        parser.error(f"images of {config.size[0]} pixels are compared in this profile: leave --size out.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, channels = options.size or config.size[0], options.channels or config.channels[0]
    p = Problem(size, channels, options.batch, config.unet, device)
    fp32 = "fp32" if device == "cpu" else f"fp32 with TF32 {'on' if torch.backends.cudnn.allow_tf32 else 'off'}"
    place = torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"
    peers = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "monai"))
    print(f"{place}, {peers}, {fp32} in convolutions\n", flush=True)
    training(p, options.repeats, iterations=5 if device == "cuda" else 1)
    folding(p, options.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(Path(scratch), {"extractor": train_extractor})
        unet, judge = our_unet(p), None
        if options.checkpoint:
            unet, judge = load_unet(options.checkpoint, unet), judge_of(options.task, config, context)
        sampling(unet, p, context, judge)


if __name__ == "__main__":
    main()
