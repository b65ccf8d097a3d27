"""The embedded lesions: their outlines, what surrounds them, and their styles."""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import label as components
from scipy.spatial import ConvexHull

from synthrepro.data import check_task, fingerprint, lesion, lesion_looks, load_task
from synthrepro.data.lesion_looks import PROBES, SKINS, Draws, Grid, Lesion, dermoscopy, ovals, strokes
from synthrepro.data.task import Task
from synthrepro.errors import UserError

STYLES = {"dermoscopy": ("standard", "camera", "skin"), "ultrasound": ("standard", "probe", "tissue")}
CHANNELS = {"dermoscopy": 3, "ultrasound": 1}
modalities = pytest.mark.parametrize("modality", list(STYLES))


@lru_cache
def small(**options: object) -> Task:
    return lesion.load(lesion.Options(**({"subjects": (48, 2, 6)} | options)), Path("nowhere"))


def grid(size: int) -> Grid:
    centres = (torch.arange(size) + 0.5) / size
    return Grid(centres, centres)


def draws(count: int, *purpose: object) -> Draws:
    return Draws([(i, *purpose) for i in range(count)])


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Chance that a positive scores above a negative, by ranks."""
    ranks = scores.argsort().argsort().double() + 1
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


@modalities
def test_images_labels_and_splits_are_of_the_promised_form(modality: str):
    task = small(modality=modality, size=(48, 40))
    assert task.classes == ("background", "lesion")
    assert task.channels == CHANNELS[modality]
    others = STYLES[modality][1:]
    assert list(task.splits) == ["train", "validation", "test", *(f"test-{style}" for style in others)]
    for split in task.splits.values():
        assert split.images.shape == (len(split), task.channels, 48, 40)
        assert split.labels.shape == (len(split), 48, 40)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        assert split.images.min() >= 0
        assert split.images.max() <= 1
        assert set(split.labels.unique().tolist()) == {0, 1}
    assert task.splits["train"].subjects[7] == "train-0007"


@modalities
def test_no_subject_is_in_two_splits_and_none_is_like_another(modality: str):
    splits = small(modality=modality).splits
    people = [set(splits[name].subjects) for name in ("train", "validation", "test")]
    assert sum(map(len, people)) == len(set.union(*people)) == 56
    maps = torch.cat([splits[name].labels for name in ("train", "validation", "test")])
    assert len(maps.unique(dim=0)) == 56


@modalities
def test_a_subject_is_the_same_whatever_the_number_of_subjects(modality: str):
    many, few = small(modality=modality), small(modality=modality, subjects=(35, 1, 2))
    for name, split in few.splits.items():
        assert torch.equal(split.images, many.splits[name].images[: len(split)])
        assert torch.equal(split.labels, many.splits[name].labels[: len(split)])
        assert split.subjects == many.splits[name].subjects[: len(split)]


@modalities
def test_the_same_options_give_the_same_task_and_another_seed_another(modality: str):
    options = {"modality": modality, "subjects": (2, 1, 1), "size": (16, 16)}
    first = fingerprint(small(**options))
    state = torch.random.get_rng_state()
    assert fingerprint(lesion.load(lesion.Options(**options), Path())) == first
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert fingerprint(small(**options, seed=1)) != first


@modalities
def test_a_scene_is_the_same_at_any_size(modality: str):
    fine = small(modality=modality, subjects=(6, 1, 1), size=(144, 144)).splits["train"]
    coarse = small(modality=modality, subjects=(6, 1, 1), size=(48, 48)).splits["train"]
    shares = F.avg_pool2d(fine.labels[:, None].float(), 3)[:, 0]
    assert ((shares > 0.5) != coarse.labels.bool()).float().mean() < 0.01
    shrunk = F.avg_pool2d(fine.images, 18)
    assert torch.corrcoef(torch.stack([shrunk.flatten(), F.avg_pool2d(coarse.images, 6).flatten()]))[0, 1] > 0.98


@modalities
def test_styles_show_the_same_lesions_and_each_can_be_the_one_trained_on(modality: str):
    tasks = {
        style: small(modality=modality, style=style, subjects=(2, 1, 3), size=(24, 24)) for style in STYLES[modality]
    }
    shown = {style: task.splits["test"].images for style, task in tasks.items()}
    for style, task in tasks.items():
        others = [other for other in STYLES[modality] if other != style]
        assert set(task.splits) == {"train", "validation", "test", *(f"test-{other}" for other in others)}
        for other in others:
            assert torch.equal(task.splits[f"test-{other}"].images, shown[other])
            assert torch.equal(task.splits[f"test-{other}"].labels, task.splits["test"].labels)
            assert (shown[other] - shown[style]).abs().mean() > 0.05
        assert torch.equal(task.splits["train"].labels, tasks["standard"].splits["train"].labels)


def test_an_outline_encloses_the_area_drawn():
    radius = lesion.draw_outlines(draws(50))
    step = 2 * math.pi / lesion.ANGLES
    torch.testing.assert_close((radius**2 / 2 * step).sum(1), torch.ones(50))


@modalities
def test_lesions_are_of_the_stated_areas_in_one_piece_and_seldom_cut_off(modality: str):
    labels = small(modality=modality).splits["train"].labels
    areas = labels.float().mean((1, 2))
    low, high = lesion.AREA
    assert (areas > 0.8 * low).all()  # displaced, and cut off at the image's border
    assert (areas < 1.15 * high).all()
    assert areas.std() > 0.04
    for each in labels.numpy():
        pieces, _ = components(each, structure=np.ones((3, 3)))
        assert np.bincount(pieces[pieces > 0]).max() > 0.9 * each.sum()
    border = torch.cat([labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]], 1).float().mean()
    assert border < 0.05


@modalities
def test_borders_are_irregular(modality: str):
    """A disc's outline is as long as 2 sqrt(pi area), and its convex hull holds nothing else."""
    labels = small(modality=modality, subjects=(24, 1, 1), size=(128, 128)).splits["train"].labels
    ratios, solidity = [], []
    for each in labels:
        mask = F.pad(each[None, None].float(), (1, 1, 1, 1))
        smooth = F.avg_pool2d(mask, 3, 1, 1)[0, 0]  # whose slope, added up, is the length of the outline
        slope = torch.stack(torch.gradient(smooth)).norm(dim=0).sum()
        ratios.append(float(slope) / (2 * math.sqrt(math.pi * float(mask.sum()))))
        points = each.nonzero().numpy()
        solidity.append(len(points) / ConvexHull(points).volume)
    assert sum(ratio > 1.15 for ratio in ratios) > 0.9 * len(ratios)
    assert sum(ratios) / len(ratios) > 1.25
    assert 0.6 < sum(solidity) / len(solidity) < 0.92


