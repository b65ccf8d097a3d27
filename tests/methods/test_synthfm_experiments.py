"""The tables: which cells there are, how everybody is prompted alike, and scores by hand and from end to end."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from synthrepro import data
from synthrepro.data import Card, Split, Task
from synthrepro.evidence import Cell, Context, load_profile
from synthrepro.methods import synthfm
from synthrepro.methods.synthfm import arms, experiments
from synthrepro.models.sam import SIZES, embed, sam
from synthrepro.synthesis.prompts import box_of
from synthrepro.training import seeded, stream

SHAPE: dict[str, Any] = {"side": 32, "patch": 8, "width": 16, "depth": 1, "heads": 2, "global_blocks": [0], "window": 4}
SHAPE |= {"prompt_dim": 16, "mlp_dim": 16, "decoder_heads": 2}
TRAIN: dict[str, Any] = {"steps": 2, "batch": 2, "lr": 0.002, "encoder_lr": 0.001, "warm_up": 1, "weight_decay": 0.01}
TRAIN |= {"kinds": ["points"], "loss": "dice+ce", "precision": "no"}
SMALL = {"size": [32, 32], "cases": [1, 1, 2], "slices": 4}
KNOWN: dict[str, Any] = {
    "sam": SHAPE,
    "pretrain": TRAIN,
    "photographs": 0.0,
    "pretrainings": 1,
    "prompting": {"positive": [1, 3], "negative": [0, 2], "margin": 0.02, "ring": [0.02, 0.1], "jitter": 0.02},
    "target": {"smallest": 0.01, "largest": 0.4},
    "checkpoints": {"vit_h": None},
    "train": TRAIN,
    "pool": 3,
    "tasks": {"abdomen": SMALL},
    "supervised": {"embedded": ["abdomen"], "real": []},
    "images": 2,
    "smallest": 0.01,
    "spacing": {"abdomen": 6.0, "hippocampus": 1.0},
    "blocks": [],
}
PROMPTS = ("1,0", "3,0", "1,2", "3,2", "box", "box,1,0", "mask")
PROFILES = ("smoke", "cpu", "gpu", "paper")


def config(**changes: Any) -> synthfm.Table:
    return synthfm.Table.model_validate(KNOWN | changes)


def cell(method: str = "start", task: str = "abdomen", seed: int = 0, **setting: Any) -> Cell:
    base = {"modality": "ct", "prompts": "1,0", "model": "promptable", "ranges": "ours"}
    return Cell(method, task, seed, base | setting)


def scenes(subjects: str = "aabbcc") -> Split:
    """A disc and, in every other image, a square, on images of 32 x 32."""
    axis = torch.arange(32)
    rows = torch.linspace(9, 20, len(subjects))
    labels = torch.stack([((axis - 10) ** 2 + (axis[:, None] - c) ** 2 < 40).long() for c in rows])
    labels[::2, 20:30, 20:28] = 2
    images = (0.2 + 0.3 * labels + 0.1 * torch.rand(labels.shape, generator=stream(0, "toy")))[:, None]
    return Split(images, labels, tuple(subjects))


def toy_task(name: str) -> Task:
    splits = {"train": scenes(), "test": scenes()}
    return Task(name, ("background", "ball", "Square"), 1, splits, Card("", "", "", "", ""))


class TestCells:
    BLOCK = {"tasks": ["abdomen"], "modalities": ["ct", "us"], "arms": ["start", "synthfm"], "seeds": 2}  # noqa: RUF012

    def test_block_by_block_and_all_seeds_of_a_cell_before_the_next(self):
        blocks = [self.BLOCK, {"tasks": ["hippocampus"], "modalities": ["mr"], "arms": ["synthfm"], "seeds": 1}]
        assert synthfm.table_cells(config(blocks=blocks)) == [
            *(cell(arm, modality=m, seed=s) for m in ("ct", "us") for arm in ("start", "synthfm") for s in (0, 1)),
            cell("synthfm", "hippocampus", modality="mr"),
        ]

    def test_what_two_blocks_list_is_one_cell(self):
        once = synthfm.table_cells(config(blocks=[self.BLOCK]))
        more = self.BLOCK | {"seeds": 3, "prompts": ["1,0", "box"]}
        cells = synthfm.table_cells(config(blocks=[self.BLOCK, more]))
        assert cells[: len(once)] == once
        assert len(cells) == len({each.key for each in cells}) == 2 * 2 * 3 * 2

    def test_what_a_block_leaves_out_is_one_point_ours_and_the_baseline(self):
        (first, *_) = synthfm.table_cells(config(blocks=[self.BLOCK]))
        assert first.setting == {"modality": "ct", "prompts": "1,0", "model": "promptable", "ranges": "ours"}

    @pytest.mark.parametrize("wrong", [{"prompts": ["4,0"]}, {"prompts": ["point"]}, {"modalities": ["pet"]}])
    def test_what_there_is_not_is_refused(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))[0]):
            config(blocks=[self.BLOCK | wrong])

    def test_the_abdomen_is_shown_in_its_modality_and_a_real_task_as_it_is(self):
        assert [synthfm.shown(cell(modality=m)) for m in ("ct", "mr", "us")] == ["abdomen", "abdomen-mr", "abdomen-us"]
        for task in ("hippocampus", "breast-us", "abdomen-ct", "brain-mni"):
            assert synthfm.shown(cell(task=task, modality="us")) == task

    def test_steps_are_those_of_training(self):
        assert synthfm.table_steps(cell("synthfm"), config()) == 2
        assert synthfm.table_steps(cell("start"), config()) == 0


class TestPrompts:
    structures = synthfm.structures_of(scenes(), 3, 0.01)
    every = torch.arange(len(structures))

    def prompt(self, prompts: str, seed: int = 0, rows: torch.Tensor | None = None) -> synthfm.Prompt:
        return synthfm.prompts_of(self.structures, prompts, config(), seed)(self.every if rows is None else rows)

    def test_points_lie_where_they_should(self):
        prompt = self.prompt("3,2")
        masks = self.structures.masks(self.every)
        assert prompt.points.shape == (len(masks), 5, 2)
        assert prompt.labels.tolist() == [[1, 1, 1, 0, 0]] * len(masks)
        x, y = prompt.points.long().unbind(-1)
        values = masks[self.every[:, None], y, x]
        assert torch.equal(values, prompt.labels)
        assert prompt.box is None
        assert not prompt.again

    @pytest.mark.parametrize(
        ("prompts", "kept"), [("1,0", [0]), ("3,0", [0, 1, 2]), ("1,2", [0, 3, 4]), ("box,1,0", [0]), ("mask", [0])]
    )
    def test_fewer_points_are_the_first_of_more(self, prompts, kept):
        most, fewer = self.prompt("3,2"), self.prompt(prompts)
        assert torch.equal(fewer.points, most.points[:, kept])
        assert torch.equal(fewer.labels, most.labels[:, kept])
        assert fewer.again == (prompts == "mask")

    def test_boxes_are_round_their_structures_and_the_same_beside_a_point(self):
        box, both = self.prompt("box"), self.prompt("box,1,0")
        assert box.points is box.labels is None
        assert torch.equal(box.box, both.box)
        outwards = (box.box - box_of(self.structures.masks(self.every))) * torch.tensor([-1, -1, 1, 1])
        assert outwards.min() >= 0
        assert 0 < outwards.max() <= 0.02 * 32 + 1e-4

    @pytest.mark.parametrize("prompts", PROMPTS)
    def test_they_are_the_seeds_and_rows_come_from_the_whole(self, prompts):
        one, again, other = self.prompt(prompts), self.prompt(prompts), self.prompt(prompts, seed=1)
        some = self.prompt(prompts, rows=torch.tensor([3, 1]))
        for a, b, c in zip(one[:3], again[:3], some[:3], strict=True):
            if a is not None:
                assert torch.equal(a, b)
                assert torch.equal(a[[3, 1]], c)
        places = [each.box if each.points is None else each.points for each in (one, other)]
        assert not torch.equal(*places)

    def test_all_arms_starts_and_ranges_of_a_seed_are_given_the_same(self, tmp_path, monkeypatch):
        seen = []
        real = experiments.answer
        monkeypatch.setattr(arms, "load_task", lambda name, **options: toy_task(name))
        network = seeded(lambda: sam(config().sam.size()), stream(0, "x")).eval()
        monkeypatch.setattr(experiments, "trained", lambda *given: network)

        def note(sam, embeddings, prompt, size):
            seen.append(prompt)
            return real(sam, embeddings, prompt, size)

        monkeypatch.setattr(experiments, "answer", note)
        for method, model, ranges in (("start", "promptable", "ours"), ("supervised", "vit_h", "doubled")):
            each = cell(method, model=model, ranges=ranges, prompts="3,2")
            synthfm.table_run(each, config(images=1), Context(tmp_path / method))
        one, other = seen
        assert torch.equal(one.points, other.points)
        assert torch.equal(one.labels, other.labels)


class TestAnswers:
    split = scenes()
    structures = synthfm.structures_of(split, 3, 0.01)

    def network(self):
        network = seeded(lambda: sam(config().sam.size()), stream(0, "x")).eval()
        draws = stream(1, "x")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
        return network

    @pytest.mark.parametrize("prompts", ["3,2", "box", "mask"])
    def test_batches_change_nothing_and_images_are_encoded_once(self, prompts, tmp_path, monkeypatch):
        network, encoded = self.network(), []
        real = experiments.embed
        monkeypatch.setattr(experiments, "embed", lambda net, x: encoded.append(len(x)) or real(net, x))
        given = synthfm.prompts_of(self.structures, prompts, config(), 0)
        found = [
            synthfm.answers_of(network, self.split.images, self.structures, given, "no", Context(tmp_path), batch)
            for batch in (64, 2)
        ]
        assert sum(encoded) == 2 * 6
        assert list(found[0]) == ["", "oracle", "single"]
        for name, masks in found[0].items():
            assert masks.shape == (9, 32, 32)
            assert masks.dtype == torch.bool
            assert (masks != found[1][name]).float().mean() < 1e-3

    def test_the_oracle_is_the_best_of_the_three_and_the_choice_is_one_of_them(self, tmp_path):
        network = self.network()
        given = synthfm.prompts_of(self.structures, "1,0", config(), 0)
        found = synthfm.answers_of(network, self.split.images, self.structures, given, "no", Context(tmp_path))
        truth = self.structures.masks(torch.arange(9)).bool()
        with torch.no_grad():
            prompt = given(torch.arange(9))
            embeddings = embed(network, self.split.images)[self.structures.images]
            logits, iou = synthfm.answer(network, embeddings, prompt, (32, 32))
        large = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False) > 0
        dice = 2 * (large & truth[:, None]).sum((2, 3)) / (large.sum((2, 3)) + truth.sum((1, 2))[:, None])
        rows = torch.arange(9)
        ours = {name: 2 * (m & truth).sum((1, 2)) / (m.sum((1, 2)) + truth.sum((1, 2))) for name, m in found.items()}
        torch.testing.assert_close(ours["oracle"], dice[:, 1:].amax(1), atol=0.02, rtol=0)
        torch.testing.assert_close(ours["single"], dice[:, 0], atol=0.02, rtol=0)
        torch.testing.assert_close(ours[""], dice[rows, 1 + iou[:, 1:].argmax(1)], atol=0.02, rtol=0)
        assert (ours["oracle"] >= ours[""]).all()


class TestTrivial:
    def test_disc_and_image_by_hand(self):
        """Pixel by pixel, with means within subjects and structures first."""
        split = scenes("aabbbb")
        structures = synthfm.structures_of(split, 3, 0.01)
        found = experiments.trivial(structures, split, config(), 4)
        masks = structures.masks(torch.arange(len(structures))).numpy().astype(bool)
        points = synthfm.prompts_of(structures, "1,0", config(), 4)(torch.arange(len(structures))).points[:, 0].numpy()

        def mean(answers: np.ndarray) -> float:
            dice = 2 * (answers & masks).sum((1, 2)) / (answers.sum((1, 2)) + masks.sum((1, 2)))
            subjects = np.array(split.subjects)[structures.images.numpy()]
            of = [
                np.mean([dice[(subjects == s) & (structures.classes.numpy() == c)].mean() for c in (1, 2)])
                for s in "ab"
            ]
            return float(np.mean(of))

        discs = []
        for radius in 16 * 10 ** np.linspace(-2, 0, 17):
            answers = np.zeros_like(masks)
            for i, (x, y) in enumerate(points):
                for row in range(32):
                    for column in range(32):
                        answers[i, row, column] = math.hypot(row - y, column - x) <= radius
            discs.append(mean(answers))
        assert found["dice_disc"] == pytest.approx(max(discs), abs=1e-5)
        assert found["dice_image"] == pytest.approx(mean(np.ones_like(masks)), abs=1e-5)
        assert found["dice_image"] < found["dice_disc"]

    def test_a_disc_prompted_at_its_middle_is_found(self):
        axis = torch.arange(64)
        labels = ((axis - 32) ** 2 + (axis[:, None] - 32) ** 2 <= 32**2 / 10**0.5).long()[None]  # a radius it tries
        split = Split(torch.zeros(1, 1, 64, 64), labels, ("a",))
        structures = synthfm.structures_of(split, 2, 0.0)
        middle = config(prompting=KNOWN["prompting"] | {"margin": 0.28})
        found = experiments.trivial(structures, split, middle, 0)
        assert found["dice_disc"] > 0.95
        share = labels.float().mean().item()
        assert found["dice_image"] == pytest.approx(2 * share / (1 + share), abs=1e-5)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("artefacts")


def check(result, classes: tuple[str, ...]) -> None:
    """Scores are scores, and metrics are the means of cases."""
    for score in ("dice", "dice_oracle", "dice_single", "jaccard", "surface_dice", "dice_disc", "dice_image"):
        assert 0 <= result.metrics[score] <= 1, score
    assert result.metrics["dice_oracle"] >= result.metrics["dice"]
    assert result.metrics["hausdorff95"] >= 0
    for score in ("dice", "jaccard", "hausdorff95", *(f"dice_{name.lower()}" for name in classes)):
        there = [case[score] for case in result.cases if score in case]
        if there:
            assert result.metrics[score] == pytest.approx(np.mean(there), abs=1e-6)
    assert {case["split"] for case in result.cases} == {"test"}


@pytest.mark.parametrize("method", ["start", "synthfm", "supervised", "boxes"])
def test_a_table_is_measured_from_end_to_end(method, tmp_path, shared, monkeypatch):
    monkeypatch.setattr(arms, "load_task", lambda name, **options: toy_task(name))
    monkeypatch.setattr(arms, "POOL_BATCH", 3)
    builders = synthfm.EXPERIMENTS["zero_shot"].artefacts
    dice = {}
    for prompts in PROMPTS:
        context = Context(tmp_path / prompts, builders, shared)
        result = synthfm.table_run(cell(method, prompts=prompts), config(), context)
        check(result, ("ball", "Square"))
        assert [case["subject"] for case in result.cases] == ["a", "b", "c"]
        assert result.metrics["structures"] == 9
        assert {"dice_ball", "dice_square"} <= set(result.metrics)
        assert context.data_hashes.keys() == {"abdomen"}
        assert sum(name.startswith("decoder-") for name in context.artefacts) == (method != "start")
        dice[prompts] = result.metrics["dice"]
    assert len(set(dice.values())) > 1, "prompts are looked at"
    again = synthfm.table_run(cell(method, prompts="3,2"), config(), Context(tmp_path / "again", builders, shared))
    assert again.metrics["dice"] == dice["3,2"]


def test_a_task_that_there_is_is_measured(tmp_path, shared):
    builders = synthfm.EXPERIMENTS["zero_shot"].artefacts
    result = synthfm.table_run(cell("start", prompts="1,2"), config(), Context(tmp_path, builders, shared))
    classes = data.load_task("abdomen", **SMALL).classes
    check(result, classes[1:])
    assert [case["subject"] for case in result.cases] == ["test-000", "test-001"]


class TestProfiles:
    @pytest.mark.parametrize("profile", PROFILES)
    def test_every_cell_is_of_a_known_arm_task_start_and_range(self, profile):
        sections = load_profile("synthfm", profile)
        assert set(sections) == set(synthfm.EXPERIMENTS)
        for name, section in sections.items():
            cells = synthfm.table_cells(section)
            assert cells
            for each in cells:
                assert each.method in synthfm.ARMS, name
                assert each.setting["ranges"] in synthfm.RANGES
                model = each.setting["model"]
                assert model == "promptable" or (model in SIZES and model in section.checkpoints)
                task = synthfm.shown(each)
                assert task in data.TASKS
                assert task in section.tasks
                assert section.spacing[task] > 0
                if synthfm.ARMS[each.method].images == "medical":
                    learns = section.supervised[data._reader(task).FAMILY]
                    assert learns, f"{each.method} has nothing to learn from for {task}"
                    assert set(learns) <= set(section.tasks)
                    assert {data._reader(other).FAMILY for other in learns} == {data._reader(task).FAMILY}
            modalities: dict[str, set[str]] = {}
            for each in cells:
                modalities.setdefault(each.task, set()).add(str(each.setting["modality"]))
            assert all(task == "abdomen" or len(found) == 1 for task, found in modalities.items())
            assert not {"abdomen-mr", "abdomen-us"} & set(modalities), "renderings of `abdomen`"

    @pytest.mark.parametrize("profile", PROFILES)
    def test_every_setting_is_one_that_can_be(self, profile):
        for section in load_profile("synthfm", profile).values():
            section.sam.size()
            section.prompting.points()
            section.prompting.boxes()
            assert 0 < section.target.smallest < section.target.largest <= 1
            assert 0 < section.smallest < 0.05
            assert 0 <= section.photographs <= 1
            assert section.pretrainings >= 1
            for training in (section.train, section.pretrain):
                assert training.warm_up < training.steps
                assert training.kinds
            assert section.pool is None or section.pool >= section.train.batch
            for task, options in section.tasks.items():
                data._reader(task).Options(**options)

    def test_no_structure_is_called_like_an_answer(self):
        """Both are scores by the name of `dice_<name>`."""
        for task in load_profile("synthfm", "cpu")["zero_shot"].tasks:
            classes = getattr(data._reader(task), "CLASSES", ())
            assert not {name.lower() for name in classes} & {"oracle", "single", "disc", "image"}, task

    def test_smoke_runs_every_table_and_every_kind_of_training(self):
        sections = load_profile("synthfm", "smoke").items()
        cells = [each for name, section in sections for each in synthfm.EXPERIMENTS[name].cells(section)]
        assert {synthfm.ARMS[each.method].images for each in cells} >= {None, "synthetic", "medical"}
        assert {each.task for each in cells} == {"abdomen"}, "which needs no data set"
        assert {each.setting["model"] for each in cells} == {"promptable"}

    def test_every_arm_is_in_a_table(self):
        cells = [c for name, s in load_profile("synthfm", "cpu").items() for c in synthfm.EXPERIMENTS[name].cells(s)]
        assert {each.method for each in cells} == set(synthfm.ARMS)
        assert {each.setting["prompts"] for each in cells} == set(PROMPTS)
        assert {each.setting["ranges"] for each in cells} == set(synthfm.RANGES)
