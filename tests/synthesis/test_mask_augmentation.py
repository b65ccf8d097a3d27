"""The geometry of masks and pairs against stated distributions, and its maps against points moved one by one."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.mask_augmentation import (
    OPERATORS,
    MaskAugmentation,
    PairedAugmentation,
    composed,
    flip,
    padding,
    rotation,
    scaling,
    shearing,
    sources,
    translation,
)

SIZE = torch.Size((48, 36))
STILL = MaskAugmentation(0.0, (0, 0), (1, 1), (0, 0), (0, 0), (0, 0))  # the identity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square(size: torch.Size = SIZE, half: int = 8) -> Tensor:
    """One mask with a square in the centre, (1, H, W)."""
    labels = torch.zeros(1, *size, dtype=torch.long)
    labels[0, size[0] // 2 - half : size[0] // 2 + half, size[1] // 2 - half : size[1] // 2 + half] = 1
    return labels


def checked(values: Tensor, low: float, high: float) -> None:
    """Whether each column of (N, ...) is U(low, high): bounds, mean and variance; and columns are uncorrelated."""
    assert low <= values.min() < low + 0.01 * (high - low)
    assert high >= values.max() > high - 0.01 * (high - low)
    columns = values.double().reshape(len(values), -1)
    middle, sd = (low + high) / 2, (high - low) / math.sqrt(12)
    assert columns.mean(0) == pytest.approx(torch.full((columns.shape[1],), middle, dtype=torch.double), abs=0.06 * sd)
    covariance = (columns - middle).mT @ (columns - middle) / len(values) / sd**2
    assert (covariance - torch.eye(columns.shape[1])).abs().max() < 0.06


def moved(point: tuple[float, float], name: str, draw: Draw, size: torch.Size) -> tuple[float, float]:
    """Where one operator takes a point, from its definition: rows down, columns to the right, of the centre."""
    row, column = point
    height, width = size
    match name:
        case "flip":
            return row, -column if draw.flip.item() else column
        case "pad":
            top, right, bottom, left = draw.pad[0].double().tolist()
            # from the upper left corner, with the new sides before it, and then all of it made as large as before
            row = (row + height / 2 + top * height) / (1 + top + bottom) - height / 2
            column = (column + width / 2 + left * width) / (1 + left + right) - width / 2
            return row, column
        case "scale":
            rows, columns = draw.scale[0].double().tolist()
            return row * rows, column * columns
        case "translate":
            down, right = draw.translate[0].double().tolist()
            return row + down * height, column + right * width
        case "rotate":
            angle = math.radians(draw.rotate.double().item())  # a point on the right goes down
            return (
                row * math.cos(angle) + column * math.sin(angle),
                column * math.cos(angle) - row * math.sin(angle),
            )
        case "shear":
            slope = math.tan(math.radians(draw.shear.double().item()))
            row = row + slope * column
            return row, column - slope * row
    raise AssertionError(name)


def test_parameters_are_drawn_from_the_stated_distributions():
    draw = MaskAugmentation().draw(8000, generator())
    assert draw.flip.double().mean() == pytest.approx(0.5, abs=0.02)
    checked(draw.pad, 0.0, 0.1)
    checked(draw.scale, 0.8, 1.2)
    checked(draw.translate, -0.1, 0.1)
    checked(draw.rotate, -15.0, 15.0)
    checked(draw.shear, -8.0, 8.0)


def test_every_order_of_the_operators_is_as_likely():
    order = MaskAugmentation().draw(7200, generator()).order
    assert torch.equal(order.sort(1).values, torch.arange(6).expand(7200, 6))
    code = (order * 6 ** torch.arange(6)).sum(1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(6)
    chi2 = ((counts - 10.0) ** 2 / 10).sum()  # 719 degrees of freedom, SD 38
    assert 719 - 4 * 38 < chi2 < 719 + 4 * 38


def test_a_composed_map_is_its_operators_one_after_another():
    """Points in float64; the operators from their definitions, in the order drawn."""
    draw = MaskAugmentation().draw(20, generator())
    maps = composed(draw, SIZE)
    assert maps.dtype == torch.float64
    for i in range(20):
        point: tuple[float, float] = (-13.7, 9.3)
        for step in draw.order[i].tolist():
            point = moved(point, OPERATORS[step], draw[i], SIZE)
        there = maps[i] @ torch.tensor([-13.7, 9.3, 1.0], dtype=torch.float64)
        assert there.tolist() == pytest.approx([*point, 1.0], abs=1e-10)


@pytest.mark.parametrize("size", [(48, 36), (17, 50)])
def test_sources_invert_the_map(size):
    """Pixels of the output, sent back to where they come from and forth again, are where they were."""
    size = torch.Size(size)
    maps = composed(MaskAugmentation().draw(5, generator()), size)
    half = torch.tensor([(s - 1) / 2 for s in size], dtype=torch.float64)
    back = sources(maps, size).flip(-1) * half  # (B, H, W, 2), pixels of the centre
    forth = back @ maps[:, None, :2, :2].mT + maps[:, None, None, :2, 2]
    rows, columns = (torch.arange(s, dtype=torch.float64) - (s - 1) / 2 for s in size)
    here = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    torch.testing.assert_close(forth, here.expand_as(forth), atol=1e-9, rtol=0)


def test_no_augmentation_is_the_identity():
    labels = torch.randint(4, (3, *SIZE), generator=generator())
    out = STILL(labels, generator())
    assert torch.equal(out, labels)
    assert out.dtype == torch.int64


@pytest.mark.parametrize("size", [(48, 36), (33, 51)])
def test_a_flip_is_exact(size):
    labels = torch.randint(3, (5, *size), generator=generator())
    assert torch.equal(replace(STILL, flip=1.0)(labels, generator()), labels.flip(-1))


def test_a_translation_by_whole_pixels_is_exact_and_brings_background():
    labels = torch.randint(1, 3, (2, 40, 30), generator=generator())
    shift = 0.1 + 1e-9  # 4 pixels down and 3 to the right
    out = replace(STILL, translate=(shift, shift))(labels, generator())
    assert torch.equal(out[:, 4:, 3:], labels[:, :-4, :-3])
    assert not out[:, :4].any()
    assert not out[:, :, :3].any()


def test_a_quarter_turn_is_clockwise():
    labels = torch.randint(3, (1, 21, 21), generator=generator())
    out = replace(STILL, rotate=(90.0, 90.0))(labels, generator())
    assert torch.equal(out, labels.rot90(-1, (1, 2)))


def test_padding_shrinks_towards_the_side_with_less_of_it():
    """A full mask becomes a rectangle: a side of 10 % above, of 110 %, leaves 1 / 1.1 of the rows, at the bottom."""
    draw = STILL.draw(1, generator())
    draw.pad[0, 0] = 0.1
    out = STILL.apply(torch.ones(1, 110, 40, dtype=torch.long), draw)
    assert out[0, 11:].all()
    assert not out[0, :9].any()
    assert out.float().mean() == pytest.approx(1 / 1.1, abs=0.01)


@pytest.mark.parametrize("factors", [(0.8, 0.8), (1.2, 1.2), (0.8, 1.2)])
def test_the_area_changes_as_the_scale_says(factors):
    labels = square(torch.Size((240, 240)), 60)
    draw = STILL.draw(1, generator())
    draw.scale[0] = torch.tensor(factors)
    out = replace(STILL, threshold=0.5).apply(labels, draw)
    assert out.sum() / labels.sum() == pytest.approx(math.prod(factors), rel=0.02)
    assert out[0].any(1).sum() / 120 == pytest.approx(factors[0], abs=0.01)
    assert out[0].any(0).sum() / 120 == pytest.approx(factors[1], abs=0.01)


def test_only_scale_and_padding_change_areas():
    draw = MaskAugmentation().draw(200, generator())
    area = torch.linalg.det(composed(draw, SIZE)).abs()
    top, right, bottom, left = draw.pad.double().unbind(1)
    expected = draw.scale.double().prod(1) / ((1 + top + bottom) * (1 + left + right))
    torch.testing.assert_close(area, expected)


def test_operators_alone():
    one = torch.ones(1)
    point = torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)

    def at(matrix: Tensor) -> list[float]:
        return (matrix[0] @ point)[:2].tolist()

    assert at(flip(one.bool())) == [2.0, -3.0]
    assert at(flip(one.bool().logical_not())) == [2.0, 3.0]
    assert at(scaling(torch.tensor([[2.0, 0.5]]))) == [4.0, 1.5]
    assert at(translation(torch.tensor([[0.25, -0.5]]), torch.Size((8, 20)))) == [4.0, -7.0]
    assert at(rotation(90 * one)) == pytest.approx([3.0, -2.0])
    assert at(shearing(45 * one)) == pytest.approx([5.0, -2.0])
    assert at(padding(torch.tensor([[0.5, 0.0, 0.5, 0.0]]), torch.Size((8, 20)))) == [1.0, 3.0]


def test_foreground_is_what_exceeds_the_threshold():
    """A pixel of which a square covers 0.5 or 0.11 belongs to it, one of which it covers 0.09 does not."""
    labels = square()
    draw = STILL.draw(1, generator())
    for pixels, gained in ((0.5, 1), (0.11, 1), (0.09, 0)):
        draw.translate[0, 1] = pixels / SIZE[1]
        out = MaskAugmentation().apply(labels, draw)
        assert out.sum() == labels.sum() + 16 * gained


def test_classes_follow_the_binary_rule_and_the_largest_share():
    labels = torch.randint(4, (6, *SIZE), generator=generator()) * (torch.rand(6, *SIZE, generator=generator(1)) < 0.3)
    augmentation, draw = MaskAugmentation(), MaskAugmentation().draw(6, generator())
    out = augmentation.apply(labels, draw)
    assert torch.equal(out > 0, augmentation.apply((labels > 0).long(), draw) > 0)
    renamed = torch.tensor([0, 3, 1, 2])  # classes have no rank of their own, but where shares are equal
    assert (augmentation.apply(renamed[labels], draw) != renamed[out]).float().mean() < 1e-3
    halves = torch.zeros(1, 20, 20, dtype=torch.long)
    halves[:, :, 5:10], halves[:, :, 10:15] = 1, 2
    for share, expected in ((0.4, 2), (0.6, 1)):  # column 10 has this share of class 1
        draw = STILL.draw(1, generator())
        draw.translate[0, 1] = share / 20
        assert (STILL.apply(halves, draw)[0, :, 10] == expected).all()


def test_a_batch_without_foreground_stays_so():
    assert not MaskAugmentation()(torch.zeros(2, *SIZE, dtype=torch.long), generator()).any()


@pytest.mark.parametrize("augmentation", [MaskAugmentation(), PairedAugmentation("all")])
def test_a_sample_depends_on_neither_its_batch_nor_the_global_state(augmentation):
    labels, image = square().expand(5, -1, -1), torch.rand(5, 2, *SIZE, generator=generator())
    given = (labels,) if isinstance(augmentation, MaskAugmentation) else (image, labels)
    state = torch.get_rng_state()
    whole = augmentation(*given, generator(3))
    part = augmentation(*(x[:2] for x in given), generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(whole, part, strict=False) if len(given) == 2 else [(whole, part)]:
        assert torch.equal(a[:2], b)
        assert len({x.numpy().tobytes() for x in a}) == 5
    draw = augmentation.draw(5, generator(3))
    alone = augmentation.apply(*(x[3:4] for x in given), draw[3])
    for a, b in zip(whole, alone, strict=False) if len(given) == 2 else [(whole, alone)]:
        assert torch.equal(a[3:4], b)


def test_pairs_are_drawn_as_stated():
    draw = PairedAugmentation("all").draw(8000, generator())
    assert draw.flip.double().mean() == pytest.approx(0.5, abs=0.02)
    checked(draw.rotate, -15.0, 15.0)
    checked(draw.translate, -0.1, 0.1)


@pytest.mark.parametrize("kind", ["rotate", "flip", "translate"])
def test_a_kind_has_its_operator_and_no_other(kind):
    everything, own = (PairedAugmentation(k).draw(50, generator()) for k in ("all", kind))
    for name in ("rotate", "flip", "translate"):
        value = getattr(own, name)
        assert torch.equal(value, getattr(everything, name)) if name == kind else not value.any()


def test_all_flips_then_rotates_then_translates():
    size = torch.Size((25, 25))
    image = torch.rand(1, 1, *size, generator=generator())
    labels = torch.randint(5, (1, *size), generator=generator())
    augmentation = PairedAugmentation("all", 1.0, (0.2, 0.2), (90.0, 90.0))
    out, out_labels = augmentation(image, labels, generator())
    for before, after in ((image[0, 0], out[0, 0]), (labels[0], out_labels[0])):
        expected = before.flip(1).rot90(-1)[:-5, :-5]
        torch.testing.assert_close(after[5:, 5:], expected, atol=1e-5, rtol=0)


def test_a_flip_of_pairs_is_exact():
    image = torch.rand(3, 2, *SIZE, generator=generator())
    labels = torch.randint(9, (3, *SIZE), generator=generator())
    out, out_labels = PairedAugmentation("flip", flip=1.0)(image, labels, generator())
    torch.testing.assert_close(out, image.flip(-1), atol=1e-5, rtol=0)
    assert torch.equal(out_labels, labels.flip(-1))


@pytest.mark.parametrize("kind", ["rotate", "flip", "translate", "all"])
def test_image_and_labels_move_together(kind):
    """An image that is its label map differs from it after the augmentation on the edges of regions only."""
    labels = torch.zeros(8, 64, 56, dtype=torch.long)
    labels[:, :40, 10:30], labels[:, 20:50, 35:] = 1, 2  # two of them on the image's edge
    image = labels[:, None].float() / 2
    out, out_labels = PairedAugmentation(kind)(image, labels, generator())
    difference = (out[:, 0] * 2 - out_labels).abs()
    near = F.max_pool2d(torch.stack([out_labels, -out_labels], 1).float(), 5, 1, 2)
    edge = near[:, 0] != -near[:, 1]  # not all the same in the 5 x 5 around
    assert difference[~edge].max() < 1e-4
    assert out_labels.dtype == torch.int64
    assert not torch.equal(out_labels, labels)


def test_pairs_stay_in_range_and_are_mirrored_at_the_edge():
    image = torch.rand(20, 3, *SIZE, generator=generator())
    labels = torch.randint(1, 200, (20, *SIZE), generator=generator())
    out, out_labels = PairedAugmentation("all")(image, labels, generator())
    assert out.shape == image.shape
    assert out.dtype == torch.float32
    assert 0 <= out.min() < out.max() <= 1
    assert 1 <= out_labels.min() < out_labels.max() < 200  # no background from outside
    shifted, _ = PairedAugmentation("translate", translate=(0.25, 0.25))(image, labels, generator())
    torch.testing.assert_close(shifted[:, :, 12:, 9:], image[:, :, :-12, :-9], atol=1e-4, rtol=0)
    torch.testing.assert_close(shifted[:, :, :12, 9:], image[:, :, 1:13, :-9].flip(2), atol=1e-4, rtol=0)


def test_mistakes_are_named():
    labels, image = square(), torch.rand(1, 1, *SIZE, generator=generator())
    with pytest.raises(UserError, match="3 samples for 1 label maps"):
        STILL.apply(labels, STILL.draw(3, generator()))
    pairs = PairedAugmentation("flip")
    with pytest.raises(UserError, match="as many and as large"):
        pairs.apply(image[..., :-1], labels, pairs.draw(1, generator()))
    with pytest.raises(UserError, match="choose one of rotate, flip, translate, all"):
        PairedAugmentation("shear")  # type: ignore[arg-type]
