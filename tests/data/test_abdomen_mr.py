"""The embedded abdomen in a magnetic resonance scanner: its tissues, its signals, and what no case depends on."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synthrepro.data import abdomen, abdomen_mr, check_task, fingerprint, load_task
from synthrepro.data.abdomen_looks import CLASSES, picture
from synthrepro.data.abdomen_mr import (
    CODE,
    CONTRASTS,
    FAT,
    PHASE_TE,
    RELAXATION,
    SNR,
    TISSUES,
    Scan,
    clean_slices,
    draw_scan,
    magnitude,
    paint_tissues,
    pool,
    reference_signal,
    signal,
    spin_echo,
)
from synthrepro.data.brain_mni import stream
from synthrepro.data.task import Task
from synthrepro.errors import UserError

NUMBER = {name: k for k, name in enumerate(CLASSES)}
SETTINGS = {"in phase": (150.0, 2 * PHASE_TE), "opposed phase": (150.0, PHASE_TE), "T2": (4000.0, 80.0)}


@lru_cache
def small(**options: object) -> Task:
    return abdomen_mr.load(
        abdomen_mr.Options(**({"cases": (2, 1, 1), "slices": 3, "size": (48, 48)} | options)), Path()
    )


def average_scan(contrast: str) -> Scan:
    """Tissues as the table has them, no receive field, no flow."""
    t1, t2 = (torch.tensor([getattr(RELAXATION[name], time) for name in TISSUES]) for time in ("t1", "t2"))
    tr, te = SETTINGS[contrast]
    return Scan(contrast, tr, te, 75.0, t1, t2, torch.ones(len(TISSUES)), 0.0, 30.0)


def pure(tissue: str, scan: Scan) -> float:
    """Magnitude of a tissue without texture."""
    return float(magnitude(*signal(torch.full((1, 1, 1), CODE[tissue]), torch.zeros(3, 1, 1, 1), scan), scan))


@lru_cache
def map_of(i: int, side: int = 192, slices: int = 10) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """Codes, classes, HU of the same place in `abdomen`, and the means of its tissues."""
    anatomy, looks = abdomen.draw_case(0, "train", i)
    levels = anatomy.levels(slices)
    codes, labels, _ = paint_tissues(anatomy, levels, (side, side), (0, "train", i))
    return codes, labels, picture(anatomy, looks, levels, (side, side), (0, "train", i))[0], dict(looks.hu)


def inner(mask: Tensor) -> Tensor:
    """Pixels none of whose neighbours is outside the mask."""
    return -F.max_pool2d(-mask.float()[:, None], 3, 1, 1)[:, 0] > 0


# ----- form, and what a case depends on


def test_images_labels_and_splits_are_of_the_promised_form():
    task = small(size=(48, 40))
    assert (task.name, task.classes, task.channels) == ("abdomen-mr", CLASSES, 1)
    assert list(task.splits) == ["train", "validation", "test"]
    for split in task.splits.values():
        assert len(split) == 3 * len(split.individuals)
        assert split.images.shape == (len(split), 1, 48, 40)
        assert split.labels.shape == (len(split), 48, 40)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        assert split.images.min() >= 0
        assert split.images.max() == 1
    assert task.splits["train"].subjects == ("train-000",) * 3 + ("train-001",) * 3


def test_labels_are_those_of_the_same_people_in_abdomen():
    options = {"cases": (2, 1, 1), "slices": 3, "size": (48, 40)}
    other = abdomen.load(abdomen.Options(**options), Path())
    for name, split in small(size=(48, 40)).splits.items():
        assert torch.equal(split.labels, other.splits[name].labels)
        assert split.subjects == other.splits[name].subjects


def test_a_case_is_the_same_whatever_else_is_asked_for():
    many = small(cases=(3, 2, 2))
    for name, split in small().splits.items():
        assert torch.equal(split.images, many.splits[name].images[: len(split)])
        assert torch.equal(split.labels, many.splits[name].labels[: len(split)])


def test_painting_in_several_parts_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch):
    whole, labels = abdomen_mr.case(0, "train", 0, 3, (32, 32))
    monkeypatch.setattr(abdomen_mr, "CHUNK", 1)
    parts, again = abdomen_mr.case(0, "train", 0, 3, (32, 32))
    assert torch.equal(labels, again)
    torch.testing.assert_close(parts, whole, atol=1e-3, rtol=1e-2)


def test_the_same_options_give_the_same_task_and_another_seed_another():
    first, state = fingerprint(small()), torch.random.get_rng_state()
    options = abdomen_mr.Options(cases=(2, 1, 1), slices=3, size=(48, 48))
    assert fingerprint(abdomen_mr.load(options, Path())) == first
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert fingerprint(small(seed=1)) != first


def test_splits_show_different_people():
    splits = small().splits.values()
    people = [split.labels[rows : rows + 3].flatten() for split in splits for rows in range(0, len(split), 3)]
    for k, one in enumerate(people):
        assert all((one != other).double().mean() > 0.02 for other in people[:k])


# ----- the map of tissues


def test_every_tissue_has_its_constants_and_a_code_of_its_own():
    assert len(set(TISSUES)) == len(TISSUES)
    assert set(RELAXATION) == set(TISSUES)
    assert CODE["muscle"] == 2 * CODE["small vessels"], "the painters halve muscle"
    assert CODE["medulla"] == CODE["cortex"] + 1, "the painters blend them"


def test_codes_are_those_of_the_tissues_that_abdomen_paints():
    """Hounsfield units of `abdomen` where a code stands, away from borders."""
    given = {"gas": -850, "cortical bone": 330, "disc": 85, "canal": 30, "sinus fat": -60, "lung": -810, "air": -1000}
    found = set()
    for i in range(2):
        codes, _, hu, means = map_of(i)
        for name in TISSUES:
            pixels = hu[inner(codes == CODE[name])]
            if len(pixels) < 30 or name in ("veins", "small vessels", "stool", "table", "skin", "cortex", "medulla"):
                continue
            found.add(name)
            thin = name == "cortical bone"  # mixed with what lies within, in `abdomen`
            assert abs(pixels.median() - given.get(name, means.get(name, 0))) < (60 if thin else 20), name
    assert {"liver", "spleen", "stomach", "bowel", "muscle", "fat", "bone", "lung", "gas", "disc"} <= found
    codes, labels, hu, means = map_of(0)
    assert set(range(len(TISSUES))) - set(codes.unique().tolist()) <= {CODE["table"], CODE["heart"]}
    kidney = (labels == NUMBER["left kidney"]) | (labels == NUMBER["right kidney"])
    assert set(codes[kidney].unique().tolist()) == {CODE["cortex"], CODE["medulla"]}
    veins = (codes == CODE["veins"]) & (labels == NUMBER["liver"])
    liver = (codes == CODE["liver"]) & (labels == NUMBER["liver"])
    assert veins.any()
    assert hu[veins].median() > hu[liver].median() or means["veins"] < means["liver"]


# ----- signals


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("tissue", ["spleen", "cortex", "gallbladder"])
def test_the_signal_of_pure_water_is_that_of_the_equation(contrast: str, tissue: str):
    scan, constants = average_scan(contrast), RELAXATION[tissue]
    tr, te = SETTINGS[contrast]
    if contrast == "T2":
        expected = constants.pd * (1 - np.exp(-tr / constants.t1)) * np.exp(-te / constants.t2)
    else:
        angle, e1 = np.radians(75.0), np.exp(-tr / constants.t1)
        expected = np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1)
        expected *= constants.pd * np.exp(-te / constants.t2_star)
    assert abs(pure(tissue, scan) / expected - 1) < 1e-5


def test_the_spin_echo_is_exact_in_double_precision():
    t1, t2, pd = (torch.tensor([value], dtype=torch.float64) for value in (1057.0, 79.0, 0.8))
    expected = 0.8 * (1 - np.exp(-3000 / 1057)) * np.exp(-90 / 79)
    assert abs(float(spin_echo(t1, t2, pd, tr=3000.0, te=90.0)) - expected) < 1e-14


def test_water_and_fat_add_up_in_phase_and_cancel_in_opposed_phase():
    assert 2.2 < PHASE_TE < 2.3, "ms at 1.5 T"
    water, fat = torch.tensor([0.5]), torch.tensor([0.3])
    for contrast, expected in (("in phase", 0.8), ("opposed phase", 0.2), ("T2", 0.8)):
        assert abs(float(magnitude(water, fat, average_scan(contrast))) - expected) < 1e-5


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_pixel_with_two_tissues_shows_the_length_of_their_mean(contrast: str):
    scan = average_scan(contrast)
    codes = torch.tensor([CODE["liver"], CODE["fat"], CODE["fat"]]).repeat(3, 1)[None]
    water, fat = signal(codes, torch.zeros(3, 1, 3, 3), scan)
    mixed = float(magnitude(pool(water), pool(fat), scan))
    ends = pure("liver", scan) / 3, 2 * pure("fat", scan) / 3
    turned = -1 if contrast == "opposed phase" else 1
    assert abs(mixed - abs(ends[0] + turned * ends[1])) < 1e-4


def test_contrast_comes_from_the_constants():
    phase, opposed, t2 = (average_scan(contrast) for contrast in CONTRASTS)
    for scan in (phase, opposed):
        assert pure("fat", scan) > 1.3 * pure("liver", scan) > 1.3 * 1.3 * pure("spleen", scan)
        assert pure("cortex", scan) > 1.1 * pure("medulla", scan)
        assert pure("pancreas", scan) > pure("spleen", scan) > pure("gallbladder", scan)
    assert pure("gallbladder", t2) > 1.5 * pure("cortex", t2) > 1.5 * 1.5 * pure("liver", t2)
    assert pure("canal", t2) > pure("fat", t2) > pure("spleen", t2) > 1.5 * pure("liver", t2) > 1.5 * pure("muscle", t2)
    for scan in (phase, opposed, t2):
        assert pure("air", scan) == pure("gas", scan) == 0
        assert pure("lung", scan) < 0.35 * pure("liver", scan)
        assert pure("cortical bone", scan) < 0.35 * pure("liver", scan)
    assert FAT.t1 < min(RELAXATION[name].t1 for name in ("liver", "pancreas", "bone"))


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_organs_show_the_signals_of_their_tissues(contrast: str):
    anatomy, _ = abdomen.draw_case(0, "train", 1)
    scan = average_scan(contrast)
    clean, labels = clean_slices(anatomy, scan, anatomy.levels(8), (64, 64), (0, "train", 1))
    for name in ("liver", "spleen", "aorta"):
        pixels = clean[inner(labels == NUMBER[name])]
        assert len(pixels) > 5
        assert abs(pixels.median() / pure(name, scan) - 1) < 0.08
    assert (clean[:, 0] == 0).all()


def test_flow_multiplies_blood_and_nothing_else():
    scan = average_scan("T2")
    slow = replace(scan, flow=draw_scan(stream("flow")).flow)
    assert slow.flow[CODE["liver"]] == slow.flow[CODE["gallbladder"]] == 1
    flow = torch.stack([draw_scan(stream(i)).flow for i in range(60) if draw_scan(stream(i)).contrast == "T2"])
    assert (flow[:, CODE["aorta"]] < 0.5).all()
    assert flow[:, CODE["aorta"]].std() > 0.05
    assert abs(pure("aorta", slow) / pure("aorta", scan) - float(slow.flow[CODE["aorta"]])) < 1e-5


# ----- the scanner


def test_scans_are_drawn_with_the_stated_shares_and_spreads():
    scans = [draw_scan(stream("scans", i)) for i in range(400)]
    for contrast, share in CONTRASTS.items():
        these = [scan for scan in scans if scan.contrast == contrast]
        assert abs(len(these) / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5
    for name in ("liver", "stomach", "gallbladder"):
        constants, drawn = RELAXATION[name], torch.stack([scan.t1[CODE[name]] for scan in scans]).log()
        assert abs(drawn.mean() - np.log(constants.t1)) < 4 * constants.spread / 20
        assert 0.85 < drawn.std() / constants.spread < 1.15
    assert SNR[0] <= min(scan.snr for scan in scans) < max(scan.snr for scan in scans) <= SNR[1]


def test_noise_is_rician_and_of_the_drawn_level():
    for i in range(3):
        scan = draw_scan(stream(0, "train", i, "scan"))
        sigma = reference_signal(scan) / scan.snr
        noisy, _ = abdomen_mr.case(0, "train", i, 6, (64, 64))
        air = noisy[:, :4].flatten()  # above everybody
        assert abs(air.mean() / (sigma * (np.pi / 2) ** 0.5) - 1) < 0.05, "of Rayleigh's law where there is no signal"
        assert abs(air.square().mean() / (2 * sigma**2) - 1) < 0.1
        anatomy, _ = abdomen.draw_case(0, "train", i)
        clean, _ = clean_slices(anatomy, scan, anatomy.levels(6), (64, 64), (0, "train", i))
        strong = clean > 5 * sigma
        assert abs((noisy - clean)[strong].std() / sigma - 1) < 0.1, "almost Gaussian where there is much"


def test_the_receive_field_is_smooth_and_of_the_drawn_strength():
    ratios = []
    for i in range(8):
        anatomy, _ = abdomen.draw_case(0, "receive", i)
        scan, key = average_scan("in phase"), (0, "receive", i)
        flat, _ = clean_slices(anatomy, scan, anatomy.levels(2), (32, 32), key)
        shaded, _ = clean_slices(anatomy, replace(scan, receive=0.2), anatomy.levels(2), (32, 32), key)
        body = flat > 0.05
        ratio = torch.zeros_like(flat)
        ratio[body] = (shaded[body] / flat[body]).log()
        ratios.append(ratio[body])
        both = body[:, 1:] & body[:, :-1]
        assert (ratio[:, 1:] - ratio[:, :-1])[both].abs().max() < 0.12, "12 mm apart"
    assert 0.12 < torch.cat(ratios).std() < 0.3


def test_a_case_is_divided_by_its_own_percentile():
    split = small().splits["train"]
    for rows in (slice(0, 3), slice(3, 6)):
        share = (split.images[rows] >= 1).double().mean()
        assert 0.003 < share < 0.006


# ----- the door


def test_a_wrong_option_is_one_sentence_that_names_it():
    with pytest.raises(UserError, match=r"no option 'unlabelled'; it has size, cases, slices, seed\.$"):
        load_task("abdomen-mr", unlabelled=3)
    with pytest.raises(UserError, match=r"'size\.1'.*greater than or equal to 16"):
        load_task("abdomen-mr", size=(64, 8))


def test_the_task_is_ready_and_needs_no_file():
    report = check_task("abdomen-mr")
    assert (report.family, report.problem, report.present, report.missing) == ("embedded", None, (), ())


def test_the_task_does_not_lean_on_the_generator_of_a_method():
    assert "synthesis" not in Path(abdomen_mr.__file__).read_text(encoding="utf-8")
