"""The embedded abdomen under ultrasound: geometry, echoes, speckle, shadows, and what no case depends on."""

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from synthrepro.data import abdomen, abdomen_us, check_task, fingerprint, load_task
from synthrepro.data.abdomen_looks import CLASSES
from synthrepro.data.abdomen_mr import CODE, TISSUES
from synthrepro.data.abdomen_us import (
    ACOUSTICS,
    FRAME,
    LINES,
    MOST,
    PRESSED,
    RANGES,
    STEP,
    TOP,
    Medium,
    Probe,
    Sector,
    body_of,
    compress,
    convert,
    draw_probe,
    echoes,
    gain,
    inside,
    lit,
    medium_of,
    put_on,
    to_frame,
    to_lines,
)
from synthrepro.data.brain_mni import stream
from synthrepro.data.task import Task
from synthrepro.errors import UserError

NUMBER = {name: k for k, name in enumerate(CLASSES)}
PROBE = Probe(
    radius=50.0, half_angle=0.5, depth=180.0, frequency=3.0, axial=1.2, lateral=1.2, widening=0.02, assumed=0.5,
    reach=1e4, grey=0.5, range=60.0, dirt=-30.0, echo=torch.tensor([ACOUSTICS[name].echo for name in TISSUES]),
)  # fmt: skip


@lru_cache
def small(**options: object) -> Task:
    return abdomen_us.load(
        abdomen_us.Options(**({"cases": (2, 1, 1), "slices": 2, "size": (64, 64)} | options)), Path()
    )


def uniform(slices: int = 1, **changed: float) -> Medium:
    """The same everywhere: amplitude one, no loss, the liver's impedance."""
    values = {"amplitude": 1.0, "loss": 0.0, "impedance": 1.65, "gas": 0.0} | changed
    shape = (slices, len(PROBE.depths), LINES)
    return Medium(*(torch.full(shape, values[name]) for name in ("amplitude", "loss", "impedance", "gas")))


def of_tissues(layers: list[tuple[str, int, int]], lines: slice = slice(None), slices: int = 1) -> Medium:
    """Liver with tissues between two samples each, on some lines."""
    liver = ACOUSTICS["liver"]
    medium = uniform(slices, loss=liver.loss, impedance=liver.impedance)
    for name, start, stop in layers:
        tissue, part = ACOUSTICS[name], (slice(None), slice(start, stop), lines)
        medium.amplitude[part] = 10 ** (tissue.echo / 20)
        medium.loss[part], medium.impedance[part] = tissue.loss, tissue.impedance
        medium.gas[part] = float(name in ("gas", "lung"))
    return medium


def decibel(values: Tensor) -> float:
    """Of the mean square."""
    return float(10 * values.square().mean().log10())


# ----- form, and what a case depends on


def test_images_labels_and_splits_are_of_the_promised_form():
    task = small(size=(64, 48))
    assert (task.name, task.classes, task.channels) == ("abdomen-us", CLASSES, 1)
    assert list(task.splits) == ["train", "validation", "test"]
    for split in task.splits.values():
        assert len(split) == 2 * len(split.individuals)
        assert split.images.shape == (len(split), 1, 64, 48)
        assert split.labels.shape == (len(split), 64, 48)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        assert split.images.min() >= 0
        assert split.images.max() <= 1
        assert split.labels.min() >= 0
        assert split.labels.max() < len(CLASSES)
        assert 0.05 < split.images.mean() < 0.4
    assert task.splits["train"].subjects == ("train-000",) * 2 + ("train-001",) * 2


def test_a_case_is_the_same_whatever_else_is_asked_for():
    many = small(cases=(3, 2, 2))
    for name, split in small().splits.items():
        assert torch.equal(split.images, many.splits[name].images[: len(split)])
        assert torch.equal(split.labels, many.splits[name].labels[: len(split)])


