"""The embedded abdomen: where its organs lie, how large they are, what they look like, and what no case depends on."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synthrepro.data import abdomen, abdomen_anatomy, abdomen_looks, check_task, fingerprint, load_task
from synthrepro.data.abdomen import CLASSES, draw_case, window
from synthrepro.data.abdomen_anatomy import NO_GALLBLADDER, Anatomy, Ellipsoid, Leaf, Tube, draw_anatomy, rotation
from synthrepro.data.abdomen_looks import HU, NOISE, PHASES, Looks, add_noise, averaged, draw_looks, outline, picture
from synthrepro.data.brain_mni import stream
from synthrepro.data.task import Task
from synthrepro.errors import UserError

PEOPLE, SLICES = 15, 48
NUMBER = {name: k for k, name in enumerate(CLASSES)}

# ml; single cases may lie beyond the means of ICRP 89 (reference man: liver 1800 g, both kidneys 310 g, spleen 150 g)
VOLUMES = {
    "liver": (900, 2700),
    "right kidney": (70, 320),
    "spleen": (40, 450),
    "pancreas": (25, 160),
    "aorta": (25, 180),
    "inferior vena cava": (30, 220),
    "right adrenal gland": (1.5, 16),
    "left adrenal gland": (1.5, 16),
    "gallbladder": (3, 100),
    "esophagus": (5, 40),
    "stomach": (100, 800),
    "duodenum": (15, 160),
    "left kidney": (70, 380),
}
MEANS = {  # ml, range of the mean of all
    "liver": (1400, 1900),
    "right kidney": (125, 195),
    "spleen": (110, 200),
    "pancreas": (50, 110),
    "left kidney": (125, 205),
    "right adrenal gland": (4, 9),
    "left adrenal gland": (4, 9),
}


@lru_cache
def small(**options: object) -> Task:
    return abdomen.load(abdomen.Options(**({"cases": (2, 1, 1), "slices": 6} | options)), Path("nowhere"))


@lru_cache
def person(i: int, size: int = 64, slices: int = SLICES) -> tuple[Anatomy, Looks, Tensor, Tensor]:
    """Anatomy, looks, HU without noise and labels of a training case."""
    anatomy, looks = draw_case(0, "train", i)
    return anatomy, looks, *picture(anatomy, looks, anatomy.levels(slices), (size, size), (0, "train", i))


def areas(labels: Tensor) -> Tensor:
    """Pixels of each class in each slice, (S, 14)."""
    return torch.stack([(labels == k).sum((1, 2)) for k in range(len(CLASSES))], 1)


def centre(labels: Tensor, name: str) -> tuple[float, float]:
    """Mean row and column of a class."""
    where = (labels == NUMBER[name]).nonzero().double()
    return float(where[:, 1].mean()), float(where[:, 2].mean())


def level(labels: Tensor, name: str) -> float:
    """Mean slice of a class as a share of the scan, 0 at the top."""
    where = (labels == NUMBER[name]).nonzero().double()
    return float(where[:, 0].mean()) / len(labels)


def inside(labels: Tensor, name: str) -> Tensor:
    """Pixels of a class none of whose neighbours in the plane is of another."""
    mask = (labels == NUMBER[name]).float()[:, None]
    return -F.max_pool2d(-mask, 3, 1, 1)[:, 0] > 0


# ----- form


def test_images_labels_and_splits_are_of_the_promised_form():
    task = small(size=(48, 40), unlabelled=2, unlabelled_slices=3)
    assert (task.name, task.classes, task.channels) == ("abdomen", CLASSES, 1)
    assert list(task.splits) == ["train", "validation", "test", "unlabelled"]
    for name, split in task.splits.items():
        assert len(split) == len(split.individuals) * (3 if name == "unlabelled" else 6)
        assert split.images.shape == (len(split), 1, 48, 40)
        assert split.labels.shape == (len(split), 48, 40)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        assert 0 <= split.images.min() < 0.02
        assert 0.6 < split.images.max() <= 1
    assert task.splits["train"].subjects == ("train-000",) * 6 + ("train-001",) * 6
    assert task.splits["train"].labels.min() == 0
    assert "unlabelled" not in small().splits


def test_classes_are_those_of_flare22_in_its_order():
    assert (
        *("background", "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava"),
        *("right adrenal gland", "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum"),
        "left kidney",
    ) == CLASSES


def test_unlabelled_cases_have_no_labels_and_are_further_people():
    split = small(unlabelled=3, unlabelled_slices=2).splits["unlabelled"]
    assert (split.labels == -1).all()
    assert split.individuals == ("unlabelled-000", "unlabelled-001", "unlabelled-002")
    assert len(split.images.flatten(1).unique(dim=0)) == len(split)
    assert not torch.allclose(split.images[0], small(slices=2).splits["train"].images[0], atol=0.1)


# ----- what a case depends on


def test_a_case_is_the_same_whatever_else_is_asked_for():
    few = small(unlabelled=1, unlabelled_slices=2)
    many = small(cases=(3, 2, 2), unlabelled=2, unlabelled_slices=2)
    for name, split in few.splits.items():
        assert torch.equal(split.images, many.splits[name].images[: len(split)])
        assert torch.equal(split.labels, many.splits[name].labels[: len(split)])
    other = small(slices=4, unlabelled=1, unlabelled_slices=2)
    assert torch.equal(other.splits["unlabelled"].images, few.splits["unlabelled"].images)
    assert torch.equal(small().splits["test"].images, few.splits["test"].images), "labelled images need no unlabelled"
    assert not torch.equal(other.splits["train"].images[0], few.splits["train"].images[0])


def test_the_same_options_give_the_same_task_and_another_seed_another():
    options = {"cases": (1, 1, 1), "slices": 2, "size": (32, 32), "unlabelled": 1, "unlabelled_slices": 2}
    first = fingerprint(small(**options))
    state = torch.random.get_rng_state()
    assert fingerprint(abdomen.load(abdomen.Options(**options), Path())) == first
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert fingerprint(small(**options, seed=1)) != first


def test_a_case_is_the_same_at_any_size():
    anatomy, looks, _, _ = person(0)
    levels = anatomy.levels(5)
    fine = picture(anatomy, looks, levels, (192, 192), (0, "train", 0))
    coarse = picture(anatomy, looks, levels, (64, 64), (0, "train", 0))
    assert torch.equal(fine[1][:, 1::3, 1::3], coarse[1]), "the middle of each pixel"
    averaged = F.avg_pool2d(fine[0][:, None], 3)[:, 0]
    assert torch.corrcoef(torch.stack([averaged.flatten(), coarse[0].flatten()]))[0, 1] > 0.99


def test_slices_are_evenly_spread_and_spacing_is_what_lies_between():
    anatomy = person(0)[0]
    levels = anatomy.levels(12)
    torch.testing.assert_close(levels.diff() * anatomy.scale, torch.full((11,), anatomy.spacing(12)), rtol=1e-4, atol=0)
    assert 3.5 < anatomy.spacing(SLICES) < 6
    assert levels[0] > anatomy.span[0]
    assert levels[-1] < anatomy.span[1]


# ----- anatomy


def test_organs_lie_where_they_belong():
    for i in range(PEOPLE):
        labels = person(i)[3]
        column = {name: centre(labels, name)[1] for name in CLASSES[1:] if (labels == NUMBER[name]).any()}
        row = {name: centre(labels, name)[0] for name in column}
        height = {name: level(labels, name) for name in column}
        for organ in ("kidney", "adrenal gland"):
            assert column[f"right {organ}"] < column["inferior vena cava"] < column["aorta"] < column[f"left {organ}"]
        assert column["liver"] < column["aorta"] < min(column["spleen"], column["stomach"])
        assert column["duodenum"] < column["pancreas"] < column["spleen"]
        assert row["pancreas"] < row["aorta"] < row["left kidney"] + 3
        assert max(row["stomach"], row["pancreas"]) < row["left kidney"]
        assert row["stomach"] < row["spleen"]
        for side in ("right", "left"):
            assert height[f"{side} adrenal gland"] < height[f"{side} kidney"]
        assert height["esophagus"] < height["liver"] < height["duodenum"]
        assert height["spleen"] < height["left kidney"]
        assert max(height["stomach"], height["pancreas"]) < height["duodenum"]
        if "gallbladder" in column:
            assert column["gallbladder"] < column["aorta"]
            assert height["gallbladder"] > height["liver"]
            assert row["gallbladder"] < row["right kidney"]


def test_the_aorta_lies_before_the_column_and_to_its_left_in_the_patient():
    for i in range(PEOPLE):
        anatomy = person(i)[0]
        aorta = anatomy.solids["aorta"]
        assert isinstance(aorta, Tube)
        abdominal = aorta.points[(aorta.points[:, 2] > 60) & (aorta.points[:, 2] < 220)]
        assert (abdominal[:, 1] < -16).all(), "before the vertebrae"
        assert abdominal[:, 0].mean() > 0
        labels = person(i)[3]
        assert centre(labels, "aorta")[0] < 64 * 0.6 + anatomy.shift[0] / 6, "above the origin's row"


def test_the_esophagus_is_in_the_upper_part_only_and_kidneys_are_not():
    for i in range(PEOPLE):
        found = areas(person(i)[3]) > 0
        assert not found[SLICES // 2 :, NUMBER["esophagus"]].any()
        assert found[:3, NUMBER["esophagus"]].any()
        for name in ("right kidney", "left kidney", "duodenum"):
            assert not found[: SLICES // 5, NUMBER[name]].any()
        assert found[:, NUMBER["aorta"]].all()


def test_most_slices_hold_several_organs_and_the_top_ones_few():
    counts = torch.stack([(areas(person(i)[3])[:, 1:] > 0).sum(1) for i in range(PEOPLE)]).double()  # (N, S)
    assert counts[:, 0].mean() < 5
    assert ((counts >= 5) & (counts <= 11)).double().mean() > 0.6
    assert counts.max() >= 10


def test_volumes_are_those_of_organs():
    volumes = []
    for i in range(PEOPLE):
        anatomy, _, _, labels = person(i)
        volumes.append(areas(labels).sum(0) * 6.0**2 * anatomy.spacing(SLICES) / 1000)
    for name, (low, high) in VOLUMES.items():
        found = torch.stack(volumes)[:, NUMBER[name]]
        found = found[found > 0]
        assert low < found.min(), (name, found.min())
        assert found.max() < high, (name, found.max())
    for name, (low, high) in MEANS.items():
        assert low < torch.stack(volumes)[:, NUMBER[name]].mean() < high, name


def test_the_liver_is_larger_than_the_spleen():
    total = torch.stack([areas(person(i)[3]) for i in range(PEOPLE)])  # (N, S, 14)
    larger = total[..., NUMBER["liver"]] > total[..., NUMBER["spleen"]]
    both = (total[..., NUMBER["liver"]] > 0) & (total[..., NUMBER["spleen"]] > 0)
    assert larger[both].double().mean() > 0.9
    assert (total.sum(1)[:, NUMBER["liver"]] > 2 * total.sum(1)[:, NUMBER["spleen"]]).all()


def test_small_organs_are_small_and_there():
    for i in range(PEOPLE):
        found = areas(person(i)[3])
        for name in ("right adrenal gland", "left adrenal gland"):
            pixels = found[:, NUMBER[name]]
            assert (pixels > 0).sum() >= 2
            assert pixels.max() <= 24


def test_people_differ_in_pose_and_size_and_about_one_in_twelve_has_no_gallbladder():
    people = [draw_anatomy(stream("people", i)) for i in range(240)]
    missing = sum("gallbladder" not in p.solids for p in people) / len(people)
    assert abs(missing - NO_GALLBLADDER) < 0.055, "three standard errors"
    assert torch.tensor([p.angle for p in people]).rad2deg().std() > 2.5
    assert torch.tensor([p.shift for p in people]).std(0).min() > 5
    assert torch.tensor([p.scale for p in people]).std() > 0.04
    assert torch.tensor([p.fat for p in people]).std() > 4


def test_four_training_slices_can_hold_all_organs():
    labels = torch.cat([person(i)[3] for i in range(8)])  # of the 32 default cases, at the default size and slices
    held = areas(labels)[:, 1:] > 0
    best, covered = [], torch.zeros(13, dtype=torch.bool)
    for _ in range(4):
        best.append(int((held & ~covered).sum(1).argmax()))
        covered |= held[best[-1]]
    assert set(labels[best].unique().tolist()) == set(range(14))
    assert (held.sum(1) > 0).all()


# ----- solids


def points(*places: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
    x, y, z = torch.tensor(places).T[:, None, None]
    return x, y, z


def test_the_depth_of_a_tube_is_that_of_balls_along_its_line():
    tube = Tube(torch.tensor([[0.0, 0, 0], [10, 0, 0], [10, 20, 0]]), torch.tensor([2.0, 2, 4]))
    depth = tube.depth(*points((5.0, 0, 0), (5, 1, 0), (-3, 0, 4), (10, 10, 0), (12, 20, 0)))[0, 0]
    torch.testing.assert_close(depth, torch.tensor([2.0, 1.0, -3.0, 3.0, 2.0]), atol=1e-3, rtol=0)
    flat = Tube(torch.tensor([[0.0, 0, -50], [0, 0, 50]]), torch.tensor([6.0, 6]), flat=1.5)
    edge = flat.depth(*points((9.0, 0, 0), (0, 6, 0)))[0, 0]
    torch.testing.assert_close(edge, torch.zeros(2), atol=1e-3, rtol=0)


def test_the_depth_of_an_ellipsoid_is_nought_on_its_surface_and_exact_for_a_ball():
    ball = Ellipsoid(torch.tensor([1.0, 2, 3]), torch.full((3,), 5.0), rotation(torch.tensor([10.0, 20, 30])).T)
    depth = ball.depth(*points((1.0, 2, 4), (1, 5, 7), (1, 2, 11)))[0, 0]
    torch.testing.assert_close(depth, torch.tensor([4.0, 0.0, -3.0]), atol=1e-4, rtol=0)
    turned = Ellipsoid(torch.zeros(3), torch.tensor([2.0, 5, 9]), rotation(torch.tensor([0.0, 0, 90])).T)
    on = turned.depth(*points((5.0, 0, 0), (0, 2, 0), (0, 0, 9)))[0, 0]
    torch.testing.assert_close(on, torch.zeros(3), atol=1e-4, rtol=0)


def test_a_leaf_has_two_limbs_and_ends():
    corners = torch.tensor([[0.0, 0], [-6, 20], [6, 20]])
    leaf = Leaf(corners, 0.0, 15.0, 3.0, torch.zeros(2))
    depth = leaf.depth(*points((-3.0, 10, 0), (3, 10, 0), (0, 16, 0), (0, 0, 16), (0, -2, 0)))[0, 0]
    torch.testing.assert_close(depth[[0, 1, 4]], torch.tensor([3.0, 3.0, 1.0]), atol=1e-4, rtol=0)
    assert (depth[2:4] < 0).all(), "between the limbs and beyond the end"


def test_boxes_hold_their_solids():
    x, y, z = torch.meshgrid(*(torch.arange(-200.0, 340, 9) for _ in range(3)), indexing="ij")
    for name, solid in list(draw_anatomy(stream("boxes")).solids.items())[::4]:
        low, high = solid.box(0.0)
        held = (x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]) & (z >= low[2]) & (z <= high[2])
        assert not (solid.depth(x, y, z) > 0)[~held].any(), name


def test_the_outline_is_a_superellipse():
    t = torch.linspace(0.1, 1.4, 8)
    x, y = 90 * t.cos() ** 0.8, 60 * t.sin() ** 0.8
    torch.testing.assert_close(outline(x, y, 90.0, 60.0), torch.zeros(8), atol=0.02, rtol=0)
    along = outline(torch.tensor([85.0, 95.0]), torch.zeros(2), 90.0, 60.0)
    torch.testing.assert_close(along, torch.tensor([5.0, -5.0]), atol=0.02, rtol=0)


# ----- looks


def test_hounsfield_units_are_drawn_with_the_stated_means_and_spreads():
    drawn = [draw_looks(stream("looks", i)) for i in range(1000)]
    for column, (phase, share) in enumerate(PHASES.items()):
        these = [looks.hu for looks in drawn if looks.phase == phase]
        assert abs(len(these) / len(drawn) - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5
        for name, table in HU.items():
            mean, sd = table[column]
            values = torch.tensor([hu[name] for hu in these])
            assert abs(values.mean() - mean) < 4 * sd / len(these) ** 0.5, (phase, name)
            assert 0.8 < values.std() / sd < 1.2, (phase, name)


def test_organs_show_the_units_drawn_before_noise():
    tissues = ("liver", "spleen", "pancreas", "aorta", "inferior vena cava", "gallbladder")
    for i in range(6):
        _, looks, hu, labels = person(i, 128, 8)
        for name in tissues:
            pixels = hu[inside(labels, name)]
            if len(pixels) < 20:
                continue
            spread = sum(sd**2 for sd in abdomen_looks.TEXTURE[name]) ** 0.5
            if name == "spleen" and looks.phase == "arterial":
                spread += 15
            assert abs(pixels.median() - looks.hu[name]) < 4 + spread, (i, name)
            middle = (pixels.quantile(0.84) - pixels.quantile(0.16)) / 2
            assert 0.3 * spread < middle < 2.5 * spread + 3, (i, name)


def histogram(name: str) -> Tensor:
    """Shares of a class's pixels with noise in bins of 10 HU, over the cases."""
    found = []
    for i in range(PEOPLE):
        _, _, hu, labels = person(i)
        found.append(add_noise(hu, stream("noise", i))[inside(labels, name)])
    counts = torch.histc(torch.cat(found), 60, -200, 400)
    return counts / counts.sum()


