"""The admission card measures what it says it does."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from synthrepro.data import Split, Task, load_task
from synthrepro.data.abdomen import CLASSES
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Context, Record, load_chapter, load_profile, records
from synthrepro.evidence.claims import load_claims
from synthrepro.evidence.records import Provenance
from synthrepro.methods import tasks
from synthrepro.metrics import dice

TINY = {
    "size": (32, 32),
    "spacing": 6.0,
    "subjects": (3, 1, 2),
    "slices": 2,
    "steps": 6,
    "batch": 2,
    "lr": 0.01,
    "checks": 2,
    "contrasts": ("t1w", "flash3"),
    "labelled": (1, 2),
    "seeds": 2,
}


@pytest.fixture
def config() -> tasks.Admission:
    return tasks.Admission(**TINY)


def test_every_profile_is_valid_and_lists_what_decides_first():
    for profile in ("smoke", "cpu", "gpu", "paper"):
        config = load_profile("tasks", profile)["admission"]
        cells = load_chapter("tasks")["admission"].cells(config)
        assert len({cell.key for cell in cells}) == len(cells)
        first = cells[: 3 * config.seeds]
        assert {cell.method for cell in first} == {"position", "intensity", "network"}
        assert all(cell.setting == {"contrast": "t1w", "labelled": "all"} for cell in first)


def test_every_profile_lists_the_lesions_in_every_modality_and_style():
    for profile in ("smoke", "cpu", "gpu", "paper"):
        config = load_profile("tasks", profile)["lesion_admission"]
        cells = load_chapter("tasks")["lesion_admission"].cells(config)
        assert len({cell.key for cell in cells}) == len(cells)
        first = cells[: 2 * 3 * config.seeds]
        assert {cell.method for cell in first} == {"position", "intensity", "network"}
        assert all((cell.setting["style"], cell.setting["labelled"]) == ("standard", "all") for cell in first)
        assert max(config.labelled) < config.subjects[0]
        for modality, styles in tasks.LESION_STYLES.items():
            task = load_task("lesion", modality=modality, subjects=(1, 1, 1), size=(16, 16))
            assert set(task.splits) == {"train", "validation", "test", *(f"test-{style}" for style in styles[1:])}
            shown = {cell.setting["style"] for cell in cells if cell.setting["modality"] == modality}
            assert shown == set(styles)


def test_position_alone_never_looks_at_the_image():
    predictor = tasks.Position(4, (8, 6))
    assert torch.equal(predictor(torch.rand(2, 1, 8, 6)), predictor(torch.zeros(2, 1, 8, 6)))


def test_intensity_alone_looks_at_one_pixel_and_sees_nothing_else():
    predictor = tasks.Intensity(4)
    torch.nn.init.normal_(predictor.logits, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 1, 8, 6, generator=torch.Generator().manual_seed(1))
    other = image.clone()
    other[..., 0, 0] = (other[..., 0, 0] + 0.5) % 1
    changed = (predictor(image) != predictor(other)).any(1)[0]
    assert predictor(image).shape == (1, 4, 8, 6)
    assert changed[0, 0]
    assert changed.sum() == 1


def test_colour_alone_tells_any_two_colours_apart_and_sees_one_pixel():
    predictor = tasks.Colour(2, levels=3)
    with torch.no_grad():
        predictor.logits.copy_(torch.arange(54).view(27, 2))
    level = torch.tensor([0.0, 0.5, 1.0])
    colours = torch.stack(torch.meshgrid(level, level, level, indexing="ij")).view(1, 3, 3, 9)
    found = predictor(colours)
    assert found.shape == (1, 2, 3, 9)
    assert torch.equal(found[0, 0].flatten(), torch.arange(0.0, 54, 2))


@pytest.mark.parametrize(("modality", "method"), [("dermoscopy", "intensity"), ("ultrasound", "network")])
def test_a_cell_of_the_lesions_scores_the_test_lesions_in_every_style(modality: str, method: str, tmp_path: Path):
    config = tasks.LesionAdmission(
        size=(16, 16), subjects=(4, 1, 2), steps=4, batch=2, lr=0.01, checks=2, modalities=(), labelled=(), seeds=1
    )
    own, *others = reversed(tasks.LESION_STYLES[modality])
    cell = Cell(method, "lesion", 0, {"modality": modality, "style": own, "labelled": "3"})
    result = tasks.lesion_run(cell, config, Context(tmp_path / "a"))
    assert [(case["split"], case["subject"]) for case in result.cases] == [
        (f"test-{style}", f"test-000{i}") for style in (own, *reversed(others)) for i in range(2)
    ]
    for score in ("dice", "jaccard"):
        mean = sum(case[score] for case in result.cases[:2]) / 2
        assert mean == pytest.approx(result.metrics[score], abs=1e-5)
        assert 0 <= result.metrics[f"{score}_validation"] <= 1
    for case in result.cases:
        assert case["jaccard"] == pytest.approx(case["dice"] / (2 - case["dice"]), abs=2e-5)
    assert tasks.lesion_run(cell, config, Context(tmp_path / "b")) == result


@pytest.mark.parametrize("method", ["position", "intensity", "network"])
def test_a_cell_scores_the_test_anatomies_in_every_contrast(method: str, config: tasks.Admission, tmp_path: Path):
    cell = Cell(method, "brain-mni", 0, {"contrast": "flash3", "labelled": "all"})
    result = tasks.run(cell, config, Context(tmp_path / "a"))
    contrasts = {"t1w", "flash3", "flash5", "flash20", "flash30", "mprage"}
    assert {case["split"] for case in result.cases} == {f"test-{contrast}" for contrast in contrasts}
    assert len(result.cases) == 6 * 2
    assert {case["subject"] for case in result.cases} == {"test-000", "test-001"}
    own = [case["dice"] for case in result.cases if case["split"] == "test-flash3"]
    assert sum(own) / len(own) == pytest.approx(result.metrics["dice"], abs=0.05)  # unlike weights of absent classes
    assert tasks.run(cell, config, Context(tmp_path / "b")) == result


def test_fewer_labels_are_a_part_of_more_and_a_seed_redraws_them(
    config: tasks.Admission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[set[str]] = []

    def note(network: object, task: object, labelled: object, *rest: object) -> None:
        seen.append(set(labelled.subjects))

    monkeypatch.setattr(tasks, "train", note)
    for seed in range(4):
        for labelled in ("1", "2", "all"):
            cell = Cell("network", "brain-mni", seed, {"contrast": "t1w", "labelled": labelled})
            tasks.run(cell, config, Context(tmp_path))
    for one, two, everybody in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert (len(one), len(two), len(everybody)) == (1, 2, 3)
        assert one < two < everybody
    assert len({frozenset(one) for one in seen[::3]}) > 1


def test_training_keeps_the_state_that_did_best_on_validation(
    config: tasks.Admission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    task = load_task("brain-mni", **{key: TINY[key] for key in ("size", "spacing", "subjects", "slices")})
    network = tasks.Intensity(4)
    states, marks = [], iter([0.7, 0.2])

    def score(network: torch.nn.Module, *rest: object) -> torch.Tensor:
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        return torch.tensor(next(marks))

    monkeypatch.setattr(tasks, "scored", score)
    tasks.train(network, task, task.splits["train"], config, 0, Context(tmp_path))
    assert len(states) == 2
    assert all(torch.equal(value, states[0][name]) for name, value in network.state_dict().items())
    assert not all(torch.equal(value, states[1][name]) for name, value in network.state_dict().items())


def test_the_criteria_are_the_differences_they_are_called():
    def record(method: str, contrast: str, labelled: str, **dice: float) -> Record:
        cell = Cell(method, "brain-mni", 0, {"contrast": contrast, "labelled": labelled})
        cases = [{"subject": "s", "split": f"test-{name}", "dice": value} for name, value in dice.items()]
        provenance = Provenance(None, None, "", {}, "", None, None, "", 0.0, 0.0, "")
        return Record("tasks", "admission", "cpu", cell, {}, "", {}, cases, [], provenance)

    records = [
        record("position", "t1w", "all", t1w=0.3, flash3=0.3),
        record("intensity", "t1w", "all", t1w=0.6, flash3=0.1),
        record("network", "t1w", "all", t1w=0.8, flash3=0.2),
        record("network", "flash3", "all", t1w=0.1, flash3=0.7),
        record("network", "t1w", "2", t1w=0.5, flash3=0.1),
    ]
    assert tasks.criteria(records) == pytest.approx(
        {
            "oracle above position alone": 0.5,
            "oracle above intensity alone": 0.2,
            "oracle above 2 labelled": 0.3,
            "oracle of flash3 above network of t1w, on flash3": 0.5,
        }
    )


# ----- the abdomen

ABDOMEN = {"size": (32, 32), "cases": (3, 1, 2), "slices": 8}


@pytest.fixture
def small() -> tasks.AbdomenAdmission:
    rates = {"lr": 0.01, "table_lr": 0.3}
    return tasks.AbdomenAdmission(
        **ABDOMEN, features=(8, 8, 8, 8, 8, 8), steps=4, batch=8, checks=2, labelled=(), seeds=1, **rates
    )


def test_every_profile_lists_the_abdomen_with_every_arm_at_one_seed_before_the_next():
    for profile in ("smoke", "cpu", "gpu", "paper"):
        config = load_profile("tasks", profile)["abdomen_admission"]
        cells = load_chapter("tasks")["abdomen_admission"].cells(config)
        assert len({cell.key for cell in cells}) == len(cells)
        arms = [("position", "all"), ("intensity", "all"), ("network", "all")]
        arms += [("network", str(n)) for n in config.labelled]
        assert [(cell.seed, cell.method, cell.setting["labelled"]) for cell in cells] == [
            (seed, *arm) for seed in range(config.seeds) for arm in arms
        ]
        slices = config.cases[0] * config.slices
        shares = [tasks.FEWEST, round(0.01 * slices), round(0.1 * slices)]
        assert list(config.labelled) == (shares if profile != "smoke" else shares[:1])


def test_the_first_four_labelled_slices_show_every_organ_and_a_seed_redraws_them():
    train = load_task("abdomen", **ABDOMEN).splits["train"]
    orders = [tasks.labelled_order(train, len(CLASSES), seed) for seed in range(5)]
    for order in orders:
        assert sorted(order) == list(range(len(train)))
        assert set(train.labels[order[: tasks.FEWEST]].flatten().tolist()) == set(range(len(CLASSES)))
    assert len({tuple(order) for order in orders}) == len(orders)
    assert tasks.labelled_order(train, len(CLASSES), 0) == orders[0]


def test_an_organ_that_no_slice_shows_is_an_error_in_one_sentence():
    train = Split(torch.zeros(5, 1, 4, 4), torch.ones(5, 4, 4, dtype=torch.int64), ("a",) * 5)
    with pytest.raises(UserError, match="show all 2 organs: ask for more"):
        tasks.labelled_order(train, 3, 0)


def test_a_score_by_volume_counts_a_cases_pixels_together_and_leaves_out_what_it_lacks():
    labels = torch.zeros(4, 2, 4, dtype=torch.int64)  # two cases of two slices
    maps = labels.clone()
    labels[0, 0, :3], labels[1, 1, 0] = 1, 1  # four pixels of the first case, none of the second
    maps[0, 0, :2], maps[1, 0, 0] = 1, 1  # two of them found, and one elsewhere
    labels[2:, 0], maps[2, 0] = 2, 2  # eight pixels of the second case, four of them found
    split = Split(torch.zeros(4, 1, 2, 4), labels, ("a", "a", "b", "b"))
    found = tasks.by_volume(dice, maps, split, 2, 3)
    assert found[0, 0] == pytest.approx(2 * 2 / (3 + 4))
    assert found[1, 1] == pytest.approx(2 * 4 / (4 + 8))
    assert found.isnan().tolist() == [[False, True], [True, False]]


def test_the_loss_is_half_cross_entropy_and_half_the_mean_over_classes_of_pooled_dice():
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=draws, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 5), generator=draws)
    p, y = logits.softmax(1), torch.stack([labels == k for k in range(3)], 1).double()
    cross_entropy = -(y * p.log()).sum(1).mean()
    pooled = 1 - 2 * (p * y).sum((0, 2, 3)) / (p + y).sum((0, 2, 3))  # (K,)
    found = tasks.cross_entropy_dice_loss(logits, labels)
    assert float(found) == pytest.approx(float(0.5 * cross_entropy + 0.5 * pooled.mean()), abs=1e-5)


@pytest.mark.parametrize(("method", "labelled"), [("position", "all"), ("intensity", "all"), ("network", "4")])
def test_a_cell_of_the_abdomen_scores_every_test_case_as_a_volume(
    method: str, labelled: str, small: tasks.AbdomenAdmission, tmp_path: Path
):
    cell = Cell(method, "abdomen", 0, {"labelled": labelled})
    result = tasks.abdomen_run(cell, small, Context(tmp_path / "a"))
    assert [(case["split"], case["subject"]) for case in result.cases] == [("test", "test-000"), ("test", "test-001")]
    for score in ("dice", "jaccard"):
        mean = sum(case[score] for case in result.cases) / 2
        assert mean == pytest.approx(result.metrics[score], abs=1e-5)
        assert 0 <= result.metrics[f"{score}_validation"] <= 1
    assert {f"dice_{organ}" for organ in CLASSES[1:]} < set(result.metrics)
    assert tasks.abdomen_run(cell, small, Context(tmp_path / "b")) == result


def test_a_cell_of_the_abdomen_that_finds_one_organ_only_scores_it_and_zero_for_the_others(
    small: tasks.AbdomenAdmission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    splits = load_task("abdomen", **ABDOMEN).splits

    def liver(network: object, images: Tensor) -> Tensor:
        (labels,) = (split.labels for split in splits.values() if torch.equal(split.images, images))
        return labels * (labels == 1)

    monkeypatch.setattr(tasks, "segment", liver)
    monkeypatch.setattr(tasks, "abdomen_train", lambda *given: None)
    result = tasks.abdomen_run(Cell("position", "abdomen", 0, {"labelled": "all"}), small, Context(tmp_path))
    for organ in CLASSES[1:]:
        assert result.metrics[f"dice_{organ}"] == (organ == "liver")
    for i, case in enumerate(result.cases):
        organs = set(splits["test"].labels[8 * i : 8 * (i + 1)].flatten().tolist()) - {0}
        assert case["dice"] == case["jaccard"] == pytest.approx(1 / len(organs), abs=1e-5)


class Noting(nn.Module):
    """Notes the grey level of every image it is shown, one number an image, and answers the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.batches: list[list[float]] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.batches.append(images[:, 0, 0, 0].tolist())
        return self.logits[None, :, None, None].expand(len(images), -1, *images.shape[2:])


