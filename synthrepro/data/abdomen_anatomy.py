"""The anatomies of the task `abdomen`: random solids in three dimensions, placed around the spine.

Millimetres throughout. The patient's frame has its origin in the middle of the vertebral column; x goes to the
patient's left (the image's right), y to the back (down the image), z down to the feet from about the dome of the
diaphragm. Tables give the average adult; `draw_anatomy` moves, turns, scales and bends it. Positions and sizes are set
by hand after the usual descriptions (Gray's Anatomy, 41st edition, 2016), and organ volumes after ICRP Publication 89
(2002).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FIELD_OF_VIEW = 384.0  # mm, rows and columns
DEPTH = 320.0  # mm of the box of the random fields along z, more than any scan
SIDES = ("right", "left")

# Organs and other parts. Tubes: (x, y, z, radius) along the middle line.
TUBES: dict[str, list[tuple[float, float, float, float]]] = {
    "aorta": [(18, -13, -60, 12.5), (17, -15, 0, 12), (11, -25, 55, 11), (8, -29, 120, 10), (7, -29, 300, 9)],
    "inferior vena cava": [
        (-20, -48, -60, 11),
        (-22, -46, 0, 11),
        (-24, -37, 70, 10.5),
        (-23, -29, 120, 10.5),
        (-20, -28, 180, 10),
        (-18, -27, 300, 9),
    ],
    "esophagus": [(6, -37, -60, 9), (9, -38, 0, 9), (16, -43, 30, 9), (27, -47, 50, 9), (36, -48, 58, 7)],
    "stomach": [
        (56, -30, 38, 28),
        (66, -48, 62, 33),
        (70, -68, 90, 30),
        (58, -88, 120, 25),
        (28, -98, 140, 20),
        (-2, -92, 145, 17),
        (-22, -82, 142, 11),
    ],
    "duodenum": [
        (-26, -80, 142, 11),
        (-42, -70, 140, 13),
        (-51, -56, 155, 12.5),
        (-51, -49, 180, 12),
        (-36, -49, 200, 12),
        (-6, -51, 205, 11),
        (20, -51, 196, 12),
        (31, -60, 178, 12),
    ],
    "pancreas": [
        (-24, -52, 182, 9),
        (-32, -58, 168, 15),
        (-22, -64, 152, 14),
        (-4, -70, 143, 10),
        (22, -64, 136, 11),
        (48, -46, 127, 12),
        (72, -24, 118, 10),
    ],
    "gallbladder": [(-36, -66, 128, 5), (-44, -76, 140, 10), (-53, -88, 152, 15), (-60, -98, 162, 14)],
    # without a class
    "portal vein": [(-8, -60, 150, 7), (-18, -60, 132, 7.5), (-34, -58, 112, 7), (-50, -55, 100, 6)],
    "splenic vein": [(-8, -60, 148, 5), (20, -54, 138, 4.5), (46, -37, 128, 4), (74, -16, 114, 3.5)],
    "mesenteric vein": [(-8, -60, 146, 6), (-11, -58, 180, 6), (-12, -66, 230, 5), (-14, -74, 290, 4)],
    "mesenteric artery": [(8, -36, 142, 4), (6, -46, 158, 4), (3, -52, 180, 4), (0, -64, 230, 3.5), (0, -72, 290, 3)],
    "renal vein right": [(-24, -28, 168, 6), (-38, -20, 170, 5), (-52, -12, 172, 5)],
    "renal vein left": [(-14, -34, 160, 5.5), (10, -42, 160, 4.5), (32, -24, 158, 5), (50, -12, 158, 5)],
    "crus right": [(-10, -26, 40, 5), (-11, -25, 90, 6.5), (-10, -23, 130, 5), (-8, -21, 180, 2.5)],
    "crus left": [(26, -22, 40, 4), (23, -20, 90, 5.5), (20, -18, 130, 4.5), (16, -18, 175, 2.5)],
    "psoas right": [(-26, 0, 105, 4), (-31, 1, 140, 12), (-36, 0, 190, 18), (-41, -4, 290, 23)],
    "psoas left": [(26, 0, 105, 4), (31, 1, 140, 12), (36, 0, 190, 18), (41, -4, 290, 23)],
    "ascending colon": [(-82, -78, 168, 21), (-100, -52, 180, 24), (-100, -40, 215, 25), (-98, -40, 300, 25)],
    "transverse colon": [(-82, -78, 168, 20), (-50, -106, 188, 19), (0, -112, 196, 18), (50, -106, 170, 18)],
    "splenic flexure": [(50, -106, 170, 18), (84, -84, 130, 18), (104, -50, 112, 19), (106, -22, 135, 17)],
    "descending colon": [(106, -22, 135, 16), (106, -16, 180, 15), (104, -20, 300, 15)],
    "hepatic vein right": [(-24, -50, 22, 6), (-52, -38, 34, 5), (-88, -28, 62, 3)],
    "hepatic vein middle": [(-22, -54, 22, 6), (-36, -78, 42, 5), (-50, -95, 78, 3)],
    "hepatic vein left": [(-20, -56, 22, 5), (-2, -78, 34, 4), (20, -90, 48, 2.5)],
    "portal branch right": [(-46, -55, 102, 6), (-72, -48, 98, 5), (-96, -30, 100, 3)],
    "portal branch low": [(-58, -52, 100, 5), (-78, -60, 122, 4), (-92, -60, 145, 2.5)],
    "portal branch left": [(-42, -58, 104, 5), (-22, -80, 84, 5), (4, -92, 66, 3)],
}
FLAT = {"inferior vena cava": 1.35, "pancreas": 1.1, "esophagus": 1.2, "hepatic vein left": 1.2}  # width over depth

# (centre), (half axes), (turns about x, y, z in degrees)
ELLIPSOIDS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "right lobe": ((-66.0, -36, 72), (84, 92, 108), (0, 0, 0)),
    "left lobe": ((0.0, -88, 55), (72, 42, 52), (0, 12, 8)),
    "caudate": ((-14.0, -50, 80), (17, 14, 26), (0, 0, 0)),
    "spleen": ((97.0, -9, 84), (35, 52, 60), (-20, 0, -20)),
    "right kidney": ((-61.0, -3, 166), (27, 30, 56), (8, 10, 35)),
    "left kidney": ((61.0, -3, 154), (28, 30, 58), (8, -10, -35)),
    "right sinus": ((-48.0, -13, 167), (15, 8, 27), (8, 10, 35)),
    "left sinus": ((48.0, -13, 155), (15, 8, 27), (8, -10, -35)),
    "heart": ((20.0, -82, -30), (56, 46, 44), (0, 0, 0)),
}

# Limbs of the adrenal glands: (x, y) where they join, (x, y) of the ends, middle and half of the height, half thickness
ADRENALS = {
    "right": (((-29, -20), (-24, 0), (-37, 2)), 98.0, 19.0, 3.0),
    "left": (((37, -24), (29, -4), (49, -4)), 100.0, 19.0, 3.0),
}

# Standard deviations: of the shift in mm along x, y, z and of the logarithm of the size.
VARIATION = {
    "liver": ((4.0, 4, 6), 0.07),
    "spleen": ((3, 6, 9), 0.13),
    "stomach": ((6, 6, 7), 0.14),
    "right kidney": ((4, 4, 10), 0.065),
    "left kidney": ((4, 4, 10), 0.065),
    "pancreas": ((4, 4, 5), 0.12),
    "duodenum": ((4, 4, 5), 0.10),
    "gallbladder": ((5, 5, 6), 0.16),
    "aorta": ((3, 2, 0), 0.10),
    "inferior vena cava": ((3, 2, 0), 0.13),
    "esophagus": ((3, 3, 5), 0.10),
    "colon": ((7, 7, 8), 0.15),
    "vessels": ((2, 2, 3), 0.12),
    "muscle": ((1, 2, 4), 0.12),
}
KIN = {  # of what else moves like it
    **dict.fromkeys(("right lobe", "left lobe", "caudate"), "liver"),
    **{name: "colon" for name in TUBES if "colon" in name or "flexure" in name},
    **{name: "muscle" for name in TUBES if "psoas" in name or "crus" in name},
    **{name: "liver" for name in TUBES if "hepatic" in name or "branch" in name},
    **{name: "vessels" for name in TUBES if name.split()[0] in ("portal", "splenic", "mesenteric", "renal")},
    "splenic flexure": "colon",
    "portal branch right": "liver",
    "portal branch low": "liver",
    "portal branch left": "liver",
    "heart": "liver",
    "right sinus": "right kidney",
    "left sinus": "left kidney",
}
CENTRAL = ("stomach", "duodenum", "pancreas", "gallbladder", "portal vein", "splenic vein", "mesenteric vein")
CENTRAL_SHIFT = (4.0, 4.0, 6.0)  # mm, standard deviation of the shift these share
KNOTS = 2.5  # mm, standard deviation of each control point of a tube that is soft
SOFT = ("stomach", "duodenum", "pancreas", "gallbladder", "ascending colon", "transverse colon", "descending colon")
TURN = 5.0  # degrees, standard deviation of an ellipsoid's turn about each axis
WARP, WARP_SPACING = 4.0, 80.0  # mm, standard deviation and knots of the displacement of everything
PIECES = 2  # of a tube between two knots
LOOPS = 20  # of small bowel
LOOP_PLACES = ((-75.0, 95.0), (-105.0, -45.0), (135.0, 240.0), (9.0, 14.0))  # where each begins, x, y, z; and radius
LOOP_STEPS = (17.0, 10.0, 12.0)  # mm, standard deviation of the way from one of its five knots to the next
NO_GALLBLADDER = 1 / 12  # share of the cases, after cholecystectomy


OTHERS = ((1, 2), (0, 2), (0, 1))  # the axes of (S, H, W) along which z, y and x hardly change


def overlap(
    spans: Sequence[tuple[np.ndarray, np.ndarray]], low: Sequence[float], high: Sequence[float]
) -> tuple[slice, slice, slice] | None:
    """Slices, rows and columns that a box may reach; None if it reaches none.

    Args:
        spans: least and most z of each slice, y of each row, x of each column.
        low, high: corners of the box, (x, y, z).
    """
    parts = []
    for (least, most), bottom, top in zip(spans, reversed(low), reversed(high), strict=True):
        hit = np.flatnonzero((most >= bottom) & (least <= top))
        if not len(hit):
            return None
        parts.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return parts[0], parts[1], parts[2]


@dataclass(frozen=True)
class Tube:
    """Balls along a polyline.

    Attributes:
        points: (P, 3), radii: (P,), mm.
        flat: width along x over depth along y.
    """

    points: Tensor
    radii: Tensor
    flat: float = 1.0

    def box(self, margin: float) -> tuple[Tensor, Tensor]:
        """Corners, each (3,)."""
        reach = (self.radii * max(self.flat, 1.0) + margin)[:, None]
        return (self.points - reach).amin(0), (self.points + reach).amax(0)

    def depth(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance below the surface of places (S, H, W) in mm, negative outside."""
        stretch = torch.tensor([1 / self.flat, 1.0, 1.0])
        middle = self.points.mean(0) * stretch  # squares of large numbers would lose digits
        ends, radii = self.points * stretch - middle, self.radii[:, None]
        places = torch.stack([(x / self.flat).flatten(), y.flatten(), z.flatten()]) - middle[:, None]  # (3, N)
        start, way = ends[:-1], ends.diff(dim=0)  # (P - 1, 3)
        length = way.square().sum(1, keepdim=True)
        along = torch.addmm(-(start * way).sum(1, keepdim=True), way, places)  # (P - 1, N)
        gap = torch.addmm(start.square().sum(1, keepdim=True), start, places, alpha=-2).add_(places.square().sum(0))
        t = (along / length).clamp_(0, 1)
        gap.sub_(along.mul_(2).sub_(t * length).mul_(t)).clamp_min_(0).sqrt_()
        return t.mul_(radii.diff(dim=0)).add_(radii[:-1]).sub_(gap).amax(0).view_as(x)


