"""Points and boxes against scipy's morphology, stated distributions and masks small enough to count by hand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_erosion
from scipy.stats import chisquare, kstest
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.prompts import BoxPrompts, PointPrompts, box_of, check_points
from synthrepro.synthesis.shapes import BezierShapes

MANY = 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(rows: slice, columns: slice, size: tuple[int, int] = (40, 50)) -> Tensor:
    """One rectangle, (1, H, W)."""
    mask = torch.zeros(1, *size, dtype=torch.long)
    mask[0, rows, columns] = 1
    return mask


def blobs(count: int, size: tuple[int, int] = (72, 60)) -> Tensor:
    """Masks of all sorts: with holes, occluded, cut by the border, (count, H, W)."""
    settings = BezierShapes(hole_chance=0.5)
    maps = settings.apply(settings.draw(count, generator()), size)
    return (maps == maps.flatten(1).where(maps.flatten(1) > 0, 99).amin(1)[:, None, None]).long()


def square(radius: int) -> np.ndarray:
    return np.ones((2 * radius + 1,) * 2, dtype=bool)


def eroded(mask: Tensor, radius: int) -> np.ndarray:
    return binary_erosion(mask.numpy() > 0, square(radius), border_value=1)


def ring(mask: Tensor, inner: int, outer: int) -> np.ndarray:
    near, far = (binary_dilation(mask.numpy() > 0, square(r)) for r in (inner, outer))
    return far & ~near


def prompts(masks: Tensor, settings: PointPrompts, seed: int = 0) -> tuple[Tensor, Tensor]:
    return settings.apply(masks, settings.draw(len(masks), generator(seed)))


def counts(points: Tensor, size: torch.Size) -> np.ndarray:
    """How many of the points (N, 2) are at each pixel, (H, W)."""
    assert torch.equal(points, points.round())
    x, y = points.long().unbind(-1)
    return torch.bincount(y * size[1] + x, minlength=size[0] * size[1]).view(size).numpy()


class TestRegions:
    @pytest.mark.parametrize("margin", [1, 2, 5])
    def test_positives_are_uniform_over_the_eroded_mask(self, margin):
        mask = mask_of(slice(8, 24), slice(10, 26))
        mask[0, 22:30, 20:40] = 1
        points, labels = prompts(mask, PointPrompts((MANY, MANY), (0, 0), margin=margin / 40))
        assert torch.equal(labels, torch.ones(1, MANY, dtype=torch.long))
        region, seen = eroded(mask[0], margin), counts(points[0], mask.shape[1:])
        assert seen[~region].sum() == 0
        assert chisquare(seen[region]).pvalue > 1e-3

    @pytest.mark.parametrize(("inner", "outer"), [(1, 2), (3, 5), (2, 9)])
    def test_negatives_are_uniform_over_the_ring(self, inner, outer):
        mask = mask_of(slice(2, 12), slice(38, 46))  # near enough to the border for the ring to be cut
        mask[0, 30, 20] = 1
        points, labels = prompts(mask, PointPrompts((1, 1), (MANY, MANY), ring=(inner / 40, outer / 40)))
        assert torch.equal(labels[0, 1:], torch.zeros(MANY, dtype=torch.long))
        region, seen = ring(mask[0], inner, outer), counts(points[0, 1:], mask.shape[1:])
        assert seen[~region].sum() == 0
        assert chisquare(seen[region]).pvalue > 1e-3

    def test_masks_of_all_sorts(self):
        masks = blobs(40)
        points, labels = prompts(masks, PointPrompts((50, 50), (50, 50), margin=0.1, ring=(0.05, 0.2)))
        halved = set()
        for mask, point, label in zip(masks, points, labels, strict=True):
            radius = next(r for r in (6, 3, 1, 0) if eroded(mask, r).any())
            halved.add(radius)
            seen = counts(point[label == 1], mask.shape)
            assert seen.sum() == 50
            assert seen[~eroded(mask, radius)].sum() == 0
            seen = counts(point[label == 0], mask.shape)
            assert seen.sum() == 50
            assert seen[~ring(mask, 3, 12)].sum() == 0
        assert halved >= {6, 3, 1}

    def test_a_point_is_never_on_the_border(self):
        masks = blobs(40)
        points, labels = prompts(masks, PointPrompts((50, 50), (50, 50), margin=0.0, ring=(0.0, 0.001)))
        wide = 0
        for mask, point, label in zip(masks, points, labels, strict=True):
            border = ring(mask, 0, 1)
            if eroded(mask, 1).any():
                wide += 1
                border |= (mask.numpy() > 0) & ~eroded(mask, 1)
            assert counts(point[label >= 0], mask.shape)[border].sum() == 0
        assert wide > 20

    def test_thin_masks(self):
        line, pixel = mask_of(slice(10, 11), slice(5, 45)), mask_of(slice(7, 8), slice(9, 10))
        points, labels = prompts(torch.cat([line, pixel]), PointPrompts((200, 200), (2, 2), margin=0.2))
        assert (labels[:, :200] == 1).all()
        assert (points[0, :200, 1] == 10).all()
        assert set(range(5, 45)) >= set(points[0, :200, 0].tolist()) >= set(range(15, 35, 10))
        assert torch.equal(points[1, :200], torch.tensor([[9.0, 7.0]]).expand(200, -1))

    def test_the_images_border_is_no_border_of_the_mask(self):
        mask = mask_of(slice(0, 10), slice(0, 12))  # in the corner
        points, _ = prompts(mask, PointPrompts((MANY, MANY), (0, 0), margin=4 / 40))
        seen = counts(points[0], mask.shape[1:])
        assert (seen[:6, :8] > 0).all()
        assert seen.sum() == seen[:6, :8].sum()

    def test_a_mask_that_fills_the_image_has_no_negatives(self):
        masks = torch.cat([mask_of(slice(None), slice(None)), mask_of(slice(5, 20), slice(5, 20))])
        points, labels = prompts(masks, PointPrompts((2, 2), (3, 3)))
        assert labels.tolist() == [[1, 1, -1, -1, -1], [1, 1, 0, 0, 0]]
        assert not points[0, 2:].any()

    def test_a_margin_larger_than_the_image(self):
        mask = mask_of(slice(5, 25), slice(5, 25))
        points, labels = prompts(mask, PointPrompts((5, 5), (5, 5), margin=2.0, ring=(0.1, 3.0)))
        assert labels.tolist() == [[1] * 5 + [0] * 5]
        assert (points[0, :5] >= 10).all()  # 80 is halved to 5, which is the first that leaves something
        assert (points[0, :5] < 20).all()


class TestCounts:
    def test_numbers_of_points_are_uniform_within_their_ranges(self):
        settings = PointPrompts((1, 3), (0, 2))
        draw = settings.draw(MANY, generator())
        assert chisquare(torch.bincount(draw.positives - 1).numpy(), [MANY / 3] * 3).pvalue > 1e-3
        assert chisquare(torch.bincount(draw.negatives).numpy(), [MANY / 3] * 3).pvalue > 1e-3
        assert chisquare(torch.bincount(draw.positives * 3 + draw.negatives)[3:].numpy(), [MANY / 9] * 9).pvalue > 1e-3
        assert kstest(draw.inside.flatten().numpy(), "uniform").pvalue > 1e-3
        assert kstest(draw.around.flatten().numpy(), "uniform").pvalue > 1e-3

    def test_padding_follows_each_kind(self):
        settings, masks = PointPrompts((1, 3), (0, 2)), mask_of(slice(8, 28), slice(8, 28)).expand(50, -1, -1)
        draw = settings.draw(50, generator())
        points, labels = settings.apply(masks, draw)
        assert points.shape == (50, 5, 2)
        assert points.dtype == torch.float32
        assert labels.dtype == torch.int64
        for i in range(50):
            p, n = int(draw.positives[i]), int(draw.negatives[i])
            assert labels[i].tolist() == [1] * p + [-1] * (3 - p) + [0] * n + [-1] * (2 - n)
        assert not points[labels == -1].any()
        assert points[labels >= 0].all()

    def test_more_points_are_fewer_points_and_further_ones(self):
        masks = blobs(5)
        all_points, all_labels = prompts(masks, PointPrompts((3, 3), (2, 2)))
        for positive, negative in ((1, 0), (3, 0), (1, 2)):
            points, labels = prompts(masks, PointPrompts((positive, positive), (negative, negative)))
            kept = [*range(positive), *range(3, 3 + negative)]
            assert torch.equal(points, all_points[:, kept])
            assert torch.equal(labels, all_labels[:, kept])

    def test_a_sample_does_not_depend_on_its_batch(self):
        settings, masks = PointPrompts((1, 3), (0, 2), margin=0.2), blobs(6)
        draw = settings.draw(6, generator())
        points, labels = settings.apply(masks, draw)
        few, few_labels = settings.apply(masks[:2], settings.draw(2, generator()))
        assert torch.equal(few, points[:2])
        assert torch.equal(few_labels, labels[:2])
        assert torch.equal(settings.apply(masks[5:], draw[5])[0], points[5:])
        assert torch.equal(settings.apply(masks, draw)[0], points)
        assert not torch.equal(draw.inside[0], draw.inside[1])

    def test_nothing_touches_the_global_random_state_or_the_masks(self):
        masks, before = blobs(3), torch.get_rng_state()
        copy = masks.clone()
        prompts(masks, PointPrompts((3, 3), (2, 2)))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(masks, copy)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_gives_the_same_points(self):
        settings, masks = PointPrompts((1, 3), (0, 2)), blobs(6)
        draw = settings.draw(6, generator())
        here, there = settings.apply(masks, draw), settings.apply(masks.cuda(), draw)
        for a, b in zip(here, there, strict=True):
            assert b.is_cuda
            assert torch.equal(a, b.cpu())
        assert torch.equal(box_of(masks), box_of(masks.cuda()).cpu())


class TestBoxes:
    def test_a_box_is_tight(self):
        masks = torch.cat(
            [
                mask_of(slice(3, 9), slice(20, 41)),
                mask_of(slice(7, 8), slice(9, 10)),
                mask_of(slice(None), slice(None)),
                mask_of(slice(39, 40), slice(0, 1)),
            ]
        )
        masks[0, 30, 5] = 1  # a second part
        expected = [[5, 3, 41, 31], [9, 7, 10, 8], [0, 0, 50, 40], [0, 39, 1, 40]]
        boxes = box_of(masks)
        assert boxes.dtype == torch.float32
        assert boxes.tolist() == expected

    def test_jitter_moves_each_side_outwards_by_its_own_uniform_length(self):
        masks, settings = mask_of(slice(10, 20), slice(10, 30)).expand(1000, -1, -1), BoxPrompts(0.2)
        moved = (settings.apply(masks, settings.draw(1000, generator())) - box_of(masks)) * torch.tensor([-1, -1, 1, 1])
        for side in moved.mT:
            assert kstest(side.numpy(), "uniform", (0, 8)).pvalue > 1e-3  # 0.2 of 40 rows
        assert (moved.mT.corrcoef() - torch.eye(4)).abs().max() < 0.15

    def test_boxes_are_clipped_to_the_image(self):
        masks, settings = mask_of(slice(1, 39), slice(1, 49)).expand(50, -1, -1), BoxPrompts(1.0)
        boxes = settings.apply(masks, settings.draw(50, generator()))
        assert boxes.amin(0)[:2].tolist() == [0, 0]
        assert boxes.amax(0)[2:].tolist() == [50, 40]

    def test_without_jitter_the_box_is_tight(self):
        masks, settings = blobs(5), BoxPrompts(0.0)
        assert torch.equal(settings.apply(masks, settings.draw(5, generator())), box_of(masks))

    def test_a_sample_does_not_depend_on_its_batch(self):
        masks, settings = blobs(5), BoxPrompts()
        draw = settings.draw(5, generator())
        boxes = settings.apply(masks, draw)
        assert torch.equal(settings.apply(masks[:2], settings.draw(2, generator())), boxes[:2])
        assert torch.equal(settings.apply(masks[4:], draw[4]), boxes[4:])


class TestErrors:
    SETTINGS = PointPrompts((3, 3), (2, 2))

    def functions(self, count):
        points, boxes = self.SETTINGS, BoxPrompts()
        return (
            lambda masks: points.apply(masks, points.draw(count, generator())),
            lambda masks: boxes.apply(masks, boxes.draw(count, generator())),
            box_of,
        )

    def test_an_empty_mask_is_named(self):
        masks = blobs(4)
        masks[2] = 0
        for function in self.functions(4):
            with pytest.raises(UserError, match="Mask 2 of the batch is empty"):
                function(masks)

    def test_masks_that_are_not_binary(self):
        for function in self.functions(4):
            for masks, match in (
                (2 * blobs(4), "run from 0 to 2"),
                (-blobs(4), "run from -1 to 0"),
                (blobs(4).float(), "int64"),
                (blobs(4) > 0, "int64"),
                (blobs(4)[:, None], r"\(B, H, W\)"),
            ):
                with pytest.raises(UserError, match=match):
                    function(masks)

    def test_a_draw_for_another_batch(self):
        for function in self.functions(3)[:2]:
            with pytest.raises(UserError, match="3 samples for 4 masks"):
                function(blobs(4))

    @pytest.mark.parametrize(
        "options",
        [
            {"positive": (0, 1)},
            {"positive": (3, 2)},
            {"negative": (-1, 1)},
            {"negative": (3, 2)},
            {"margin": -0.1},
            {"ring": (0.2, 0.1)},
            {"ring": (-0.1, 0.1)},
        ],
    )
    def test_impossible_ranges(self, options):
        with pytest.raises(UserError, match=next(iter(options))):
            PointPrompts(**{"positive": (1, 1), "negative": (0, 0), **options})

    def test_impossible_jitter(self):
        with pytest.raises(UserError, match="jitter"):
            BoxPrompts(-0.1)

    def test_points_outside_the_image(self):
        size = (40, 50)
        inside = torch.tensor([[0.0, 0.0], [49.0, 39.0], [49.9, 39.9]])
        check_points(inside, size)
        check_points(inside.expand(2, -1, -1), size)
        for wrong in ([50.0, 0.0], [0.0, 40.0], [-0.5, 3.0], [3.0, -1.0], [float("nan"), 3.0]):
            points = torch.stack([inside, inside])
            points[1, 2] = torch.tensor(wrong)
            with pytest.raises(UserError, match=r"Point 2 of sample 1, .* outside the image of 50 columns and 40 rows"):
                check_points(points, size)
            with pytest.raises(UserError, match=rf"Point 2, \(x, y\) = \({wrong[0]:g}, {wrong[1]:g}\)"):
                check_points(points[1], size)
        for shape in ((2,), (3, 3), (1, 2, 3, 2)):
            with pytest.raises(UserError, match=r"\(N, 2\)"):
                check_points(torch.zeros(shape), size)
