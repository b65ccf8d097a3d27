"""What the chapter says in words is so: about the method always, about its tables as soon as there are records."""

from functools import cache
from statistics import mean

import pytest
import torch

from synthrepro.evidence import load_profile, records
from synthrepro.evidence.claims import judge
from synthrepro.evidence.scores import current
from synthrepro.methods import ddpm
from synthrepro.models.diffusion_unet import diffusion_unet


@cache
def evidence(experiment: str, metric: str = "dice") -> dict[tuple, dict[int, float]]:
    """(task, arm, ratio, t) -> seed -> metric; of the strongest profile there is but smoke, as the chapter has it."""
    found = records("ddpm", experiment)
    kept = next((hit for p in ("paper", "gpu", "cpu") if (hit := [r for r in found if r.profile == p])), [])
    if not kept:
        pytest.skip(f"no records of {experiment} yet")
    by: dict[tuple, dict[int, float]] = {}
    for record in current(kept):
        cell = record.cell
        if cell.setting["size"] == "S" and cell.setting["redrawn"] == "all" and metric in record.metrics:
            key = (cell.task, cell.method, cell.setting["ratio"], cell.setting["t"])
            by.setdefault(key, {})[cell.seed] = record.metrics[metric]
    return by


def lead(experiment: str, task: str, ratio: str, t: int = 0, against: str = "scratch") -> list[float]:
    """Of the fine-tuned decoder at step t over another arm at step 0, seed by seed."""
    there = evidence(experiment)
    ours, theirs = there[task, "decoder", ratio, t], there[task, against, ratio, 0]
    assert len(ours) == len(theirs) == 5
    return [ours[seed] - theirs[seed] for seed in sorted(ours)]


def verdict(claim: str, task: str) -> str:
    (found,) = (v for v in judge("ddpm") if v.claim.id == claim and v.task == task)
    return found.verdict


# ----- the method


def test_nineteen_arms() -> None:
    assert len(ddpm.ARMS) == 19


def test_the_small_network_has_about_a_hundredth_of_the_papers_parameters() -> None:
    config = load_profile("ddpm", "cpu")["label_ratio"]
    with torch.device("meta"):
        small = diffusion_unet(64, config.sizes["S"].channels, **config.unet.model_dump())
        large = diffusion_unet(256, 128)
    count = [sum(p.numel() for p in unet.parameters()) for unet in (small, large)]
    assert 80 < count[1] / count[0] < 120


def test_iterations_are_a_hundredth_of_the_papers_before_and_a_fraction_after() -> None:
    cpu, paper = (load_profile("ddpm", profile)["label_ratio"] for profile in ("cpu", "paper"))
    assert cpu.pretrain["abdomen"].steps * 100 == paper.pretrain["flare22"].steps
    assert all(cpu.steps[ratio] <= paper.steps[ratio] / 5 for ratio in ddpm.RATIOS)


def test_the_cells_of_strategies_are_trained_for_fewer_iterations_than_those_with_a_hundredth_of_the_labels() -> None:
    profile = load_profile("ddpm", "cpu")
    assert profile["strategies"].steps["100"] < profile["label_ratio"].steps["1"]


def test_rates_were_chosen_on_a_seed_that_is_in_no_table() -> None:
    for experiment in ("label_ratio", "strategies"):
        assert all(seed < 100 for by_seed in evidence(experiment).values() for seed in by_seed)


# ----- the tables


@pytest.mark.parametrize("ratio", ["0.1", "1"])
def test_the_decoder_is_ahead_by_a_few_points(ratio: str) -> None:
    assert 0.01 < mean(lead("label_ratio", "abdomen", ratio)) < 0.06


def test_the_lead_with_four_slices_is_in_every_seed_and_too_small_for_the_claim() -> None:
    leads = lead("label_ratio", "abdomen", "0.1")
    assert min(leads) > 0
    assert verdict("decoder-beats-scratch-0.1", "abdomen") == "does not hold here"


def test_at_one_per_cent_the_seeds_disagree() -> None:
    leads = lead("label_ratio", "abdomen", "1")
    assert min(leads) < 0 < max(leads)


def test_the_adrenal_glands_are_not_found_with_few_labels() -> None:
    for side in ("right", "left"):
        there = evidence("label_ratio", f"dice_{side} adrenal gland")
        for arm in ("decoder", "scratch"):
            for ratio in ("0.1", "1"):
                assert max(there["abdomen", arm, ratio, 0].values()) < 0.05


def test_on_the_hippocampus_training_from_scratch_is_better() -> None:
    assert max(lead("label_ratio", "hippocampus", "1")) < 0


def test_on_the_hippocampus_the_verdict_is_inconclusive() -> None:
    assert verdict("decoder-beats-scratch-real", "hippocampus") == "inconclusive"


def test_on_the_hippocampus_two_seeds_of_one_pre_training_lose_a_part() -> None:
    parts = [
        evidence("label_ratio", f"dice_{name}")["hippocampus", "decoder", "1", 0] for name in ("anterior", "posterior")
    ]
    lost = [seed for seed in parts[0] if min(part[seed] for part in parts) < 0.01]
    assert len(lost) == 2
    pretrainings = load_profile("ddpm", "cpu")["label_ratio"].pretrainings
    assert len({seed % pretrainings for seed in lost}) == 1
    same = [seed for seed in parts[0] if seed % pretrainings == lost[0] % pretrainings and seed not in lost]
    assert all(min(part[seed] for part in parts) > 0.5 for seed in same)
    assert len(same) == 1


def test_strategies_are_in_the_papers_order() -> None:
    assert min(lead("strategies", "abdomen", "100")) > 0
    there = evidence("strategies")
    by_arm = {key[1:]: mean(values.values()) for key, values in there.items() if key[0] == "abdomen"}
    assert by_arm["linear", "100", 0] < by_arm["scratch", "100", 0] < by_arm["decoder", "100", 0]
    steps = {t: value for (arm, _, t), value in by_arm.items() if arm == "decoder"}
    assert max(steps, key=steps.__getitem__) == 0
    assert min(steps, key=steps.__getitem__) == 900


def test_samples_come_closer_to_real_slices_and_stay_far_from_them() -> None:
    (record,) = (r for r in records("ddpm", "generation") if r.profile == "cpu")
    found = record.metrics
    assert found["trail fid"][0] > found["trail fid"][-1] > 10 * found["fid_real"]
    assert found["precision"] < 0.3 < 0.7 < found["recall"]
