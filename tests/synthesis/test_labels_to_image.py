from dataclasses import fields, replace

import pytest
import torch

from synthrepro.errors import UserError
from synthrepro.synthesis import Draw, LabelsToImage
from synthrepro.synthesis.draws import pixel_generators
from synthrepro.synthesis.labels_to_image import FWHM

CLASSES = 5
PLAIN = LabelsToImage(CLASSES)
PRESETS = {"learn2synth": LabelsToImage.learn2synth(CLASSES), "synthseg": LabelsToImage.synthseg(CLASSES)}
EVERYTHING = replace(PRESETS["learn2synth"], bias=(0, 0.5), noise=(0, 0.1), resolution=(1, 3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anatomies(count: int, size: tuple[int, int] = (64, 80)) -> torch.Tensor:
    """Nested ellipses, each of its own width, (count, *size)."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, s) for s in size], indexing="ij")
    widths = torch.linspace(1.0, 1.4, count)[:, None, None]
    return (CLASSES * (1 - (y**2 + widths * x**2).sqrt())).clamp(0, CLASSES - 1).long()


def drawn(settings: LabelsToImage, count: int = 400, size: tuple[int, int] = (8, 8)) -> Draw:
    return settings.draw(torch.zeros(count, *size, dtype=torch.int64), generator())


@pytest.mark.parametrize("settings", [*PRESETS.values(), EVERYTHING], ids=[*PRESETS, "everything"])
class TestAnySetting:
    def test_images_and_labels_are_what_the_contract_says(self, settings):
        labels = anatomies(3)
        images, deformed = settings(labels, generator())
        assert images.shape == (3, 1, 64, 80)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.flatten(1).std(1).min() > 0.01
        assert deformed.shape == labels.shape
        assert deformed.dtype == torch.int64

    def test_a_replayed_draw_gives_the_same_bits(self, settings):
        labels = anatomies(3)
        draw = settings.draw(labels, generator())
        first, second = settings.apply(labels, draw), settings.apply(labels, draw)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])

    def test_a_sample_does_not_depend_on_its_batch(self, settings):
        labels = anatomies(4)
        images, deformed = settings(labels, generator())
        alone, alone_deformed = settings(labels[:2], generator())
        assert torch.equal(images[:2], alone)
        assert torch.equal(deformed[:2], alone_deformed)
        draw = settings.draw(labels, generator())
        assert torch.equal(settings.apply(labels[3:], draw[3])[0], images[3:])

    def test_samples_differ(self, settings):
        images, _ = settings(anatomies(1).expand(3, -1, -1), generator())
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[1], images[2])

    def test_labels_are_only_moved(self, settings):
        labels = 2 * (anatomies(6) // 2)  # values 0, 2, 4
        _, deformed = settings(labels, generator())
        assert set(deformed.unique().tolist()) == {0, 2, 4}
        assert not torch.equal(deformed, labels)

    def test_deform_and_intensities_are_apply_taken_apart(self, settings):
        labels = anatomies(2)
        draw = settings.draw(labels, generator())
        images, deformed = settings.apply(labels, draw)
        assert torch.equal(settings.deform(labels, draw), deformed)
        assert torch.equal(settings.intensities(deformed, draw), images)

    def test_nothing_touches_the_global_random_state(self, settings):
        before = torch.get_rng_state()
        settings(anatomies(1), generator())
        assert torch.equal(before, torch.get_rng_state())

    def test_inputs_are_left_alone(self, settings):
        labels = anatomies(2)
        draw = settings.draw(labels, generator())
        kept = {name: value.clone() for name, value in vars(draw).items()}
        before = labels.clone()
        settings.apply(labels, draw)
        assert torch.equal(labels, before)
        assert all(torch.equal(value, kept[name]) for name, value in vars(draw).items())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_draws_the_same_parameters_and_the_same_labels(self, settings):
        labels = anatomies(3)
        here, there = settings.draw(labels, generator()), settings.draw(labels.cuda(), generator())
        for name, value in vars(there).items():
            assert value.is_cuda
            assert torch.equal(value.cpu(), getattr(here, name)), name
        images, deformed = settings.apply(labels.cuda(), there)
        again, _ = settings.apply(labels.cuda(), here.to("cuda"))
        assert torch.equal(images, again)
        assert (deformed.cpu() != settings.deform(labels, here)).float().mean() < 1e-3  # ties may round otherwise


def test_image_and_labels_are_aligned():
    """Without noise and blur, each class's pixels have one intensity, that of the deformed label map."""
    settings = replace(PRESETS["learn2synth"], sd=(0, 0), blur_fwhm=(0, 0), gamma=0.0, quantiles=None)
    labels = anatomies(4)
    images, deformed = settings(labels, generator())
    for image, label in zip(images[:, 0], deformed, strict=True):
        assert all(image[label == k].unique().numel() == 1 for k in label.unique())


STAGES = {
    "translation": ("affine",),
    "rotation": ("affine",),
    "shear": ("affine",),
    "zoom": ("affine",),
    "displacement": ("displacement",),
    "velocity": ("velocity",),
    "mean": ("mean",),
    "sd": ("sd",),
    "texture_fwhm": ("texture_sd",),
    "bias": ("bias",),
    "blur_fwhm": ("blur_sd",),
    "resolution": ("resolution", "blur_sd"),
    "resolution_one_axis": ("resolution", "blur_sd"),
    "noise": ("noise",),
}


@pytest.mark.parametrize("stage", STAGES)
def test_widening_one_stage_changes_no_other_stages_draws(stage):
    narrow, wide = drawn(PLAIN), drawn(replace(PLAIN, **{stage: (1.2, 3.0)}))
    changed = {name for name, value in vars(narrow).items() if not torch.equal(value, getattr(wide, name))}
    assert changed == set(STAGES[stage])


def test_every_range_is_a_stage_under_test():
    assert set(STAGES) == {f.name for f in fields(LabelsToImage) if f.type == tuple[float, float]}


def fills(values: torch.Tensor, low: float, high: float) -> bool:
    """Whether the values lie within the bounds, and reach both but for a twentieth."""
    near = 0.05 * (high - low)
    inside = low - 0.01 * near <= values.min() <= low + near and high - near <= values.max() <= high + 0.01 * near
    return bool(inside) and abs(values.mean() - (low + high) / 2) < 2 * near


def test_learn2synth_draws_from_the_published_ranges():
    draw = drawn(PRESETS["learn2synth"])
    assert fills(draw.affine[..., 2], -0.1, 0.1)
    matrix = draw.affine[..., :2]
    assert fills(matrix.norm(dim=1), 0.85, 1.15)
    angle = torch.atan2(matrix[:, 0, 1] - matrix[:, 1, 0], matrix[:, 0, 0] + matrix[:, 1, 1]).rad2deg()
    assert fills(angle, -15, 15)
    assert fills(draw.displacement.abs().amax((1, 2, 3)), 0, 0.05)
    assert draw.nodes.unique().tolist() == list(range(2, 11))
    assert fills(draw.mean[:, 1:], 0, 1)
    assert fills(draw.sd[:, 1:], 0, 0.05)
    assert fills(draw.texture_sd[:, 1:] * FWHM, 0, 10)
    assert fills(draw.blur_sd * FWHM, 0, 3)
    assert torch.equal(draw.blur_sd[:, 0], draw.blur_sd[:, 1])
    assert draw.gamma.log().std().item() == pytest.approx(0.6, rel=0.1)
    assert draw.gamma.log().mean().item() == pytest.approx(0, abs=0.1)
    assert (draw.mean[:, 0] == 0).all()
    assert (draw.sd[:, 0] == 0).all()
    off = [draw.velocity, draw.bias, draw.noise, draw.resolution - 1]
    assert all((value == 0).all() for value in off)


def test_synthseg_draws_from_the_published_ranges():
    draw = drawn(PRESETS["synthseg"], size=(256, 200), count=200)
    assert (draw.affine[..., 2] == 0).all()
    assert torch.linalg.matrix_norm(draw.affine[..., :2], 2).max() < 1.2 * 1.012 + 1e-3
    assert draw.velocity.shape[2:] == (11, 8)
    assert fills(draw.velocity.std((1, 2, 3)), 0, 4.3)
    assert fills(draw.mean * 255, 25, 225)
    assert fills(draw.sd * 255, 5, 25)
    assert draw.bias.shape[1:] == (7, 5)
    assert draw.bias.square().mean().sqrt().item() == pytest.approx(0.7 / 3**0.5, rel=0.15)
    assert draw.gamma.log().std().item() == pytest.approx(0.5, rel=0.15)
    assert (draw.texture_sd == 0).all()
    assert (draw.noise == 0).all()


def test_synthseg_resolution_is_mostly_low_along_one_axis():
    draw = drawn(PRESETS["synthseg"], count=4000)
    low = (draw.resolution > 1).sum(1)
    assert (low == 0).float().mean().item() == pytest.approx(0.05, abs=0.015)
    assert (low == 2).float().mean().item() == pytest.approx(0.095, abs=0.02)
    assert fills(draw.resolution[low == 1].amax(1), 1, 8)
    assert fills(draw.resolution[low == 2], 1, 4)
    assert (draw.resolution[low == 1].argmax(1) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    kept = draw.resolution == 1
    assert fills(draw.blur_sd[kept], 0.5 / 1.03, 0.5 * 1.03)
    thickness = draw.blur_sd[~kept] / 0.75
    assert (thickness > 1 / 1.04).all()
    assert (thickness < 1.04 * draw.resolution[~kept]).all()


def test_spacing_turns_millimetres_into_pixels():
    assert LabelsToImage.synthseg(CLASSES, spacing=2.0).velocity == (0, 2)
    assert LabelsToImage.synthseg(CLASSES, spacing=2.0).resolution_one_axis == (1, 4)
    assert LabelsToImage.learn2synth(CLASSES, spacing=2.0).blur_fwhm == (0, 1.5)


def test_labels_of_one_generation_class_share_their_gaussian():
    settings = replace(EVERYTHING, generation_classes=(0, 1, 2, 1, 2), fill_background=True)
    draw = drawn(settings)
    for name in ("mean", "sd", "texture_sd"):
        value = getattr(draw, name)
        assert torch.equal(value[:, 1], value[:, 3])
        assert torch.equal(value[:, 2], value[:, 4])
        assert not torch.equal(value[:, 1], value[:, 2])


def mixture(settings: LabelsToImage, labels: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Intensities before anything is done to the mixture."""
    draw = settings._factors(draw, labels.shape[1:])
    return settings._mixture(labels, draw, pixel_generators(draw.seed, labels.device))


def test_each_class_has_its_own_mean_and_sd():
    settings = replace(PLAIN, fill_background=True)
    labels = torch.arange(CLASSES)[None, :, None].expand(4, CLASSES, 4000).contiguous()
    draw = settings.draw(labels, generator())
    image = mixture(settings, labels, draw)  # row k is class k
    torch.testing.assert_close(image.mean(2), draw.mean, atol=3e-3, rtol=0)
    torch.testing.assert_close(image.std(2), draw.sd, atol=0, rtol=0.06)
    standard = (image - draw.mean[..., None]) / draw.sd[..., None]
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # Gaussian
    assert torch.corrcoef(standard[0]).triu(1).abs().max() < 0.06


def test_smoothing_within_classes_keeps_the_mean_and_lowers_the_sd():
    settings = replace(PLAIN, texture_fwhm=(6.0, 6.0), sd=(0.05, 0.05))
    labels = torch.arange(CLASSES).repeat_interleave(100)[None, :, None].expand(2, -1, 400).contiguous()
    draw = settings.draw(labels, generator())
    image = mixture(settings, labels, draw).unflatten(1, (CLASSES, 100))
    torch.testing.assert_close(image.mean((2, 3)), draw.mean, atol=2e-3, rtol=0)
    sd = 6 / FWHM
    expected = 0.05 / (2 * torch.pi**0.5 * sd)
    assert image[:, 1:].std((2, 3)).mean().item() == pytest.approx(expected, rel=0.07)
    assert (image[:, 0] == 0).all()
    centred = image[:, 1:] - image[:, 1:].mean((2, 3), keepdim=True)
    step = torch.stack([centred[..., :-1].flatten(), centred[..., 1:].flatten()])
    assert torch.corrcoef(step)[0, 1].item() == pytest.approx(torch.tensor(-1 / (4 * sd**2)).exp().item(), abs=0.02)


def test_the_background_stays_zero_unless_filled():
    labels = anatomies(4, (96, 96))
    images, deformed = PRESETS["learn2synth"](labels, generator())
    for image, label in zip(images[:, 0], deformed, strict=True):
        away = torch.nn.functional.max_pool2d((label > 0).float()[None], 25, 1, 12)[0] == 0  # out of the blur's reach
        assert away.any()
        assert image[away].abs().max() < 1e-5
    filled, deformed = replace(PRESETS["learn2synth"], fill_background=True)(labels, generator())
    assert filled[:, 0][deformed == 0].mean() > 0.05


def test_the_bias_field_has_the_stated_logarithm():
    labels = torch.ones(200, 40, 40, dtype=torch.int64)
    flat = replace(PLAIN, mean=(0.5, 0.5), sd=(0, 0), bias=(0.7, 0.7))
    draw = flat.draw(labels, generator())
    assert draw.bias.std().item() == pytest.approx(0.7, rel=0.1)
    assert draw.bias.mean().item() == pytest.approx(0, abs=0.1)
    image = flat.intensities(labels, draw)[:, 0]  # the field, stretched from minimum to maximum
    corners = draw.bias[:, [0, 0, -1, -1], [0, -1, 0, -1]].exp()  # where no interpolation is
    measured = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    low, high = corners.amin(1, keepdim=True), corners.amax(1, keepdim=True)
    assert draw.bias.shape[1:] == (2, 2)  # so that minimum and maximum are at corners
    torch.testing.assert_close(measured, (corners - low) / (high - low), atol=1e-4, rtol=0)


def test_intensities_are_clipped_as_synthseg_clips():
    labels = torch.arange(3).repeat_interleave(4)[None, :, None].expand(1, 12, 12).contiguous()
    settings = replace(PLAIN, sd=(0, 0), clip=0.5)
    draw = settings.draw(labels, generator())
    draw.mean[0, :3] = torch.tensor([0.0, 0.25, 0.9])
    image = settings.intensities(labels, draw)[0, 0]
    torch.testing.assert_close(image[:, 0].unique(), torch.tensor([0.0, 0.5, 1.0]))  # 0.9 was clipped to 0.5


def test_gamma_is_the_exponent_of_the_stretched_image():
    labels = anatomies(3)
    plain, curved = replace(PLAIN, gamma=0.0), replace(PLAIN, gamma=0.8)
    draw = curved.draw(labels, generator())
    expected = plain.intensities(labels, draw) ** draw.gamma[:, None, None, None]
    torch.testing.assert_close(curved.intensities(labels, draw), expected)


def test_noise_has_the_stated_sd_in_units_of_the_range():
    labels = torch.arange(CLASSES).repeat_interleave(40)[None, :, None].expand(3, -1, 300).contiguous()
    clean, noisy = replace(PLAIN, sd=(0, 0)), replace(PLAIN, sd=(0, 0), noise=(0.02, 0.08))
    draw = noisy.draw(labels, generator())
    inside = clean.intensities(labels, draw)
    added = noisy.intensities(labels, draw) - inside
    for i in range(3):
        middle = (inside[i] > 0.35) & (inside[i] < 0.65)  # away from the clip at 0 and 1
        if middle.any():
            assert added[i][middle].std().item() == pytest.approx(draw.noise[i].item(), rel=0.05)
            assert added[i][middle].mean().abs() < 3e-3
    assert sum(((inside[i] > 0.35) & (inside[i] < 0.65)).any() for i in range(3)) > 0


def test_mixture_noise_and_additive_noise_are_independent():
    labels = torch.ones(1, 200, 200, dtype=torch.int64)
    settings = replace(PLAIN, mean=(0.5, 0.5), sd=(0.05, 0.05), noise=(0.1, 0.1))
    draw = settings.draw(labels, generator())
    without = replace(settings, noise=(0, 0)).intensities(labels, draw)
    added = settings.intensities(labels, draw) - without
    assert torch.corrcoef(torch.stack([without.flatten(), added.flatten()]))[0, 1].abs() < 0.1


def test_blur_has_the_stated_width_along_both_axes():
    labels = torch.zeros(2, 61, 61, dtype=torch.int64)
    labels[:, 30, 30] = 1
    settings = replace(PLAIN, mean=(1, 1), sd=(0, 0), blur_fwhm=(1.0, 3.0))
    draw = settings.draw(labels, generator())
    point = settings.intensities(labels, draw)[:, 0]
    distance = torch.arange(61.0) - 30
    for axis in (1, 2):
        profile = point.sum(axis)
        variance = (profile * distance**2).sum(1) / profile.sum(1)
        torch.testing.assert_close(variance.sqrt(), draw.blur_sd[:, 2 - axis], atol=2e-3, rtol=0)


def test_low_resolution_loses_detail_along_its_own_axis_only():
    settings = replace(PLAIN, fill_background=True, sd=(0.05, 0.05), resolution_one_axis=(6.0, 6.0))
    labels = torch.zeros(40, 60, 60, dtype=torch.int64)
    draw = settings.draw(labels, generator())
    images = settings.intensities(labels, draw)[:, 0]
    for axis in (0, 1):
        low = (draw.resolution[:, axis] == 6) & (draw.resolution[:, 1 - axis] == 1)
        assert low.sum() > 5
        across, along = images[low].diff(dim=1 + axis).std(), images[low].diff(dim=2 - axis).std()
        assert across < 0.5 * along


def test_quantiles_become_zero_and_one():
    labels = torch.randint(1, CLASSES, (2, 90, 90), generator=generator())
    settings = replace(PLAIN, sd=(0.05, 0.05), quantiles=(0.05, 0.9), fill_background=True)
    images = settings(labels, generator())[0].flatten(1)
    assert (images == 0).float().mean(1).tolist() == pytest.approx([0.05, 0.05], abs=0.003)
    assert (images == 1).float().mean(1).tolist() == pytest.approx([0.1, 0.1], abs=0.003)


def test_the_upper_quantile_leaves_out_an_unfilled_background():
    labels = torch.zeros(1, 100, 100, dtype=torch.int64)
    labels[:, 40:60, 40:60] = 1  # 400 pixels
    settings = replace(PLAIN, mean=(0.5, 0.5), sd=(0.05, 0.05), quantiles=(0.01, 0.9))
    image = settings(labels, generator())[0]
    assert (image == 1).sum().item() == pytest.approx(40, abs=2)
    assert (image == 0).sum() == 9600


def test_an_empty_label_map_gives_an_empty_image():
    images, _ = PRESETS["learn2synth"](torch.zeros(1, 32, 32, dtype=torch.int64), generator())
    assert (images == 0).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 8, 8), "int64"),
        (torch.zeros(8, 8, dtype=torch.int64), r"\(B, H, W\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), r"\(B, H, W\)"),
        (torch.full((1, 8, 8), -1), "0 to 4"),
        (torch.full((1, 8, 8), CLASSES), "0 to 4"),
    ],
    ids=["dtype", "too few axes", "too many axes", "negative", "too large"],
)
def test_wrong_labels_are_one_sentence(labels, message):
    good = anatomies(len(labels), (8, 8))
    draw = PLAIN.draw(good, generator())
    for use in (
        lambda: PLAIN.draw(labels, generator()),
        lambda: PLAIN.apply(labels, draw),
        lambda: PLAIN.intensities(labels, draw),
    ):
        with pytest.raises(UserError, match=message) as error:
            use()
        assert str(error.value).count(". ") == 0
        assert str(error.value).endswith(".")


def test_a_draw_of_another_batch_is_refused():
    with pytest.raises(UserError, match="3 samples for 2 label maps"):
        PLAIN.apply(anatomies(2), PLAIN.draw(anatomies(3), generator()))


def test_generation_classes_of_another_length_are_refused():
    with pytest.raises(UserError, match="3 Gaussians for 5 label values"):
        LabelsToImage(CLASSES, (0, 1, 1))


def test_two_kinds_of_elastic_deformation_at_once_are_refused():
    with pytest.raises(UserError, match="two kinds"):
        replace(PRESETS["synthseg"], displacement=(0, 0.05))
