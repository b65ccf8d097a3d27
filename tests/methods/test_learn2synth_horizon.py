"""The experiments beside the comparison: several steps ahead, a known kind of augmentation, what a step costs."""

import math
from pathlib import Path

import pytest
import torch

from synthrepro.evidence import Cell, Context, load_profile
from synthrepro.methods import learn2synth as l2s
from synthrepro.methods.learn2synth.cost import cost_cells
from synthrepro.methods.learn2synth.horizon import horizon_cells
from synthrepro.methods.learn2synth.known_augmentation import known_augmentation_cells
from synthrepro.models import unet
from synthrepro.synthesis import GaussianNoise, LabelsToImage
from synthrepro.training import seeded, stream

ANATOMY = {"size": (32, 32), "spacing": 6.0, "subjects": (4, 1, 2), "slices": 2}
SETTINGS = {
    "steps": 8, "batch": 2, "features": (4, 8), "norm": "instance", "loss": "dice", "update": "adam",
    "lr": 2e-3, "hyper_lr": 2e-2, "every": 1, "alpha": 1.0, "estimator": "exact",
}  # fmt: skip
KNOWN = SETTINGS | {"anatomy": ANATOMY, "bias_noise": "0.05"}
SOLVERS = {"terms": 2, "neumann_lr": 1e-2, "damping": 100.0}
PROFILE = load_profile("learn2synth", "cpu")
METHODS = PROFILE["horizon"].methods
ARMS = {
    "size": (32, 32), "spacing": 6.0, "options": {"brain-mni": {"subjects": (4, 1, 2), "slices": 2}},
    "real": {"brain-mni": 2}, "nonparametric_lr": 1e-2, "candidates": 2, "levels": 2,
}  # fmt: skip


def config_of(**changes: object) -> l2s.Horizon:
    return l2s.Horizon(**(KNOWN | SOLVERS | {"noises": ("0.05",), "methods": METHODS, "seeds": 1} | changes))


@pytest.fixture(scope="module")
def pairs() -> tuple[l2s.Pairs, l2s.Pairs]:
    """Synthetic and real batches of 16 x 16 pixels."""
    coarse = torch.randint(4, (2, 1, 4, 4), generator=stream(0, "labels")).float()
    labels = torch.nn.functional.interpolate(coarse, (16, 16))[:, 0].long()
    synthesis = LabelsToImage.learn2synth(4)
    return (lambda i: synthesis(labels, stream(i, "synthetic"))), (lambda i: synthesis(labels, stream(i, "real")))


def train(
    method: str, pairs: tuple[l2s.Pairs, l2s.Pairs], folder: Path, **changes: object
) -> tuple[list[float], torch.Tensor]:
    """Sigma after each step of the augmenter, and the weights of the network at the end."""
    network, augmenter = seeded(lambda: unet(1, 4, (4, 8)), stream(0, "network")), GaussianNoise("fixed", 0.3)
    trail = l2s.horizon_train(method, network, augmenter, *pairs, config_of(**changes), 0, Context(folder))
    return [point["sigma"] for point in trail], torch.cat([p.detach().flatten() for p in network.parameters()])


def test_the_name_of_a_method_says_how_far_it_looks() -> None:
    assert l2s.window("unrolled-4") == (4, None)
    assert l2s.window("truncated-8-2") == (8, 2)
    assert all(l2s.window(method) == (1, None) for method in ("exact", "finite-difference", "neumann", "cg"))


@pytest.mark.parametrize("method", ["exakt", "exact-3", "unrolled", "unrolled-x", "truncated-8", "truncated-2-8"])
def test_a_method_that_does_not_exist_trains_nothing(
    method: str, pairs: tuple[l2s.Pairs, l2s.Pairs], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, LookupError)):
        train(method, pairs, tmp_path)


def test_one_step_ahead_is_learn2synth(pairs: tuple[l2s.Pairs, l2s.Pairs], tmp_path: Path) -> None:
    network, augmenter = seeded(lambda: unet(1, 4, (4, 8)), stream(0, "network")), GaussianNoise("fixed", 0.3)
    settings = l2s.Settings(**SETTINGS)
    trail = l2s.learn2synth(network, augmenter, *pairs, settings, 0, Context(tmp_path / "learn2synth"))
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    sigmas, same = train("exact", pairs, tmp_path / "exact")
    assert sigmas == [point["sigma"] for point in trail]
    assert torch.equal(same, weights)
    assert train("unrolled-1", pairs, tmp_path / "unrolled")[0] == pytest.approx(sigmas, rel=1e-5)
    assert len(set(sigmas)) > 4  # the augmenter does move


def test_all_steps_of_a_window_differentiated_is_no_truncation(
    pairs: tuple[l2s.Pairs, l2s.Pairs], tmp_path: Path
) -> None:
    whole, _ = train("unrolled-4", pairs, tmp_path / "whole")
    assert train("truncated-4-4", pairs, tmp_path / "all")[0] == whole
    assert train("truncated-4-1", pairs, tmp_path / "one")[0] != whole


def test_the_network_steps_as_often_and_as_far_whatever_the_method(
    pairs: tuple[l2s.Pairs, l2s.Pairs], tmp_path: Path
) -> None:
    """With the augmenter held still, methods differ in nothing: only hypergradients are estimated differently."""
    ends = {}
    for method in METHODS:
        seen: list[int] = []
        counted = lambda i, seen=seen: seen.append(i) or pairs[0](i)  # noqa: E731
        sigmas, ends[method] = train(method, (counted, pairs[1]), tmp_path / method, hyper_lr=0.0)
        assert seen == list(range(8)), method
        assert len(sigmas) == 8 // l2s.window(method)[0]
    start = torch.cat([p.flatten() for p in seeded(lambda: unet(1, 4, (4, 8)), stream(0, "network")).parameters()])
    assert (ends["exact"] - start).abs().max() > 1e-3
    for method in METHODS:
        assert torch.allclose(ends[method], ends["exact"], atol=1e-5), method


