import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.measure import points_in_poly

from synthrepro.errors import UserError
from synthrepro.synthesis import Draw
from synthrepro.synthesis.dead_leaves import DeadLeaves

LEAVES = DeadLeaves(leaves=41)  # 10 discs, 10 ellipses, 10 rectangles, 11 polygons
PLAIN = replace(LEAVES, gradient=(0.0, 0.0), wave=(0.0, 0.0))

CHANCE = 1e-3  # that a test of a distribution fails when nothing is wrong; there are ten of them


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inside(draw: Draw, leaf: int, form: int, points: np.ndarray) -> np.ndarray:
    """Whether points (P, 2) are on a leaf of the draw's first image, by another way than that of the code."""
    cx, cy = draw.centre[0, leaf].tolist()
    radius, turn, aspect = (float(value[0, leaf]) for value in (draw.radius, draw.turn, draw.aspect))
    rotated = (points - (cx, cy)) @ np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    a, b = rotated.T
    if form == 0:
        return np.hypot(points[:, 0] - cx, points[:, 1] - cy) <= radius
    if form == 1:
        return (a / radius) ** 2 + (b / (aspect * radius)) ** 2 <= 1
    if form == 2:
        half = radius / math.sqrt(2)
        return (abs(a) <= half) & (abs(b) <= aspect * half)
    count = int(draw.corners[0, leaf])
    angle = turn + 2 * math.pi / count * (np.arange(count) + draw.jitter[0, leaf, :count].numpy())
    return points_in_poly(points, np.stack([cx + radius * np.cos(angle), cy + radius * np.sin(angle)], 1))


def test_images_and_labels_are_what_the_contract_says():
    images, labels = LEAVES.apply(LEAVES.draw(3, generator()), 64, "cpu")
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.shape == (3, 64, 64)
    assert labels.dtype == torch.int64
    assert labels.min() >= 0
    assert 20 < labels[0].unique().numel() <= 42
    assert not torch.equal(labels[0], labels[1])


def test_radii_follow_the_power_law():
    low, high = 0.04, 0.5
    radius = DeadLeaves(radius=(low, high)).draw(40, generator()).radius.flatten().double().numpy()
    assert stats.kstest(radius, lambda r: (low**-2 - r**-2) / (low**-2 - high**-2)).pvalue > CHANCE
    assert low * 0.999 <= radius.min()
    assert radius.max() <= high * 1.001


def test_centres_colours_and_orders_are_uniform():
    draw = LEAVES.draw(200, generator())
    for values in (draw.centre[..., 0], draw.centre[..., 1], draw.colour, draw.turn / (2 * math.pi)):
        assert stats.kstest(values.flatten(), "uniform").pvalue > CHANCE
    assert torch.equal(draw.order.sort(1).values, torch.arange(1, 42).expand(200, -1))
    first = torch.bincount(draw.order.argmax(1), minlength=41)
    assert stats.chisquare(first).pvalue > CHANCE
    assert torch.bincount(draw.corners.flatten()).tolist()[:3] == [0, 0, 0]
    assert stats.chisquare(torch.bincount(draw.corners.flatten())[3:]).pvalue > CHANCE


@pytest.mark.parametrize("seed", range(3))
def test_the_leaf_on_top_is_the_last_one_that_covers_the_pixel(seed):
    draw = LEAVES.draw(1, generator(seed))
    labels = LEAVES.apply(draw, 96, "cpu")[1][0]
    y, x = (np.mgrid[:96, :96] + 0.5) / 96
    points = np.stack([x.ravel(), y.ravel()], 1)
    expected = np.zeros(96 * 96, dtype=int)
    forms = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 11
    for leaf in draw.order[0].argsort().tolist():
        expected[inside(draw, leaf, forms[leaf], points)] = int(draw.order[0, leaf])
    assert (labels.numpy() != expected.reshape(96, 96)).mean() < 1e-3  # pixels on an outline, by rounding


def test_four_leaves_made_by_hand():
    four = DeadLeaves(leaves=4, gradient=(0.0, 0.0), wave=(0.0, 0.0))
    draw = four.draw(1, generator())
    draw.order = torch.tensor([[4, 1, 2, 3]])
    draw.centre = torch.tensor([[[0.5, 0.5], [0.25, 0.5], [0.5, 0.2], [0.75, 0.5]]])  # disc, ellipse, rectangle, square
    draw.radius = torch.tensor([[0.2, 0.25, 0.2 * math.sqrt(2), 0.25]])
    draw.turn, draw.aspect = torch.zeros(1, 4), torch.tensor([[1.0, 0.2, 0.5, 1.0]])
    draw.corners, draw.jitter = torch.full((1, 4), 4), torch.zeros(1, 4, 6)
    images, labels = four.apply(draw, 100, "cpu")
    assert labels[0, 50, 50] == 4  # the disc is on top of all
    assert labels[0, 50, 71] == 3  # and the square, corners left, right, up and down, beside it
    assert labels[0, 50, 28] == 1
    assert labels[0, 50, 1] == 1
    assert labels[0, 56, 20] == 0  # the ellipse is 0.05 high
    assert labels[0, 11, 31] == 2
    assert labels[0, 9, 31] == 0  # the rectangle is 0.1 high
    assert labels[0, 28, 75] == 3
    assert labels[0, 33, 60] == 4
    assert labels[0, 30, 60] == 0
    assert torch.equal(images[0, :, 50, 50], draw.colour[0, 4])
    assert torch.equal(images[0, :, 99, 99], draw.colour[0, 0])


