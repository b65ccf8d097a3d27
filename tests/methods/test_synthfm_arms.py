"""Every arm: what it starts from, what moves, what it is trained on, and with whom it shares what was trained."""

import ast
import importlib
import inspect
import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from synthrepro import data, paths
from synthrepro.data import Card, Split, Task
from synthrepro.evidence import Cell, Context, load_profile
from synthrepro.methods import synthfm
from synthrepro.methods.synthfm import arms
from synthrepro.models.sam import embed, sam
from synthrepro.training import seeded, stream

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"side": 32, "patch": 8, "width": 16, "depth": 1, "heads": 2, "global_blocks": [0], "window": 4}
SHAPE |= {"prompt_dim": 16, "mlp_dim": 16, "decoder_heads": 2}
TRAIN: dict[str, Any] = {"steps": 2, "batch": 2, "lr": 0.002, "encoder_lr": 0.001, "warm_up": 1, "weight_decay": 0.01}
TRAIN |= {"kinds": ["points"], "loss": "dice+ce", "precision": "no"}
KNOWN: dict[str, Any] = {
    "sam": SHAPE,
    "pretrain": TRAIN | {"kinds": ["points", "box", "mask"]},
    "photographs": 0.0,
    "pretrainings": 2,
    "prompting": {"positive": [1, 3], "negative": [0, 2], "margin": 0.02, "ring": [0.02, 0.1], "jitter": 0.02},
    "target": {"smallest": 0.01, "largest": 0.4},
    "checkpoints": {"vit_b": None, "vit_h": None},
    "train": TRAIN,
    "pool": 5,
    "tasks": {"abdomen": {}, "abdomen-us": {}, "hippocampus": {}, "breast-us": {}},
    "supervised": {"embedded": ["abdomen", "abdomen-us"], "real": ["hippocampus"]},
}
NAMES = tuple(synthfm.ARMS)
WITHOUT_MEDICAL = tuple(name for name, arm in synthfm.ARMS.items() if arm.images in ("synthetic", "leaves"))
MATRIX = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def config(**changes: Any) -> synthfm.ArmSettings:
    return synthfm.ArmSettings.model_validate(KNOWN | changes)


def cell(method: str = "synthfm", seed: int = 0, task: str = "abdomen", **setting: Any) -> Cell:
    base = {"modality": "ct", "prompts": "1,0", "model": "promptable", "ranges": "ours"}
    return Cell(method, task, seed, base | setting)


def toy_task(name: str) -> Task:
    """Discs of class 1 and squares of class 2 for training, and test images that no network may see."""
    axis, draws = torch.arange(32), stream(len(name), name)
    labels = torch.stack([((axis - 10) ** 2 + (axis[:, None] - c) ** 2 < 30).long() for c in range(8, 26, 3)])
    labels[:2, 22:29, 22:29] = 2
    images = (0.2 + 0.3 * labels + 0.1 * torch.rand(labels.shape, generator=draws))[:, None]
    train = Split(images, labels, tuple("aabbcc"))
    unseen = Split(torch.full_like(images, torch.nan), labels, tuple("ddeeff"))
    splits = {"train": train, "validation": unseen, "test": unseen}
    return Task(name, ("background", "disc", "square"), 1, splits, Card("", "", "", "", ""))


