"""Fine-tuning: the loss, the labelled slices, the scores, and what the arms share and do not share."""

import math

import pytest
import torch
from torch.nn import functional as F

from synthrepro.data import Card, Split, Task
from synthrepro.errors import UserError
from synthrepro.evidence import Cell
from synthrepro.evidence.context import Context
from synthrepro.evidence.profiles import load_profile
from synthrepro.methods import ddpm
from synthrepro.methods.ddpm import arms
from synthrepro.models.diffusion_unet import Segmenter


def test_the_loss_is_equations_six_to_eight():
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=draws, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 5), generator=draws)
    y, g = logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1).double()
    n = labels.numel()
    entropy = -(g * y.log()).sum() / n
    dice = 1 - (2 * (g * y).sum() + 1e-5) / (g.sum() + y.sum() + 1e-5)
    assert ddpm.segmentation_loss(logits, labels) == pytest.approx(float(0.5 * entropy + 0.5 * dice), abs=1e-9)


def split(n: int = 40, classes: int = 4, subjects: int = 4) -> Split:
    labels = torch.zeros(n, 8, 8, dtype=torch.int64)
    for i in range(n):
        labels[i, 0, 0] = i % classes  # a slice shows one organ or none
    names = tuple(f"case-{i * subjects // n}" for i in range(n))
    return Split(torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels, names)


def test_the_few_labelled_slices_show_every_organ_and_each_choice_is_as_likely():
    there = split()
    seen = torch.zeros(40)
    for seed in range(200):
        rows = ddpm.labelled_slices(there, 4, 4, seed, every_class=True)
        assert len(set(rows)) == 4
        assert {1, 2, 3} <= {int(there.labels[row].max()) for row in rows}
        seen[rows] += 1
    assert rows == ddpm.labelled_slices(there, 4, 4, 199, every_class=True)
    assert seen[torch.arange(40) % 4 > 0].min() > 5
    assert seen.sum() == 800


def test_more_labelled_slices_are_any():
    rows = ddpm.labelled_slices(split(), 10, 4, 0, every_class=False)
    assert len(set(rows)) == 10
    assert rows != ddpm.labelled_slices(split(), 10, 4, 1, every_class=False)


def test_slices_that_cannot_be_had_are_an_error():
    with pytest.raises(UserError, match="there are 40"):
        ddpm.labelled_slices(split(), 41, 4, 0, every_class=False)
    with pytest.raises(UserError, match="all 8 organs"):
        ddpm.labelled_slices(split(), 4, 9, 0, every_class=True)


def test_batches_go_through_all_rows_before_any_comes_again():
    rows = [row for step in range(25) for row in ddpm.rows_of(10, 4, step, 0)]
    for epoch in range(10):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert sorted(ddpm.rows_of(4, 4, 17, 0)) == [0, 1, 2, 3]
    assert ddpm.rows_of(10, 4, 3, 0) != ddpm.rows_of(10, 4, 3, 1)


def test_scores_of_volumes_slices_and_absent_organs():
    labels = torch.zeros(4, 8, 8, dtype=torch.int64)
    labels[:2, :4] = 1  # organ 1 in two slices of case a, nowhere in case b
    labels[2:, :, 4:] = 2  # organ 2 in case b
    there = Split(torch.zeros(4, 1, 8, 8), labels, ("a", "a", "b", "b"))
    prediction = labels.clone()
    prediction[1] = 0  # organ 1 is missed in one of its slices
    prediction[3, 0, 0] = 1  # and one pixel of it is found where it is not
    a, b = ddpm.volume_scores(prediction, there, "test", ("background", "x", "y"), 1.0, 2)
    assert (a["subject"], a["split"], b["subject"]) == ("a", "test", "b")
    assert a["dice"] == pytest.approx(2 / 3, abs=1e-5)
    assert a["jaccard"] == pytest.approx(1 / 2, abs=1e-5)
    assert (a["dice_x"], a["dice_y"]) == (pytest.approx(2 / 3, abs=1e-5), None)
    assert a["dice_slice"] == pytest.approx(1 / 2)  # 1 in one slice, 0 in the other
    assert a["dice_absent"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-5)  # organ 2 is rightly not found
    assert b["dice"] == 1
    assert b["dice_absent"] == pytest.approx(1 / 2)  # organ 1 is found where it is not
    assert b["dice_slice_absent"] == pytest.approx(3 / 4)  # in one of its two slices
    assert b["surface_dice"] == 1
    scores = ddpm.volume_dice(prediction, there, 3)
    assert scores.shape == (2, 2)
    assert math.isnan(scores[0, 1])


SHAPE = ddpm.UNetSettings(multipliers=(1, 2), blocks=1, attention=(), head_channels=4, groups=4)


