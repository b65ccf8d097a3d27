"""The embedded brain: its individuals, its images and its labels."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthrepro.data import brain_mni, fingerprint, load_task
from synthrepro.data.brain_mni import CENTRE, EXTENT, ORIGIN, TEST_SLABS, TRAINING_SLABS
from synthrepro.data.individuals import jacobian_determinant
from synthrepro.data.mri import TISSUES
from synthrepro.data.task import Task
from synthrepro.errors import UserError

HERE = Path(brain_mni.__file__).parent / "no-such-folder"  # hence nilearn's own files
SMALL = {"subjects": (2, 1, 2), "size": (64, 64), "spacing": 3.0, "slices": 4}
CLEAN = {"noise": (0.0, 0.0), "bias": 0.0}


def template() -> brain_mni.Template:
    return brain_mni.read_template(HERE)


@lru_cache
def small(**options: object) -> Task:
    return brain_mni.load(brain_mni.Options(**(SMALL | options)), HERE)


def planes_of(task_seed: int, subject: str, slabs: tuple, thickness: int, slices: int = 4) -> torch.Tensor:
    return brain_mni.draw_slices(slabs, slices, thickness, brain_mni.stream(task_seed, subject, "slices"))


def rows_and_columns(spacing: float, size: tuple[int, int]) -> list[torch.Tensor]:
    return [middle + (torch.arange(n) - n / 2) * spacing for n, middle in zip(size, CENTRE, strict=True)]


def test_the_template_is_nilearns_own_by_its_own_loaders():
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    brain = template().planes[:, 0].numpy() > 0
    for channel, load in enumerate((load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)):
        image = load(resolution=1)
        expected = np.asarray(image.dataobj).transpose(2, 1, 0)[:, ::-1] * brain
        np.testing.assert_allclose(template().planes[:, channel], expected, atol=1e-6)
        assert tuple(image.affine[:3, 3]) == ORIGIN


def test_images_labels_and_splits_are_of_the_promised_form():
    task = small()
    assert task.classes == ("background", "CSF", "GM", "WM")
    assert set(task.splits) == {"train", "validation", "test"} | {
        f"test-{c}" for c in ("flash3", "flash5", "flash20", "flash30", "mprage")
    }
    for split in task.splits.values():
        assert split.images.shape == (len(split), 1, 64, 64)
        assert split.images.dtype == torch.float32
        assert split.labels.shape == (len(split), 64, 64)
        assert split.labels.dtype == torch.int64
        assert split.images.min() >= 0
        assert split.images.max() == 1
        share = split.labels.flatten().bincount(minlength=4) / split.labels.numel()
        assert (share > 0.01).all(), "every class is there"


def test_no_individual_and_no_slab_is_in_two_splits():
    splits = small().splits
    people = [set(splits[name].subjects) for name in ("train", "validation", "test")]
    assert sum(map(len, people)) == len(set.union(*people)) == 5
    assert all(split.subjects == splits["test"].subjects for name, split in splits.items() if name[:5] == "test-")
    training = {z for low, high in TRAINING_SLABS for z in range(low, high + 1)}
    test = {z for low, high in TEST_SLABS for z in range(low, high + 1)}
    assert min(abs(a - b) for a in training for b in test) > 3


@pytest.mark.parametrize("slabs", [TRAINING_SLABS, TEST_SLABS])
@pytest.mark.parametrize("thickness", [1, 3, 9])
def test_every_slice_lies_wholly_inside_its_slab(slabs: tuple, thickness: int):
    for seed in range(20):
        heights = planes_of(seed, "someone", slabs, thickness, slices=6) + int(ORIGIN[2])
        for j, slice_ in enumerate(heights.tolist()):
            low, high = slabs[j % 4]
            assert low <= slice_[0] <= slice_[-1] <= high
            assert len(slice_) == thickness


def test_at_zero_variation_image_and_labels_are_the_template():
    task = small(spacing=1.0, size=(208, 176), variation=0.0, **CLEAN)
    planes = planes_of(0, "train-001", TRAINING_SLABS, 1)[:, 0]
    top, left = (middle - n // 2 for middle, n in zip(CENTRE, (208, 176), strict=True))
    intensity, gm, wm = template().planes[planes, :, top : top + 208, left : left + 176].unbind(1)
    mine = task.splits["train"].take(["train-001"])
    for image, expected in zip(mine.images[:, 0], intensity, strict=True):
        scale = float((image * expected).sum() / (expected**2).sum())
        darker = image < 1  # the brightest half per cent is cut off
        torch.testing.assert_close(image[darker], scale * expected[darker], rtol=0, atol=1e-3)
    brain = (intensity > 0).float()
    expected = torch.stack([1 - brain, brain - gm - wm, gm, wm]).argmax(0)
    clear = torch.stack([1 - brain, brain - gm - wm, gm, wm]).topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-3
    assert (mine.labels == expected)[clear].all()
    assert clear.float().mean() > 0.99


def test_pixels_are_means_of_what_they_cover():
    fine = small(spacing=1.0, size=(192, 160), variation=0.0, subjects=(1, 1, 1), **CLEAN)
    coarse = small(spacing=2.0, size=(96, 80), variation=0.0, subjects=(1, 1, 1), **CLEAN)
    planes = planes_of(0, "train-000", TRAINING_SLABS, 2)
    top, left = CENTRE[0] - 96, CENTRE[1] - 80
    means = F.avg_pool2d(template().planes[planes, 0, top : top + 192, left : left + 160].mean(1), 2)
    for image, expected in zip(coarse.splits["train"].images[:, 0], means, strict=True):
        assert torch.corrcoef(torch.stack([image.flatten(), expected.flatten()]))[0, 1] > 0.9999
    assert fine.splits["train"].images.shape[-2:] == (192, 160)


def test_the_t1_weighted_image_is_the_measured_intensity_not_a_painting_of_the_labels():
    """Within the pixels of one pure tissue the image still follows the template's texture there."""
    rows, columns = rows_and_columns(1.0, (192, 160))
    planes = torch.tensor([[80], [110]])
    anatomy = brain_mni.draw_anatomy(template(), planes, rows, columns, 1.0, brain_mni.stream(3, "x", "anatomy"))
    positions = brain_mni.draw_positions(
        planes[:, 0].float(), rows, columns, 1.0, brain_mni.stream(3, "x", "anatomy")
    )  # same stream, same draw
    measured = brain_mni.sample(template().planes[planes[:, 0], :1], positions)[:, 0]
    white = (anatomy.fractions[:, 0, 2] > 0.97) & (anatomy.brain[:, 0] > 0.999)
    pair = torch.stack([anatomy.intensity[:, 0][white], measured[white]])
    assert white.sum() > 2000
    assert pair[0].std() > 0.01
    assert torch.corrcoef(pair)[0, 1] > 0.8


