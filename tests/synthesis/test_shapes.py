"""Curves against exact tests for crossings and closed-form areas; label maps against another library's polygons."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from skimage.measure import points_in_poly
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.shapes import POINTS, BezierShapes, enclosed_area, outline, paint

DEFAULT = BezierShapes()
EXTREMES = {
    "default": DEFAULT,
    "fewest": BezierShapes(controls=(5, 5), irregularity=(1.0, 1.0), elongation=(4.0, 4.0), bend=(0.6, 0.6)),
    "most": BezierShapes(controls=(12, 12), irregularity=(1.0, 1.0), elongation=(4.0, 4.0), bend=(-0.6, -0.6)),
}
HOLES = replace(DEFAULT, number=(6, 6), hole_chance=1.0)
ALONE = replace(DEFAULT, number=(1, 1), centre=(0.5, 0.5), radius=(0.1, 0.15), hole_chance=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def precise(draw: Draw) -> Draw:
    """The draw in double precision, but for its counts."""
    return Draw(**{name: x.double() if x.is_floating_point() else x for name, x in vars(draw).items()})


def crossings(polygons: Tensor) -> Tensor:
    """Pairs of edges, not neighbours, of each polygon (K, P, 2) of int64 corners that meet; exact; (K,)."""
    start, end = polygons, polygons.roll(-1, 1)

    def side(of: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ab, ac = b - a, of - a
        return (ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]).sign()

    a, b, c, d = start[:, :, None], end[:, :, None], start[:, None], end[:, None]
    meet = (side(c, a, b) * side(d, a, b) <= 0) & (side(a, c, d) * side(b, c, d) <= 0)
    count = polygons.shape[1]
    apart = (torch.arange(count) - torch.arange(count)[:, None]) % count
    return (meet & (apart > 1) & (apart < count - 1)).sum((1, 2)) // 2


def shoelace(polygon: Tensor) -> Tensor:
    """Area of polygons (..., P, 2)."""
    x, y = polygon.double().unbind(-1)
    return ((x * y.roll(-1, -1) - y * x.roll(-1, -1)).sum(-1) / 2).abs()


def middles(size: tuple[int, int]) -> np.ndarray:
    """Middles of pixels, (H * W, 2), (x, y)."""
    y, x = torch.meshgrid(*[torch.arange(s) + 0.5 for s in size], indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1).double().numpy()


def distance(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Distance of points (K, 2) to a closed polygon (P, 2)."""
    start, edge = polygon, np.roll(polygon, -1, 0) - polygon
    to = points[:, None] - start
    share = ((to * edge).sum(-1) / (edge**2).sum(-1)).clip(0, 1)
    return np.linalg.norm(to - share[..., None] * edge, axis=-1).min(1)


