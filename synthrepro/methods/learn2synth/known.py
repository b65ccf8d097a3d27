"""Experiments on targets whose noise and field strength are known, as the released scripts make them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import nnls
from torch import Tensor, nn

from synthrepro.data import Task, load_task
from synthrepro.evidence import Cell, Config, Context, Result
from synthrepro.methods.learn2synth.algorithm import Augmenter, Pairs, Settings, fit, learn2synth
from synthrepro.metrics import cases, dice
from synthrepro.models import unet
from synthrepro.synthesis import GaussianNoise, IntensityNonUniformity, LabelsToImage, Parametric
from synthrepro.training import LOSSES, seeded, segment, stream


class Anatomy(Config):
    """Options of the task `brain-mni`."""

    size: tuple[int, int]  # pixels
    spacing: float  # mm
    subjects: tuple[int, int, int]  # individuals for training, validation and test
    slices: int  # a subject


def generator(task: Task, anatomy: Anatomy) -> LabelsToImage:
    """Learn2Synth's generator, its blur and textures as wide in mm as the authors'."""
    return LabelsToImage.learn2synth(len(task.classes), spacing=anatomy.spacing)


def noise_level(preset: str) -> tuple[float, float]:
    """Range of the noise of a preset: ``"0.05"`` is (0.05, 0.05), ``"0.025-0.2"`` is (0.025, 0.2)."""
    low, _, high = preset.partition("-")
    return float(low), float(high or low)


def exponent_values(preset: str) -> tuple[float, ...]:
    """Exponents of a preset of the intensity non-uniformity: ``".5/.5/.5"`` is (0.5, 0.5, 0.5), low to high."""
    return tuple(float(value) for value in preset.split("/"))


def degrader(noise: str, exponents: str | None = None) -> Augmenter:
    """The augmenter, with its parameters set, that turns clean synthetic images into targets.

    The field multiplies an image already normalised to [0, 1]; noise is added last; nothing is clipped or normalised
    afterwards. So sigma is in units of the clean image's range, whatever the field does.
    """
    low, high = noise_level(noise)
    added = GaussianNoise("fixed", low) if low == high else GaussianNoise("range", (low, high))
    if exponents is None:
        return added
    return Parametric(IntensityNonUniformity(exponents=exponent_values(exponents)), added)


class Halves:
    """The training individuals of a task in two halves: one gives "real" images, the other label maps for synthesis.

    A seed redraws who is in which half, and everything drawn from them.
    """

    def __init__(self, task: Task, synthesis: LabelsToImage, batch: int, seed: int, device: torch.device) -> None:
        train = task.splits["train"]
        people = train.individuals
        order = torch.randperm(len(people), generator=stream(seed, "individuals")).tolist()
        middle = len(people) // 2
        self.real = train.take([people[i] for i in order[:middle]])
        self.synthesis = synthesis
        self.labels = train.take([people[i] for i in order[middle:]]).labels.to(device)
        self.real_images, self.real_labels = self.real.images.to(device), self.real.labels.to(device)
        self.batch, self.seed = batch, seed

    def _pick(self, maps: Tensor, draws: torch.Generator) -> Tensor:
        return torch.randperm(len(maps), generator=draws)[: self.batch].to(maps.device)

    def synthetic(self, step: int) -> tuple[Tensor, Tensor]:
        """Clean synthetic images, in [0, 1], with their deformed label maps."""
        draws = stream(self.seed, f"synthesis {step}")
        return self.synthesis(self.labels[self._pick(self.labels, draws)], draws)

    def target(self, degrade: Augmenter) -> Pairs:
        """ "Real" pairs that are synthetic images of the other half's label maps, degraded in a known way."""

        def pairs(step: int) -> tuple[Tensor, Tensor]:
            draws = stream(self.seed, f"target {step}")
            x, y = self.synthesis(self.real_labels[self._pick(self.real_labels, draws)], draws)
            with torch.no_grad():
                return degrade(x, degrade.draw(x, draws)), y

        return pairs

    def measured(self, step: int) -> tuple[Tensor, Tensor]:
        """Real images as measured, with their label maps."""
        rows = self._pick(self.real_labels, stream(self.seed, f"real {step}"))
        return self.real_images[rows], self.real_labels[rows]