def test_random_tissue_fields_move_intensity_and_label_together():
    """Expected intensity given the tissue fractions explains the image as well in an individual as in the template."""
    rows, columns = rows_and_columns(1.0, (192, 160))
    planes = torch.tensor([[80], [110]])
    errors = []
    for variation in (0.0, 1.0):
        a = brain_mni.draw_anatomy(template(), planes, rows, columns, variation, brain_mni.stream(1, "x", "anatomy"))
        expected = torch.einsum("snkhw,k->snhw", a.fractions, template().means)
        inside = a.brain > 0.999
        errors.append(float((a.intensity - expected)[inside].abs().mean()))
    assert errors[1] < 1.3 * errors[0]


def test_individuals_differ_in_tissue_as_well_as_in_shape():
    rows, columns = rows_and_columns(2.0, (96, 80))
    planes = torch.tensor([[100]])
    draw = brain_mni.stream
    first, second = (
        brain_mni.draw_anatomy(template(), planes, rows, columns, 1.0, draw(0, name, "anatomy")) for name in "ab"
    )
    assert (first.brain.round() != second.brain.round()).float().mean() > 0.02
    positions = brain_mni.draw_positions(planes[:, 0].float(), rows, columns, 1.0, draw(0, "a", "anatomy"))
    gm, wm = brain_mni.sample(template().planes[planes[:, 0], 1:], positions)[0]
    only_deformed = torch.stack([1 - gm - wm, gm, wm]).argmax(0)
    inside = first.brain[0, 0] > 0.999
    retyped = (first.fractions[0, 0].argmax(0) != only_deformed)[inside].float().mean()
    assert 0.05 < retyped < 0.4