@pytest.mark.parametrize(("n", "expected"), [(4, 4), (20, 8)])
def test_a_batch_holds_no_slice_twice_and_training_keeps_the_best_on_validation(
    n: int, expected: int, small: tasks.AbdomenAdmission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = torch.arange(n)[:, None, None, None].expand(-1, 1, 4, 4) / n
    labelled = Split(images, torch.ones(n, 4, 4, dtype=torch.int64), ("a",) * n)
    states, marks, network = [], iter([0.7, 0.2]), Noting()

    def score(*given: object) -> Tensor:
        states.append(network.logits.detach().clone())
        return torch.tensor(next(marks))

    monkeypatch.setattr(tasks, "by_volume", score)
    task = Task("abdomen", ("background", "liver"), 1, {"train": labelled, "validation": labelled}, None)  # type: ignore[arg-type]
    tasks.abdomen_train(network, task, labelled, 0.1, small, 0, Context(tmp_path))
    assert [len(batch) for batch in network.batches] == [expected] * small.steps
    assert all(len(set(batch)) == expected for batch in network.batches)
    assert len({tuple(batch) for batch in network.batches}) > 1
    assert len(states) == small.checks
    assert torch.equal(network.logits, states[0])
    assert not torch.equal(network.logits, states[1])


def test_on_abdomen_position_and_intensity_stay_far_below_the_oracle() -> None:
    found = {
        record.cell.method: record.metrics["dice"]
        for record in records("tasks", "abdomen_admission")
        if record.profile == "cpu" and record.cell.setting["labelled"] == "all" and record.cell.seed == 0
    }
    assert found["network"] > 2 * max(found["position"], found["intensity"])


# ----- the same people in other scanners


def test_every_profile_lists_the_other_modalities_as_abdomen_and_both_at_one_seed_before_the_next():
    for profile in ("smoke", "cpu", "gpu", "paper"):
        config = load_profile("tasks", profile)
        own, other = config["abdomen_admission"], config["abdomen_modalities_admission"]
        assert own.model_dump(exclude={"size"}) == other.model_dump(exclude={"size"})
        assert (own.labelled, own.seeds) == (other.labelled, other.seeds)
        if profile in ("smoke", "cpu"):
            assert own.size == other.size
        cells = load_chapter("tasks")["abdomen_modalities_admission"].cells(other)
        assert len({cell.key for cell in cells}) == len(cells)
        assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
        alone = [(cell.seed, cell.method, cell.setting) for cell in tasks.abdomen_cells(own)]
        for task in ("abdomen-mr", "abdomen-us"):
            assert [(cell.seed, cell.method, cell.setting) for cell in cells if cell.task == task] == alone
        assert len(cells) == 2 * len(alone)


def test_every_row_of_the_other_modalities_tables_is_measured_and_every_organ_has_a_column():
    config = load_profile("tasks", "cpu")["abdomen_modalities_admission"]
    cells = [
        {"method": cell.method, "task": cell.task, **cell.setting} for cell in tasks.abdomen_modalities_cells(config)
    ]
    specs = load_claims("tasks").tables["abdomen_modalities_admission"]
    for spec in specs:
        for values in product(*spec.rows.values()):
            row = {**spec.where, **dict(zip(spec.rows, values, strict=True))}
            assert sum(row.items() <= cell.items() for cell in cells) == config.seeds, (spec.id, row)
    organs = {spec.where["task"]: {column.metric for column in spec.metrics} for spec in specs if "task" in spec.where}
    assert organs == {task: {f"dice_{organ}" for organ in CLASSES[1:]} for task in tasks.ABDOMEN_MODALITIES}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_labels_the_same_slices_of_the_same_people_in_ct_and_mr(seed: int):
    ct, mr = (load_task(name, **ABDOMEN).splits["train"] for name in ("abdomen", "abdomen-mr"))
    assert tasks.labelled_order(ct, len(CLASSES), seed) == tasks.labelled_order(mr, len(CLASSES), seed)


@pytest.mark.parametrize(("task", "labelled"), [("abdomen-mr", "4"), ("abdomen-us", "all")])
def test_a_cell_of_another_modality_scores_the_test_cases_of_that_task(
    task: str, labelled: str, small: tasks.AbdomenAdmission, tmp_path: Path
):
    context = Context(tmp_path)
    result = tasks.abdomen_run(Cell("network", task, 0, {"labelled": labelled}), small, context)
    assert set(context.data_hashes) == {task}
    assert [(case["split"], case["subject"]) for case in result.cases] == [("test", "test-000"), ("test", "test-001")]
    shown = set(load_task(task, **ABDOMEN).splits["test"].labels.flatten().tolist())
    for number, organ in enumerate(CLASSES[1:], 1):  # a place of the array may show none of an organ
        assert (number in shown) == (0 <= result.metrics[f"dice_{organ}"] <= 1)


@pytest.mark.parametrize("task", tasks.ABDOMEN_MODALITIES)
def test_position_and_intensity_stay_far_below_the_oracle_in_other_modalities_too(task: str) -> None:
    found = {
        record.cell.method: record.metrics["dice"]
        for record in records("tasks", "abdomen_modalities_admission")
        if (record.profile, record.cell.task, record.cell.seed) == ("cpu", task, 0)
        and record.cell.setting["labelled"] == "all"
    }
    if set(found) != {"position", "intensity", "network"}:
        pytest.skip(f"{task} is not measured yet")
    assert found["network"] > 2 * max(found["position"], found["intensity"])
