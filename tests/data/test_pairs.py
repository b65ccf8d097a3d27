"""Pictures and masks: reading, resizing, what may be wrong with them, and the division by subject."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synthrepro.data.pairs import (
    RAW_SIDE,
    RAW_TOP,
    Options,
    Pair,
    build,
    check,
    divide,
    find,
    join,
    match,
    read_image,
    read_mask,
    read_pair,
    read_pixels,
    read_sample,
    resize_image,
    resize_mask,
)
from synthrepro.data.task import Card, Sample, Task
from synthrepro.errors import UserError

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


# ----- pictures


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif"])
def test_grey_pictures_read_as_fractions_of_255(tmp_path: Path, suffix: str):
    pixels = read_pixels(save(tmp_path / f"a.{suffix}", Image.fromarray(RAMP)))
    assert pixels.dtype == np.float32
    assert np.abs(pixels - RAMP[..., None] / 255).max() < 1e-6


def test_transparency_is_dropped(tmp_path: Path):
    alpha = np.full_like(RAMP, 7)
    rgb = np.stack([RAMP, RAMP // 2, RAMP // 3], axis=-1)
    for values, expected in (
        (np.dstack([rgb, alpha]), rgb),
        (np.dstack([RAMP, alpha]), RAMP[..., None]),
    ):
        pixels = read_pixels(save(tmp_path / "a.png", Image.fromarray(values)))
        assert np.abs(pixels - expected / 255).max() < 1e-6


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_palettes_are_looked_up(tmp_path: Path, transparency: object):
    image = Image.fromarray(RAMP // 80)
    image = image.convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    options = {} if transparency is None else {"transparency": transparency}
    pixels = read_pixels(save(tmp_path / "a.png", image, **options))
    colours = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]])
    assert np.abs(pixels - colours[RAMP // 80] / 255).max() < 1e-6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_stretched_over_their_own_range(tmp_path: Path, suffix: str):
    values = (RAMP.astype(np.uint16) * 17 + 100).astype(np.uint16)  # about 12 of the 16 bits
    pixels = read_pixels(save(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert np.abs(pixels[..., 0] - RAMP / 230).max() < 1e-6


def test_colour_becomes_luma_and_grey_three_channels(tmp_path: Path):
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[:4, :, 0] = 255
    path = save(tmp_path / "a.png", Image.fromarray(red))
    assert read_image(path, (8, 8), 1)[0, 0, 0].item() == pytest.approx(0.299, abs=1e-6)
    grey = read_image(save(tmp_path / "b.png", Image.fromarray(RAMP)), (4, 6), 3)
    assert grey.shape == (3, 4, 6)
    assert torch.equal(grey[0], grey[2])
    assert torch.allclose(grey[0], torch.from_numpy(RAMP / 255).float(), atol=1e-6), "its own size changes nothing"


def test_the_raw_radiographs_of_jsrt_are_big_endian_and_inverted(tmp_path: Path):
    values = np.zeros((RAW_SIDE, RAW_SIDE), dtype=">u2")
    values[:, : RAW_SIDE // 4] = RAW_TOP  # bright in the file, hence dark
    values[0, -1] = 1024
    path = tmp_path / "JPCLN001.IMG"
    values.tofile(path)
    pixels = read_pixels(path)
    assert pixels.shape == (RAW_SIDE, RAW_SIDE, 1)
    assert (pixels[:, : RAW_SIDE // 4] == 0).all()
    assert pixels[1, -1] == 1
    assert pixels[0, -1, 0] == pytest.approx(1 - 1024 / RAW_TOP)
    values[0, 0] = RAW_TOP + 1
    values.tofile(path)
    with pytest.raises(UserError, match=r"JPCLN001\.IMG holds values above 4095"):
        read_pixels(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"JPCLN001\.IMG has 8388606 bytes instead of the 8388608 of 2048 x 2048"):
        read_pixels(path)


# ----- masks


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ([[0, 0, 1]], "L"),
        ([[0, 0, 255]], "L"),
        ([[0, 127, 128]], "L"),  # edges smoothed by somebody
        ([[0, 100, 200]], "L"),
        ([[0, 0, 65535]], "I;16"),
        ([[0, 0, 1]], "I;16"),
        ([[[0, 0, 0], [0, 0, 0], [0, 255, 0]]], "RGB"),
        ([[[0, 0, 0], [90, 90, 90], [0, 0, 180]]], "RGB"),
        ([[[0, 0, 0], [0, 0, 0], [1, 1, 1]]], "RGB"),
        ([[[0, 0, 0, 255], [0, 0, 0, 255], [255, 255, 255, 0]]], "RGBA"),
    ],
)
def test_foreground_is_one_or_at_least_half(tmp_path: Path, values: list, mode: str):
    array = np.array(values, dtype=np.uint16 if mode == "I;16" else np.uint8)
    path = save(tmp_path / "m.png", Image.fromarray(array))
    assert read_mask(path).tolist() == [[False, False, True]]


def test_masks_of_one_bit_and_with_palettes(tmp_path: Path):
    mask = np.zeros((5, 7), dtype=np.uint8)
    mask[1:3, 2:4] = 255
    for suffix in ("png", "bmp", "tif", "gif"):
        path = save(tmp_path / f"m.{suffix}", Image.fromarray(mask).convert("1"))
        assert (read_mask(path) == (mask > 0)).all(), suffix
    image = Image.fromarray(mask // 255).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])  # index 1 is dark red, as many annotation tools write it
    assert (read_mask(save(tmp_path / "p.gif", image)) == (mask > 0)).all()


def test_a_lossy_mask_loses_no_area(tmp_path: Path):
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[7:22, 7:22] = 255
    path = save(tmp_path / "m.jpg", Image.fromarray(mask), quality=80)
    assert len(np.unique(np.array(Image.open(path)))) > 2
    assert (read_mask(path) == (mask > 0)).all()


def test_a_mask_in_an_unknown_code_is_an_error(tmp_path: Path):
    path = save(tmp_path / "m.png", Image.fromarray(np.array([[0, 38, 75]], dtype=np.uint8)))
    with pytest.raises(UserError, match=r"m\.png is no binary mask \(its values end at 0 and 75\)"):
        read_mask(path)


def test_an_empty_mask_has_no_foreground(tmp_path: Path):
    path = save(tmp_path / "m.png", Image.fromarray(np.zeros((3, 4), dtype=np.uint8)))
    assert not read_mask(path).any()


# ----- resizing


def test_fine_stripes_become_grey_not_other_stripes():
    stripes = np.tile(np.array([0, 1], dtype=np.float32), 32)[None].repeat(64, 0)[..., None]
    small = resize_image(stripes, (8, 9), 1)
    assert small.shape == (1, 8, 9)
    assert (small - 0.5).abs().max() < 0.1


def test_resizing_keeps_rows_columns_and_range():
    picture = np.zeros((60, 40, 1), dtype=np.float32)
    picture[:20] = 1  # the upper third
    small = resize_image(picture, (6, 8), 1)[0]
    assert small[:2].min() > 0.9
    assert small[2:].max() < 0.1
    assert small.min() >= 0
    assert small.max() <= 1
    assert resize_image(picture, (120, 90), 1)[0].shape == (120, 90)


def test_a_pixel_of_a_mask_goes_to_the_majority_of_its_area():
    blocks = np.zeros((4, 8), dtype=bool)
    blocks[0, 0] = True  # a quarter of the first pixel
    blocks[0, 2:4] = True  # half of the second
    blocks[0:2, 4:6] = True  # all of the third
    blocks[2:4, 6:8] = [[True, True], [True, False]]  # three quarters of the last below
    small = resize_mask(blocks, (2, 4))
    assert small.dtype == torch.int64
    assert small.tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]
    assert torch.equal(resize_mask(blocks, (4, 8)), torch.from_numpy(blocks).long())
    assert resize_mask(blocks, (8, 16))[0:2, 0:2].sum() == 4


# ----- what may be wrong with a file


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif"])
@pytest.mark.parametrize("read", [read_pixels, read_mask])
def test_a_file_that_breaks_off_is_an_error(tmp_path: Path, suffix: str, read: Callable):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"a\.{suffix} cannot be read \(.*\): get the file again") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_that_is_no_picture_is_an_error(tmp_path: Path, content: bytes):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        read_pixels(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png is missing"):
        read_pixels(tmp_path / "b.png")


def test_a_picture_of_one_value_is_an_error(tmp_path: Path):
    for values in (np.full((4, 4), 9, dtype=np.uint8), np.full((4, 4), 900, dtype=np.uint16)):
        path = save(tmp_path / "a.png", Image.fromarray(values))
        with pytest.raises(UserError, match=r"a\.png has the same value everywhere"):
            read_pixels(path)


def test_a_float_picture_that_is_not_finite_is_an_error(tmp_path: Path):
    values = RAMP.astype(np.float32)
    path = save(tmp_path / "a.tif", Image.fromarray(values))
    assert read_pixels(path).max() == 1
    values[0, 0] = np.nan
    with pytest.raises(UserError, match=r"a\.tif holds values that are not finite"):
        read_pixels(save(path, Image.fromarray(values)))


# ----- pairs


@pytest.fixture
def folder(tmp_path: Path, save_pair: Callable) -> Path:
    """Five subjects with one, two, three ... pictures."""
    for subject in range(1, 6):
        for k in range(subject):
            name = f"s{subject}-{k}.png"
            save_pair(tmp_path / "images" / name, tmp_path / "masks" / name, seed=10 * subject + k)
    return tmp_path


def pairs_in(folder: Path) -> list[Pair]:
    matched = match(find(folder / "images"), find(folder / "masks"))
    return [Pair(case.split("-")[0], image, masks) for case, (image, masks) in matched.items()]


def test_finding_passes_over_what_is_not_asked_for(folder: Path, save_picture: Callable):
    (folder / "images" / "notes.txt").write_text("no picture")
    (folder / "images" / "._s1-0.png").write_bytes(b"left by another system")
    save_picture(folder / "images" / "overview.png", RAMP)
    assert len(find(folder / "images", r"(s\d-\d)")) == 15
    assert [*find(folder / "images", r"(s2)-\d", several=True)] == ["s2"]


def test_the_same_case_twice_is_an_error(folder: Path):
    (folder / "images" / "s1-0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"s1-0\.png and s1-0\.jpg are of the same case: keep one of them"):
        find(folder / "images")
    with pytest.raises(UserError, match=r"s1-0\.png and .*s1-0\.png are of the same case"):
        join(find(folder / "masks"), find(folder / "masks"))


def test_a_missing_or_empty_folder_is_an_error(folder: Path):
    with pytest.raises(UserError, match=r"pictures is missing: put the data set there"):
        find(folder / "pictures")
    with pytest.raises(UserError, match=r"images holds none of the files"):
        find(folder / "images", r"(ISIC_\d+)")


def test_a_picture_needs_a_mask_and_a_mask_a_picture(folder: Path):
    images, masks = find(folder / "images"), find(folder / "masks")
    some = {case: path for case, path in masks.items() if case != "s3-1"}
    with pytest.raises(UserError, match=r"images/s3-1\.png has no mask in .*masks"):
        match(images, some)
    with pytest.raises(UserError, match=r"images/s3-1\.png has no mask in .*masks"):
        match(images, masks, some)
    assert set(images) - set(match(images, some, partial=True)) == {"s3-1"}
    some = {case: path for case, path in images.items() if case != "s3-1"}
    with pytest.raises(UserError, match=r"masks/s3-1\.png is a mask without a picture"):
        match(some, masks)


def test_masks_are_united(tmp_path: Path, save_pair: Callable):
    image, masks = tmp_path / "a.png", (tmp_path / "left.png", tmp_path / "right.gif")
    save_pair(image, *masks)
    _, foreground = read_pair(Pair("a", image, masks))
    expected = np.zeros((24, 32), dtype=bool)
    expected[:8, :8] = expected[8:16, 8:16] = True
    assert (foreground == expected).all()


def test_a_mask_of_another_size_is_an_error_unless_a_whole_factor_is_granted(tmp_path: Path, save_pair: Callable):
    image, mask = tmp_path / "a.png", tmp_path / "m.png"
    save_pair(image, shape=(24, 32))
    save_pair(tmp_path / "b.png", mask, shape=(12, 16))
    with pytest.raises(UserError, match=r"m\.png has 16 x 12 pixels but its image a\.png has 32 x 24"):
        read_pair(Pair("a", image, (mask,)))
    _, foreground = read_pair(Pair("a", image, (mask,), finer=(1, 2)))
    assert foreground.shape == (12, 16)
    save_pair(tmp_path / "c.png", tmp_path / "other.png", shape=(24, 32))
    with pytest.raises(UserError, match=r"m\.png has another size than other\.png"):
        read_pair(Pair("a", image, (tmp_path / "other.png", mask), finer=(1, 2)))


def test_a_sample_without_foreground_is_none_also_if_it_vanishes(tmp_path: Path, save_picture: Callable):
    save_picture(tmp_path / "a.png", np.tile(RAMP, (8, 8)))
    mask = np.zeros((32, 48), dtype=np.uint8)
    pair = Pair("a", tmp_path / "a.png", (tmp_path / "m.png",))
    save_picture(tmp_path / "m.png", mask)
    assert read_sample(pair, (32, 48), 1) is None
    mask[5, 5] = 255
    save_picture(tmp_path / "m.png", mask)
    assert read_sample(pair, (32, 48), 1).label.sum() == 1
    assert read_sample(pair, (4, 6), 1) is None


# ----- sets


def read(pair: Pair) -> list[Sample]:
    return [read_sample(pair, (8, 8), 3)]


def test_parts_have_different_subjects_with_all_of_their_pictures(folder: Path):
    parts = divide("t", pairs_in(folder), {"test": 2, "validation": 1, "train": 2}, 0, read)
    subjects = {part: [sample.subject for sample in samples] for part, samples in parts.items()}
    assert {part: len(set(names)) for part, names in subjects.items()} == {"test": 2, "validation": 1, "train": 2}
    together = [name for names in subjects.values() for name in names]
    assert sorted(together) == sorted(pair.subject for pair in pairs_in(folder)), "everybody once, with everything"


def test_the_first_part_depends_on_the_seed_but_not_on_the_others(folder: Path):
    def first(seed: int, train: int) -> list[str]:
        counts = {"test": 2, "train": train}
        return [sample.subject for sample in divide("t", pairs_in(folder), counts, seed, read)["test"]]

    assert first(0, 1) == first(0, 3)
    assert len({tuple(first(seed, 1)) for seed in range(8)}) > 1


def test_asking_for_more_than_there_are_names_the_option(folder: Path, save_picture: Callable):
    words = r"Task t, option 'subjects': 4 for test \+ 2 for train are asked for, but only {} there: ask for fewer"
    counts = {"test": 4, "train": 2}
    with pytest.raises(UserError, match=words.format("5 are")):
        divide("t", pairs_in(folder), counts, 0, read)
    save_picture(folder / "masks" / "s1-0.png", np.zeros((24, 32), dtype=np.uint8))
    some = [pair for pair in pairs_in(folder) if pair.subject != "s5"] + [
        Pair("s6", folder / "images" / "s1-0.png", (folder / "masks" / "s1-0.png",))
    ]
    with pytest.raises(UserError, match=words.format("3 with foreground are").replace("4 for", "3 for")):
        divide("t", some, {"test": 3, "train": 2}, 0, lambda pair: [s for s in read(pair) if s])


def test_subjects_without_foreground_are_passed_over_and_all_without_is_an_error(folder: Path, save_picture: Callable):
    task = Task("t", ("background", "x"), 3, {}, Card("", "", "", "", ""))
    options = Options(size=(8, 8))
    for path in (folder / "masks").glob("s[1-3]*"):
        save_picture(path, np.zeros((24, 32), dtype=np.uint8))
    built = build(task, {"own": pairs_in(folder), "test-other": pairs_in(folder)}, (1, 0, 1), options)
    assert {*built.splits["train"].subjects, *built.splits["test"].subjects} == {"s4", "s5"}
    assert len(built.splits["validation"]) == 0
    assert built.splits["validation"].images.shape == (0, 3, 8, 8)
    assert len(built.splits["test-other"]) == 9, "pictures without foreground are left out there, too"
    check({"own": pairs_in(folder)})
    for path in (folder / "masks").glob("*"):
        save_picture(path, np.zeros((24, 32), dtype=np.uint8))
    for action in (
        lambda: check({"own": pairs_in(folder)}),
        lambda: build(task, {"own": pairs_in(folder)}, (1, 0, 1), options),
        lambda: build(task, {"own": pairs_in(folder), "test": pairs_in(folder)}, (1, 0), options),
    ):
        with pytest.raises(UserError, match=r"None of the 15 masks in .*masks has any foreground"):
            action()