@pytest.mark.parametrize("seed", range(12))
def test_no_individual_is_folded_and_none_moves_out_of_its_plane(seed: int):
    rows, columns = rows_and_columns(1.0, (232, 196))
    z = torch.tensor([44.0, 72.0, 100.0, 120.0])
    positions = brain_mni.draw_positions(z, rows, columns, 1.0, brain_mni.stream(seed, "anyone", "anatomy"))
    assert positions.shape == (4, 232, 196, 2)  # rows and columns only: there is no third coordinate to leave by
    determinant = jacobian_determinant(positions, 1.0)
    assert determinant.min() > 0.1
    assert determinant.max() < 4
    moved = (positions - torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)).norm(dim=-1)
    assert 2 < moved.mean() < 15  # mm


def test_t1_falls_with_intensity_through_the_published_values():
    means = template().means
    intensity = torch.linspace(0, 1.2, 200)
    t1 = brain_mni.t1_of_intensity(intensity, means)
    assert (t1.diff() <= 0).all()
    assert (t1.diff()[intensity[:-1] > means[0]] < 0).all()
    expected = torch.tensor([TISSUES[name].t1 for name in ("CSF", "GM", "WM")])
    torch.testing.assert_close(brain_mni.t1_of_intensity(means, means), expected)
    assert t1.min() > 400


def test_contrasts_order_the_tissues_as_the_signal_equations_do():
    splits = small(**CLEAN).splits

    def brightness(name: str) -> list[float]:
        split = splits[name]
        return [float(split.images[:, 0][split.labels == k].mean()) for k in (1, 2, 3)]

    for name in ("test", "test-mprage", "test-flash20", "test-flash30"):
        csf, gm, wm = brightness(name)
        assert csf < gm < wm, name
    csf, gm, wm = brightness("test-flash3")
    assert csf > gm > wm
    assert all(torch.equal(splits["test"].labels, splits[name].labels) for name in splits if name[:5] == "test-")


def test_another_contrast_shows_the_same_anatomies():
    flash = small(contrast="flash30", **CLEAN).splits
    t1w = small(**CLEAN).splits
    assert torch.equal(flash["train"].labels, t1w["train"].labels)
    assert torch.equal(flash["test"].images, t1w["test-flash30"].images)
    assert torch.equal(flash["test-t1w"].images, t1w["test"].images)
    assert "test-flash30" not in flash


def test_a_seed_gives_the_task_again_and_another_seed_another():
    again = brain_mni.load(brain_mni.Options(**SMALL), HERE)
    assert fingerprint(again) == fingerprint(small())
    assert fingerprint(small(seed=1)) != fingerprint(small())


def test_an_individual_does_not_depend_on_how_many_there_are():
    few, more = small().splits, small(subjects=(3, 2, 3)).splits
    for name, split in few.items():
        same = more[name].take(split.individuals)
        assert torch.equal(same.images, split.images), name
        assert torch.equal(same.labels, split.labels), name


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    brain_mni.load(brain_mni.Options(**(SMALL | {"subjects": (1, 1, 1)})), HERE)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_noise_level_is_drawn_per_acquisition_within_its_range():
    images = small(noise=(0.02, 0.06), variation=0.0, bias=0.0, subjects=(12, 1, 1)).splits["train"].images
    corner = images.view(12, 4, 64, 64)[:, :, :8, :8]  # no tissue there: Rayleigh, mean sigma * 1.2533
    levels = corner.mean(dim=(1, 2, 3)) / 1.2533
    assert levels.min() > 0.015
    assert levels.max() < 0.065
    assert levels.max() - levels.min() > 0.02
    assert small(**CLEAN).splits["train"].images[:, :, 0].max() == 0


