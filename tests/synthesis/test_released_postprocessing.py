"""The released post-processing against Pillow's operators and its stated chances."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.released_postprocessing import apply, draw, released_postprocessing

KINDS = ("isic", "jsrt", "none")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, channels: int = 3) -> Tensor:
    """Smooth images between -0.9 and 0.7, as of a generator that ends in tanh."""
    coarse = torch.rand(count, channels, 5, 6, generator=generator(7))
    fine = torch.nn.functional.interpolate(coarse, (40, 48), mode="bicubic")
    return (fine - fine.min()) / (fine.max() - fine.min()) * 1.6 - 0.9


def choice(equalize: bool = False, sharpness: bool = False, contrast: bool = False, saturation: float = 1.0) -> Draw:
    """A draw for one image."""
    flags = {"equalize": equalize, "sharpness": sharpness, "contrast": contrast}
    return Draw(saturation=torch.tensor([saturation]), **{name: torch.tensor([f]) for name, f in flags.items()})


def as_bytes(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(as_bytes(image).movedim(0, -1).squeeze(-1).numpy())


def difference(image: Tensor, expected: Image.Image) -> int:
    """Largest difference of an image from a PIL image, grey values."""
    found = as_bytes(image).movedim(0, -1).squeeze(-1).numpy().astype(int)
    return int(np.abs(found - np.asarray(expected).astype(int)).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_is_cut_and_values_are_255ths(kind, channels):
    x = images(channels=channels).double().requires_grad_()
    out = released_postprocessing(x, generator(), kind)
    assert not out.requires_grad
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert torch.equal(out, as_bytes(out).float() / 255)
    assert out.unique().numel() > 8
    assert torch.equal(x, images(channels=channels).double())  # the input is as it was


def test_rounding_is_the_released_one():
    """255 steps, values in the middle between two go up, as `mul(255).add_(0.5)` and a cut to whole numbers do."""
    x = torch.tensor([0.0, 0.49, 0.5, 0.51, 100.5, 254.4, 255.0]).reshape(1, 1, 1, 7)
    out = released_postprocessing(3 * x - 100, generator(), "none") * 255
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0, 1, 1, 101, 254, 255]))


def test_range_is_that_of_the_whole_batch():
    """An image depends on those in its batch: one of half the contrast stays so, and alone it does not."""
    x = images(2)
    x[0] /= 2
    both = released_postprocessing(x, generator(), "none")
    alone = released_postprocessing(x[:1], generator(), "none")
    span = (x.max() - x.min()).item()
    assert (alone.min(), alone.max()) == (0.0, 1.0)
    assert both.min() == 0
    assert both.max() == 1
    torch.testing.assert_close(both * span + x.min(), x, atol=0.51 * span / 255, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_batch_is_not_nan(kind):
    assert released_postprocessing(torch.full((2, 3, 8, 8), 0.3), generator(), kind).unique().tolist() == [0.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_posterization_leaves_four_bits(channels):
    x = images(1, channels)
    out, plain = apply(x, choice(), "isic"), apply(x, choice(), "none")
    assert torch.equal(as_bytes(out), as_bytes(plain) & 0b11110000)
    assert out.unique().numel() == 16


@pytest.mark.parametrize("channels", [1, 3])
def test_each_operator_is_that_of_pillow(channels):
    """Up to a grey value of rounding; each after posterization, but equalization before."""
    x = images(1, channels)
    plain = pil(apply(x, choice(), "none")[0])
    posterized = ImageOps.posterize(plain, 4)
    assert difference(apply(x, choice(), "isic")[0], posterized) == 0
    equalized = ImageOps.posterize(ImageOps.equalize(plain), 4)
    assert difference(apply(x, choice(equalize=True), "isic")[0], equalized) == 0
    sharp = ImageEnhance.Sharpness(posterized).enhance(0.3)
    assert difference(apply(x, choice(sharpness=True), "isic")[0], sharp) <= 1
    contrast = ImageOps.autocontrast(posterized)
    assert difference(apply(x, choice(contrast=True), "isic")[0], contrast) <= 1
    colour = ImageEnhance.Color(posterized).enhance(0.6)
    assert difference(apply(x, choice(saturation=0.6), "isic")[0], colour) <= 1
    every = ImageOps.autocontrast(ImageEnhance.Sharpness(equalized).enhance(0.3))
    if channels == 3:
        every = ImageEnhance.Color(every).enhance(1.4)
    assert difference(apply(x, choice(True, True, True, 1.4), "isic")[0], every) <= 4


def test_saturation_changes_colours_and_no_grey():
    colour, grey = images(1), images(1, 1)
    assert (apply(colour, choice(saturation=0.0), "isic").std(1) < 1e-6).all()
    assert torch.equal(apply(grey, choice(saturation=0.0), "isic"), apply(grey, choice(), "isic"))


def test_chest_images_are_equalized_then_brightened_and_nothing_is_random():
    x = images(3, 1)
    out = released_postprocessing(x, generator(), "jsrt")
    plain = released_postprocessing(x, generator(), "none")
    for found, before in zip(out, plain, strict=True):
        equalized = np.asarray(ImageOps.equalize(pil(before))) / 255
        assert difference(found, Image.fromarray((255 * equalized**0.5).astype(np.uint8))) <= 1
    assert torch.equal(out, released_postprocessing(x, generator(1), "jsrt"))


def test_every_operator_has_its_chance():
    drawn = draw(8000, generator())
    flags = torch.stack([drawn.equalize, drawn.sharpness, drawn.contrast], 1).double()
    assert flags.mean(0) == pytest.approx(torch.full((3,), 0.5, dtype=torch.double), abs=0.02)
    together = (flags @ 2.0 ** torch.arange(3).double()).long().bincount(minlength=8) / 8000
    assert together == pytest.approx(torch.full((8,), 1 / 8), abs=0.015)  # independent of one another
    factor = drawn.saturation
    assert 0.5 <= factor.min() < 0.505 < 1.495 < factor.max() <= 1.5
    assert factor.mean() == pytest.approx(1.0, abs=0.01)
    assert factor.var() == pytest.approx(1 / 12, rel=0.04)


def test_draws_are_one_a_sample():
    """Samples of equal images differ, do not depend on the samples after them, and touch no global state."""
    x = images(1).expand(12, -1, -1, -1)
    state = torch.get_rng_state()
    whole = released_postprocessing(x, generator(3), "isic")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole, released_postprocessing(x, generator(3), "isic"))
    assert torch.equal(whole[:5], released_postprocessing(x[:5], generator(3), "isic"))
    assert len({image.numpy().tobytes() for image in whole}) == 12
    drawn = draw(12, generator(3))
    assert torch.equal(whole[4:5], apply(x[4:5], drawn[4], "isic"))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="choose one of isic, jsrt, none"):
        released_postprocessing(images(), generator(), "ph2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 samples for 4 images"):
        apply(images(), draw(2, generator()), "isic")
