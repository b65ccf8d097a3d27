"""How fast are synthetic images made? Ours, cornucopia and TorchIO on the same stages, one CPU thread, one run.

The last table is SynthFM's images at SAM's size, with targets and prompts; scikit-image's random shapes are a peer of
the simplest kind. Where there is a GPU, it has rows of its own, in time on the wall.

    pip install -e '.[benchmarks]' && python benchmarks/synthesis.py

Prints one Markdown table a comparison: CPU milliseconds an image, median and minimum over the rounds. Methods take
turns within every round, so that a busy machine slows all of them alike; CPU time leaves out waiting for others.
Peers that are not installed are left out. TorchIO 1 and 2 exclude each other: install either.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from synthrepro.synthesis import LabelsToImage
from synthrepro.synthesis.prompts import PointPrompts
from synthrepro.synthesis.shapes_to_image import ShapesToImage

SIZE, CLASSES, BATCH = 256, 8, 16
LEARN2SYNTH = LabelsToImage.learn2synth(CLASSES)
COMMON = replace(LEARN2SYNTH, texture_fwhm=(0.0, 0.0), bias=(0.0, 0.5), noise=(0.0, 0.1))

GEOMETRY = "affine, elastic"
Method = tuple[str, str, int, Callable[[], Any]]  # name, stages, images a call, the call


def anatomy() -> torch.Tensor:
    """A head-like label map (SIZE, SIZE): seven nested, slightly lobed ellipses on background."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, SIZE)], indexing="ij")
    radius = (y**2 + 1.3 * x**2).sqrt() * (1 + 0.04 * torch.cos(6 * torch.atan2(y, x)))
    return (CLASSES * (1 - radius)).clamp(0, CLASSES - 1).long()