def test_the_receive_field_is_smooth_and_multiplies():
    plain, shaded = (small(noise=(0.0, 0.0), bias=bias).splits["train"] for bias in (0.0, 0.3))
    inside = (plain.images > 0.2) & (shaded.images < 1) & (plain.images < 1)
    ratio = (shaded.images / plain.images.clamp_min(1e-6)).log()
    assert ratio[inside].std() > 0.1
    neighbours = inside[..., 1:] & inside[..., :-1]
    assert ratio.diff(dim=-1)[neighbours].abs().mean() < 0.03
    assert torch.equal(plain.labels, shaded.labels)


# ----- what a person can get wrong


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A data folder with a copy of the template to spoil."""
    folder = tmp_path / "brain-mni"
    folder.mkdir()
    for path in brain_mni.files(HERE):
        (folder / path.name).symlink_to(path)
    return folder


def spoil(folder: Path, which: int, change: object) -> str:
    import nibabel as nib

    path = folder / brain_mni.FILES[which]
    image = nib.load(path.resolve())
    data, affine = change(np.asarray(image.dataobj, dtype=np.float32), image.affine.copy())
    path.unlink()
    nib.save(nib.Nifti1Image(data, affine), path)
    return path.name


def _nan(data: np.ndarray, affine: np.ndarray) -> tuple:
    data[100, 100, 100] = np.nan
    return data, affine


def _coarse(data: np.ndarray, affine: np.ndarray) -> tuple:
    return data[::2, ::2, ::2], affine @ np.diag([2, 2, 2, 1])


def _elsewhere(data: np.ndarray, affine: np.ndarray) -> tuple:
    return data, affine @ np.diag([2, 2, 2, 1])


def _negative(data: np.ndarray, affine: np.ndarray) -> tuple:
    return data - 1, affine


def says(folder: Path, name: str, reason: str) -> None:
    """Loading and checking give the same single sentence, with the file and the reason."""
    from synthrepro.data import check_task

    with pytest.raises(UserError) as caught:
        load_task("brain-mni", root=folder.parent)
    report = check_task("brain-mni", root=folder.parent)
    assert report.problem == str(caught.value)
    assert name in report.problem
    assert reason in report.problem
    assert "\n" not in report.problem
    assert report.problem in str(report)


@pytest.mark.parametrize(
    ("which", "change", "reason"),
    [(0, _nan, "not finite"), (1, _coarse, "(99, 117, 95)"), (2, _elsewhere, "elsewhere"), (0, _negative, "from 0 up")],
)
def test_a_wrong_map_is_named_with_the_reason(broken: Path, which: int, change: object, reason: str):
    says(broken, spoil(broken, which, change), reason)


def test_a_missing_map_is_named(broken: Path):
    (broken / brain_mni.FILES[1]).unlink()
    says(broken, brain_mni.FILES[1], "misses")


def test_a_file_that_is_no_image_is_named(broken: Path):
    path = broken / brain_mni.FILES[2]
    path.unlink()
    path.write_bytes(b"not an image")
    says(broken, path.name, "cannot read")


def test_a_torn_file_is_named(broken: Path):
    path = broken / brain_mni.FILES[0]
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    says(broken, path.name, "cannot read")


def test_without_nilearn_the_task_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install nilearn"):
        brain_mni.files(HERE)


def test_the_box_of_the_random_fields_holds_the_template():
    assert template().planes.shape == (EXTENT[0], 3, EXTENT[1], EXTENT[2])
