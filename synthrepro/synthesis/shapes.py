"""Random closed Bézier shapes, and the label maps they make: the geometry of SynthFM's shape-aware module.

Sengupta et al., "SynthFM" (ISBI 2025, arXiv 2504.08177), build anatomy-like structures of closed Bézier curves with
random control points. Neither code nor ranges were released; the construction and the defaults here are ours.

**Why the curves never cross themselves.** A curve has control points P_i round a centre, which is the origin, at
increasing angles. Its pieces are quadratic: with the midpoints M_i = (P_i + P_{i+1}) / 2, piece i runs from M_{i-1} to
M_i with control point P_i. Neighbours share their end and the tangent P_{i+1} - P_i there, so the curve is C1 (it is
the uniform quadratic B-spline). For points B(t) and tangents B'(t) of a piece, with a x b = a_x b_y - a_y b_x,

    B x B' = 2 [(1 - t)^2 M_{i-1} x P_i + t (1 - t) M_{i-1} x M_i + t^2 P_i x M_i].

Angles are jittered regular angles, chosen such that P_{i-1} to P_{i+1} is at most half a turn; the three products are
then positive, the angle round the centre increases all along the curve and makes one turn: the curve is simple, and
every ray from the centre meets it once. The same curve scaled down about the centre therefore lies strictly inside,
which makes the holes.

**More than stars.** A map of the plane that is one to one keeps curves simple and holes inside. The affine map of the
control points elongates, and the bend (x, y) -> (x, y + k x^2), with x along the long axis, makes kidneys and bananas.
It turns quadratic pieces into quartic ones. Both maps keep areas, so that a shape's area is known in closed form.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.draws import Draw, spawn, uniform

Range = tuple[float, float]
JITTER = 0.5  # of the spacing of regular angles; (2 + JITTER) spacings are half a turn where there are 5 points
FEWEST_CONTROLS = 5
MOST_SHAPES = 24  # each is a bit of a float32's integers
POINTS = 1024  # of the polygon that stands for a curve; by the even-odd rule, should an extreme one need more


@dataclass(frozen=True)
class BezierShapes:
    """Ranges from which shapes are drawn; a pair is the bounds, both included, of a uniform distribution.

    Lengths are fractions of the image's shorter side. Nothing keeps a shape in the image or uncovered: a label may be
    missing from the map, and one that the image's border cuts is common.
    """

    number: tuple[int, int] = (3, 9)
    """Shapes of an image; 24 at most."""
    controls: tuple[int, int] = (5, 12)
    """Control points of a shape; 5 at least."""
    radius: Range = (0.04, 0.3)
    """Of the disc whose area the shape has, its hole included; log-uniform."""
    irregularity: Range = (0.0, 0.6)
    """The logarithms of a shape's control points' distances from the centre are uniform within plus or minus this."""
    elongation: Range = (1.0, 3.0)
    """Stretch along one axis relative to the other; log-uniform."""
    bend: Range = (-0.4, 0.4)
    """k of the bend, in units of 1 / radius."""
    centre: Range = (0.1, 0.9)
    """Fraction of the columns, and of the rows."""
    hole_chance: float = 0.2
    hole: Range = (0.3, 0.8)
    """Length of a hole relative to its shape's."""

    def __post_init__(self) -> None:
        if not 1 <= self.number[0] <= self.number[1] <= MOST_SHAPES:
            raise UserError(f"number must be a range within 1 to {MOST_SHAPES} shapes, but is {self.number}.")
        if not FEWEST_CONTROLS <= self.controls[0] <= self.controls[1]:
            raise UserError(
                f"controls must be a range of {FEWEST_CONTROLS} or more, but is {self.controls}: curves with fewer "
                "control points may cross themselves."
            )
        if not (self.radius[0] > 0 and self.elongation[0] > 0):
            raise UserError(f"radius {self.radius} and elongation {self.elongation} must be positive: change them.")
        if not 0 < self.hole[0] <= self.hole[1] < 1:
            raise UserError(f"hole must be a range between 0 and 1, but is {self.hole}: a hole lies inside its shape.")

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw the shapes of `count` images.

        Args:
            count: Images.
            generator: On the CPU; one number an image is taken from it.

        Returns:
            On the CPU, S being the most shapes and N the most control points: ``number`` (B,), int64, the shapes
            that are used; ``pieces`` (B, S), int64, the control points that are used; ``controls`` (B, S, N, 2)
            (x, y), elongated along x, of a curve round the origin that encloses an area of pi; ``bend``, ``radius``
            and ``rotation`` (radians) (B, S); ``centre`` (B, S, 2) (x, y), fractions of columns and rows; ``hole``
            (B, S), 0 where there is none.

        Raises:
            UserError: The generator is not on the CPU.
        """
        samples = spawn(count, generator)
        most, points = self.number[1], self.controls[1]

        def draws(bounds: Range, *shape: int) -> Tensor:
            return uniform(samples, shape, bounds)

        def integers(bounds: tuple[int, int], *shape: int) -> Tensor:
            return draws((bounds[0], bounds[1] + 1), *shape).floor().clamp_max(bounds[1]).long()

        def log_uniform(bounds: Range, *shape: int) -> Tensor:
            return draws((math.log(bounds[0]), math.log(bounds[1])), *shape).exp()

        number, pieces = integers(self.number), integers(self.controls, most)
        order = torch.arange(points) + JITTER * draws((-0.5, 0.5), most, points)
        angles = 2 * math.pi * (order / pieces[..., None] + draws((0.0, 1.0), most, 1))
        distances = (draws(self.irregularity, most, 1) * draws((-1.0, 1.0), most, points)).exp()
        stretch = log_uniform(self.elongation, most, 1).sqrt()
        controls = torch.stack([distances * angles.cos() * stretch, distances * angles.sin() / stretch], -1)
        controls *= (math.pi / enclosed_area(controls, pieces)).sqrt()[..., None, None]
        return Draw(
            number=number,
            pieces=pieces,
            controls=controls,
            bend=draws(self.bend, most),
            radius=log_uniform(self.radius, most),
            rotation=draws((0.0, 2 * math.pi), most),
            centre=draws(self.centre, most, 2),
            hole=torch.where(draws((0.0, 1.0), most) < self.hole_chance, draws(self.hole, most), 0.0),
        )

    @torch.no_grad()
    def apply(self, draw: Draw, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
        """The label map of a draw: 0 is background, s the visible part of the s-th shape.

        Later shapes lie over earlier ones, and a hole shows what lies behind. A pixel belongs to a shape if its middle
        does, by the even-odd rule; the middle of pixel (row, column) is at (column + 0.5, row + 0.5).

        Args:
            draw: From :meth:`draw`.
            size: Rows and columns.
            device: Where the map is made.

        Returns:
            (B, H, W), int64, values 0 to ``number[1]``.
        """
        draw = draw.to(device)
        there = torch.arange(draw.radius.shape[1], device=device) < draw.number[:, None]
        curves = torch.stack([outline(draw, size), outline(draw, size, hole=True)], 2)  # (B, S, 2, P, 2)
        return paint(curves, torch.stack([there, there & (draw.hole > 0)], -1), size)


def enclosed_area(controls: Tensor, pieces: Tensor) -> Tensor:
    """Signed area within the curves of control points (B, S, N, 2), the first (B, S) of them used; (B, S).

    It is the integral of B x B' / 2: 5/12 of the sum of P_i x P_{i+1} and 1/24 of that of P_i x P_{i+2}.
    """
    index = torch.arange(controls.shape[2], device=controls.device).expand(controls.shape[:3])
    first, second, third = (_pick(controls, (index + k) % pieces[..., None]) for k in range(3))
    terms = 5 / 12 * _cross(first, second) + 1 / 24 * _cross(first, third)
    return torch.where(index < pieces[..., None], terms, 0).sum(-1)


def outline(draw: Draw, size: tuple[int, int], *, hole: bool = False, points: int = POINTS) -> Tensor:
    """Points along the curves of a draw's shapes, or of their holes, equally spaced in the curve's parameter.

    Shapes beyond ``draw.number`` have curves too; holes that are not there are points at their shape's centre.

    Args:
        draw: From :meth:`BezierShapes.draw`, on any device.
        size: Rows and columns of the image.

    Returns:
        (B, S, points, 2): (x, y) in pixels from the image's upper left corner, so that the middle of the first pixel
        is at (0.5, 0.5).
    """
    pieces = draw.pieces[..., None]
    place = torch.arange(points, device=pieces.device) * (pieces / points)  # (B, S, P), from 0 to the pieces
    piece = place.long()
    t = (place - piece)[..., None]
    before, control, after = (_pick(draw.controls, (piece + k) % pieces) for k in range(3))
    curve = 0.5 * (1 - t) ** 2 * before + (0.5 + t * (1 - t)) * control + 0.5 * t**2 * after
    if hole:
        curve = curve * draw.hole[..., None, None]
    x, y = curve.unbind(-1)
    y = y + draw.bend[..., None] * x**2
    rows, columns = size
    scale = draw.radius * min(size)
    cos, sin = (scale * draw.rotation.cos())[..., None], (scale * draw.rotation.sin())[..., None]
    x, y = cos * x - sin * y, sin * x + cos * y
    return torch.stack([x + draw.centre[..., :1] * columns, y + draw.centre[..., 1:] * rows], -1)


def paint(curves: Tensor, there: Tensor, size: tuple[int, int]) -> Tensor:
    """Paint shapes bounded by polygons over each other, by the even-odd rule.

    Args:
        curves: (B, S, C, P, 2), the corners (x, y), in pixels, of the C polygons that bound each of S shapes.
        there: (B, S, C), bool, whether to take a polygon into account.
        size: Rows and columns.

    Returns:
        (B, H, W), int64: number, from 1, of the last shape in which the pixel's middle lies, or 0.
    """
    rows, columns = size
    batch, shapes = curves.shape[:2]
    # An edge crosses the middles of the rows from `low` to before `high`; rows of the next edge start where it ends.
    row = (curves[..., 1] - 0.5).ceil().clamp(0, rows).long()  # (B, S, C, P)
    low, high = torch.stack([row, row.roll(-1, -1)]).aminmax(dim=0)
    crossed = ((high - low) * there[..., None]).flatten()
    edge = torch.arange(crossed.numel(), device=crossed.device).repeat_interleave(crossed)  # one entry a crossing
    row = low.flatten()[edge] + torch.arange(len(edge), device=edge.device) - (crossed.cumsum(0) - crossed)[edge]
    start, end = curves.flatten(0, 3)[edge], curves.roll(-1, 3).flatten(0, 3)[edge]
    share = (row + 0.5 - start[:, 1]) / (end[:, 1] - start[:, 1])
    x = start[:, 0] + share * (end[:, 0] - start[:, 0])
    column = (x - 0.5).ceil().clamp(0, columns).long()  # the first whose middle is not left of the crossing

    # Closed polygons cross a row an even number of times: sorted by shape, row and column, every other one leads in.
    pixels = rows * (columns + 1)
    shape = edge // (curves.shape[2] * curves.shape[3])  # b * S + s
    key = (shape * pixels + row * (columns + 1) + column).sort().values
    shape, pixel = key // pixels, key % pixels
    bit = torch.bitwise_left_shift(torch.ones_like(shape), shape % shapes)
    bit[1::2] *= -1
    changes = torch.zeros(batch * pixels, dtype=torch.int32, device=curves.device)
    changes.index_add_(0, shape // shapes * pixels + pixel, bit.int())
    inside = changes.view(batch, rows, columns + 1).cumsum(2, dtype=torch.int32)[..., :-1]  # a bit a shape
    return torch.frexp(inside.float()).exponent.long()  # the highest bit's number, from 1


def _pick(controls: Tensor, index: Tensor) -> Tensor:
    """Control points (B, S, N, 2) by index (B, S, P): (B, S, P, 2)."""
    return controls.gather(2, index[..., None].expand(*index.shape, 2))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