def target_set(task: Task, synthesis: LabelsToImage, degrade: Augmenter, device: torch.device) -> tuple[Tensor, Tensor]:
    """One degraded synthetic image of each test label map: the same for every arm and seed."""
    draws = stream(0, "test")
    with torch.no_grad():
        x, y = synthesis(task.splits["test"].labels.to(device), draws)
        return degrade(x, degrade.draw(x, draws)), y


def network_for(task: Task, settings: Settings, seed: int, device: torch.device) -> nn.Module:
    """The segmentation network, its first weights drawn from the seed."""
    classes = len(task.classes)
    build = lambda: unet(task.channels, classes, settings.features, norm=settings.norm)  # noqa: E731
    return seeded(build, stream(seed, "weights")).to(device)


def trivial_dice(task: Task, split: str) -> float:
    """Mean Dice of answering one class everywhere, the one that scores best."""
    labels, k = task.splits[split].labels, len(task.classes)
    constant = (dice(torch.full_like(labels, i), labels, k).nan_to_num(0.0).mean() for i in range(1, k))
    return float(max(constant))


# ---------------------------------------------------------------------------------------------------------------------
# Experiment: noise_recovery
# ---------------------------------------------------------------------------------------------------------------------


class KnownTargets(Settings):
    """How a network is trained against targets whose noise and field are known."""

    anatomy: Anatomy
    bias_noise: str  # noise preset of the cells that learn exponents