@pytest.fixture
def toys(monkeypatch):
    """Tasks of our own instead of all there are; which of them were loaded."""
    loaded: list[str] = []

    def load(name, **options):
        loaded.append(name)
        return toy_task(name)

    monkeypatch.setattr(arms, "load_task", load)
    return loaded


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    """Images are drawn by threes, as each takes a while."""
    monkeypatch.setattr(arms, "POOL_BATCH", 3)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Where artefacts stand, one baseline a seed for all tests."""
    return tmp_path_factory.mktemp("artefacts")


def context(folder: Path, shared: Path) -> Context:
    return Context(folder / "cell", synthfm.EXPERIMENTS["zero_shot"].artefacts, shared)


def weights(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert set(one) == set(other)
    return {name for name in one if not torch.equal(one[name], other[name])}


class TestStarts:
    def start(self, name, tmp_path, shared, seed=0):
        network, address = arms.as_it_starts(
            synthfm.ARMS[name], "promptable", seed, config(), context(tmp_path, shared)
        )
        return network, weights(network), address

    @pytest.mark.parametrize("name", NAMES)
    def test_what_begins_anew_and_what_is_kept(self, name, tmp_path, shared):
        arm = synthfm.ARMS[name]
        _, kept, address = self.start("start", tmp_path, shared)
        network, state, own = self.start(name, tmp_path, shared)
        assert own == address, "all arms of a seed start from the same"
        assert address.startswith("promptable-")
        parts = {each.partition(".")[0] for each in differ(state, kept)}
        expected = {"image_encoder"} if arm.encoder == "random" else set()
        expected |= {"kept": set(), "fresh": {"mask_decoder"}, "both": {"mask_decoder", "prompt_encoder"}}[arm.decoder]
        assert parts == expected
        assert (MATRIX in differ(state, kept)) == (arm.decoder == "both")
        learns = {each.partition(".")[0] for each, p in network.named_parameters() if p.requires_grad}
        assert "mask_decoder" in learns
        assert ("image_encoder" in learns) == (arm.encoder == "trained")
        assert ("prompt_encoder" in learns) == (arm.decoder == "both")

    def test_arms_of_a_seed_share_what_is_fresh_and_seeds_do_not(self, tmp_path, shared):
        _, ours, _ = self.start("synthfm", tmp_path, shared)
        for name in ("random-encoder", "dead-leaves", "fine-tuned-encoder", "fresh-prompts"):
            _, other, _ = self.start(name, tmp_path, shared)
            assert not any(each.startswith("mask_decoder.") for each in differ(ours, other))
        _, again, _ = self.start("random-encoder", tmp_path, shared)
        assert not differ(self.start("random-encoder", tmp_path, shared)[1], again)
        _, later, address = self.start("random-encoder", tmp_path, shared, seed=2)
        assert address == self.start("start", tmp_path, shared)[2], "two pre-trainings, which seeds share"
        parts = {each.partition(".")[0] for each in differ(later, again)}
        assert parts == {"mask_decoder", "image_encoder"}


def refuse(*arguments, **options):
    raise AssertionError("training read a task")


@pytest.fixture
def no_task(monkeypatch, tmp_path):
    """No task can be read any more, through whatever door."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "nothing")
    for name in data.TASKS:
        reader = importlib.import_module(f"synthrepro.data.{name.replace('-', '_')}")
        for door in ("load", "check", "files"):
            monkeypatch.setattr(reader, door, refuse)
    for name, module in list(sys.modules.items()):
        if name.startswith("synthrepro"):
            for door in ("load_task", "_load", "list_tasks", "structures_of"):
                if hasattr(module, door):
                    monkeypatch.setattr(module, door, refuse)
    monkeypatch.setattr(arms, "check_task", lambda name: SimpleNamespace(family="embedded"))
    monkeypatch.setattr(Context, "data", refuse)