class TestCurves:
    def test_the_crossing_test_finds_a_crossing(self):
        eight = torch.tensor([[[0, 0], [4, 4], [4, 0], [0, 4]], [[0, 0], [4, 0], [4, 4], [0, 4]]])
        assert crossings(eight).tolist() == [1, 0]

    @pytest.mark.parametrize("settings", EXTREMES.values(), ids=EXTREMES)
    def test_a_curve_does_not_meet_itself(self, settings):
        draw = precise(settings.draw(40, generator()))
        polygons = outline(draw, (2**22, 2**22), points=160).round().long().flatten(0, 1)
        assert sum(int(crossings(some).sum()) for some in polygons.split(10)) == 0

    @pytest.mark.parametrize("settings", EXTREMES.values(), ids=EXTREMES)
    def test_the_angle_round_the_centre_makes_one_turn(self, settings):
        settings = replace(settings, irregularity=(0.0, 2.0), elongation=(1.0, 10.0), bend=(0.0, 0.0))
        draw = precise(settings.draw(40, generator()))
        arms = outline(draw, (1, 1)) - draw.centre[:, :, None]
        x, y = arms.unbind(-1)
        steps = torch.atan2(x * y.roll(-1, -1) - y * x.roll(-1, -1), x * x.roll(-1, -1) + y * y.roll(-1, -1))
        assert steps.min() > 0
        assert steps.sum(-1) == pytest.approx(torch.full(steps.shape[:2], 2 * math.pi, dtype=torch.double).numpy())

    @pytest.mark.parametrize("settings", EXTREMES.values(), ids=EXTREMES)
    def test_a_hole_lies_inside_its_shape(self, settings):
        draw = replace(settings, hole_chance=1.0, hole=(0.9, 0.95)).draw(8, generator())
        shapes, holes = (outline(draw, (1024, 1024), hole=h).flatten(0, 1).double().numpy() for h in (False, True))
        for shape, hole in zip(shapes, holes, strict=True):
            assert points_in_poly(hole, shape).all()

    @pytest.mark.parametrize("settings", EXTREMES.values(), ids=EXTREMES)
    def test_the_area_is_that_of_the_disc_whatever_the_form(self, settings):
        draw = precise(replace(settings, hole_chance=1.0).draw(20, generator()))
        area = math.pi * (draw.radius * 200) ** 2
        assert shoelace(outline(draw, (200, 300))) == pytest.approx(area.numpy(), rel=1e-3)
        inner = shoelace(outline(draw, (200, 300), hole=True))
        assert inner == pytest.approx((area * draw.hole**2).numpy(), rel=1e-3)

    def test_area_of_control_points_in_closed_form(self):
        # A square of side 2: midpoints enclose 2, and each piece adds 2/3 of its triangle of area 1/2.
        square = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1], [9, 9]])
        assert enclosed_area(square[None, None], torch.tensor([[4]])).item() == pytest.approx(2 + 4 / 3, rel=1e-6)

    def test_pieces_run_from_midpoint_to_midpoint_and_share_tangents(self):
        draw = precise(replace(ALONE, controls=(8, 8), bend=(0.0, 0.0)).draw(1, generator()))
        draw.rotation.zero_()
        scale = draw.radius[0, 0]
        controls = draw.controls[0, 0] * scale + draw.centre[0, 0]
        curve = outline(draw, (1, 1), points=8)[0, 0]
        assert curve == pytest.approx(((controls + controls.roll(-1, 0)) / 2).numpy(), rel=1e-6)
        fine = outline(draw, (1, 1), points=8 * 4096)[0, 0]
        ahead, behind = (fine.roll(-1, 0) - fine)[::4096], (fine - fine.roll(1, 0))[::4096]
        assert ahead == pytest.approx(behind.numpy(), rel=1e-2, abs=1e-8)

    def test_the_polygon_is_much_nearer_to_the_curve_than_a_pixel(self):
        longest = {name: (getattr(DEFAULT, name)[1],) * 2 for name in ("radius", "irregularity", "elongation", "bend")}
        draw = precise(replace(DEFAULT, **longest).draw(40, generator()))
        fine = outline(draw, (1024, 1024), points=2 * POINTS)
        chords = (fine[:, :, ::2] + fine.roll(-2, 2)[:, :, ::2]) / 2
        assert (chords - fine[:, :, 1::2]).norm(dim=-1).max() < 0.1

    def test_elongation_and_bend_are_the_stated_maps(self):
        draw = precise(
            replace(ALONE, irregularity=(0.0, 0.0), elongation=(4.0, 4.0), bend=(0.3, 0.3)).draw(5, generator())
        )
        for points, count in zip(draw.controls[:, 0], draw.pieces[:, 0], strict=True):
            x, y = points[:count].unbind(-1)
            radii = (x**2 / 4 + y**2 * 4).numpy()
            assert radii == pytest.approx(np.full(count, radii[0]), rel=1e-5)
        draw.rotation.zero_()
        straight = outline(Draw(**{**vars(draw), "bend": 0 * draw.bend}), (100, 100))
        bent, unit = outline(draw, (100, 100)), 100 * draw.radius[..., None]
        x = (straight[..., 0] - 50) / unit
        assert bent[..., 0] == pytest.approx(straight[..., 0].numpy())
        assert bent[..., 1] == pytest.approx((straight[..., 1] + unit * 0.3 * x**2).numpy())