def test_no_profile_breaks_off_in_the_middle_of_a_window() -> None:
    for name in ("smoke", "cpu", "gpu", "paper"):
        config = load_profile("learn2synth", name)["horizon"]
        assert all(config.steps % l2s.window(method)[0] == 0 for method in config.methods)
        assert config.every == 1


@pytest.mark.parametrize("method", ["exact", "unrolled-2", "truncated-4-2", "cg"])
def test_a_killed_horizon_training_goes_on_where_it_was(
    method: str, pairs: tuple[l2s.Pairs, l2s.Pairs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "checkpoint_due", lambda self: True)
    synthetic, real = pairs
    first: list[int] = []

    def killed(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if i >= 4:
            raise KeyboardInterrupt
        return real(i)

    with pytest.raises(KeyboardInterrupt):
        train(method, (synthetic, killed), tmp_path / "killed")
    noted = lambda i: first.append(i) or synthetic(i)  # noqa: E731
    resumed, whole = train(method, (noted, real), tmp_path / "killed"), train(method, pairs, tmp_path / "whole")
    assert first == [4, 5, 6, 7]
    assert resumed[0] == whole[0]
    assert torch.equal(resumed[1], whole[1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_profile_gives_finite_metrics(method: str, tmp_path: Path) -> None:
    config = config_of(methods=(method,))
    (cell,) = horizon_cells(config)
    assert cell == Cell(method, "brain-mni", 0, {"noise": "0.05"})
    result = l2s.horizon_run(cell, config, Context(tmp_path))
    numbers = {name: value for name, value in result.metrics.items() if not isinstance(value, list)}
    assert numbers.keys() == {"preset", "sigma", "sigma_lowest", "dice_trivial"}
    assert all(math.isfinite(value) for value in [*numbers.values(), *result.metrics["trail_sigma"]])
    assert numbers["preset"] == 0.05
    assert 0 <= numbers["sigma_lowest"] <= numbers["sigma"] < 1
    assert len(result.metrics["trail_sigma"]) == 8 // l2s.window(method)[0]
    assert len(result.cases) == 2 * 2
    assert all(0 <= case["dice"] <= 1 for case in result.cases)


KNOWN_ARMS = PROFILE["known_augmentation"].arms


@pytest.mark.parametrize("arm", KNOWN_ARMS)
def test_every_arm_of_known_augmentation_runs_and_the_plain_one_draws_no_target(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    target = l2s.Halves.target

    def counted(self: l2s.Halves, degrade: l2s.Augmenter) -> l2s.Pairs:
        made = target(self, degrade)
        return lambda i: drawn.append(i) or made(i)

    monkeypatch.setattr(l2s.Halves, "target", counted)
    config = l2s.KnownAugmentation(
        **(KNOWN | {"steps": 4}), target_exponents=".5/.5/.5", nonparametric_lr=1e-2, arms=(arm,), seeds=1
    )
    (cell,) = known_augmentation_cells(config)
    result = l2s.known_augmentation_run(cell, config, Context(tmp_path))
    learned = {"learn2synth-parametric": {"sigma", "low", "mid", "high"}}.get(arm, set())
    assert result.metrics.keys() == {"dice_real", "dice_trivial"} | learned
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert len(result.cases) == 2 * 2
    assert drawn == ([] if arm == "synthseg-plain" else list(range(4)))


def test_arms_of_known_augmentation_are_told_apart_by_their_networks(tmp_path: Path) -> None:
    config = l2s.KnownAugmentation(
        **(KNOWN | {"steps": 4, "lr": 0.05}),
        target_exponents=".5/.5/.5",
        nonparametric_lr=1e-2,
        arms=KNOWN_ARMS,
        seeds=2,
    )
    cells = known_augmentation_cells(config)
    assert [(cell.method, cell.seed) for cell in cells] == [(arm, seed) for arm in KNOWN_ARMS for seed in range(2)]
    found = {
        cell.method: l2s.known_augmentation_run(cell, config, Context(tmp_path / cell.method)).metrics["dice_real"]
        for cell in cells[::2]
    }
    assert len(set(found.values())) == len(KNOWN_ARMS)


@pytest.mark.parametrize("method", PROFILE["cost"].methods)
def test_every_kind_of_step_has_a_cost(method: str, tmp_path: Path) -> None:
    config = l2s.Cost(**SETTINGS, **ARMS, repeats=1, methods=(method,))
    (cell,) = cost_cells(config)
    metrics = l2s.cost_run(cell, config, Context(tmp_path)).metrics
    assert metrics.keys() == {"seconds", "gflops", "saved_megabytes"}
    assert all(math.isfinite(value) and value > 0 for value in metrics.values())
    assert l2s.cost_run(cell, config, Context(tmp_path)).metrics["gflops"] == metrics["gflops"]  # counted, not timed


def test_looking_further_ahead_costs_memory_and_an_unrolled_step_less_than_a_single_one(tmp_path: Path) -> None:
    config = l2s.Cost(**SETTINGS, **ARMS, repeats=1, methods=("plain", "exact", "unrolled-4"))
    found = {c.method: l2s.cost_run(c, config, Context(tmp_path)).metrics for c in cost_cells(config)}
    assert found["plain"]["gflops"] < found["unrolled-4"]["gflops"] < found["exact"]["gflops"]
    assert found["plain"]["saved_megabytes"] < found["exact"]["saved_megabytes"]
    assert found["exact"]["saved_megabytes"] < found["unrolled-4"]["saved_megabytes"]