class TestTrainingWithoutMedicalImages:
    def test_the_doors_are_closed(self, no_task):
        for door in (arms.load_task, data.load_task, data._load, arms.structures_of):
            with pytest.raises(AssertionError, match="read a task"):
                door("abdomen")
        with pytest.raises(AssertionError, match="read a task"):
            arms.task_of("abdomen", config())

    @pytest.mark.parametrize("name", WITHOUT_MEDICAL)
    def test_no_task_is_read_and_what_is_frozen_stays(self, name, no_task, tmp_path, shared):
        arm, there = synthfm.ARMS[name], context(tmp_path, shared)
        starting, _ = arms.as_it_starts(arm, "promptable", 0, config(), there)
        network = synthfm.trained(cell(name), "abdomen", config(), there)
        assert there.data_hashes == {}
        assert not network.training
        moved = differ(weights(starting), weights(network))
        parts = {each.partition(".")[0] for each in moved}
        expected = {"mask_decoder"} | ({"image_encoder"} if arm.encoder == "trained" else set())
        expected |= {"prompt_encoder"} if arm.decoder == "both" else set()
        assert parts == expected
        assert MATRIX not in moved
        assert all(value.isfinite().all() for value in network.state_dict().values())
        (folder,) = (shared / each for each in there.artefacts if each.startswith("decoder"))
        saved = torch.load(folder / "trained.pt", weights_only=True)
        assert any(each.startswith("image_encoder.") for each in saved) == (arm.encoder == "trained")
        assert len(torch.load(folder / "trail.pt", weights_only=True)) == 1

    @pytest.mark.parametrize("name", ["synthfm", "dead-leaves", "fine-tuned-encoder"])
    def test_nor_with_new_images_in_every_iteration(self, name, no_task, tmp_path, shared, monkeypatch):
        batches, real = [], arms.drawn
        monkeypatch.setattr(arms, "drawn", lambda *given: batches.append(real(*given)) or batches[-1])
        arm, there = synthfm.ARMS[name], context(tmp_path, shared)
        starting, _ = arms.as_it_starts(arm, "promptable", 0, config(pool=None), there)
        network = synthfm.trained(cell(name), "abdomen", config(pool=None), there)
        assert differ(weights(starting), weights(network))
        assert not any(each.startswith("images") for each in there.artefacts)
        assert [images.shape[0] for images, _ in batches] == [2, 2]
        assert batches[0][0].shape[1] == (3 if arm.images == "leaves" else 1)
        assert not torch.equal(batches[0][0], batches[1][0])

    def test_what_draws_and_trains_knows_of_no_task(self):
        """Of `data` the sources import photographs alone, which are no task."""
        sources = [importlib.import_module(f"synthrepro.methods.synthfm.{name}") for name in ("starts", "segmenting")]
        for module in sources:
            found = set()
            for node in ast.walk(ast.parse(inspect.getsource(module))):
                names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found |= {each for each in names if each.startswith("synthrepro.data")}
            assert found <= {"synthrepro.data.photographs"}
        assert "photographs" not in data.TASKS

    def test_the_builder_turns_to_tasks_for_the_supervised_arm_alone(self):
        """In its source, whatever reads a task stands where the images are medical."""
        (builder,) = ast.parse(inspect.getsource(arms.train_decoder)).body
        inside = [
            node
            for branch in ast.walk(builder)
            if isinstance(branch, ast.If) and ast.unparse(branch.test) == "arm.images == 'medical'"
            for statement in branch.body
            for node in ast.walk(statement)
        ]
        for name in ("task_of", "medical", "structures_of"):
            uses = [node for node in ast.walk(builder) if isinstance(node, ast.Name) and node.id == name]
            assert uses
            assert all(node in inside for node in uses), name
        for other in (arms.drawn, arms.pooled, arms.draw_images, arms.kept_embeddings, arms.as_it_starts):
            (tree,) = ast.parse(inspect.getsource(other)).body
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert not names & {"task_of", "load_task", "medical", "structures_of", "check_task", "Split", "Task"}


class TestPool:
    def test_arms_that_want_the_same_images_share_them(self, no_task, tmp_path, shared):
        there = {}
        for name in WITHOUT_MEDICAL:
            used = context(tmp_path, shared)
            spec = {"model": "promptable", "ranges": "ours", "seed": 0}
            arms.pooled(synthfm.ARMS[name], spec, config(), used)
            (there[name],) = used.artefacts
        different = {there[name] for name in ("synthfm", "shape-only", "boundary-only", "dead-leaves")}
        assert len(different) == 4
        same = set(WITHOUT_MEDICAL) - {"shape-only", "boundary-only", "dead-leaves"}
        assert {there[name] for name in same} == {there["synthfm"]}

    def test_it_holds_the_images_that_are_drawn(self, no_task, tmp_path, shared):
        arm, spec = synthfm.ARMS["shape-only"], {"model": "promptable", "ranges": "ours", "seed": 0}
        images, masks = arms.pooled(arm, spec, config(), context(tmp_path, shared))
        assert images.shape == (5, 1, 32, 32)
        assert images.dtype == torch.float16
        assert masks.shape == (5, 32, 32)
        first = arms.drawn(arm, "ours", 3, 32, config().target, stream(0, "images 0"), CPU)
        assert torch.equal(images[:3], first[0].half())
        assert torch.equal(masks[:3].long(), first[1])

    def test_ranges_and_modules_draw_other_images(self):
        def one(name, ranges, seed=0):
            return arms.drawn(synthfm.ARMS[name], ranges, 1, 32, config().target, stream(seed, "images 0"), CPU)[0]

        ours = one("shape-only", "ours")
        assert torch.equal(ours, one("shape-only", "ours"))
        for other in (one("shape-only", "halved"), one("shape-only", "doubled"), one("shape-only", "ours", 1)):
            assert not torch.equal(ours, other)
        assert not torch.equal(one("boundary-only", "ours"), ours)

    def test_kept_embeddings_are_those_of_the_encoder(self, tmp_path, shared):
        network = seeded(lambda: sam(config().sam.size()), stream(0, "x"))
        images = torch.rand(5, 1, 32, 32, generator=stream(1, "x")).half()
        rows = torch.tensor([4, 0, 4, 2])
        found = arms.kept_embeddings(network, images, 2, "no", context(tmp_path, shared))(rows)
        assert not found.requires_grad
        torch.testing.assert_close(found, embed(network, images[rows].float()), rtol=1e-4, atol=1e-5)


