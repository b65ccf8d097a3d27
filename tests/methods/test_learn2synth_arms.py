"""The arms of Learn2Synth's comparison: what each may see, and that each runs."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.data import Card, Split, Task, load_task
from synthrepro.evidence import Cell, Context
from synthrepro.methods import learn2synth as l2s
from synthrepro.methods.learn2synth import arms
from synthrepro.synthesis import Parametric

SETTINGS = {
    "steps": 4, "batch": 2, "features": (4, 8), "norm": "instance", "loss": "dice", "update": "adam",
    "lr": 2e-3, "hyper_lr": 2e-2, "every": 2, "alpha": 1.0, "estimator": "exact",
    "size": (32, 32), "spacing": 6.0, "options": {"brain-mni": {"subjects": (8, 1, 2), "slices": 2}},
    "real": {"brain-mni": 4}, "nonparametric_lr": 1e-2, "candidates": 2, "levels": 2,
}  # fmt: skip
LISTS = {"tasks": ("brain-mni",), "seeds": 1}
CPU = torch.device("cpu")


def pool_of(task: Task, people: int = 2, seed: int = 0) -> l2s.Pool:
    return l2s.Pool(task, people, 3, 6.0, seed, CPU, None)


@pytest.fixture
def task() -> Task:
    return l2s.task_of("brain-mni", l2s.ArmSettings(**SETTINGS))


@pytest.fixture
def with_maps() -> Task:
    """A task like brain-oasis: two classes, label maps of their own with a third value for unlabelled tissue."""
    labels = torch.zeros(4, 32, 32, dtype=torch.int64)
    labels[:, 8:24, 8:24] = 1
    maps = labels.clone()
    maps[:, 12:16, 12:16] = 2
    images = labels[:, None].float() / 2
    names = ("a", "a", "b", "c")
    splits = {"train": Split(images, labels, names), "maps": Split(torch.zeros(4, 0, 32, 32), maps, names)}
    return Task("brain-mni", ("background", "brain"), 1, splits, Card("", "", "", "", ""))


@pytest.mark.parametrize("arm", [*l2s.ARMS, "synthseg-foreign"])
def test_every_arm_runs_and_is_scored_for_each_person(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = l2s.task_of
    monkeypatch.setattr(
        arms, "task_of", lambda name, config: foreign(config) if name == "brain-labelmaps" else real(name, config)
    )
    config = l2s.InDomain(**SETTINGS, arms=(arm,), foreign=(), **LISTS)
    (cell,) = arms.in_domain_cells(config)
    result = l2s.in_domain_run(cell, config, Context(tmp_path, l2s.EXPERIMENTS["in_domain"].artefacts))
    people = real("brain-mni", config).splits["test"].individuals
    assert [case["subject"] for case in result.cases] == list(people)
    assert {"dice", "dice_flops", "jaccard", "surface_dice", "hausdorff95", "dice_gm"} <= result.cases[0].keys()
    assert 0 <= result.metrics["dice test"] <= 1
    if arm.startswith("learn2synth") or arm in ("synthseg-searched", "atlas-mixture"):  # one network for both budgets
        assert result.metrics["dice test"] == pytest.approx(result.metrics["dice_flops test"], abs=1e-4)


def foreign(config: l2s.ArmSettings) -> Task:
    task = l2s.task_of("brain-mni", config)
    maps = Split(torch.zeros(2, 0, 32, 32), torch.randint(5, (2, 32, 32)), ("x", "y"))
    return Task("brain-labelmaps", task.classes, 1, {"maps": maps}, task.card)


def test_real_images_and_label_maps_are_of_different_people(task: Task) -> None:
    for seed in range(3):
        pool = pool_of(task, 4, seed)
        mine = {m.numpy().tobytes() for m in pool.labels}
        assert mine.isdisjoint({m.numpy().tobytes() for m in pool.maps})
        assert len(pool.labels) == 4 * 2


def test_a_seed_redraws_who_gives_real_images_and_fewer_people_are_some_of_them(task: Task) -> None:
    many = {seed: {m.numpy().tobytes() for m in pool_of(task, 4, seed).labels} for seed in range(4)}
    few = {seed: {m.numpy().tobytes() for m in pool_of(task, 2, seed).labels} for seed in range(4)}
    assert all(few[seed] < many[seed] for seed in many)
    assert len({frozenset(people) for people in many.values()}) > 1
    with pytest.raises(ValueError, match="people to train on, not 5"):
        pool_of(task, 5)


def test_tissue_without_a_label_is_painted_and_answered_as_background(with_maps: Task) -> None:
    pool = pool_of(with_maps)
    assert pool.learn2synth.classes == 3
    _, y = pool.synthetic(0)
    assert set(y.unique().tolist()) <= {0, 1}
    painted, deformed = pool.learn2synth(pool.maps, torch.Generator().manual_seed(0))
    assert (painted[:, 0][deformed == 2] > 0).float().mean() > 0.5


def test_a_mixed_batch_is_half_real(with_maps: Task) -> None:
    pool = l2s.Pool(with_maps, 3, 4, 6.0, 0, CPU, None)
    x, _ = pool.mixed(5)
    assert torch.equal(x[2:], pool.real(5)[0][:2])
    assert torch.equal(x[:2], pool.synthetic(5)[0][2:])


def test_arms_without_real_images_do_not_touch_them(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: l2s.Pool, step: int) -> None:
        raise AssertionError("a real image was drawn")

    monkeypatch.setattr(l2s.Pool, "real", never)
    for arm in (name for name, arm in l2s.ARMS.items() if not arm.real and arm.plain_steps):
        spec = {"method": arm, "task": "brain-mni", "seed": 0, "people": 4, "config": SETTINGS}
        (tmp_path / arm).mkdir()
        l2s.train_arm(spec, tmp_path / arm, Context(tmp_path / f"{arm}-scratch"))
    spec["method"] = "supervised"
    with pytest.raises(AssertionError, match="real image"):
        l2s.train_arm(spec, tmp_path, Context(tmp_path / "supervised-scratch"))


def test_equal_flops_give_plain_arms_what_hypergradients_cost(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = []

    def descend(network, loss_at, settings, at, context, name="descend"):  # type: ignore[no-untyped-def]
        marks.append((name, *at))
        return [network.state_dict() for _ in at]

    monkeypatch.setattr(arms, "descend", descend)
    for arm in ("synthseg", "advchain", "synthseg-searched"):
        spec = {"method": arm, "task": "brain-mni", "seed": 0, "people": 4, "config": SETTINGS | {"steps": 300}}
        l2s.train_arm(spec, tmp_path, Context(tmp_path / f"{arm}-scratch"))
    # every second step costs 3.9: 300 steps cost 735 plain ones
    assert marks[0] == ("descend", 300, 735)
    assert marks[1] == ("descend", 300, 245)
    assert marks[2:] == [("candidate 0", 218), ("candidate 1", 218), ("descend", 300, 300)]


def test_the_cost_of_a_step_is_what_the_operations_add_up_to(tmp_path: Path) -> None:
    """The budgets rest on it; on the network of the profiles, whatever the size of its images."""
    settings = SETTINGS | {"features": (16, 24, 32, 48, 64), "every": 1}
    config = l2s.Cost(**settings, repeats=1, methods=())
    found = {}
    for method in ("plain", "exact", "exact-nonparametric", "advchain"):
        step = l2s.step_of(method, config, Context(tmp_path))
        with FlopCounterMode(display=False) as counter:
            step()
        found[method] = counter.get_total_flops()
    ratio = {method: flops / found["plain"] for method, flops in found.items()}
    assert arms.hyper(config) == pytest.approx(ratio["exact"], rel=0.06)
    assert arms.hyper(config) == pytest.approx(ratio["exact-nonparametric"], rel=0.06)
    assert arms.adversarial(config) == pytest.approx(ratio["advchain"], rel=0.06)


def test_memory_counts_every_saved_storage_once_and_only_while_it_is_kept() -> None:
    x = torch.ones(1000, requires_grad=True)

    def chain() -> None:
        y = x.exp()  # saves its own result, 4 kB
        (y * y).sum().backward()  # saves the same storage, twice

    assert l2s.saved_bytes(chain) == 4000
    assert l2s.saved_bytes(lambda: [chain() for _ in range(3)]) == 4000


def test_random_search_takes_the_candidate_with_the_lowest_loss_on_real_images(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = l2s.ArmSettings(**(SETTINGS | {"candidates": 5}))
    risks = iter([3.0, 2.0, 0.5, 4.0, 1.0])
    seen = []

    def augmented(network, augmenter, pool, loss):  # type: ignore[no-untyped-def]
        seen.append(augmenter)
        return lambda step: network(pool.images[:1]).sum() * 0

    now = {"risk": 0.0}

    def build() -> torch.nn.Module:
        now["risk"] = next(risks)
        return torch.nn.Conv2d(1, 4, 1)

    monkeypatch.setattr(arms, "augmented", augmented)
    monkeypatch.setitem(arms.LOSSES, "dice", lambda logits, labels: torch.tensor(now["risk"]))
    chosen = l2s.search(pool_of(task), build, settings, Context(tmp_path))
    assert isinstance(chosen, Parametric)
    assert chosen is seen[2]
    sigmas = [float(a.noise.sigma) for a in seen]
    assert all(0.005 <= sigma <= 0.5 for sigma in sigmas)
    assert len(set(sigmas)) == 5


def test_a_person_is_scored_over_all_slices_together() -> None:
    label = torch.zeros(3, 8, 8, dtype=torch.int64)
    label[0, :4] = 1  # 32 pixels
    label[1, :1] = 1  # 8 pixels
    label[2, 2:6] = 2
    prediction = label.clone()
    prediction[1] = 0
    rows = l2s.by_subject(prediction, label, ("a", "a", "b"), "test", ("background", "one", "two"), 1.0)
    assert [row["subject"] for row in rows] == ["a", "b"]
    assert rows[0]["dice"] == pytest.approx(2 * 32 / (32 + 40), abs=1e-4)  # not the mean of 1 and 0
    assert rows[0]["dice_two"] is None
    assert rows[1]["dice"] == rows[1]["dice_two"] == 1
    assert all(
        value is None or not isinstance(value, float) or math.isfinite(value) for row in rows for value in row.values()
    )


def test_cross_contrast_lists_arms_with_real_images_of_all_and_of_five() -> None:
    config = l2s.CrossContrast(**SETTINGS, arms=("learn2synth-nonparametric", "synthseg"), few=("supervised",), **LISTS)
    cells = arms.cross_contrast_cells(config)
    assert [(c.method, c.setting["subjects"]) for c in cells] == [
        ("learn2synth-nonparametric", "all"), ("synthseg", "none"), ("supervised", "5"),
    ]  # fmt: skip


def test_a_training_is_shared_by_the_two_experiments(tmp_path: Path) -> None:
    lists = LISTS | {"arms": ("supervised",)}
    inside, across = l2s.InDomain(**SETTINGS, foreign=(), **lists), l2s.CrossContrast(**SETTINGS, few=(), **lists)
    context = Context(tmp_path, l2s.EXPERIMENTS["in_domain"].artefacts)
    one = l2s.in_domain_run(Cell("supervised", "brain-mni", 0), inside, context)
    two = l2s.cross_contrast_run(Cell("supervised", "brain-mni", 0, {"subjects": "all"}), across, context)
    assert len(context.artefacts) == 1
    assert one.metrics["dice test"] == two.metrics["dice test"]
    assert {case["split"] for case in two.cases} == {"test", *(f"test-flash{a}" for a in (3, 5, 20, 30))}
    assert load_task("brain-mni", size=(32, 32), spacing=6.0, subjects=(8, 1, 2), slices=2).splits.keys() >= {"test"}