@pytest.mark.parametrize(
    ("one", "other", "least"),
    [
        ("liver", "spleen", 0.5),
        ("liver", "pancreas", 0.5),
        ("spleen", "pancreas", 0.5),
        ("stomach", "duodenum", 0.4),
        ("aorta", "inferior vena cava", 0.4),
        ("right kidney", "left kidney", 0.8),
        ("inferior vena cava", "right kidney", 0.4),
    ],
)
def test_histograms_of_neighbours_overlap(one: str, other: str, least: float):
    assert torch.minimum(histogram(one), histogram(other)).sum() > least


def test_phases_shift_vessels_and_organs_together():
    means = {name: dict(zip(PHASES, (mean for mean, _ in table), strict=True)) for name, table in HU.items()}
    assert means["aorta"]["arterial"] > means["aorta"]["portal venous"] > means["aorta"]["none"]
    for name in ("liver", "inferior vena cava", "veins"):
        assert means[name]["portal venous"] > means[name]["arterial"] > means[name]["none"]
    for phase in PHASES:
        drawn = [draw_looks(stream("together", i)) for i in range(500)]
        pairs = torch.tensor([[each.hu["liver"], each.hu["spleen"]] for each in drawn if each.phase == phase])
        assert 0.3 < torch.corrcoef(pairs.T)[0, 1] < 0.85