class TestSupervised:
    def test_it_sees_training_images_alone_of_the_family_of_what_is_tested(self, toys, tmp_path, shared):
        there = context(tmp_path, shared)
        starting, _ = arms.as_it_starts(synthfm.ARMS["supervised"], "promptable", 0, config(), there)
        network = synthfm.trained(cell("supervised"), "abdomen", config(), there)  # its test images are NaN
        assert set(toys) == set(there.data_hashes) == {"abdomen", "abdomen-us"}
        moved = differ(weights(starting), weights(network))
        assert {each.partition(".")[0] for each in moved} == {"mask_decoder", "image_encoder"}
        assert all(value.isfinite().all() for value in network.state_dict().values())

    def test_tasks_take_turns_and_masks_are_one_structure(self):
        sources = []
        for name in ("abdomen", "abdomen-us"):
            split = toy_task(name).splits["train"]
            sources.append((split, synthfm.structures_of(split, 3, 0.01)))
        first, squares = 0, 0
        for k in range(200):
            images, masks = arms.medical(sources, 2, 0, k, CPU)
            assert images.shape == (2, 1, 32, 32)
            assert masks.unique().tolist() == [0, 1]
            of = [i for i, (split, _) in enumerate(sources) if (split.images == images[0]).flatten(1).all(1).any()]
            (which,) = of
            first += which == 0
            for image, mask in zip(images, masks, strict=True):
                (row,) = (sources[which][0].images == image).flatten(1).all(1).nonzero()[:, 0].tolist()
                (value,) = sources[which][0].labels[row][mask.bool()].unique().tolist()
                assert torch.equal(sources[which][0].labels[row] == value, mask.bool())
                squares += value == 2
        assert stats.binomtest(first, 200).pvalue > 0.01
        assert stats.binomtest(squares, 400).pvalue > 0.01, "in two images of six, but as likely as discs"
        again = arms.medical(sources, 2, 0, 7, CPU)
        assert torch.equal(again[0], arms.medical(sources, 2, 0, 7, CPU)[0])


def addresses(monkeypatch, tmp_path, cells: list[tuple[Cell, str]], there=None) -> list[str | None]:
    """What each cell, tested on the task beside it, asks for as its decoder; None where nothing is trained."""

    class Asked(Exception):
        pass

    found: list[str | None] = []

    def artefact(self, name, spec):
        assert name == "decoder"
        found[-1] = json.dumps(spec, sort_keys=True)
        raise Asked

    families = {name: data._reader(name).FAMILY for name in {task for _, task in cells}}
    network = seeded(lambda: sam(config().sam.size()), stream(0, "x"))
    monkeypatch.setattr(arms, "check_task", lambda name: SimpleNamespace(family=families[name]))  # reads no files
    monkeypatch.setattr(Context, "artefact", artefact)
    monkeypatch.setattr(Context, "data", lambda self, task: self.data_hashes.update({task.name: f"of {task.name}"}))
    start = lambda model, seed, config, context: (network, f"start {model} {seed % config.pretrainings}")  # noqa: E731
    monkeypatch.setattr(arms, "as_it_starts", lambda arm, *given: start(*given))
    for each, task in cells:
        found.append(None)
        try:
            synthfm.trained(each, task, there or config(), Context(tmp_path))
        except Asked:
            assert synthfm.ARMS[each.method].images is not None
    return found


