"""The arms of GenSeg's comparison: what each may see, that each runs, and what its record says."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from synthrepro.data import Card, Split, Task
from synthrepro.evidence import Context
from synthrepro.methods import genseg
from synthrepro.methods.genseg import arms, experiments
from synthrepro.models import pix2pix

SETTINGS: dict[str, Any] = {
    "size": (16, 16), "generator_features": 3, "discriminator_layers": 1, "search": "up", "dropout": 0.5,
    "pretrain_steps": 2, "pretrain_lr": 1e-3, "l1_weight": 100.0, "batch": 2,
    "steps": 4, "segmenter_lr": 1e-2, "loss": "jaccard", "gamma": 1.0,
    "generator_lr": 1e-3, "architecture_lr": 0.1, "every": 2, "estimator": "exact", "checks": 2,
    "released_generator_lr": 1e-6, "released_architecture_lr": 1e-6, "wgan_steps": 1, "wgan_lr": 1e-4,
    "segmenters": {"unet": {"features": (4, 8)}}, "options": {"lesion": {"subjects": (12, 1, 3)}},
}  # fmt: skip
CPU = torch.device("cpu")


def split(count: int, seed: int, people: int) -> Split:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, 16, 16, dtype=torch.int64)
    labels[:, 4:12, 3:9] = 1
    images = (0.5 * labels[:, None] + 0.5 * torch.rand(count, 1, 16, 16, generator=draws)).float()
    return Split(images, labels, tuple(f"{seed}-{i % people}" for i in range(count)))


@pytest.fixture
def task() -> Task:
    splits = {"train": split(20, 0, 10), "validation": split(2, 1, 2), "test": split(4, 2, 4)}
    return Task("toy", ("background", "lesion"), 1, splits | {"test-far": split(4, 3, 4)}, Card("", "", "", "", ""))


def pool_of(task: Task, n: int, seed: int = 0, **options: Any) -> genseg.Pool:
    return genseg.Pool(task, n, 2, seed, CPU, **options)


def rows(task: Task, images: torch.Tensor) -> set[int]:
    return {
        next(i for i, other in enumerate(task.splits["train"].images) if torch.equal(image, other)) for image in images
    }


# ----- the labelled images


def test_n_counts_the_validation_images_and_a_fifth_is_for_validation(task: Task) -> None:
    pool = pool_of(task, 10)
    train, held = rows(task, pool.images), rows(task, pool.validation[0])
    assert (len(train), len(held)) == (8, 2)
    assert not train & held


def test_more_labels_contain_fewer_and_stay_on_their_side(task: Task) -> None:
    few, many = pool_of(task, 10), pool_of(task, 15)
    assert rows(task, few.images) < rows(task, many.images)
    assert rows(task, few.validation[0]) < rows(task, many.validation[0])


def test_only_train_and_validation_trains_on_validation_images(task: Task) -> None:
    both = pool_of(task, 10, both=True)
    alone = pool_of(task, 10)
    assert rows(task, both.images) == rows(task, alone.images) | rows(task, alone.validation[0])


def test_few_images_show_many_subjects(task: Task) -> None:
    train = task.splits["train"]
    for seed in range(5):
        assert len({train.subjects[i] for i in genseg.labelled(train, 10, seed)}) == 10
    assert sorted(genseg.labelled(train, 20, 0)) == list(range(20))
    assert genseg.labelled(train, 10, 0) != genseg.labelled(train, 10, 1)


@pytest.mark.parametrize("n", [4, 21])
def test_a_number_of_labels_that_there_are_not_is_an_error(task: Task, n: int) -> None:
    with pytest.raises(ValueError, match=f"toy has 20 images to label, so n must be from 5 to that, not {n}"):
        pool_of(task, n)


def test_batches_are_those_of_the_seed_and_the_step(task: Task) -> None:
    one, same, other = pool_of(task, 10), pool_of(task, 10), pool_of(task, 10, seed=1)
    for step in range(3):
        assert torch.equal(one.joint(step).images, same.joint(step).images)
        assert torch.equal(one.joint(step).masks, same.joint(step).masks)
        assert torch.equal(one.joint(step).images, one.real(step)[0])  # all arms step on the same real images
    assert not torch.equal(one.real(0)[0], other.real(0)[0])


def test_a_validation_image_is_never_painted_or_trained_on(task: Task) -> None:
    train = task.splits["train"]
    marked = train.labels.clone()
    pool = pool_of(task, 10)
    held = list(rows(task, pool.validation[0]))
    marked[held] = 0
    marked[held, :, :] = 0  # empty maps: would show
    pool = pool_of(Task("toy", task.classes, 1, {"train": Split(train.images, marked, train.subjects)}, task.card), 10)
    assert all(pool.masks(step).flatten(1).any(1).all() for step in range(20))


# ----- every arm


@pytest.fixture
def toy(task: Task, monkeypatch: pytest.MonkeyPatch) -> Task:
    for module in (arms, experiments):
        monkeypatch.setattr(module, "task_of", lambda name, config: task)
    monkeypatch.setattr(arms, "load_task", lambda name, **options: task)
    return task


def measured(arm: str, folder: Path, name: str = "unet", **changes: Any) -> Any:
    segmenters = {
        "unet": {"features": (4, 8)},
        "deeplabv3-resnet50": {"depths": (1, 1, 1, 1)},
        "swin-unetr": {"features": 12, "depths": (1, 1, 1, 1)},
    }
    config = genseg.Main(
        **SETTINGS | {"segmenters": segmenters} | changes, arms={"toy": {name: (arm,)}}, labels={"toy": (10,)}, seeds=1
    )
    (cell,) = experiments.main_cells(config)
    artefacts = genseg.EXPERIMENTS["main"].artefacts
    return experiments.main_run(cell, config, Context(folder, artefacts, folder.parent / "shared"))


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("arm", list(genseg.ARMS))
def test_every_arm_runs_and_is_scored_per_image_on_each_test_set(arm: str, tmp_path: Path) -> None:
    result = measured(arm, tmp_path / "cell")
    assert [(case["split"], case["subject"]) for case in result.cases] == [
        (name, f"{seed}-{i}") for name, seed in (("test", 2), ("test-far", 3)) for i in range(4)
    ]
    for name in ("test", "test-far"):
        scores = [case["jaccard"] for case in result.cases if case["split"] == name]
        assert result.metrics[f"jaccard {name}"] == pytest.approx(sum(scores) / 4)
        assert result.metrics[f"jaccard_trivial {name}"] == pytest.approx(48 / 256)
    if genseg.ARMS[arm].images == "joint":
        searched = genseg.ARMS[arm].drive in ("validation", "gan") and genseg.ARMS[arm].hyper == "architecture"
        assert (result.metrics["moved"] > 0) == searched
        assert len(result.metrics["norms up_mixed"]) == 4 * len(genseg.ARMS[arm].kernels)
    assert ("mean hypergradient" in result.metrics) == (genseg.ARMS[arm].drive == "validation")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("name", ["deeplabv3-resnet50", "swin-unetr"])
def test_the_other_segmenters_take_the_same_three_levels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    size = (64, 64) if name == "swin-unetr" else (32, 32)
    for module in (arms, experiments):
        monkeypatch.setattr(module, "task_of", lambda name, config: enlarged(task, size[0] // 16))
    monkeypatch.setattr(arms, "load_task", lambda name, **options: enlarged(task, size[0] // 16))
    result = measured("genseg", tmp_path / "cell", name, size=size, steps=2)
    assert result.metrics["mean hypergradient"] > 0
    assert 0 <= result.metrics["jaccard test"] <= 1


def enlarged(task: Task, factor: int) -> Task:
    def each(part: Split) -> Split:
        images, labels = (
            t.repeat_interleave(factor, -1).repeat_interleave(factor, -2) for t in (part.images, part.labels)
        )
        return Split(images, labels, part.subjects)

    return Task(task.name, task.classes, 1, {name: each(part) for name, part in task.splits.items()}, task.card)


@pytest.mark.usefixtures("toy")
def test_the_released_rates_are_for_the_gan_and_the_architecture_alone(tmp_path: Path) -> None:
    tuned, released = (measured(arm, tmp_path / arm) for arm in ("genseg", "genseg-released"))
    assert 0 < released.metrics["moved"] < 1e-5 < tuned.metrics["moved"]


@pytest.mark.usefixtures("toy")
def test_arms_share_the_pretrained_gan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = arms.pretrain
    monkeypatch.setattr(arms, "pretrain", lambda *args, **options: built.append(1) or real(*args, **options))
    for arm in ("separate", "genseg", "as-coded", "fixed-mixture", "kernel-8"):
        measured(arm, tmp_path / arm)
    assert len(built) == 2  # one with the mixture, one with the 8 x 8 kernel


@pytest.mark.usefixtures("toy")
def test_another_gan_makes_another_arm(tmp_path: Path) -> None:
    config = genseg.Main(**SETTINGS, arms={"toy": {"unet": ("separate",)}}, labels={"toy": (10,)}, seeds=1)
    (cell,) = experiments.main_cells(config)
    artefacts = genseg.EXPERIMENTS["main"].artefacts
    found = []
    for code in ("one", "other"):
        context = Context(tmp_path / code, artefacts, tmp_path / "shared", {"gan": code, "arm": "same"})
        experiments.main_run(cell, config, context)
        found.append(set(context.artefacts))
        assert {name.partition("-")[0] for name in context.artefacts} == {"gan", "arm"}
    assert not found[0] & found[1]


@pytest.mark.usefixtures("toy")
def test_a_segmenter_with_dropout_trains_alike_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    monkeypatch.setattr(arms, "task_of", lambda name, config: enlarged(task, 2))
    results = [measured("real", tmp_path / name / "cell", "deeplabv3-resnet50", steps=2) for name in ("one", "other")]
    assert results[0].cases == results[1].cases


@pytest.mark.usefixtures("toy")
def test_weights_move_at_the_rate_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    monkeypatch.setattr(arms, "train_jointly", lambda *args: rates.append(args[4].architecture_lr) or [])
    for arm in ("genseg", "weights"):
        measured(arm, tmp_path / arm)
    assert rates == [SETTINGS["architecture_lr"], SETTINGS["generator_lr"]]


def test_a_random_architecture_differs_by_seed_and_an_even_one_is_even(task: Task) -> None:
    config = genseg.GanSettings(**{k: v for k, v in SETTINGS.items() if k in genseg.GanSettings.model_fields})
    one, other, even = (
        genseg.gan_for(task, genseg.ARMS[arm], config, seed, CPU).generator.requires_grad_(False)
        for arm, seed in (("random-architecture", 0), ("random-architecture", 1), ("genseg", 0))
    )
    assert not torch.allclose(one.up_architecture, other.up_architecture)
    assert float((even.up_architecture.softmax(1) - 1 / 3).abs().max()) < 0.01
    assert float((one.up_architecture.softmax(1) - 1 / 3).abs().max()) > 0.1
    ours = pix2pix.weights(even)
    assert all(torch.equal(p, ours[name]) for name, p in pix2pix.weights(one).items())  # the weights start alike


@pytest.mark.usefixtures("toy")
def test_the_best_validated_state_is_kept_and_a_later_equal_one_wins(task: Task, tmp_path: Path) -> None:
    config = genseg.ArmSettings(**SETTINGS)
    network = genseg.segmenter_for("unet", task, config, 0, CPU)
    scores = iter([0.2, 0.5, 0.5, 0.1])
    keeper = arms.Keeper(
        network, pool_of(task, 10), config.model_copy(update={"steps": 4, "checks": 4}), Context(tmp_path)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "jaccard", lambda *args: torch.tensor([next(scores)]))
        for step in range(1, 5):
            with torch.no_grad():
                next(network.parameters()).fill_(step)
            keeper(step)
    assert float(next(iter(keeper.state.values())).flatten()[0]) == 3
    again = arms.Keeper(network, pool_of(task, 10), config, Context(tmp_path))
    assert again.best == 0.5


# ----- experiments


def test_all_seeds_of_an_arm_come_before_the_next() -> None:
    lists = {
        "arms": {"a": {"unet": ("real", "genseg")}, "b": {"unet": ("real",)}},
        "labels": {"a": (10, 20), "b": (5,)},
    }
    cells = experiments.main_cells(genseg.Main(**SETTINGS, **lists, seeds=2))
    assert [(c.task, c.setting["labels"], c.method, c.seed) for c in cells[:5]] == [
        ("a", 10, "real", 0), ("a", 10, "real", 1), ("a", 10, "genseg", 0), ("a", 10, "genseg", 1),
        ("a", 20, "real", 0),
    ]  # fmt: skip
    assert len(cells) == len({cell.key for cell in cells}) == 10


@pytest.mark.usefixtures("toy")
def test_search_and_gamma_change_what_they_name(tmp_path: Path) -> None:
    search = genseg.Search(**SETTINGS, tasks={"toy": 10}, arms=("genseg",), searches=("both",), seeds=1)
    artefacts = genseg.EXPERIMENTS["search"].artefacts
    up, both = experiments.search_cells(search)
    assert "mixture down" not in experiments.search_run(up, search, Context(tmp_path / "1", artefacts)).metrics
    assert "mixture down" in experiments.search_run(both, search, Context(tmp_path / "2", artefacts)).metrics
    gamma = genseg.Gamma(**SETTINGS, tasks={"toy": 10}, arms=("genseg",), gammas=("0", "1"), seeds=1)
    none, one = (
        experiments.gamma_run(cell, gamma, Context(tmp_path / cell.key, artefacts)).metrics
        for cell in experiments.gamma_cells(gamma)
    )
    assert none["mean hypergradient"] == 0
    assert none["moved"] == 0
    assert one["mean hypergradient"] > 0


@pytest.mark.usefixtures("toy")
def test_a_separate_generator_is_not_looked_at_after_its_training(tmp_path: Path) -> None:
    config = genseg.Generated(**SETTINGS, tasks={"toy": 10}, arms=("separate",), marks=2, judge_steps=1, seeds=1)
    (cell,) = experiments.generated_cells(config)
    assert experiments.generated_run(cell, config, Context(tmp_path)).metrics["trail step"] == [0, 1, 2]


@pytest.mark.usefixtures("toy")
def test_generated_looks_at_the_generator_through_both_phases(tmp_path: Path) -> None:
    config = genseg.Generated(
        **SETTINGS | {"pretrain_steps": 4}, tasks={"toy": 10}, arms=("genseg",), marks=2, judge_steps=60, seeds=1
    )
    (cell,) = experiments.generated_cells(config)
    metrics = experiments.generated_run(cell, config, Context(tmp_path)).metrics
    assert metrics["trail step"] == [0, 2, 4, 6, 8]
    assert metrics["l1"] == metrics["trail l1"][-1] < metrics["trail l1"][0]
    assert metrics["faithful_real"] > 0.85  # the toy's images show their masks
    assert not math.isnan(metrics["faithful"])
