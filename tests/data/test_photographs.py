"""Photographs are of no task and of no network, their regions follow their edges, and crops keep the two together."""

import re
import socket
from dataclasses import fields

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from synthrepro.data import photographs as module
from synthrepro.data.photographs import NAMES, SCALES, SIDE, Crops, Draw, photographs, regions
from synthrepro.errors import UserError

MEDICAL = {"cell", "ihc", "lfw_subset", "microaneurysms", "phantom", "retina"}
SIZE = (48, 64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def part(draw: Draw, index: slice) -> Draw:
    return Draw(**{field.name: getattr(draw, field.name)[index] for field in fields(draw)})


def thumbnail(picture: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(picture.mean(0)[None], 16).flatten()


def across(picture: Tensor, parts: Tensor) -> float:
    """Mean difference of brightness between neighbours that lie in two regions."""
    grey, found = picture.mean(0), []
    for axis in (0, 1):
        edge = parts.diff(dim=axis) != 0
        found.append(grey.diff(dim=axis).abs()[edge])
    return float(torch.cat(found).mean())


def test_nothing_asks_the_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert all(module.read(file).ndim == 3 for file in module.FILES)


def test_every_picture_of_the_wheel_is_used_under_a_licence_or_left_out_for_a_reason():
    used, left_out = module.__doc__.split("Not used")
    for name in NAMES:
        assert re.search(rf"^    {name} +(public domain|CC0|no known copyright|no licence stated)", used, re.M), name
    pictures = (path for path in module.FOLDER.iterdir() if path.suffix in {".png", ".jpg", ".tif", ".gif", ".npy"})
    for path in pictures:
        assert (path.stem in NAMES) != bool(re.search(rf"\b{path.stem}\b", left_out)), path


def test_nothing_is_medical():
    assert not MEDICAL & set(NAMES)


def test_photographs_are_small_pictures_of_unlike_things():
    found = photographs()
    assert tuple(found) == NAMES
    for picture in found.values():
        assert picture.dtype == torch.float32
        assert picture.shape[0] == 3
        assert max(picture.shape) == SIDE
        assert 0 <= picture.min() < picture.max() <= 1
        assert picture.std() > 0.05
    thumbnails = torch.stack([thumbnail(picture) for picture in found.values()])
    likeness = torch.corrcoef(thumbnails).fill_diagonal_(0)
    assert likeness.max() < 0.75  # motorcycle_left and motorcycle_right have more than 0.8


@pytest.mark.parametrize("name", ["camera", "coffee"])
def test_regions_cover_everything_are_connected_and_not_small(name):
    for scale in SCALES:
        parts = regions(name, scale)
        assert parts.dtype == torch.int64
        assert parts.shape == photographs()[name].shape[1:]
        sizes = parts.flatten().bincount()
        assert sizes[0] == 0
        assert sizes[1:].min() >= scale
        for value in range(1, len(sizes)):
            assert ndimage.label(parts.numpy() == value, structure=torch.ones(3, 3).numpy())[1] == 1


def test_a_larger_scale_has_fewer_regions_and_never_one_alone():
    for name in NAMES:
        counts = [int(regions(name, scale).max()) for scale in SCALES]
        assert counts[0] > counts[1] > counts[2] > 3


@pytest.mark.parametrize("name", NAMES)
def test_edges_of_regions_lie_where_the_photograph_has_them(name):
    for scale in SCALES:
        parts = regions(name, scale)
        elsewhere = max(across(photographs()[name], parts.flip(axes)) for axes in ((0,), (1,), (0, 1)))
        assert across(photographs()[name], parts) > 1.15 * elsewhere


def test_crops_have_the_regions_of_their_photograph():
    draw = Crops().draw(24, generator())
    images, maps = Crops().apply(draw, SIZE)
    assert (images.shape, images.dtype) == ((24, 3, *SIZE), torch.float32)
    assert (maps.shape, maps.dtype) == ((24, *SIZE), torch.int64)
    assert 0 <= images.min() < images.max() <= 1
    for picture, scale, parts in zip(draw.photograph, draw.scale, maps, strict=True):
        assert torch.isin(parts, regions(NAMES[picture], SCALES[scale])).all()
    assert maps.min() >= 1


def test_the_largest_crop_at_the_photographs_own_size_is_the_photograph():
    name = "chelsea"
    whole, parts = photographs()[name], regions(name, SCALES[1])
    for flip in (False, True):
        draw = Draw(
            photograph=torch.tensor([NAMES.index(name)]),
            scale=torch.tensor([1]),
            extent=torch.tensor([1.0]),
            place=torch.tensor([[0.7, 0.2]]),
            flip=torch.tensor([flip]),
        )
        images, maps = Crops().apply(draw, tuple(parts.shape))
        torch.testing.assert_close(images[0], whole.flip(-1) if flip else whole)
        assert torch.equal(maps[0], parts.flip(-1) if flip else parts)


@pytest.mark.parametrize("size", [(32, 32), (40, 100), (200, 200)])
def test_images_and_label_maps_show_the_same_place(monkeypatch, size):
    # Pictures whose values are rows and columns, and maps that number the pixels, tell where each pixel is from.
    height, width = 90, 120
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    where = torch.stack([rows / height, columns / width, torch.zeros(height, width)])
    monkeypatch.setattr(module, "photographs", lambda: dict.fromkeys(NAMES, where))
    monkeypatch.setattr(module, "regions", lambda *_: rows * width + columns)
    draw = Crops().draw(20, generator())
    images, maps = Crops().apply(draw, size)
    inner = (..., slice(4, -4), slice(4, -4))  # at its edge, averaging leans inwards
    steps = draw.extent * min(height / size[0], width / size[1])  # photograph's pixels in one of the crop
    off = torch.stack([images[:, 0] * height - maps // width, images[:, 1] * width - maps % width], dim=1)
    assert (off[inner].abs().amax((1, 2, 3)) < 0.51 + 0.5 * steps).all()
    assert off[inner].mean().abs() < 0.1
    # A crop has the shape asked for: as many of the photograph's pixels a step down as across.
    down = (images[:, 0, -5] - images[:, 0, 4]).mean(-1) * height / (size[0] - 9)
    right = (images[:, 1, :, -5] - images[:, 1, :, 4]).mean(-1) * width / (size[1] - 9)
    torch.testing.assert_close(down, steps, rtol=0.05, atol=0.0)
    torch.testing.assert_close(right.abs(), steps, rtol=0.05, atol=0.0)
    assert torch.equal(right < 0, draw.flip)


def test_a_sample_does_not_depend_on_its_batch_and_a_draw_is_replayed():
    state = torch.get_rng_state()
    crops = Crops()
    few, many = crops.draw(3, generator(5)), crops.draw(6, generator(5))
    images, maps = crops.apply(many, SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    for field in fields(few):
        assert torch.equal(getattr(few, field.name), getattr(many, field.name)[:3])
    for index in range(6):
        image, parts = crops.apply(part(many, slice(index, index + 1)), SIZE)
        assert torch.equal(image[0], images[index])
        assert torch.equal(parts[0], maps[index])
    again = crops.apply(crops.draw(6, generator(5)), SIZE)
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], maps)
    assert not torch.equal(crops.apply(crops.draw(6, generator(6)), SIZE)[0], images)


def test_draws_are_uniform():
    draw = Crops(extent=(0.4, 0.8)).draw(4000, generator())
    assert len(draw) == 4000
    torch.testing.assert_close(
        draw.photograph.bincount() / 4000, torch.full((len(NAMES),), 1 / len(NAMES)), rtol=0, atol=0.02
    )
    torch.testing.assert_close(draw.scale.bincount() / 4000, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    assert abs(float(draw.flip.float().mean()) - 0.5) < 0.03
    for values, (low, high) in ((draw.extent, (0.4, 0.8)), *((side, (0.0, 1.0)) for side in draw.place.T)):
        sorted_, even = values.sort().values, torch.linspace(low, high, 4000)
        assert (sorted_ - even).abs().max() < 0.04 * (high - low)
    # Nothing drawn hangs on anything else drawn.
    drawn = torch.stack([getattr(draw, f.name).reshape(4000, -1)[:, -1].double() for f in fields(draw)])
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.06


@pytest.mark.parametrize("extent", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)])
def test_bounds_that_give_no_crop_are_refused(extent):
    with pytest.raises(UserError, match="extent is"):
        Crops(extent=extent)


def test_an_unknown_name_and_a_missing_file_are_said(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no photograph 'retina'; there are astronaut"):
        regions("retina", 50)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"has no coins\.png: install scikit-image"):
        module.read("coins.png")


def test_it_is_no_task():
    assert not hasattr(module, "FAMILY")