class TestAddresses:
    def test_arms_share_one_exactly_if_they_are_the_same_training(self, toys, monkeypatch, tmp_path):
        """Of every arm with every range, start, seed, prompt and task."""
        cells = [
            (cell(name, seed, task, ranges=ranges, model=model, prompts=prompts), task)
            for name, ranges, model, seed, task, prompts in product(
                NAMES,
                synthfm.RANGES,
                ("promptable", "vit_b", "vit_h"),
                (0, 1),
                ("abdomen", "abdomen-us", "breast-us", "hippocampus"),
                ("1,0", "box"),
            )
        ]
        by_training: dict[Any, set[str | None]] = {}
        for (each, task), address in zip(cells, addresses(monkeypatch, tmp_path, cells), strict=True):
            arm = synthfm.ARMS[each.method]
            if arm.images is None:
                assert address is None
                continue
            training = [arm.images, arm.encoder, arm.decoder, arm.loss, arm.kinds, each.setting["model"], each.seed]
            training += [arm.boundary, each.setting["ranges"]] if arm.images == "synthetic" else []
            training += [task.startswith("abdomen")] if arm.images == "medical" else []
            by_training.setdefault(tuple(training), set()).add(address)
        assert all(len(each) == 1 for each in by_training.values()), "the same training has one address"
        assert len(set().union(*by_training.values())) == len(by_training), "and no other training has it"
        assert len(by_training) == 6 * (3 * (len(WITHOUT_MEDICAL) - 1) + 1 + 2)

    def test_they_depend_on_what_an_arm_is_trained_with(self, toys, monkeypatch, tmp_path):
        def found(name, task="abdomen", **changes):
            return addresses(monkeypatch, tmp_path, [(cell(name), task)], config(**changes))[0]

        base = {name: found(name) for name in ("synthfm", "supervised", "boxes", "dice-only")}
        for changes in (
            {"train": TRAIN | {"steps": 9}},
            {"target": {"smallest": 0.2, "largest": 0.4}},
            {"prompting": KNOWN["prompting"] | {"margin": 0.1}},
        ):
            assert all(found(name, **changes) != there for name, there in base.items())
        assert found("synthfm", pool=None) != base["synthfm"]
        assert found("supervised", pool=None) == base["supervised"], "it draws nothing"
        assert found("boxes", train=TRAIN | {"kinds": ["box"]}) == base["boxes"], "it has kinds of its own"
        assert found("dice-only", train=TRAIN | {"loss": "dice"}) == base["dice-only"], "it has a loss of its own"
        others = KNOWN["tasks"] | {"abdomen": {"size": [48, 48]}}
        assert found("synthfm", tasks=others) == base["synthfm"]
        assert found("supervised", tasks=others) != base["supervised"]
        fewer = {"embedded": ["abdomen"], "real": ["hippocampus"]}
        assert found("synthfm", supervised=fewer) == base["synthfm"]
        assert found("supervised", supervised=fewer) != base["supervised"]
        named = {"vit_b": None, "vit_h": "/some/file.pth"}
        assert found("synthfm", checkpoints=named) == base["synthfm"], "a start of its own needs no file"

    @pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
    def test_tables_share_what_they_train(self, profile, toys, monkeypatch, tmp_path):
        sections = load_profile("synthfm", profile)
        for name in NAMES:
            if synthfm.ARMS[name].images:
                there = {
                    addresses(monkeypatch, tmp_path, [(cell(name), "abdomen")], section)[0]
                    for section in sections.values()
                }
                assert len(there) == 1, name

    def test_another_hash_of_the_training_data_is_another_decoder(self, toys, monkeypatch, tmp_path):
        (spec,) = addresses(monkeypatch, tmp_path, [(cell("supervised"), "abdomen")])
        assert json.loads(spec)["data"] == {"abdomen": "of abdomen", "abdomen-us": "of abdomen-us"}
        (spec,) = addresses(monkeypatch, tmp_path, [(cell("synthfm"), "abdomen")])
        assert json.loads(spec)["data"] == {}


def test_a_decoder_is_trained_once_for_all_tasks_and_prompts(toys, tmp_path, shared, monkeypatch):
    first = weights(synthfm.trained(cell("shape-only"), "abdomen", config(), context(tmp_path, shared)))
    monkeypatch.setattr(arms, "train", refuse)
    for task, prompts in (("abdomen-us", "3,2"), ("hippocampus", "box")):
        again = synthfm.trained(cell("shape-only", prompts=prompts), task, config(), context(tmp_path, shared))
        assert not differ(first, weights(again))
    assert toys == []


def test_the_start_is_taken_as_it_is(tmp_path, shared):
    there = context(tmp_path, shared)
    network = synthfm.trained(cell("start"), "abdomen", config(), there)
    baseline, address = synthfm.start("promptable", 0, config(), context(tmp_path, shared))
    assert not differ(weights(baseline), weights(network))
    assert there.artefacts == [address]
