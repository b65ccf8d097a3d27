"""What the chapter says in words is so: about the method always, about its tables as soon as there are records."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synthrepro.data import load_task
from synthrepro.evidence import Record, load_profile, papers, records
from synthrepro.evidence.claims import judge, load_claims
from synthrepro.evidence.scores import current
from synthrepro.evidence.tables import tables
from synthrepro.methods import genseg
from synthrepro.models import pix2pix, unet

PROFILES = ("smoke", "cpu")


@cache
def evidence(experiment: str) -> list[Record]:
    """The records of the strongest profile there is, smoke aside, as the chapter takes them."""
    found = records("genseg", experiment)
    kept = next((hit for p in ("paper", "gpu", "cpu") if (hit := [r for r in found if r.profile == p])), [])
    if not kept:
        pytest.skip(f"no records of {experiment} yet")
    return current(kept)


@cache
def means(experiment: str, id: str) -> dict[tuple[str, ...], dict[str, float]]:
    """The fields of a table's rows, in their order -> column -> mean over seeds."""
    evidence(experiment)
    (table,) = (table for table in tables("genseg", experiment) if table.id == id)
    return {
        tuple(row.fields.values()): {
            column.label: value.mean
            for column, value in zip(table.columns, row.values, strict=True)
            if value.mean is not None
        }
        for row in table.rows
        if row.seeds
    }


def configurations(profile: str) -> dict[str, Any]:
    return dict(load_profile("genseg", profile))


# ----- the method


def test_sixteen_arms() -> None:
    assert len(genseg.ARMS) == 16


def test_two_claims_are_our_own() -> None:
    assert sum("The claim is ours" in (claim.why or "") for claim in load_claims("genseg").claims) == 2


def test_forty_labels_are_thirty_two_to_train_on_and_eight_to_validate() -> None:
    task = load_task("lesion", size=(16, 16), subjects=(40, 1, 1))
    pool = genseg.Pool(task, 40, 4, 0, torch.device("cpu"))
    assert (len(pool.labels), len(pool.validation[1])) == (32, 8)


def test_mixtures_are_of_four_six_and_eight_pixels() -> None:
    assert pix2pix.KERNELS == (4, 6, 8)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_settings_that_the_chapter_speaks_of(profile: str) -> None:
    for name, config in configurations(profile).items():
        assert config.released_architecture_lr == config.released_generator_lr == 1e-6, name
        assert config.architecture_lr > 1000 * config.released_architecture_lr, name
        assert (config.l1_weight, config.loss, config.estimator) == (100, "jaccard", "exact"), name
        assert config.search == "up", name
        assert config.every > 1, name
    assert configurations("cpu")["main"].size == (64, 64)


def test_the_unet_is_smooth_and_the_gan_is_not() -> None:
    kinked = nn.ReLU | nn.LeakyReLU | nn.PReLU
    assert not any(isinstance(part, kinked) for part in unet(3, 2).modules())
    assert any(isinstance(part, kinked) for part in pix2pix.PatchDiscriminator(4).modules())


def test_ten_thousand_steps_of_a_millionth_move_no_share_by_half_a_point() -> None:
    far = 10_000 * configurations("cpu")["main"].released_architecture_lr
    assert abs(float(torch.tensor([far, -far, -far]).softmax(0)[0]) - 1 / 3) < 0.005


# ----- its tables


def test_the_mixture_moves_far_at_our_rates_hardly_at_the_released_ones_and_not_as_coded() -> None:
    moved = {method: row["mixture moved by"] for (_, method), row in means("end_to_end", "end_to_end").items()}
    for method in ("as-coded", "fixed-mixture", "separate"):
        assert moved.get(method, 0) == 0
    assert moved.get("genseg-released", 0) < 0.001 < 0.05 < moved["genseg"]


def test_by_norm_the_largest_kernel_has_more_than_its_share_and_the_smallest_less() -> None:
    for method in ("genseg", "fixed-mixture"):
        found = [r for r in evidence("search") if (r.cell.method, r.cell.setting["search"]) == (method, "up")]
        if not found:
            continue
        mixture, norms = (
            np.mean([np.reshape(r.metrics[name], (-1, 3)) for r in found], axis=0)
            for name in ("mixture up", "norms up_mixed")
        )
        shares = norms / norms.sum(1, keepdims=True)
        assert (shares[:, 2] > mixture[:, 2]).all()
        assert (shares[:, 0] < mixture[:, 0]).all()


GENERATORS = ("wgan", "separate", "as-coded", "genseg")
AUGMENTED = ("rotate", "flip", "translate", "all")