@functools.cache
def peer(name: str) -> Any:
    """The library, or None and one sentence where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed, so it is left out.", file=sys.stderr)
        return None


def ours(settings: LabelsToImage, stages: str) -> list[Method]:
    labels = anatomy().expand(BATCH, -1, -1).contiguous()
    generator = torch.Generator().manual_seed(0)
    return [
        ("synthrepro, batch of 16", stages, BATCH, lambda: settings(labels, generator)),
        ("synthrepro, one at a time", stages, 1, lambda: settings(labels[:1], generator)),
    ]


def cornucopia(stages: str, **options: Any) -> list[Method]:
    cc = peer("cornucopia")
    if cc is None:
        return []
    labels = anatomy()[None]
    transform = cc.SynthFromLabelTransform(order=1, resolution=False, returns=["image", "label"], **options)
    batch = cc.batch(transform)
    stacked = labels.expand(BATCH, -1, -1, -1).contiguous()
    return [
        ("cornucopia, one at a time", stages, 1, lambda: transform(labels)),
        ("cornucopia, batch of 16", stages, BATCH, lambda: batch(stacked)),
    ]


def torchio(stages: str) -> list[Method]:
    tio = peer("torchio")
    if tio is None:
        return []
    labels = anatomy()[None, ..., None]
    fov = SIZE / 10  # translation; a twentieth of the field of view is the largest displacement
    if tio.__version__.startswith("1."):
        import SimpleITK as sitk

        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        old = tio.Compose(
            [
                tio.RandomAffine((0.85, 1.15, 0.85, 1.15, 1, 1), (0, 0, 0, 0, -15, 15), (-fov, fov, -fov, fov, 0, 0)),
                tio.RandomElasticDeformation(7, (SIZE / 20, SIZE / 20, 0)),
                tio.RandomLabelsToImage("labels", default_mean=(0, 1), default_std=(0, 0.05), ignore_background=True),
                tio.RandomBiasField(),
                tio.RandomGamma((-0.6, 0.6)),
                tio.RandomBlur((0, 1.27, 0, 1.27, 0, 0)),
                tio.RandomNoise(std=(0, 0.1)),
                tio.RescaleIntensity((0, 1), (1, 99)),
            ]
        )
        subject = tio.Subject(labels=tio.LabelMap(tensor=labels))
        return [(f"TorchIO {tio.__version__}, one at a time", stages, 1, lambda: old(subject))]
    from torchio.data.batch import SubjectsBatch

    new = tio.Compose(
        [
            tio.Spatial(
                degrees=(0, 0, 0, 0, -15, 15),
                scales=(0.85, 1.15, 0.85, 1.15, 1, 1),
                translation=(-fov, fov, -fov, fov, 0, 0),
                num_control_points=(7, 7, 5),
                max_displacement=(0, SIZE / 20, 0, SIZE / 20, 0, 0),
            ),
            tio.LabelsToImage(default_mean=(0, 1), default_std=(0, 0.05), ignore_background=True),
            tio.BiasField(std=(0, 0.5)),
            tio.Gamma(log_gamma=(-0.6, 0.6)),
            tio.Blur(std=(0, 1.27, 0, 1.27, 0, 0)),
            tio.Noise(std=(0, 0.1)),
            tio.Normalize(out_min=0, out_max=1, percentile_low=1, percentile_high=99),
        ]
    )
    subject = tio.Subject(labels=tio.LabelMap(labels.clone()))
    batch = SubjectsBatch.from_subjects([tio.Subject(labels=tio.LabelMap(labels.clone())) for _ in range(BATCH)])
    return [
        (f"TorchIO {tio.__version__}, one at a time", stages, 1, lambda: new(subject)),
        (f"TorchIO {tio.__version__}, batch of 16", stages, BATCH, lambda: new(batch)),
    ]


def synthfm() -> list[Method]:
    """Images of 1024 x 1024, each with the mask of an object and points in and around it."""
    points = PointPrompts((1, 3), (0, 2))
    generator = torch.Generator().manual_seed(0)

    def make(share: float, device: str) -> None:
        settings = ShapesToImage(boundary=share)
        _, masks = settings.apply(settings.draw(4, generator), (1024, 1024), device)
        points.apply(masks, points.draw(4, generator))
        if device == "cuda":
            torch.cuda.synchronize()

    methods: list[Method] = []
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        for share, modules in ((0.5, "both modules"), (0.0, "shape-aware"), (1.0, "boundary-aware")):
            name = f"synthrepro, {modules}, batch of 4, {device}"
            methods.append((name, "geometry, look, noise, target, points", 4, functools.partial(make, share, device)))
    skimage = peer("skimage")
    if skimage is not None:
        from skimage.draw import random_shapes
        from skimage.util import random_noise

        seeds = iter(range(10**6))

        def drawn() -> None:
            seed = next(seeds)
            image, _ = random_shapes((1024, 1024), 9, 3, 41, 307, channel_axis=None, allow_overlap=True, rng=seed)
            random_noise(image, "gaussian", rng=seed)

        methods.append(("scikit-image, random_shapes and random_noise", "geometry, noise", 1, drawn))
    return methods


def comparisons() -> dict[str, list[Method]]:
    released = f"{GEOMETRY}, mixture smoothed within classes, gamma, blur, quantiles"
    common = f"{GEOMETRY}, mixture, bias, gamma, blur, noise, quantiles"
    both = f"{GEOMETRY}, mixture smoothed within classes, bias, gamma, blur, noise, quantiles"
    return {
        "Learn2Synth's setting": [
            *ours(LEARN2SYNTH, released),
            *cornucopia(released, snr=False, bias=False),
        ],
        "All stages but low resolution": [
            *ours(replace(LEARN2SYNTH, bias=(0.0, 0.5), noise=(0.0, 0.1)), both),
            *cornucopia(both + " (noise scaled by a g-factor map)"),
        ],
        "Stages that all libraries have": [
            *ours(COMMON, common),
            *cornucopia(common, gmm_fwhm=False, gfactor=False),
            *torchio(common),
        ],
        "SynthFM's images, 1024 x 1024": synthfm(),
    }


def measure(methods: list[Method], rounds: int) -> list[list[float]]:
    """Milliseconds an image of every method, one value a round, after one round that is not counted."""
    times: list[list[float]] = [[] for _ in methods]
    for _ in range(rounds + 1):
        for kept, (name, _, images, call) in zip(times, methods, strict=True):
            calls = max(BATCH // images // 2, 1)  # single images: eight a round
            clock = time.perf_counter if name.endswith("cuda") else time.process_time
            start = clock()
            for _ in range(calls):
                call()
            kept.append((clock() - start) / (calls * images) * 1e3)
    return [kept[1:] for kept in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the milliseconds of every round to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the peers draw from the global state
    warnings.simplefilter("ignore")
    record: dict[str, dict[str, list[float]]] = {}
    print(f"{SIZE} x {SIZE}, {CLASSES} labels, one thread, torch {torch.__version__}, {options.rounds} rounds\n")
    for title, methods in comparisons().items():
        times = measure(methods, options.rounds)
        record[title] = {name: kept for (name, *_), kept in zip(methods, times, strict=True)}
        print(f"**{title}**\n")
        print("| method | stages | ms/image, median (min) | images/s | times ours |\n|---|---|--:|--:|--:|")
        best = statistics.median(times[0])
        for (name, stages, *_), kept in zip(methods, times, strict=True):
            median = statistics.median(kept)
            print(f"| {name} | {stages} | {median:.2f} ({min(kept):.2f}) | {1e3 / median:.0f} | {median / best:.1f} |")
        print()
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