@dataclass(frozen=True)
class Ellipsoid:
    """A turned ellipsoid: centre (3,), radii (3,) in mm, and the axes as the rows of turn (3, 3)."""

    centre: Tensor
    radii: Tensor
    turn: Tensor

    def box(self, margin: float) -> tuple[Tensor, Tensor]:
        """Corners, each (3,)."""
        reach = ((self.turn * self.radii[:, None]) ** 2).sum(0).sqrt() + margin
        return self.centre - reach, self.centre + reach

    def depth(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance below the surface in mm to first order, negative outside."""
        u, v, w = x - self.centre[0], y - self.centre[1], z - self.centre[2]
        level, slope = torch.zeros_like(x), torch.zeros_like(x)
        for axis, radius in zip(self.turn, self.radii, strict=True):
            part = (axis[0] * u + axis[1] * v + axis[2] * w).div_(radius)
            level.addcmul_(part, part)
            slope.addcmul_(part, part, value=float(radius) ** -2)
        level, slope = level.sqrt_(), slope.sqrt_()
        return level * (1 - level) / slope.clamp_min(1e-6)


@dataclass(frozen=True)
class Leaf:
    """Two upright plates that meet in an edge, thinner towards top and bottom.

    Attributes:
        corners: (3, 2) x and y of the edge and of the plates' ends; middle, half: of the height; thick: half thickness.
        lean: (2,) mm in x and y that it moves over a mm in z.
    """

    corners: Tensor
    middle: float
    half: float
    thick: float
    lean: Tensor

    def box(self, margin: float) -> tuple[Tensor, Tensor]:
        """Corners, each (3,)."""
        reach = self.thick + margin + self.half * self.lean.abs()
        low, high = self.corners.amin(0) - reach, self.corners.amax(0) + reach
        z = torch.tensor([self.middle - self.half - margin, self.middle + self.half + margin])
        return torch.cat([low, z[:1]]), torch.cat([high, z[1:]])

    def depth(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance below the surface in mm, near enough; negative outside."""
        height = z - self.middle
        u, v = x - self.corners[0, 0] - self.lean[0] * height, y - self.corners[0, 1] - self.lean[1] * height
        taper = (1 - (height / self.half) ** 2).clamp_min(0).sqrt()
        gaps = []
        for along in self.corners[1:] - self.corners[0]:
            t = ((u * along[0] + v * along[1]) / along.square().sum()).clamp_min(0)
            t = torch.minimum(t, 0.4 + 0.6 * taper)  # limbs are shorter towards the ends
            gaps.append(((u - t * along[0]) ** 2 + (v - t * along[1]) ** 2).sqrt())
        inside = self.thick * taper.clamp_min(0.5) - torch.minimum(*gaps)
        return torch.minimum(inside, self.half - height.abs())


Solid = Tube | Ellipsoid | Leaf


def middle_of(solid: Solid) -> Tensor:
    """(3,) middle of the box around it."""
    low, high = solid.box(0.0)
    return (low + high) / 2


@dataclass(frozen=True)
class Anatomy:
    """One person, lying in the scanner.

    Attributes:
        angle: radians by which the body is turned in the plane; shift: (2,) mm of the origin, down and right of the
            place where it lies on average; scale: of everything.
        cavity: half width, half depth and y of the middle of the abdominal cavity.
        wall: mm of muscle around it; fat: mm of subcutaneous fat; domes: z of the diaphragm's domes, right and left.
        span: z of the top and the bottom of the scan.
        gas: y above which a hollow organ holds gas, by organ.
        solids: by name; no "gallbladder" after cholecystectomy.
    """

    angle: float
    shift: tuple[float, float]
    scale: float
    cavity: tuple[float, float, float]
    wall: float
    fat: float
    domes: tuple[float, float]
    span: tuple[float, float]
    gas: Mapping[str, float]
    solids: Mapping[str, Solid]

    def levels(self, slices: int) -> Tensor:
        """z of evenly spread slices from top to bottom, (slices,)."""
        top, bottom = self.span
        return top + (bottom - top) * (torch.arange(slices) + 0.5) / slices

    def spacing(self, slices: int) -> float:
        """Millimetres from one of so many slices to the next, in the scanner."""
        return self.scale * (self.span[1] - self.span[0]) / slices


def rotation(degrees: Tensor) -> Tensor:
    """(3, 3) of turns about x, then y, then z, (3,)."""
    (a, b, c), (sa, sb, sc) = degrees.deg2rad().cos().tolist(), degrees.deg2rad().sin().tolist()
    about_x = torch.tensor([[1, 0, 0], [0, a, -sa], [0, sa, a]])
    about_y = torch.tensor([[b, 0, sb], [0, 1, 0], [-sb, 0, b]])
    about_z = torch.tensor([[c, -sc, 0], [sc, c, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@lru_cache
def spline(count: int) -> Tensor:
    """(PIECES (count - 1) + 1, count) weights of knots on a Catmull-Rom spline, in `PIECES` between any two."""
    knots = torch.eye(count)
    padded = torch.cat([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    t = torch.arange(PIECES)[:, None] / PIECES
    before, at, after, later = (padded[k : count - 1 + k, None] for k in range(4))  # (count - 1, 1, count)
    curve = at + 0.5 * t * (
        after - before + t * (2 * before - 5 * at + 4 * after - later + t * (3 * (at - after) + later - before))
    )
    return torch.cat([curve.flatten(0, 1), knots[-1:]])


def smooth_tube(knots: Tensor, flat: float = 1.0) -> Tube:
    """Tube through (x, y, z, radius), (P, 4), along a spline."""
    curve = spline(len(knots)) @ knots
    return Tube(curve[:, :3], curve[:, 3].clamp_min(1.5), flat)


def draw_anatomy(generator: torch.Generator) -> Anatomy:
    """Draw one person; the number of draws does not depend on what they come to."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    habitus, size, wide, deep, plump = normal(5).clamp(-2.2, 2.2).tolist()
    scale = 0.98 * math.exp(0.06 * size)
    kx, ky = 1 + 0.04 * habitus + 0.025 * wide, 1 + 0.07 * habitus + 0.04 * deep
    fat = math.exp(2.75 + 0.38 * habitus + 0.15 * plump)
    stretch = torch.tensor([kx, ky, 1.0])
    half_width, half_depth = 130 * kx, 42 + 42 * ky
    angle, shift = normal(1).clamp(-2.2, 2.2), 7 * normal(2).clamp(-2.2, 2.2)

    shifts, spreads = (torch.tensor(column) for column in zip(*VARIATION.values(), strict=True))  # (n, 3), (n,)
    moves = dict(zip(VARIATION, shifts * normal(*shifts.shape), strict=True))
    sizes = dict(zip(VARIATION, (spreads * normal(len(spreads)).clamp(-2, 2)).exp().tolist(), strict=True))
    turns = dict(zip(VARIATION, TURN * normal(*shifts.shape), strict=True))
    central = torch.tensor(CENTRAL_SHIFT) * normal(3)

    solids: dict[str, Solid] = {}
    for name, table in TUBES.items():
        kin, knots = KIN.get(name, name), torch.tensor(table, dtype=torch.float32)
        knots[:, :3] = knots[:, :3] * stretch + moves[kin] + (central if name in CENTRAL else 0)
        knots[:, 3] *= sizes[kin]
        jitter = KNOTS * normal(len(knots), 3)
        if name in SOFT:
            knots[:, :3] += jitter
        solids[name] = smooth_tube(knots, FLAT.get(name, 1.0))
    for name, ellipsoid in ELLIPSOIDS.items():
        centre, radii, degrees = torch.tensor(ellipsoid).unbind()
        kin = KIN.get(name, name)
        turn, middle = rotation(degrees + turns[kin]), centre * stretch + moves[kin]
        if name.endswith("sinus"):  # stays in place in its kidney, also when that turns
            hilum = rotation(degrees).T @ (centre - torch.tensor(ELLIPSOIDS[kin][0]))
            middle = middle_of(solids[kin]) + sizes[kin] * turn @ hilum
        wider = stretch.sqrt() if kin == "liver" else 1.0
        solids[name] = Ellipsoid(middle, radii * wider * sizes[kin], turn.T)
    for side in SIDES:
        table_corners, height, half, thick = ADRENALS[side]
        follows = 0.5 * moves[f"{side} kidney"] + torch.tensor([1.5, 1.5, 3.0]) * normal(3)
        corners = torch.tensor(table_corners, dtype=torch.float32)
        corners = corners * stretch[:2] + follows[:2] + 1.5 * normal(3, 2)
        grow = 0.12 * normal(2).clamp(-2, 2)
        leaf = Leaf(
            corners,
            height + float(follows[2]),
            half * float(grow[0].exp()),
            thick * float(grow[1].exp()),
            0.12 * normal(2),
        )
        solids[f"{side} adrenal gland"] = leaf
    low, high = torch.tensor(LOOP_PLACES).unbind(1)
    places = low + (high - low) * torch.rand(LOOPS, 4, generator=generator)
    ways = (normal(LOOPS, 5, 3) * torch.tensor(LOOP_STEPS)).cumsum(1)
    for k, (place, way) in enumerate(zip(places, ways, strict=True)):
        knots = torch.cat([place[:3] * stretch + way, place[3].expand(5, 1)], dim=1)
        solids[f"loop {k}"] = smooth_tube(knots)
    absent = uniform(0, 1) < NO_GALLBLADDER
    if absent:
        del solids["gallbladder"]
    gas = {
        name: uniform(low, high)
        for name, low, high in (
            ("stomach", -135, -70),
            ("duodenum", -110, -60),
            ("colon", -115, -40),
            ("esophagus", -75, -38),
        )
    }
    domes = (uniform(-3, 3), uniform(6, 24))
    lower = max(float(solids[f"{side} kidney"].box(0.0)[1][2]) for side in SIDES)
    return Anatomy(
        angle=float(angle.clamp(-2.2, 2.2)) * 4 * math.pi / 180,
        shift=(float(shift[0]), float(shift[1])),
        scale=scale,
        cavity=(half_width, half_depth, 38 - half_depth),
        wall=uniform(9, 15),
        fat=fat,
        domes=domes,
        span=(uniform(2, 8), lower + uniform(-8, 6)),
        gas=gas,
        solids=solids,
    )