class TestDraw:
    def test_numbers_have_the_stated_distributions(self):
        draw = DEFAULT.draw(2000, generator())
        for values, (low, high) in ((draw.number, (3, 9)), (draw.pieces, (5, 12))):
            counts = torch.bincount(values.flatten(), minlength=high + 1)
            assert counts[:low].sum() == 0
            assert len(counts) == high + 1
            assert chisquare(counts[low:].numpy()).pvalue > 1e-3
        unit = {
            "radius": (draw.radius.log() - math.log(0.04)) / math.log(0.3 / 0.04),
            "bend": (draw.bend + 0.4) / 0.8,
            "rotation": draw.rotation / (2 * math.pi),
            "centre": (draw.centre - 0.1) / 0.8,
            "hole": (draw.hole[draw.hole > 0] - 0.3) / 0.5,
        }
        for name, values in unit.items():
            assert kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3, name
        holes = (draw.hole > 0).double()
        assert holes.mean().item() == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / holes.numel()))

    def test_control_points_are_within_the_irregularity(self):
        draw = replace(DEFAULT, elongation=(1.0, 1.0), irregularity=(0.4, 0.4)).draw(200, generator())
        used = torch.arange(12) < draw.pieces[..., None]
        logs = draw.controls.norm(dim=-1).log()
        high = logs.masked_fill(~used, -math.inf).amax(-1)
        low = logs.masked_fill(~used, math.inf).amin(-1)
        assert 0.75 < (high - low).max() <= 0.8 + 1e-5

    def test_a_sample_does_not_depend_on_its_batch(self):
        draw, few = DEFAULT.draw(5, generator()), DEFAULT.draw(2, generator())
        for name, values in vars(few).items():
            assert torch.equal(values, vars(draw)[name][:2]), name
        maps = DEFAULT.apply(draw, (60, 50))
        assert torch.equal(DEFAULT.apply(few, (60, 50)), maps[:2])
        assert torch.equal(DEFAULT.apply(draw[4], (60, 50)), maps[4:])
        assert not torch.equal(maps[0], maps[1])

    def test_nothing_touches_the_global_random_state(self):
        before = torch.get_rng_state()
        DEFAULT.apply(DEFAULT.draw(2, generator()), (16, 16))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_generator_on_a_gpu_is_refused(self):
        with pytest.raises(UserError, match="CPU"):
            DEFAULT.draw(1, torch.Generator("cuda"))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"number": (0, 3)}, "number"),
            ({"number": (3, 25)}, "number"),
            ({"number": (4, 3)}, "number"),
            ({"controls": (4, 8)}, "cross themselves"),
            ({"controls": (9, 8)}, "controls"),
            ({"radius": (0.0, 0.3)}, "positive"),
            ({"elongation": (0.0, 1.0)}, "positive"),
            ({"hole": (0.5, 1.0)}, "inside its shape"),
            ({"hole": (0.0, 0.5)}, "inside its shape"),
        ],
    )
    def test_impossible_ranges_are_refused(self, change, match):
        with pytest.raises(UserError, match=match):
            replace(DEFAULT, **change)