def test_a_border_is_sharp_in_part_and_faded_in_part():
    lesions = lesion.draw_lesions(draws(40), grid(128))
    assert torch.equal(lesions.inside > 0.5, lesions.distance > 0)
    near = (lesions.distance.abs() > 1e-4) & (lesions.distance.abs() < 0.02)
    for inside, distance, chosen in zip(lesions.inside, lesions.distance, near, strict=True):
        width = distance[chosen] / inside[chosen].logit(1e-6)
        assert width.quantile(0.95) > 3 * width.quantile(0.05)
    assert math.exp(lesion.FADE[0] - 2 * lesion.FADE_CHANGE) < 1 / 256, "sharp: less than a pixel of the largest size"


@modalities
@pytest.mark.parametrize("channel", [0, -1])
def test_no_grey_value_tells_lesion_from_background(modality: str, channel: int):
    split = small(modality=modality).splits["train"]
    value = auc(split.images[:, channel].flatten(), split.labels.flatten().bool())
    assert 0.1 < value < 0.4, "darker in general, and by far not always"


@modalities
def test_some_lesions_are_brighter_than_what_surrounds_them(modality: str):
    split = small(modality=modality).splits["train"]
    inside, grey = split.labels.bool(), split.images.mean(1)
    brighter = [float(image[mask].mean() > image[~mask].mean()) for image, mask in zip(grey, inside, strict=True)]
    assert 0.08 < sum(brighter) / len(brighter) < 0.45


def test_look_up_is_linear_between_entries_and_periodic():
    table = torch.arange(8.0)[None]
    angles = torch.tensor([0.0, 1.5, 7.5, 8.0, -1.0]) * (2 * math.pi / 8)
    expected = torch.tensor([0.0, 1.5, 3.5, 0.0, 7.0])
    torch.testing.assert_close(lesion.look_up(table, angles[None, None])[0, 0], expected, atol=1e-5, rtol=0)


def test_a_field_has_variance_one_and_the_spacing_sets_its_correlation():
    field = grid(32).field(draws(400), 0.25)[:, 0]
    torch.testing.assert_close(field.var(0), torch.ones(32, 32), atol=0.3, rtol=0)
    assert (field[:, 0] * field[:, 1]).mean() > 0.9
    assert (field[:, 0] * field[:, -1]).mean().abs() < 0.05
    along_rows = grid(32).field(draws(50), (1.0, 0.1))[:, 0]
    assert along_rows.diff(dim=1).abs().mean() < 0.2 * along_rows.diff(dim=2).abs().mean()