def test_around_the_body_is_air_and_in_it_are_lung_fat_and_bone():
    for i in range(4):
        hu = person(i)[2]
        assert (hu[:, :2] == -1000).all()
        top = hu[:4]
        assert 0.02 < ((top > -950) & (top < -700)).double().mean() < 0.4, "lung bases"
        assert 0.05 < ((hu > -130) & (hu < -70)).double().mean() < 0.5, "fat"
        assert 0.002 < (hu > 200).double().mean() < 0.1, "bone"


@pytest.mark.parametrize("size", [64, 256])
def test_noise_has_the_drawn_level_and_is_smooth_where_pixels_are_fine(size: int):
    low, high = (level * averaged((384 / size) ** 2) for level in NOISE)
    noise = torch.stack([add_noise(torch.zeros(2, size, size), stream("level", i)) for i in range(30)])
    levels = noise.flatten(1).std(1)
    assert low * 0.95 < levels.min() < low * 1.25
    assert high * 0.85 < levels.max() < high * 1.05
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
    assert neighbours < 0.05 if size == 64 else 0.2 < neighbours < 0.9


def test_pixels_average_the_noise():
    """White noise filtered with the Gaussian on a fine grid, then averaged over pixels of 6 mm."""
    step = 0.5
    noise = torch.randn(1, 1, 960, 960, generator=stream("white"))
    taps = (-0.5 * (torch.arange(-8, 9) * step / abdomen_looks.NOISE_WIDTH) ** 2).exp()
    smooth = F.conv2d(F.conv2d(noise, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    ratio = F.avg_pool2d(smooth, 12).std() / smooth.std()
    assert abs(ratio / averaged(36.0) - 1) < 0.12


def test_the_window_is_that_of_the_reference_draw_and_of_no_split():
    low, high = window(0)
    assert -1100 < low < -950
    assert 150 < high < 400
    _, _, hu, labels = person(0, 64, 6)
    task = small()
    assert torch.equal(task.splits["train"].labels[:6], labels)
    noisy = add_noise(hu, stream(0, "train", 0, "noise"))
    expected = ((noisy - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(task.splits["train"].images[:6, 0], expected)


# ----- the door


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (64, 8)}, ["'size.1'", "greater than or equal to 16", "not 8"]),
        ({"cases": (4, 0, 1)}, ["'cases.1'", "greater than 0"]),
        ({"slices": 0}, ["'slices'", "greater than 0"]),
        ({"unlabelled": -1}, ["'unlabelled'", "greater than or equal to 0"]),
        ({"organs": 3}, ["no option 'organs'", "size, cases, slices, unlabelled, unlabelled_slices, seed"]),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_it(options: dict, words: list[str]):
    with pytest.raises(UserError) as caught:
        load_task("abdomen", **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")


def test_the_task_is_ready_and_needs_no_file():
    report = check_task("abdomen")
    assert (report.family, report.problem, report.present, report.missing) == ("embedded", None, (), ())


def test_the_task_does_not_lean_on_the_generator_of_a_method():
    for module in (abdomen, abdomen_anatomy, abdomen_looks):
        assert "synthesis" not in Path(module.__file__).read_text(encoding="utf-8")