def test_a_case_is_the_same_at_any_size():
    coarse, labels = abdomen_us.case(0, "train", 0, 2, (64, 64))
    fine, finer = abdomen_us.case(0, "train", 0, 2, (128, 128))
    pooled = F.avg_pool2d(fine[:, None], 2)[:, 0]
    assert torch.corrcoef(torch.stack([coarse.flatten(), pooled.flatten()]))[0, 1] > 0.98, (
        "but for the pixels on the sector's border"
    )
    assert (labels == finer[:, 1::2, 1::2]).double().mean() > 0.97


def test_the_same_options_give_the_same_task_and_another_seed_another():
    first, state = fingerprint(small()), torch.random.get_rng_state()
    options = abdomen_us.Options(cases=(2, 1, 1), slices=2, size=(64, 64))
    assert fingerprint(abdomen_us.load(options, Path())) == first
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert fingerprint(small(seed=1)) != first


def test_splits_show_different_pictures():
    images = torch.cat([split.images for split in small().splits.values()]).flatten(1)
    distances = torch.cdist(images, images) + 1e3 * torch.eye(len(images))
    assert distances.min() > 1


def test_the_people_are_those_of_abdomen(monkeypatch: pytest.MonkeyPatch):
    asked = []
    draw = abdomen.draw_case
    monkeypatch.setattr(abdomen_us, "draw_case", lambda *key: asked.append(key) or draw(*key))
    abdomen_us.case(5, "test", 2, 1, (16, 16))
    assert asked == [(5, "test", 2)]


# ----- geometry


def test_a_place_on_a_line_and_a_place_in_the_image_are_each_others_inverse():
    angle, depth = torch.meshgrid(torch.linspace(-0.5, 0.5, 9), torch.linspace(0, 180, 7), indexing="ij")
    x, y = to_frame(PROBE, angle, depth)
    back = to_lines(PROBE, x, y)
    torch.testing.assert_close(back[0], angle, atol=1e-5, rtol=0)
    torch.testing.assert_close(back[1], depth, atol=1e-3, rtol=0)
    assert float(to_frame(PROBE, torch.tensor(0.0), torch.tensor(0.0))[0]) == FRAME / 2
    corner = to_frame(PROBE, torch.tensor(0.5), torch.tensor(0.0))
    assert abs(float(corner[1]) - TOP) < 1e-4, "the ends of the array are at the top"


@pytest.mark.parametrize(("angle", "depth"), [(0.0, 60.0), (0.3, 100.0), (-0.4, 150.0)])
def test_a_point_shows_in_its_pixel(angle: float, depth: float):
    line = round((angle / PROBE.half_angle + 1) * (LINES - 1) / 2)
    medium = uniform(amplitude=0.0)
    medium.amplitude[0, round(depth / STEP), line] = 1e4
    image = convert(compress(echoes(medium, PROBE, stream("point")), PROBE), PROBE, (256, 256))[0]
    row, column = divmod(int(image.argmax()), 256)
    reach = 50 + depth
    x = FRAME / 2 + reach * math.sin(float(PROBE.angles[line]))
    y = TOP + reach * math.cos(float(PROBE.angles[line])) - 50 * math.cos(0.5)
    bright = (image > image.max() - 0.02).nonzero().double().mean(0) + 0.5
    assert abs(bright[0] - y) < 1.5, (row, column)
    assert abs(bright[1] - x) < 1.5, (row, column)


def test_outside_the_sector_are_zeros():
    for split in small().splits.values():
        for i, subject in enumerate(split.subjects):
            part, number = subject.split("-")
            within = inside(draw_probe(stream(0, part, int(number), "probe")), (64, 64)) > 0
            assert (split.images[i, 0][~within] == 0).all()
            assert (split.labels[i][~within] == 0).all()
            assert 0.3 < within.double().mean() < 0.65
            assert (split.images[i, 0][within] > 0).double().mean() > 0.3