class TestLabelMap:
    @pytest.mark.parametrize("size", [(48, 64), (64, 48), (1, 40), (33, 1)])
    def test_against_another_librarys_polygons(self, size):
        """Order, holes, numbers and pixels' middles, all at once."""
        settings = replace(HOLES, number=(3, 6), hole_chance=0.5)
        draw = settings.draw(8, generator())
        maps = settings.apply(draw, size)
        shapes, holes = (outline(draw, size, hole=h).double().numpy() for h in (False, True))
        where, wrong = middles(size), 0
        for b in range(8):
            expected = np.zeros(len(where), dtype=np.int64)
            for s in range(int(draw.number[b])):
                inside = points_in_poly(where, shapes[b, s])
                if draw.hole[b, s] > 0:
                    inside &= ~points_in_poly(where, holes[b, s])
                expected[inside] = s + 1
            differ = maps[b].flatten().numpy() != expected
            near = [distance(where[differ], polygon) for polygon in (*shapes[b], *holes[b, draw.hole[b].numpy() > 0])]
            assert np.all(np.min(near, axis=0) < 1e-3)
            wrong += differ.sum()
        assert wrong <= 2
        assert maps.max() > 0

    def test_a_rectangle_is_exact(self):
        corners = torch.tensor([[2.0, 1.0], [6.0, 1.0], [6.0, 4.0], [2.0, 4.0]])
        expected = torch.zeros(7, 9, dtype=torch.long)
        expected[1:4, 2:6] = 1
        for polygon in (corners, corners.flip(0), corners + 0.4, corners - 0.4):
            assert torch.equal(paint(polygon[None, None, None], torch.ones(1, 1, 1) > 0, (7, 9))[0], expected)

    def test_a_rectangle_is_cut_at_the_images_border(self):
        corners = torch.tensor([[-5.0, -7.0], [3.0, -7.0], [3.0, 50.0], [-5.0, 50.0]])
        expected = torch.zeros(7, 9, dtype=torch.long)
        expected[:, :3] = 1
        assert torch.equal(paint(corners[None, None, None], torch.ones(1, 1, 1) > 0, (7, 9))[0], expected)
        outside = paint(corners[None, None, None] + 100, torch.ones(1, 1, 1) > 0, (7, 9))
        assert torch.equal(outside, torch.zeros(1, 7, 9, dtype=torch.long))

    def test_later_shapes_lie_over_earlier_ones_and_holes_show_them(self):
        square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        whole, hole = 6 * square + 1, 2 * square + 3
        curves = torch.stack([torch.stack([8 * square, hole]), torch.stack([whole, hole])])[None]
        with_hole = paint(curves, torch.tensor([[[True, False], [True, True]]]), (9, 9))[0]
        assert with_hole[0].tolist() == [1] * 8 + [0]
        assert with_hole[4].tolist() == [1, 2, 2, 1, 1, 2, 2, 1, 0]
        without = paint(curves, torch.tensor([[[True, False], [True, False]]]), (9, 9))[0]
        assert without[4].tolist() == [1, 2, 2, 2, 2, 2, 2, 1, 0]
        behind_too = paint(curves, torch.tensor([[[True, True], [True, True]]]), (9, 9))[0]
        assert behind_too[4].tolist() == [1, 2, 2, 0, 0, 2, 2, 1, 0]

    def test_as_many_shapes_as_there_may_be_keep_their_labels(self):
        steps = torch.arange(24.0)[:, None, None, None] * torch.tensor([1.0, 0.0])
        bars = torch.tensor([[0.0, 0.0], [30.0, 0.0], [30.0, 2.0], [0.0, 2.0]]) + steps  # each over the one before
        labels = paint(bars[None], torch.ones(1, 24, 1) > 0, (2, 30))
        assert labels[0, 1].tolist() == [*range(1, 25), *[24] * 6]

    def test_a_disc_in_closed_form(self):
        angles = torch.arange(64) * (2 * math.pi / 64)
        circle = torch.stack([angles.cos(), angles.sin()], -1)
        one = torch.ones(1, 1)
        draw = Draw(
            number=torch.tensor([1]),
            pieces=torch.tensor([[64]]),
            controls=circle[None, None],
            bend=0 * one,
            radius=0.3 * one,
            rotation=one,
            centre=torch.tensor([[[0.4, 0.6]]]),
            hole=0.5 * one,
        )
        size = (300, 200)
        labels = DEFAULT.apply(draw, size)[0].flatten()
        r = np.linalg.norm(middles(size) - [0.4 * 200, 0.6 * 300], axis=1)
        # Midpoints of the control polygon are nearer by 1 - cos(pi / 64), which is 0.07 pixels of 60.
        clear = (abs(r - 60) > 0.1) & (abs(r - 30) > 0.1)
        assert clear.mean() > 0.99
        assert np.array_equal(labels.numpy()[clear], ((r < 60) & (r > 30))[clear].astype(np.int64))

    @pytest.mark.parametrize("size", [(512, 512), (512, 700), (700, 512)])
    def test_the_area_in_pixels(self, size):
        draw = ALONE.draw(10, generator())
        pixels = ALONE.apply(draw, size).sum((1, 2)).double()
        assert pixels == pytest.approx((math.pi * (512 * draw.radius[:, 0].double()) ** 2).numpy(), rel=4e-3)

    def test_the_same_draw_at_any_size(self):
        """Every third pixel's middle of the larger image is a pixel's middle of the smaller one."""
        draw = DEFAULT.draw(8, generator())
        small, large = DEFAULT.apply(draw, (64, 80)), DEFAULT.apply(draw, (192, 240))
        assert (small != large[:, 1::3, 1::3]).double().mean() < 1e-3
        for label in range(10):
            a, b = ((x == label).double().mean((1, 2)) for x in (small, large))
            assert a == pytest.approx(b.numpy(), abs=4e-3)

    def test_type_values_and_replay(self):
        draw = DEFAULT.draw(6, generator())
        labels = DEFAULT.apply(draw, (40, 50))
        assert labels.shape == (6, 40, 50)
        assert labels.dtype == torch.int64
        assert labels.min() == 0
        assert (labels.amax((1, 2)) <= draw.number).all()
        assert torch.equal(labels, DEFAULT.apply(draw, (40, 50)))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_makes_the_same_map(self):
        draw = DEFAULT.draw(4, generator())
        there = DEFAULT.apply(draw, (256, 200), "cuda")
        assert there.is_cuda
        assert (there.cpu() != DEFAULT.apply(draw, (256, 200))).double().mean() < 1e-4
