"""What decoders start from: images of no task, one baseline for many seeds, and SAM's own weights from a file."""

import hashlib
from typing import Any

import pytest
import torch

from synthrepro.data import Card, Split, Task
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Context
from synthrepro.methods import synthfm
from synthrepro.methods.synthfm import arms
from synthrepro.methods.synthfm.starts import Target
from synthrepro.models.sam import OFFICIAL, SIZES, SamSize, sam
from synthrepro.training import seeded, stream

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"side": 32, "patch": 8, "width": 16, "depth": 1, "heads": 2, "global_blocks": [0], "window": 4}
SHAPE |= {"prompt_dim": 16, "mlp_dim": 16, "decoder_heads": 2}
TRAIN: dict[str, Any] = {"steps": 3, "batch": 2, "lr": 0.002, "encoder_lr": 0.001, "warm_up": 1, "weight_decay": 0.01}
TRAIN |= {"kinds": ["points", "box", "mask"], "loss": "dice+ce", "precision": "no"}
PROMPTING = {"positive": [1, 3], "negative": [0, 2], "margin": 0.02, "ring": [0.02, 0.1], "jitter": 0.02}
KNOWN: dict[str, Any] = {
    "sam": SHAPE,
    "pretrain": TRAIN,
    "photographs": 0.0,
    "pretrainings": 2,
    "prompting": PROMPTING,
    "target": {"smallest": 0.01, "largest": 0.4},
    "checkpoints": {"vit_b": None},
    "train": TRAIN | {"kinds": ["points"]},
    "pool": None,
    "tasks": {},
    "supervised": {"embedded": [], "real": []},
    "images": 2,
    "smallest": 0.01,
    "spacing": {"abdomen": 1.0},
    "blocks": [],
}
TARGET = Target(smallest=0.01, largest=0.4)


def config(**changes: Any) -> synthfm.Table:
    return synthfm.Table.model_validate(KNOWN | changes)


def context(folder, **builders) -> Context:
    known = synthfm.EXPERIMENTS["zero_shot"].artefacts
    return Context(folder / "cell", {**known, **builders}, folder / "artefacts")


def batch(count: int = 4, photographs: float = 0.0, seed: int = 0, target: Target = TARGET, side: int = 32):
    return synthfm.natural(count, photographs, side, target, stream(seed, "images"), CPU)