def test_the_sector_is_placed_and_turned_as_it_says():
    sector = Sector(100.0, 50.0, math.pi / 2, torch.zeros(LINES))
    x, y = sector.places(PROBE, torch.tensor([0.0, 0.0, 0.5]), torch.tensor([0.0, 30.0, 30.0]))
    expected_x = [100.0, 70.0, 150 - 80 * math.cos(0.5)]
    torch.testing.assert_close(x, torch.tensor(expected_x), atol=1e-3, rtol=0)
    torch.testing.assert_close(y, torch.tensor([50.0, 50.0, 50 + 80 * math.sin(0.5)]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("side", [0.0, 0.9, -0.5])
def test_the_array_lies_on_the_skin_which_is_pressed_on_it(side: float):
    """A round body of 100 mm: the gap between two circles that touch from without."""
    place = torch.arange(384) + 0.5
    body = ((place - 200) ** 2 + (place[:, None] - 220) ** 2 < 100**2).float()
    sector = put_on(body, PROBE, side, 0.0)
    assert abs(sector.x - 200 - 100 * math.sin(side)) < 1.5
    assert abs(sector.y - 220 + 100 * math.cos(side)) < 1.5
    for angle in (0.0, 0.3, 0.45):
        line = round((angle / 0.5 + 1) * (LINES - 1) / 2)
        at, between = float(PROBE.angles[line]), 150.0
        gap = between * math.cos(at) - math.sqrt(100**2 - (between * math.sin(at)) ** 2) - 50
        assert abs(sector.lift[line] - PRESSED - gap) < 1.6
    edge = torch.full((1,), 0.45)
    x, y = sector.places(PROBE, edge, torch.zeros(1))
    assert abs(math.hypot(float(x) - 200, float(y) - 220) - 100 + PRESSED) < 1.6, "the face is on the skin"
    deep, flat = (
        each.places(PROBE, edge, torch.full((1,), 170.0)) for each in (sector, replace(sector, lift=0 * sector.lift))
    )
    assert math.hypot(float(deep[0] - flat[0]), float(deep[1] - flat[1])) < 1.0, "far away nothing is moved"
    bare = put_on(((place - 200).abs() < 12).float() * body, PROBE, 0.0, 0.0)
    assert bare.lift.max() == MOST + PRESSED, "where no skin is found"


@pytest.mark.parametrize("side", [0.0, 0.9])
def test_sound_goes_from_the_array_into_the_body_on_every_line(side: float):
    place = (torch.arange(256) + 0.5) * 1.5
    round_body = (place - 200) ** 2 + (place[:, None] - 220) ** 2 < 130**2
    codes = torch.where(round_body, CODE["liver"], CODE["air"])[None]
    sectors = [put_on(body_of(codes)[0], PROBE, side, 0.0)]
    medium = medium_of(codes, torch.zeros(3, 1, 256, 256), sectors, PROBE, stream("contact"))
    torch.testing.assert_close(medium.loss, torch.full_like(medium.loss, ACOUSTICS["liver"].loss))
    torch.testing.assert_close(medium.amplitude, torch.ones_like(medium.amplitude))


# ----- echoes


def test_speckle_is_of_rayleighs_law_before_compression():
    envelope = echoes(uniform(4), PROBE, stream("speckle"))
    apart = envelope[:, 20:-20:12, 8:-8:8].flatten()
    assert len(apart) > 1000
    assert stats.kstest(apart.double().numpy(), stats.rayleigh(scale=0.5**0.5).cdf).pvalue > 0.01
    assert abs(envelope.mean() / envelope.std() - (math.pi / (4 - math.pi)) ** 0.5) < 0.08, "1.91"


@pytest.mark.parametrize("loss", [0.3, 0.7])
def test_echoes_fall_by_what_is_lost_there_and_back(loss: float):
    envelope = echoes(uniform(4, loss=loss), PROBE, stream("slope"))
    level = 10 * envelope.square().mean((0, 2)).log10()
    slope = np.polyfit(PROBE.depths[20:-20].numpy() / 10, level[20:-20].numpy(), 1)[0]
    assert abs(slope / (-2 * loss * PROBE.frequency) - 1) < 0.02, "dB/cm"


def test_the_gain_makes_up_for_the_assumed_attenuation():
    grey = compress(echoes(uniform(4, loss=0.5), PROBE, stream("gain")), PROBE).mean((0, 2))
    assert (grey[40:120].mean() - grey[-120:-40].mean()).abs() < 0.01
    assert abs(grey.mean() - (PROBE.grey - 2.5 / PROBE.range)) < 0.01, "the mean logarithm of Rayleigh's law is -2.5 dB"
    assert abs(float(gain(PROBE)[-1]) - 2 * 0.5 * 3 * 18) < 1e-3
    spread = compress(echoes(uniform(4, loss=0.5), PROBE, stream("gain")), PROBE).std() * PROBE.range
    assert abs(spread - 5.57) < 0.2, "dB, and so is its standard deviation"


def test_the_point_spread_function_is_as_wide_as_it_says_and_widens_with_depth():
    widths = []
    for depth in (40.0, 160.0):
        medium, row = uniform(amplitude=0.0), round(depth / STEP)
        medium.amplitude[0, row, LINES // 2] = 1.0
        envelope = echoes(medium, PROBE, stream("width"))[0].double()
        pitch = (50 + depth) * 2 * PROBE.half_angle / (LINES - 1)
        for profile, step, expected in (
            (envelope[:, LINES // 2], STEP, PROBE.axial),
            (envelope[row], pitch, (PROBE.lateral**2 + (PROBE.widening * depth) ** 2) ** 0.5),
        ):
            shares, places = profile / profile.sum(), torch.arange(len(profile)) * step
            spread = ((shares * places**2).sum() - (shares * places).sum() ** 2) ** 0.5
            assert abs(spread * (8 * math.log(2)) ** 0.5 / expected - 1) < 0.08, "cut off beyond 1.3 widths"
            widths.append(float(spread))
    assert widths[3] > 1.7 * widths[1]
    assert abs(widths[2] - widths[0]) < 1e-3


@pytest.mark.parametrize("name", ["cortical bone", "gas", "lung"])
def test_bone_and_gas_reflect_and_cast_a_shadow(name: str):
    medium = of_tissues([(name, 120, 140)], slice(60, 100), slices=4)
    grey = compress(echoes(medium, replace(PROBE, reach=220.0), stream("shadow", name)), PROBE)
    beside = grey[..., 10:40]
    assert grey[:, 117:124, 70:90].amax(1).mean() > beside.mean() + 0.25, "the surface"
    assert grey[:, 180:260, 70:90].mean() < beside[:, 180:260].mean() - 0.2
    shown = lit(medium, PROBE)
    assert shown[:, :118].all()
    assert (shown[:, 160:, 66:94] == 0).all()
    assert shown[..., :50].all()


def test_what_lies_behind_fluid_is_brighter():
    medium = of_tissues([("gallbladder", 100, 180)], slice(60, 100), slices=4)
    envelope = echoes(medium, PROBE, stream("fluid"))
    behind, beside = envelope[:, 200:300, 70:90], envelope[:, 200:300, 10:40]
    expected = 2 * (ACOUSTICS["liver"].loss - ACOUSTICS["gallbladder"].loss) * 3.0 * 80 * STEP / 10
    assert abs(decibel(behind) - decibel(beside) - expected) < 0.7
    assert decibel(envelope[:, 120:160, 70:90]) < decibel(envelope[:, 120:160, 10:40]) - 25
    assert lit(medium, PROBE).all()


def test_an_interface_is_brighter_the_more_it_faces_the_beam():
    levels = []
    for slope in (0.0, 1.0):  # samples down for every line across
        medium = uniform(amplitude=0.0)
        border = 150 + slope * 1.3 * (torch.arange(LINES) - LINES / 2)
        step = ((torch.arange(len(PROBE.depths))[:, None] - border) / 2).sigmoid()
        medium.impedance[0] = 1.65 - 0.2 * step
        levels.append(float(echoes(medium, PROBE, stream("facing"))[0, :, 40:-40].amax(0).mean()))
    assert levels[0] > 1.3 * levels[1] > 0


def test_gas_fills_its_shadow_with_a_reverberation_that_fades():
    medium = of_tissues([("gas", 100, 361)])
    loud = echoes(medium, replace(PROBE, dirt=-25.0), stream("dirt"))
    quiet = echoes(medium, replace(PROBE, dirt=-200.0), stream("dirt"))
    level = [decibel(loud[:, k : k + 10]) for k in (120, 160, 200)]
    assert level[0] > level[1] + 10 > level[2] + 20
    assert level[0] > decibel(quiet[:, 120:130]) + 6


def test_noise_is_as_bright_as_tissue_at_the_stated_depth():
    probe = replace(PROBE, reach=100.0)
    noise = echoes(uniform(4, amplitude=0.0), probe, stream("noise"))
    tissue = echoes(uniform(4, loss=0.5), PROBE, stream("tissue"))
    assert abs(decibel(noise) - decibel(tissue[:, 198:203])) < 0.5


# ----- looks


def test_every_tissue_has_acoustic_properties_in_the_right_order():
    assert set(ACOUSTICS) == set(TISSUES)
    echo = {name: tissue.echo for name, tissue in ACOUSTICS.items()}
    assert abs(echo["liver"] - echo["spleen"]) < 2
    assert echo["medulla"] < echo["cortex"] < echo["liver"] < echo["pancreas"] < echo["sinus fat"]
    assert max(echo["gallbladder"], echo["aorta"], echo["inferior vena cava"]) < -30
    impedance = {name: tissue.impedance for name, tissue in ACOUSTICS.items()}
    assert impedance["gas"] < impedance["fat"] < impedance["liver"] < impedance["muscle"] < impedance["cortical bone"]


def test_scanners_are_drawn_within_their_ranges_and_differ():
    probes = [draw_probe(stream("probes", i)) for i in range(200)]
    for name, (low, high) in RANGES.items():
        values = torch.tensor([getattr(probe, name) for probe in probes])
        values = values.rad2deg() if name == "half_angle" else values
        assert low - 1e-3 <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high + 1e-3
    assert all(probe.echo[CODE["liver"]] == 0 for probe in probes)


def test_organs_look_as_they_should_and_the_liver_like_the_spleen():
    found: dict[str, list[Tensor]] = {name: [] for name in CLASSES}
    for i in range(6):
        images, labels = abdomen_us.case(0, "train", i, 6, (96, 96))
        for name, number in NUMBER.items():
            mask = -F.max_pool2d(-(labels == number).float()[:, None], 3, 1, 1)[:, 0] > 0
            found[name].append(images[mask])
    grey = {name: torch.cat(pixels) for name, pixels in found.items()}
    for name in ("liver", "spleen", "aorta", "inferior vena cava", "gallbladder", "left kidney", "pancreas"):
        assert len(grey[name]) > 50, name
    liver = grey["liver"].mean()
    assert abs(grey["spleen"].mean() - liver) < 0.08
    assert grey["gallbladder"].mean() < liver - 0.2
    assert grey["aorta"].mean() < liver - 0.08
    assert grey["pancreas"].mean() > grey["aorta"].mean() + 0.1
    low, high = (grey[name].quantile(q) for name, q in (("spleen", 0.75), ("liver", 0.25)))
    assert low > high, "their histograms overlap"


# ----- the door


def test_a_wrong_option_is_one_sentence_that_names_it():
    with pytest.raises(
        UserError, match=r"Task abdomen-us has no option 'unlabelled'; it has size, cases, slices, seed\.$"
    ):
        load_task("abdomen-us", unlabelled=3)


def test_the_task_is_ready_and_needs_no_file():
    report = check_task("abdomen-us")
    assert (report.family, report.problem, report.present, report.missing) == ("embedded", None, (), ())


def test_the_task_does_not_lean_on_the_generator_of_a_method():
    assert "synthesis" not in Path(abdomen_us.__file__).read_text(encoding="utf-8")