def jaccard(table: str, column: str) -> dict[str, float]:
    return {row[-1]: values[column] for row, values in means("main", table).items()}


def test_on_lesions_a_gan_adds_nothing_and_augmentation_much() -> None:
    home = jaccard("lesion", "in domain")
    assert abs(home["genseg"] - home["real"]) < 0.01
    assert home["all"] - home["real"] > 0.08
    assert min(home[arm] for arm in AUGMENTED) > max(home[arm] for arm in GENERATORS)
    assert home["train-validation"] > max(home[arm] for arm in GENERATORS)
    for abroad in ("another camera", "other skin"):
        assert jaccard("lesion", abroad)["genseg"] < jaccard("lesion", abroad)["real"]


def test_on_real_ultrasound_the_order_is_much_the_same() -> None:
    home, abroad = jaccard("breast", "BUSI"), jaccard("breast", "BUS-BRA")
    assert 0.01 < home["genseg"] - home["real"] < 0.02
    (verdict,) = (v for v in judge("genseg") if v.claim.id == "helps-breast")
    assert verdict.deciding is not None
    assert float(verdict.deciding.low) < 0
    assert float(verdict.deciding.high) > (verdict.claim.margin or 1)
    assert min(home[arm] for arm in AUGMENTED) > home["genseg"]
    assert max(abroad, key=lambda arm: abroad[arm]) == "real"
    baseline, _ = papers.table("genseg", "gains").rows["BUID, 100, UNet"]
    assert max(home.values()) < float(baseline or 0) - 0.1
    assert not means("main", "wound")


def test_the_paper_gains_six_points_and_a_half_on_skin() -> None:
    before, after = papers.table("genseg", "gains").rows["ISIC, 40, UNet"]
    assert round(100 * (float(after or 0) - float(before or 0)), 1) == 6.6


def test_only_the_unet_is_measured() -> None:
    assert {segmenter for segmenter, _ in means("main", "segmenters")} == {"unet"}


def test_end_to_end_makes_little_difference() -> None:
    found = means("end_to_end", "end_to_end")
    leaders = set()
    for task in ("breast-us", "lesion"):
        scores = {arm: row["Jaccard in domain"] for (name, arm), row in found.items() if name == task}
        assert max(scores.values()) - min(scores.values()) < 0.03
        assert scores["genseg"] - sorted(scores.values())[-2] < 0.005
        assert found[task, "genseg"]["mixture moved by"] > 0.3
        leaders.add(max(scores, key=lambda arm: scores[arm]))
    assert len(leaders) == 2


def test_searched_or_left_alone_the_score_is_the_same() -> None:
    found = {arm: row["Jaccard in domain"] for (arm,), row in means("search", "search").items()}
    assert set(found) == {"genseg", "fixed-mixture"}
    assert abs(found["genseg"] - found["fixed-mixture"]) < 0.01


def test_the_kernels_have_not_absorbed_the_mixture_and_seeds_do_not_agree() -> None:
    def of(arm: str, name: str) -> np.ndarray:  # (seeds, levels, kernels)
        return np.stack([np.reshape(r.metrics[name], (-1, 3)) for r in evidence("search") if r.cell.method == arm])

    searched, left = (of(arm, "norms up_kernel").mean(0) for arm in ("genseg", "fixed-mixture"))
    assert np.abs(searched / left - 1).max() < 0.03
    assert (np.ptp(of("genseg", "mixture up"), axis=0).max(1) > 0.2).all()


@pytest.mark.parametrize("experiment", ["gamma", "generated"])
def test_what_is_not_measured_yet_is_said_to_be_so(experiment: str) -> None:
    assert not records("genseg", experiment)


def test_forty_labels_with_genseg_are_worth_about_forty_without() -> None:
    found = means("label_efficiency", "label_efficiency") | {
        ("genseg", *labels): row for labels, row in means("label_efficiency", "label_efficiency_genseg").items()
    }

    def at(arm: str, labels: int, column: str = "in domain") -> float:
        return next(row[column] for key, row in found.items() if key == (arm, str(labels)) or key == (arm, labels))

    assert abs(at("genseg", 40) - at("real", 40)) < 0.02
    assert at("genseg", 40) < at("real", 80) - 0.03
    assert at("real", 320) > at("real", 40) + 0.1  # steep
    for column in ("another camera", "other skin"):
        assert at("genseg", 40, column) < at("real", 40, column)
    assert not any(key[0] == "all" or tuple(map(str, key)) == ("genseg", "80") for key in found)
