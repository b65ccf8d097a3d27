"""Every arm of label-efficient diffusion and the generation of images, run from end to end on next to nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from synthrepro.data import load_task
from synthrepro.evidence import Cell
from synthrepro.evidence.context import Context
from synthrepro.evidence.profiles import load_profile
from synthrepro.methods import ddpm
from synthrepro.methods.ddpm import arms

PRETRAIN = {"steps": 2, "batch": 2, "lr": 1e-3, "last_lr": 1e-4, "ema": 0.9, "checkpoints": [1], "precision": "no"}
PRETRAIN |= {"compile": False, "processes": 1}
TINY: dict[str, Any] = {
    "options": {"abdomen": {"cases": [2, 1, 2], "slices": 8}},
    "unlabelled": {"abdomen": {"unlabelled": 1, "unlabelled_slices": 8}},
    "pretrain": {"abdomen": PRETRAIN},
}


def config(experiment: str = "label_ratio", **changes: Any) -> Any:
    """The smoke profile's section with next to no training."""
    section = load_profile("ddpm", "smoke")[experiment]
    known = {name: getattr(section, name) for name in type(section).model_fields} | TINY
    if experiment == "label_ratio":
        baselines = {"attention-unet": 4, "resunet": 4}
        known |= {"steps": {"100": 2}, "batch": 4, "baselines": baselines, "boundary": 1}
        known["lr"] = known["lr"] | dict.fromkeys(baselines, 0.001)
    return type(section).model_validate(known | changes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artefacts")


def run(cell: Cell, config: Any, folder: Path, shared: Path, experiment: str = "label_ratio") -> Any:
    there = ddpm.EXPERIMENTS[experiment]
    return there.run(cell, config, Context(folder, there.artefacts, shared))


RUNNING = [name for name, arm in ddpm.ARMS.items() if arm.network in ("unet", "ddpm-seg", "attention-unet", "resunet")]


@pytest.mark.parametrize("method", RUNNING)
def test_an_arm_is_trained_and_scored(method: str, tmp_path: Path, shared: Path) -> None:
    t = 100 if method == "noised" else 0
    cell = Cell(method, "abdomen", 0, {"ratio": "100", "size": "S", "t": t, "redrawn": "all"})
    result = run(cell, config(), tmp_path, shared)
    assert [case["subject"] for case in result.cases] == ["test-000", "test-001"]
    assert {case["split"] for case in result.cases} == {"test"}
    assert 0 <= result.metrics["dice"] <= 1
    assert 0 <= result.metrics["dice_validation"] <= 1
    assert result.metrics["dice"] == pytest.approx(sum(case["dice"] for case in result.cases) / 2, abs=1e-4)
    assert (result.metrics["trained"] > 0) == (method != "ddpm-seg")


def test_the_arms_that_are_not_run_here_are_other_baselines() -> None:
    others = {"deeplabv3plus", "unetplusplus", "unetr", "swin-unetr", "nnunet"}
    assert set(ddpm.ARMS) - set(RUNNING) == others


def test_nnunet_is_given_whole_cases_and_has_no_validation(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def fake(task: Any, cases: list[str], folder: Path, **options: Any) -> torch.Tensor:
        given.update(options, cases=cases)
        return task.splits["test"].labels

    monkeypatch.setattr(arms, "nnunet", fake)
    cell = Cell("nnunet", "abdomen", 0, {"ratio": "100", "size": "S", "t": 0, "redrawn": "all"})
    result = run(cell, config(nnunet_cases={"100": 1}, nnunet_epochs=5), tmp_path, shared)
    assert len(given["cases"]) == 1
    assert given["cases"][0].startswith("train-")
    assert (given["epochs"], given["spacing"]) == (5, 12.0)
    assert result.metrics["dice"] == 1
    assert math.isnan(result.metrics["dice_validation"])


def test_generated_images_are_scored_at_every_checkpoint_and_some_are_kept(tmp_path: Path, shared: Path) -> None:
    there = config("generation", images=4, pictures=2, extractor_steps=2)
    cell = Cell("dpm-solver", "abdomen", 0, {"channels": 8, "evaluations": 2})
    metrics = run(cell, there, tmp_path, shared, "generation").metrics
    assert metrics["trail iteration"] == [1, 2]
    for score in ("fid", "sfid", "precision", "recall", "f1"):
        assert len(metrics[f"trail {score}"]) == 2
        assert metrics[score] == pytest.approx(metrics[f"trail {score}"][-1], nan_ok=True)
        assert f"{score}_real" in metrics
    assert metrics["fid_real"] < metrics["fid"]
    assert len(metrics["samples"]) == 2 * 32 * 32
    assert (metrics["samples_count"], metrics["samples_rows"], metrics["samples_columns"]) == (2, 32, 32)
    assert 0 <= min(metrics["samples"]) <= max(metrics["samples"]) <= 255


def test_labelled_slices_of_a_ratio() -> None:
    there = config()
    task = load_task("abdomen", size=(32, 32), cases=(2, 1, 2), slices=8)
    images, labels = ddpm.labelled(task, "100", there, 0)
    assert len(images) == len(labels) == 16
    images, labels = ddpm.labelled(task, "50", there, 0)
    assert len(images) == 8
    assert len(ddpm.labelled(task, "0.1", config(batch=8), 0)[0]) == 8, "never fewer than a batch"