def settings(**changes) -> ddpm.ArmSettings:
    known = load_profile("ddpm", "smoke")["label_ratio"].model_dump()
    known = {name: value for name, value in known.items() if name in ddpm.ArmSettings.model_fields}
    known |= {"size": (8, 8), "unet": SHAPE, "steps": {"1": 6}, "batch": 4, "layers": (0,)}
    known |= {"sizes": {"S": {"channels": 4, "hidden": 4}}, "transfer": {4: None}}
    return ddpm.ArmSettings(**known | changes)


def spec(**changes) -> dict:
    found = {"task": "abdomen", "size": "S", "t": 0, "ratio": "1", "seeds": dict.fromkeys(arms.PARTS, 0), "data": ""}
    return found | changes


def network(arm: str, config: ddpm.ArmSettings, folder) -> Segmenter:
    plain = ddpm.Arm("", strategy=ddpm.ARMS[arm].strategy, several=ddpm.ARMS[arm].several)
    return ddpm.segmenter_for(plain, spec(), 4, config, Context(folder))


@pytest.mark.parametrize("arm", ["linear", "linear-layers", "decoder", "decoder-layers", "full"])
def test_keeping_the_frozen_parts_outputs_changes_nothing(arm, tmp_path):
    there, ends = split(), []
    for gib in (0, 1):
        config = settings(cache_gib=gib)
        trained = network(arm, config, tmp_path)
        fit = (there.images, there.labels, spec(), config, Context(tmp_path / f"{gib}"))
        ddpm.fit(trained, ddpm.ARMS[arm], *fit)
        ends.append(trained.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("arm", ["linear", "decoder", "full"])
def test_what_is_frozen_stays_and_the_rest_moves(arm, tmp_path):
    config, there = settings(), split()
    trained = network(arm, config, tmp_path)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    ddpm.fit(trained, ddpm.ARMS[arm], there.images, there.labels, spec(), config, Context(tmp_path / "x"))
    moved = {name for name, p in trained.named_parameters() if not torch.equal(before[name], p)}
    trains = {"linear": ("head.",), "decoder": ("head.", "unet.up_blocks."), "full": ("",)}[arm]
    assert moved == {name for name in before if name.startswith(trains)}


def test_the_head_moves_at_ten_times_the_rate(tmp_path, monkeypatch):
    seen = {}
    real = torch.optim.Adam.__init__

    def note(self, groups, **options):
        seen["groups"] = [{name: value for name, value in g.items() if name != "params"} for g in groups]
        real(self, groups, **options)

    monkeypatch.setattr(torch.optim.Adam, "__init__", note)
    config, there = settings(head_factor=10, lr={"unet": 1e-3}), split()
    trained = network("decoder", config, tmp_path)
    arm = ddpm.Arm("", strategy="decoder")
    ddpm.fit(trained, arm, there.images, there.labels, spec(), config, Context(tmp_path / "x"))
    assert seen["groups"] == [{"lr": 1e-3, "weight_decay": 1e-4}, {"lr": pytest.approx(1e-2), "weight_decay": 1e-3}]


def test_a_training_that_is_resumed_ends_the_same(tmp_path):
    config, there, ends = settings(), split(), []
    whole = network("decoder", config, tmp_path)
    arm = ddpm.ARMS["decoder"]
    ddpm.fit(whole, arm, there.images, there.labels, spec(), config, Context(tmp_path / "whole"))
    ends.append(whole.state_dict())
    part = network("decoder", config, tmp_path)
    context, calls = Context(tmp_path / "part"), []

    def due() -> bool:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return True

    context.checkpoint_due = due
    with pytest.raises(KeyboardInterrupt):
        ddpm.fit(part, arm, there.images, there.labels, spec(), config, context)
    assert context.load("training")["step"] == 3
    again = network("decoder", config, tmp_path)
    ddpm.fit(again, arm, there.images, there.labels, spec(), config, Context(tmp_path / "part"))
    ends.append(again.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def cell(method: str = "decoder", seed: int = 0, **setting) -> Cell:
    return Cell(method, "abdomen", seed, {"ratio": "1", "size": "S", "t": 0, "redrawn": "all"} | setting)


def specs(monkeypatch, tmp_path, cells, config=None) -> list[dict]:
    """What each cell asks of its artefacts."""
    config = config or load_profile("ddpm", "cpu")["label_ratio"]
    asked = []

    class Asked(Exception):
        pass

    def artefact(self, name, there):
        asked.append((name, there))
        if name == "arm":
            raise Asked
        return tmp_path / "ddpm-x"

    monkeypatch.setattr(Context, "artefact", artefact)
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    part = Split(torch.zeros(1, 1, 8, 8), labels, ("a",))
    card = Card("", "", "", "", "")
    monkeypatch.setattr(arms, "task_of", lambda name, config: Task(name, ("b", "x"), 1, {"train": part}, card))
    for each in cells:
        with pytest.raises(Asked):
            arms.predicted(each, config, Context(tmp_path))
    return asked


def test_tables_share_what_they_train(monkeypatch, tmp_path):
    profile = load_profile("ddpm", "cpu")
    for name in ("full_data", "organs", "controls", "seeds"):
        ours, theirs = (specs(monkeypatch, tmp_path, [cell()], profile[n]) for n in ("label_ratio", name))
        assert ours == theirs, name


def test_a_seed_draws_what_is_said(monkeypatch, tmp_path):
    found = specs(monkeypatch, tmp_path, [cell(seed=3, redrawn=part) for part in ("all", *arms.PARTS)])
    seeds = [there["seeds"] for name, there in found if name == "arm"]
    assert seeds == [
        {"labels": 3, "start": 1, "training": 3},
        {"labels": 3, "start": 0, "training": 0},
        {"labels": 0, "start": 1, "training": 0},
        {"labels": 0, "start": 0, "training": 3},
    ]
    starts = [there["seed"] for name, there in found if name == "ddpm"]
    assert starts == [1, 0, 1, 0], "the cpu profile has two pre-trainings, which seeds share"


def test_an_arm_that_starts_from_nothing_does_not_depend_on_the_pre_training(monkeypatch, tmp_path):
    config = load_profile("ddpm", "cpu")["label_ratio"]
    other = {"abdomen": config.pretrain["abdomen"].model_copy(update={"steps": 9})}
    changed = config.model_copy(update={"pretrain": other, "pretrainings": 1})
    for method, same in (("scratch", True), ("attention-unet", True), ("decoder", False)):
        found = [specs(monkeypatch, tmp_path, [cell(method, seed=3)], c)[-1] for c in (config, changed)]
        assert (found[0] == found[1]) is same


def test_a_checkpoint_that_pre_training_does_not_keep_is_an_error(monkeypatch, tmp_path):
    config = load_profile("ddpm", "cpu")["label_ratio"].model_copy(update={"transfer": {16: 7}})
    with pytest.raises(UserError, match="no checkpoint at iteration 7"):
        specs(monkeypatch, tmp_path, [cell()], config)


def test_imagenets_weights_are_for_the_networks_that_have_a_resnet(monkeypatch, tmp_path):
    config = load_profile("ddpm", "paper")["label_ratio"].model_copy(update={"imagenet": "resnet34.pth"})
    for method, given in (("resunet", "resnet34.pth"), ("unetr", None), ("decoder", None)):
        found = specs(monkeypatch, tmp_path, [Cell(method, "flare22", 0, cell().setting)], config)[-1][1]
        assert found["config"]["imagenet"] == given


def test_sizes_that_share_their_channels_share_the_pre_training(monkeypatch, tmp_path):
    found = specs(monkeypatch, tmp_path, [cell(size=size) for size in "SML"])
    small, medium, large = (there for name, there in found if name == "ddpm")
    assert small == medium
    assert small != large


def test_the_unlabelled_images_are_of_nobody_who_is_tested():
    config = load_profile("ddpm", "smoke")["generation"]
    task = ddpm.task_of_unlabelled("abdomen", config)
    unlabelled = set(task.splits["unlabelled"].subjects)
    assert unlabelled
    for name in ("validation", "test"):
        assert not unlabelled & set(task.splits[name].subjects)
    assert (task.splits["unlabelled"].labels == -1).all()


def test_the_trivial_predictor_is_the_best_constant_one():
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[:, :2], labels[:, 3] = 1, 2
    there = Split(torch.zeros(2, 1, 4, 4), labels, ("a", "a"))
    task = Task("toy", ("b", "x", "y"), 1, {"test": there}, Card("", "", "", "", ""))
    assert ddpm.trivial(task) == pytest.approx((2 * 8 / (8 + 16) + 0) / 2)


@pytest.mark.parametrize("profile", ["smoke", "cpu"])
def test_every_cell_is_of_a_known_arm_size_and_ratio(profile):
    for name, experiment in ddpm.EXPERIMENTS.items():
        config = load_profile("ddpm", profile)[name]
        for each in experiment.cells(config) if name != "generation" else []:
            assert each.method in ddpm.ARMS
            assert each.setting["size"] in config.sizes
            assert each.setting["ratio"] in config.steps
            assert ddpm.ARMS[each.method].network in (*config.baselines, "unet", "ddpm-seg", "nnunet")