class TestNatural:
    @pytest.mark.parametrize("photographs", [0.0, 0.5])
    def test_images_and_masks_are_what_the_contract_says(self, photographs):
        images, masks = batch(2, photographs)
        assert images.shape == (2, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.flatten(1).std(1).min() > 0.01
        assert masks.shape == (2, 32, 32)
        assert masks.dtype == torch.int64
        assert masks.unique().tolist() == [0, 1]
        assert masks.sum((1, 2)).min() > 0

    def test_a_generator_in_the_same_state_gives_the_same_bits_and_the_global_state_stays(self):
        state = torch.get_rng_state()
        one, again, other = batch(), batch(), batch(seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        for i in range(2):
            assert torch.equal(one[i], again[i])
            assert not torch.equal(one[i], other[i])

    @pytest.mark.parametrize(("count", "share", "crops"), [(8, 0.5, 4), (4, 0.3, 1), (4, 0.0, 0), (3, 1.0, 3)])
    def test_so_many_are_crops_and_the_others_dead_leaves(self, count, share, crops, monkeypatch):
        class Grey:
            def draw(self, number, generator):
                assert 0 < number == crops
                return number

            def apply(self, number, size):
                maps = torch.ones(number, *size, dtype=torch.int64)
                maps[:, : size[0] // 4] = 2
                return torch.full((number, 3, *size), 0.5), maps

        monkeypatch.setattr(synthfm.starts, "Crops", Grey)
        images, masks = batch(count, share)
        assert (images.flatten(1).std(1) == 0).sum() == crops
        assert masks[:crops].float().mean((1, 2)).tolist() == [0.25] * crops, "three quarters are too large"

    def test_targets_are_within_bounds_where_they_can_be(self):
        _, masks = batch(24, target=Target(smallest=0.02, largest=0.1))
        shares = masks.float().mean((1, 2))
        assert ((shares >= 0.02) & (shares <= 0.1)).float().mean() > 0.9

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_gives_the_same_scenes(self):
        here = batch(side=64)
        there = synthfm.natural(4, 0.0, 64, TARGET, stream(0, "images"), torch.device("cuda"))
        assert there[0].is_cuda
        assert (there[0].cpu() - here[0]).abs().mean() < 1e-3
        assert (there[1].cpu() != here[1]).float().mean() < 1e-3


class TestPromptable:
    def test_it_is_trained_once_for_all_seeds_that_share_it(self, tmp_path):
        built = []

        def build(spec, folder, inner):
            built.append(spec["seed"])
            network = seeded(lambda: sam(SamSize(**config().sam.model_dump())), stream(spec["seed"], "x"))
            torch.save(network.state_dict(), folder / "sam.pt")

        found = [synthfm.start("promptable", seed, config(), context(tmp_path, promptable=build)) for seed in range(4)]
        assert built == [0, 1]
        addresses = [address for _, address in found]
        assert addresses[:2] == addresses[2:]
        assert addresses[0] != addresses[1]
        states = [network.state_dict() for network, _ in found]
        for name, value in states[0].items():
            assert torch.equal(value, states[2][name])
        assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_its_address_is_that_of_all_it_depends_on_and_of_nothing_else(self):
        base = synthfm.start_spec(0, config())
        same = [{"train": TRAIN | {"steps": 9}}, {"pool": 7}, {"images": 9}, {"checkpoints": {}}, {"smallest": 0.5}]
        assert all(synthfm.start_spec(0, config(**changes)) == base for changes in same)
        others = [{"sam": SHAPE | {"width": 24}}, {"pretrain": TRAIN | {"steps": 9}}, {"photographs": 0.5}]
        others += [{"prompting": PROMPTING | {"jitter": 0.1}}, {"target": {"smallest": 0.1, "largest": 0.4}}]
        assert all(synthfm.start_spec(0, config(**changes)) != base for changes in others)

    def test_training_is_of_the_seed_and_moves_all_weights(self, tmp_path):
        starts = [
            synthfm.start("promptable", seed, config(), context(tmp_path / name))[0]
            for name, seed in (("a", 0), ("b", 0), ("a", 1))
        ]
        one, again, other = (network.state_dict() for network in starts)
        assert all(torch.equal(value, again[name]) for name, value in one.items())
        assert sum(not torch.equal(value, other[name]) for name, value in one.items()) > len(one) / 2
        (folder,) = {path.parent for path in (tmp_path / "b" / "artefacts").glob("*/sam.pt")}
        assert len(torch.load(folder / "trail.pt", weights_only=True)) == 1
        untrained = seeded(lambda: sam(config().sam.size()), stream(0, "promptable")).state_dict()
        assert {name for name in one if torch.equal(one[name], untrained[name])} == {
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
        }


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A file that passes for SAM's, though it is a tiny one."""
    shape = SamSize(**SHAPE | {"global_blocks": (0,)})
    network = seeded(lambda: sam(shape), stream(5, "official"))
    path = tmp_path / "sam_vit_b.pth"
    torch.save(network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(OFFICIAL, "sam_vit_b.pth", digest)
    monkeypatch.setitem(SIZES, "vit_b", shape)
    return path, digest, network


def toy_task(name: str = "abdomen") -> Task:
    """Bright discs as class 1 on images of 32 x 32."""
    axis = torch.arange(32)
    labels = torch.stack([((axis - 14) ** 2 + (axis[:, None] - c) ** 2 < 36).long() for c in range(10, 22, 2)])
    images = (0.2 + 0.5 * labels + 0.1 * torch.rand(labels.shape, generator=stream(0, "toy")))[:, None]
    there = Split(images, labels, tuple("aabbcc"))
    return Task(name, ("background", "disc"), 1, {"train": there, "test": there}, Card("", "", "", "", ""))


class TestOfficial:
    def test_no_file_named_is_one_sentence(self, tmp_path):
        for checkpoints in ({"vit_b": None}, {}):
            with pytest.raises(UserError, match="name the file of vit_b under `checkpoints`") as caught:
                synthfm.start("vit_b", 0, config(checkpoints=checkpoints), context(tmp_path))
            assert one_sentence(caught.value)

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        there = config(checkpoints={"vit_b": str(tmp_path / "none.pth")})
        with pytest.raises(UserError, match=r"no file .*none\.pth") as caught:
            synthfm.start("vit_b", 0, there, context(tmp_path))
        assert one_sentence(caught.value)

    def test_weights_that_are_not_sams_are_refused(self, tmp_path, official):
        path, _, _ = official
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(UserError, match="checksum") as caught:
            synthfm.start("vit_b", 0, config(checkpoints={"vit_b": str(path)}), context(tmp_path))
        assert one_sentence(caught.value)

    def test_weights_of_another_size_are_refused(self, tmp_path, official):
        there = config(checkpoints={"vit_h": str(official[0])})
        with pytest.raises(UserError, match="does not fit this size of SAM") as caught:
            synthfm.start("vit_h", 0, there, context(tmp_path))
        assert one_sentence(caught.value)

    def test_it_starts_from_the_file_and_says_so(self, tmp_path, official):
        path, digest, network = official
        there, found = config(checkpoints={"vit_b": str(path)}), context(tmp_path)
        started, address = synthfm.start("vit_b", 3, there, found)
        assert address == f"sam-{digest[:16]}"
        assert found.artefacts == [address]
        state = started.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    @pytest.mark.parametrize("method", ["start", "synthfm", "random-encoder"])
    def test_an_arm_runs_on_it_from_end_to_end(self, method, tmp_path, official, monkeypatch):
        path, digest, _ = official
        monkeypatch.setattr(arms, "load_task", lambda name, **options: toy_task(name))
        there, found = config(checkpoints={"vit_b": str(path)}), context(tmp_path)
        setting = {"modality": "ct", "prompts": "1,0", "model": "vit_b", "ranges": "ours"}
        result = synthfm.table_run(Cell(method, "abdomen", 0, setting), there, found)
        assert f"sam-{digest[:16]}" in found.artefacts
        assert not any(name.startswith("promptable") for name in found.artefacts)
        assert sum(name.startswith("decoder") for name in found.artefacts) == (method != "start")
        assert 0 <= result.metrics["dice"] <= 1


def one_sentence(error: UserError) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and ". " not in text


@pytest.mark.parametrize(
    "changes",
    [{"positive": [0, 1]}, {"positive": [3, 1]}, {"negative": [-1, 0]}, {"ring": [0.1, 0.02]}, {"margin": -0.1}],
)
def test_prompts_that_cannot_be_are_refused_in_one_sentence(changes):
    prompting = synthfm.Prompting(**PROMPTING | changes)
    with pytest.raises(UserError) as caught:
        prompting.points()
    assert one_sentence(caught.value)
    assert next(iter(changes)) in str(caught.value)


def test_boxes_are_only_enlarged():
    with pytest.raises(UserError, match="jitter") as caught:
        synthfm.Prompting(**PROMPTING | {"jitter": -0.1}).boxes()
    assert one_sentence(caught.value)