def test_ovals_and_strokes_are_as_many_as_asked_for():
    canvas = grid(64)
    none = {"count": (-2.0, 0.0)}
    assert not ovals(canvas, draws(5), 3, radius=(0.1, 0.2), amount=(1, 1), edge=(0.01, 0.01), **none).any()
    assert not strokes(canvas, draws(5), 3, width=(0.01, 0.01), **none).any()
    one = ovals(canvas, draws(30), 3, (0.5, 1.0), (0.1, 0.1), (1.0, 1.0), (1e-3, 1e-3), corner=True)
    assert one.min() >= 0
    assert one.max() <= 1
    covered = (one > 0.5).flatten(1).sum(1)
    assert (covered > 0).float().mean() > 0.8
    assert covered.float().mean() / 64**2 < math.pi * 0.1**2, "only the part within the image"
    curve = strokes(canvas, draws(30), 1, (0.5, 1.0), (0.02, 0.02))
    assert 0.8 < curve.amax((1, 2)).median() <= 1


def test_a_hair_thinner_than_a_pixel_darkens_as_much_at_any_size():
    fine, coarse = (strokes(grid(size), draws(60), 1, (0.5, 1.0), (0.003, 0.003)).mean() for size in (256, 64))
    torch.testing.assert_close(coarse, fine, rtol=0.05, atol=0)


def test_skin_without_a_lesion_absorbs_as_its_model_says(monkeypatch: pytest.MonkeyPatch):
    """All that varies set to nothing, a channel's logarithm is minus the density of the amounts given."""
    monkeypatch.setattr(Draws, "uniform", lambda self, bounds, *shape: torch.full((1, *shape), float(bounds[0])))
    monkeypatch.setattr(Draws, "normal", lambda self, *shape: torch.zeros(1, *shape))
    plain = {
        "hairs": (0.0, 0.0),
        "exposure": (1.0, 1.0),
        "cast": ((1.0, 1.0),) * 3,
        "gamma": (1.0, 1.0),
        "noise": (0.0, 0.0),
    }
    nothing = Lesion(*torch.zeros(3, 1, 1, 1).expand(3, 1, 8, 8).unbind())
    for melanin, haemoglobin in ((0.3, 0.0), (0.0, 0.5), (0.4, 0.2)):
        skin = type(SKINS["standard"])(melanin=(melanin,) * 2, haemoglobin=(haemoglobin,) * 2, **plain)
        monkeypatch.setitem(SKINS, "plain", skin)
        image = dermoscopy(nothing, grid(8), draws(1), draws(1), "plain")[0]
        density = torch.tensor([0.50, 0.80, 1.05]) * melanin + torch.tensor([0.12, 0.75, 0.60]) * haemoglobin
        centre = image[:, 4, 4] / (1 - 0.3 * (0.0625 + 0.0625))  # the light falls off from the middle
        torch.testing.assert_close(-centre.log(), density, atol=2e-3, rtol=0)


def test_the_styles_are_those_of_the_looks():
    assert {"dermoscopy": tuple(SKINS), "ultrasound": tuple(PROBES)} == STYLES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modality": "mri"}, ["'modality'", "'dermoscopy' or 'ultrasound'", "not 'mri'"]),
        ({"style": "probe"}, ["'style'", "dermoscopy are standard, camera, skin", "not 'probe'"]),
        ({"modality": "ultrasound", "style": "skin"}, ["'style'", "ultrasound are standard, probe, tissue"]),
        ({"size": (64, 4)}, ["'size.1'", "greater than or equal to 8", "not 4"]),
        ({"subjects": (0, 1, 1)}, ["'subjects.0'", "greater than 0"]),
        ({"contrast": "t1w"}, ["no option 'contrast'", "modality, size, subjects, style, seed"]),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_it(options: dict, words: list[str]):
    with pytest.raises(UserError) as caught:
        load_task("lesion", **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")


def test_the_task_is_ready_and_needs_no_file():
    report = check_task("lesion")
    assert (report.family, report.problem, report.present, report.missing) == ("embedded", None, (), ())


def test_the_task_does_not_lean_on_the_generator_of_a_method():
    for module in (lesion, lesion_looks):
        assert "synthesis" not in Path(module.__file__).read_text(encoding="utf-8")