def test_a_leaf_has_one_colour_when_texture_is_off():
    draw = PLAIN.draw(2, generator())
    images, labels = PLAIN.apply(draw, 64, "cpu")
    for b in range(2):
        assert torch.equal(images[b].movedim(0, -1), draw.colour[b][labels[b]])


def test_gradients_and_stripes_are_of_the_stated_size():
    one = DeadLeaves(leaves=1, radius=(0.3, 0.3), gradient=(0.2, 0.2), wave=(0.0, 0.0))
    draw = one.draw(1, generator())
    draw.colour[:], draw.centre[:] = 0.5, torch.tensor([0.4, 0.6])
    draw.corners[:] = 6
    images, labels = one.apply(draw, 64, "cpu")
    y, x = torch.meshgrid(*[(torch.arange(64) + 0.5) / 64] * 2, indexing="ij")
    away = (x - 0.4) * draw.downhill[0, 1].cos() + (y - 0.6) * draw.downhill[0, 1].sin()
    expected = 0.5 + draw.gradient[0, 1][:, None, None] * away / 0.3
    seen = labels[0] == 1
    torch.testing.assert_close(images[0][:, seen], expected[:, seen])
    assert draw.gradient.abs().unique().tolist() == pytest.approx([0.2])

    striped = replace(one, gradient=(0.0, 0.0), wave=(0.1, 0.1), wavelength=(0.1, 0.1))
    draw = striped.draw(1, generator())
    draw.colour[:] = 0.5
    change = striped.apply(draw, 256, "cpu")[0] - 0.5
    assert change.abs().max().item() == pytest.approx(0.1, rel=0.01)
    length = 2 * math.pi / draw.wavevector.norm(dim=-1)
    torch.testing.assert_close(length, torch.full_like(length, 0.1))


def test_a_sample_depends_on_neither_its_batch_nor_its_turn():
    draw = LEAVES.draw(4, generator())
    images, labels = LEAVES.apply(draw, 48, "cpu")
    for one, few in ((draw[2], slice(2, 3)), (LEAVES.draw(2, generator()), slice(2)), (draw, slice(None))):
        again, again_labels = LEAVES.apply(one, 48, "cpu")
        assert torch.equal(again, images[few])
        assert torch.equal(again_labels, labels[few])


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    LEAVES.apply(LEAVES.draw(1, generator()), 16, "cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_agree_where_their_pixels_do():
    draw = LEAVES.draw(4, generator())
    images, labels = LEAVES.apply(draw, 48, "cpu")
    larger, larger_labels = LEAVES.apply(draw, 144, "cpu")
    same = larger_labels[:, 1::3, 1::3] == labels
    assert same.float().mean() > 0.999
    difference = (larger[:, :, 1::3, 1::3] - images).abs().amax(1)
    assert difference[same].max() < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_paints_the_same():
    draw = LEAVES.draw(4, generator())
    images, labels = LEAVES.apply(draw, 128, "cuda")
    here, here_labels = LEAVES.apply(draw, 128, "cpu")
    same = labels.cpu() == here_labels
    assert same.float().mean() > 0.999
    assert (images.cpu() - here).abs().amax(1)[same].max() < 1e-3


def test_few_leaves_and_no_texture_are_fine_and_none_are_not():
    few = DeadLeaves(leaves=2)
    assert few.apply(few.draw(2, generator()), 16, "cpu")[1].max() <= 2
    with pytest.raises(UserError, match="at least one leaf"):
        DeadLeaves(leaves=0)
    with pytest.raises(UserError, match="radii above 0"):
        DeadLeaves(radius=(0.0, 0.5))


def test_images_come_as_fast_as_pre_training_wants_them():
    leaves, seconds = DeadLeaves(leaves=150), []
    for seed in range(3):
        start = time.process_time()
        leaves.apply(leaves.draw(4, generator(seed)), 128, "cpu")
        seconds.append((time.process_time() - start) / 4 / torch.get_num_threads())
    assert min(seconds) < 1 / 50