class NoiseRecovery(KnownTargets):
    """Configuration of `noise_recovery`."""

    noises: tuple[str, ...] = Field(exclude=True)
    exponents: tuple[str, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


STARTS = {"below": 0.1, "above": 0.9}  # first value of all three exponents; the released start is 0.5 to 0.73


def noise_recovery_cells(config: NoiseRecovery) -> list[Cell]:
    """Noise first, then the range, then exponents; all seeds of a setting before the next."""
    seeds = range(config.seeds)
    found = [Cell("fixed", "brain-mni", seed, {"noise": noise}) for noise in config.noises for seed in seeds]
    ranges = [noise for noise in config.noises if "-" in noise]
    found += [Cell("range", "brain-mni", seed, {"noise": noise}) for noise in ranges for seed in seeds]
    for exponents in config.exponents:
        for start in STARTS:
            setting = {"exponents": exponents, "start": start}
            found += [Cell("bias", "brain-mni", seed, setting) for seed in seeds]
    return found


def train_on_known(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `on_known`: a network trained against targets of known noise (and field), and the augmenter's trail.

    Args:
        spec: method (``fixed``, ``range``, ``bias``, or ``synthseg``: no augmenter at all), task, seed, setting
            (``noise``; or ``exponents`` and ``start``), config (:class:`KnownTargets`).
        folder: Gets ``network.pt`` and ``trail.json``.
    """
    config = KnownTargets(**spec["config"])
    task = load_task(spec["task"], **config.anatomy.model_dump())
    device, seed, setting = context.device, spec["seed"], spec["setting"]
    network = network_for(task, config, seed, device)
    halves = Halves(task, generator(task, config.anatomy), config.batch, seed, device)
    trail: list[dict[str, float]] = []
    if spec["method"] == "synthseg":
        fit(network, halves.synthetic, config, seed, context)
    else:
        start = stream(seed, "augmenter")
        noise_model = GaussianNoise("range" if spec["method"] == "range" else "fixed", generator=start)
        augmenter: Augmenter = noise_model
        if spec["method"] == "bias":
            first = STARTS[setting["start"]]
            augmenter = Parametric(IntensityNonUniformity(exponents=(first, first, first)), noise_model)
        degrade = degrader(setting.get("noise", config.bias_noise), setting.get("exponents")).to(device)
        targets = halves.target(degrade)
        trail = learn2synth(network, augmenter.to(device), halves.synthetic, targets, config, seed, context)
    torch.save(network.state_dict(), folder / "network.pt")
    (folder / "trail.json").write_text(json.dumps(trail))


def on_known(cell: Cell, config: KnownTargets, context: Context) -> tuple[nn.Module, list[dict[str, float]]]:
    """The network and the trail of `train_on_known`, trained now if they are not there yet."""
    shared = config.model_dump(mode="json", include=set(KnownTargets.model_fields))
    spec = {"method": cell.method, "task": cell.task, "seed": cell.seed, "setting": dict(cell.setting)}
    folder = context.artefact("on_known", spec | {"config": shared})
    network = network_for(load_task(cell.task, **config.anatomy.model_dump()), config, cell.seed, context.device)
    network.load_state_dict(torch.load(folder / "network.pt", map_location=context.device, weights_only=True))
    return network, json.loads((folder / "trail.json").read_text())


def noise_recovery_run(cell: Cell, config: NoiseRecovery, context: Context) -> Result:
    """Learn an augmenter against targets of known noise (and field), and see whether it finds them.

    What is learned is the mean of the last fifth of the iterates, as the authors average five checkpoints.
    """
    task = context.data(load_task(cell.task, **config.anatomy.model_dump()))
    network, trail = on_known(cell, config, context)
    tail = trail[-max(1, len(trail) // 5) :]
    learned = {name: float(np.mean([point[name] for point in tail])) for name in tail[0]}
    noise = str(cell.setting.get("noise", config.bias_noise))
    low, high = noise_level(noise)
    metrics: dict[str, Any] = {"preset": low if low == high else (low + high) / 2}
    if cell.method == "range":
        bounds = sorted(abs(learned[name]) for name in ("minimum", "maximum"))
        metrics |= {"sigma_minimum": bounds[0], "sigma_maximum": bounds[1], "sigma": sum(bounds) / 2}
    else:
        metrics |= {"sigma": abs(learned["sigma"])}
    metrics["sigma_error"] = metrics["sigma"] - metrics["preset"]
    if cell.method == "bias":
        presets = exponent_values(str(cell.setting["exponents"]))
        names = ("low", "mid", "high")
        metrics |= {f"exponent_{name}": learned[name] for name in names}
        metrics |= {f"preset_{name}": value for name, value in zip(names, presets, strict=True)}
        errors = [learned[name] - value for name, value in zip(names, presets, strict=True)]
        metrics |= {f"error_{name}": error for name, error in zip(names, errors, strict=True)}
        metrics["exponent_error"] = float(np.mean(np.abs(errors)))
    every = max(1, len(trail) // 50)
    metrics |= {f"trail_{name}": [round(point[name], 5) for point in trail[::every]] for name in trail[0]}

    degrade = degrader(noise, cell.setting.get("exponents")).to(context.device)  # type: ignore[arg-type]
    x, y = target_set(task, generator(task, config.anatomy), degrade, context.device)
    subjects = task.splits["test"].subjects
    found = cases(segment(network, x).cpu(), y.cpu(), subjects, "test", task.classes, config.anatomy.spacing)
    metrics["dice_real"] = float(np.nanmean([case["dice"] for case in found]))
    metrics["dice_trivial"] = trivial_dice(task, "test")
    return Result(metrics, found)


# ---------------------------------------------------------------------------------------------------------------------
# Experiment: noise_matrix
# ---------------------------------------------------------------------------------------------------------------------


class NoiseMatrix(KnownTargets):
    """Configuration of `noise_matrix`: the networks of `noise_recovery`, each tested at every noise."""

    test_noises: tuple[str, ...]
    noises: tuple[str, ...] = Field(exclude=True)  # trained at
    seeds: int = Field(exclude=True)


def noise_matrix_cells(config: NoiseMatrix) -> list[Cell]:
    """Learn2Synth at each noise, then SynthSeg with no noise at all."""
    seeds = range(config.seeds)
    found = [Cell("fixed", "brain-mni", seed, {"noise": noise}) for noise in config.noises for seed in seeds]
    return found + [Cell("synthseg", "brain-mni", seed) for seed in seeds]


def noise_matrix_run(cell: Cell, config: NoiseMatrix, context: Context) -> Result:
    """Dice of one trained network on the test label maps' images at every noise; a split a noise."""
    task = context.data(load_task(cell.task, **config.anatomy.model_dump()))
    network, _ = on_known(cell, config, context)
    metrics, found = {}, []
    for noise in config.test_noises:
        degrade = degrader(noise).to(context.device)
        x, y = target_set(task, generator(task, config.anatomy), degrade, context.device)
        maps, subjects = segment(network, x).cpu(), task.splits["test"].subjects
        rows = cases(maps, y.cpu(), subjects, f"noise-{noise}", task.classes, config.anatomy.spacing)
        metrics[f"dice noise-{noise}"] = float(np.nanmean([row["dice"] for row in rows]))
        found += rows
    return Result(metrics | {"dice_trivial": trivial_dice(task, "test")}, found)


# ---------------------------------------------------------------------------------------------------------------------
# Experiment: risk_profile
# ---------------------------------------------------------------------------------------------------------------------


class RiskProfile(Settings):
    """Configuration of `risk_profile`: networks trained at fixed augmentations, scored on targets of known ones."""

    anatomy: Anatomy
    bias_noise: str
    target_noises: tuple[str, ...]  # targets of the "noise" axis
    target_exponents: tuple[str, ...]  # targets of the "strength" and "split" axes
    noises: tuple[str, ...] = Field(exclude=True)  # trained at
    strengths: tuple[float, ...] = Field(exclude=True)  # trained at: all three exponents at once
    splits: tuple[str, ...] = Field(
        exclude=True
    )  # trained at: exponents of one total strength, apportioned differently
    seeds: int = Field(exclude=True)


def risk_profile_cells(config: RiskProfile) -> list[Cell]:
    """Noise, strength, split."""
    values = {
        "noise": config.noises,
        "strength": tuple(f"{s:g}/{s:g}/{s:g}" for s in config.strengths),
        "split": config.splits,
    }
    return [
        Cell("synthseg", "brain-mni", seed, {"axis": axis, "value": value})
        for axis, several in values.items()
        for value in several
        for seed in range(config.seeds)
    ]


def risk_profile_run(cell: Cell, config: RiskProfile, context: Context) -> Result:
    """Train without hypergradients at one fixed augmentation; its loss and Dice on every target of the axis."""
    task = context.data(load_task(cell.task, **config.anatomy.model_dump()))
    device = context.device
    axis, value = str(cell.setting["axis"]), str(cell.setting["value"])
    if axis == "noise":
        augmenter = degrader(value)
        targets = {noise: degrader(noise) for noise in config.target_noises}
    else:
        augmenter = degrader(config.bias_noise, value)
        targets = {exponents: degrader(config.bias_noise, exponents) for exponents in config.target_exponents}
    network = network_for(task, config, cell.seed, device)
    halves = Halves(task, generator(task, config.anatomy), config.batch, cell.seed, device)
    fit(network, halves.synthetic, config, cell.seed, context, augmenter.to(device))
    network.eval()
    metrics: dict[str, Any] = {}
    for name, degrade in targets.items():
        x, y = target_set(task, halves.synthesis, degrade.to(device), device)
        with torch.no_grad():
            metrics[f"risk {name}"] = float(LOSSES[config.loss](network(x), y))
        metrics[f"dice {name}"] = float(dice(segment(network, x), y, len(task.classes)).nanmean())
    return Result(metrics)


# ---------------------------------------------------------------------------------------------------------------------
# Experiment: exponents_from_images
# ---------------------------------------------------------------------------------------------------------------------


class ExponentsFromImages(Config):
    """Configuration of `exponents_from_images`."""

    anatomy: Anatomy
    bias_noise: str
    images: int  # targets that an estimate is made from
    exponents: tuple[str, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


def exponents_from_images_cells(config: ExponentsFromImages) -> list[Cell]:
    """One estimate a preset and seed."""
    return [
        Cell("moments", "brain-mni", seed, {"exponents": exponents})
        for exponents in config.exponents
        for seed in range(config.seeds)
    ]


def field_energies(images: Tensor, labels: Tensor, classes: int, grids: tuple[int, ...] = (2, 4, 8)) -> Tensor:
    """Variance of the log-intensity residual that each grid explains beyond the coarser ones.

    The residual is log intensity less its mean in each class of the image; the grids span bilinear functions of
    2 x 2, 4 x 4 and 8 x 8 knots.

    Args:
        images: (B, 1, H, W); pixels below 0.1 and the background are left out, their logarithm is all noise.
        labels: (B, H, W), int64.

    Returns:
        (B, len(grids)) energies, a mean over the pixels used.
    """
    b, _, h, w = images.shape
    bases = []
    for k in grids:
        knots = torch.eye(k * k, dtype=torch.float64).view(k * k, 1, k, k)
        tents = nn.functional.interpolate(knots, (h, w), mode="bilinear", align_corners=True)
        bases.append(tents.flatten(1).T)  # (H * W, k * k)
    energies = torch.zeros(b, len(grids), dtype=torch.float64)
    for i in range(b):
        used = ((labels[i] > 0) & (images[i, 0] > 0.1)).flatten()
        x = images[i, 0].flatten()[used].double().log()
        one_hot = nn.functional.one_hot(labels[i].flatten()[used], classes).double()  # (N, K)
        left = [_residual(one_hot, x), *(_residual(torch.cat([one_hot, basis[used]], dim=1), x) for basis in bases)]
        energies[i] = -torch.stack(left).diff()
    return energies


def _residual(design: Tensor, x: Tensor) -> Tensor:
    """Mean square that least squares leave; a trace of ridge, since columns may be empty or add up to others."""
    gram = design.T @ design + 1e-8 * torch.eye(design.shape[1], dtype=design.dtype)
    return (x - design @ torch.linalg.solve(gram, design.T @ x)).square().mean()


def exponents_from_images_run(cell: Cell, config: ExponentsFromImages, context: Context) -> Result:
    """Estimate the exponents from the targets themselves, by moments and without a segmentation network.

    The logarithm of the field is linear in the exponents, so the expected energies are
    ``energy(c) = energy(0) + sum_k c_k^2 slope_k``; offset and slopes come from simulated targets, the exponents from
    non-negative least squares.
    """
    task = context.data(load_task(cell.task, **config.anatomy.model_dump()))
    labels = task.splits["train"].labels
    classes = len(task.classes)

    def energies(exponents: str, purpose: str) -> np.ndarray:
        draws = stream(cell.seed, purpose)
        rows = torch.randint(len(labels), (config.images,), generator=draws)
        x, y = generator(task, config.anatomy)(labels[rows], draws)
        degrade = degrader(config.bias_noise, exponents)
        with torch.no_grad():
            x = degrade(x, degrade.draw(x, draws))
        return field_energies(x, y, classes).mean(0).numpy()

    names = ("low", "mid", "high")
    offset = energies("0/0/0", "calibration")
    units = [energies("/".join("1" if k == j else "0" for k in range(3)), "calibration") for j in range(3)]
    slopes = np.stack([unit - offset for unit in units], axis=1)  # (energy, exponent)
    squared, _ = nnls(slopes, energies(str(cell.setting["exponents"]), "target") - offset)
    presets = exponent_values(str(cell.setting["exponents"]))
    metrics = {f"exponent_{name}": float(np.sqrt(value)) for name, value in zip(names, squared, strict=True)}
    errors = [metrics[f"exponent_{name}"] - preset for name, preset in zip(names, presets, strict=True)]
    metrics |= {f"error_{name}": error for name, error in zip(names, errors, strict=True)}
    metrics["exponent_error"] = float(np.mean(np.abs(errors)))
    return Result(metrics)
