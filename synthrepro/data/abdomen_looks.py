"""How the anatomies of the task `abdomen` look on computed tomography: Hounsfield units, texture, noise, window.

The Hounsfield units of contrast-enhanced tissue are set within the usual textbook ranges (Prokop and Galanski, Spiral
and Multislice Computed Tomography of the Body, Thieme 2003); no scan was measured. Bare numbers in what
paints the frame are mm in the patient's frame, set by eye.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from synthrepro.data.abdomen_anatomy import (
    DEPTH,
    ELLIPSOIDS,
    FIELD_OF_VIEW,
    LOOPS,
    OTHERS,
    SIDES,
    WARP,
    WARP_SPACING,
    Anatomy,
    Solid,
    middle_of,
    overlap,
)
from synthrepro.data.brain_mni import stream
from synthrepro.data.individuals import smooth_field

CLASSES = (
    "background",
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)
AIR, GAS, LUNG = -1000.0, -850.0, -820.0  # HU
PHASES = {"none": 0.10, "arterial": 0.20, "portal venous": 0.70}  # of the contrast agent, share of the cases

# Mean and standard deviation over the cases in HU, in each of `PHASES`.
HU: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "liver": ((57, 7), (75, 10), (106, 13)),
    "spleen": ((48, 5), (115, 16), (114, 13)),
    "pancreas": ((40, 7), (98, 14), (92, 13)),
    "cortex": ((33, 4), (165, 20), (172, 20)),
    "medulla": ((31, 4), (78, 14), (150, 20)),
    "aorta": ((41, 4), (290, 40), (152, 17)),
    "inferior vena cava": ((40, 4), (82, 16), (138, 17)),
    "veins": ((41, 4), (110, 22), (160, 16)),  # portal and hepatic
    "adrenal gland": ((26, 7), (72, 10), (68, 10)),
    "gallbladder": ((8, 6), (9, 6), (11, 6)),
    "esophagus": ((36, 6), (55, 9), (62, 9)),
    "stomach wall": ((37, 6), (74, 12), (82, 12)),
    "stomach": ((18, 14), (18, 14), (18, 14)),  # what it holds, gas apart
    "duodenum wall": ((37, 6), (78, 12), (84, 12)),
    "duodenum": ((22, 12), (24, 12), (26, 12)),
    "bowel wall": ((37, 6), (80, 14), (84, 12)),
    "bowel": ((24, 14), (26, 14), (28, 14)),
    "stool": ((30, 20), (30, 20), (30, 20)),
    "muscle": ((50, 6), (56, 6), (61, 6)),
    "fat": ((-102, 6), (-102, 6), (-101, 6)),
    "bone": ((170, 30), (180, 30), (190, 30)),
    "heart": ((42, 4), (230, 40), (140, 16)),
}
TOGETHER = 0.6  # correlation of two tissues' draws in a case

# Standard deviation in HU of each grain of texture; mm between the knots of the grains.
GRAINS = (7.0, 16.0, 45.0)
TEXTURE = {
    "liver": (4, 3, 3),
    "spleen": (4, 3, 2),
    "pancreas": (12, 8, 4),
    "cortex": (7, 4, 0),
    "medulla": (7, 4, 0),
    "aorta": (2, 2, 0),
    "inferior vena cava": (3, 8, 6),
    "veins": (2, 2, 0),
    "adrenal gland": (5, 2, 0),
    "gallbladder": (1, 2, 2),
    "esophagus": (7, 3, 0),
    "stomach wall": (8, 4, 0),
    "stomach": (8, 12, 6),
    "duodenum wall": (8, 4, 0),
    "duodenum": (10, 10, 0),
    "bowel wall": (8, 4, 0),
    "bowel": (10, 12, 0),
    "stool": (45, 50, 0),
    "muscle": (7, 8, 3),
    "fat": (6, 7, 4),
    "bone": (35, 20, 10),
    "heart": (5, 15, 10),
}
WALL, CORTEX = 3.0, 8.0  # mm, of hollow organs and of the kidney
NOISE, NOISE_WIDTH = (7.0, 16.0), 0.9  # HU before pixels average it; mm of the Gaussian that filters it


Part = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Looks:
    """A case's contrast phase and the mean HU of its tissues, by the names in `HU`."""

    phase: str
    hu: Mapping[str, float]


def draw_looks(generator: torch.Generator) -> Looks:
    """Draw a phase, then every tissue of that phase; tissues of a case are correlated."""
    shares = torch.tensor(list(PHASES.values()))
    phase = int(torch.multinomial(shares, 1, generator=generator))
    shared, own = torch.randn((), generator=generator), torch.randn(len(HU), generator=generator)
    scores = TOGETHER**0.5 * shared + (1 - TOGETHER) ** 0.5 * own
    means = [table[phase] for table in HU.values()]
    drawn = [mean + sd * z for (mean, sd), z in zip(means, scores.tolist(), strict=True)]
    return Looks(list(PHASES)[phase], dict(zip(HU, drawn, strict=True)))


def outline(x: Tensor, y: Tensor, half_width: float, half_depth: float) -> Tensor:
    """Depth below |x / a|^2.5 + |y / b|^2.5 = 1 in mm to first order, negative outside."""
    u, v = (x / half_width).abs() + 1e-4, (y / half_depth).abs() + 1e-4
    pu, pv = u * u.sqrt(), v * v.sqrt()
    total = u * pu + v * pv
    level = (total.log() / 2.5).exp()
    slope = level / total * ((pu / half_width).square() + (pv / half_depth).square()).sqrt()
    return (1 - level) / slope


def smooth_least(a: Tensor, b: Tensor, width: float) -> Tensor:
    """The lesser of two, rounded off over a width."""
    gap = (0.5 + 0.5 * (a - b) / width).clamp(0, 1)
    return a + gap * (b - a) - width * gap * (1 - gap)


class Canvas:
    """A stack of slices that solids are painted on, later ones over earlier ones.

    Attributes:
        x, y, z: (S, H, W) place of each voxel in the patient's frame, mm.
        hu: (S, H, W) what has been painted; a voxel that a surface crosses holds a mixture.
        labels: (S, H, W) class at the voxel's middle.
        grains: fields of unit variance, (S, H, W) each, one for each of `GRAINS`.
        table: (H, W) mm below the middle of the table, roughly.
        pixel: width of a pixel in the patient's frame, mm.
    """

    def __init__(self, anatomy: Anatomy, looks: Looks, levels: Tensor, size: tuple[int, int], key: tuple[object, ...]):
        height, width = size
        rows = (torch.arange(height) + 0.5) * (FIELD_OF_VIEW / height)
        columns = (torch.arange(width) + 0.5) * (FIELD_OF_VIEW / width)
        down = rows[:, None] - FIELD_OF_VIEW * 0.6 - anatomy.shift[0]
        right = columns - FIELD_OF_VIEW * 0.5 - anatomy.shift[1]
        cos, sin = math.cos(anatomy.angle), math.sin(anatomy.angle)
        self.table = down - 0.0006 * right**2
        place = levels + 20.0, rows, columns
        extent = (int(DEPTH), int(FIELD_OF_VIEW), int(FIELD_OF_VIEW))
        warp = WARP * smooth_field(extent, WARP_SPACING, 3, place, stream(*key, "warp"))
        self.x = (cos * right + sin * down) / anatomy.scale + warp[:, 0]
        self.y = (cos * down - sin * right) / anatomy.scale + warp[:, 1]
        self.z = levels[:, None, None] + warp[:, 2]
        texture = stream(*key, "texture")
        self.grains = torch.cat([smooth_field(extent, spacing, 1, place, texture) for spacing in GRAINS], 1).unbind(1)
        self.pixel = FIELD_OF_VIEW * (height * width) ** -0.5 / anatomy.scale
        self.hu = torch.full_like(self.x, AIR)
        self.labels = torch.zeros(self.x.shape, dtype=torch.uint8)
        self.looks = looks
        self.everywhere: Part = (slice(None), slice(None), slice(None))
        self._spans = [
            (places.amin(axes).numpy(), places.amax(axes).numpy())
            for places, axes in zip((self.z, self.y, self.x), OTHERS, strict=True)
        ]

    def around(self, solid: Solid, margin: float = 0.0) -> Part | None:
        """The part of the canvas that holds a solid and a margin around it; None if it lies outside."""
        low, high = solid.box(margin + self.pixel)
        return overlap(self._spans, low.tolist(), high.tolist())

    def at(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """x, y, z of a part."""
        return self.x[part], self.y[part], self.z[part]

    def textured(self, tissue: str, part: Part) -> Tensor:
        """A tissue's HU there."""
        total = torch.full((), self.looks.hu[tissue])
        for sd, grain in zip(TEXTURE[tissue], self.grains, strict=True):
            if sd:
                total = total + sd * grain[part]
        return total

    def paint(self, depth: Tensor, hu: Tensor | float, label: int | None, part: Part) -> None:
        """Put a material where `depth` below its surface is positive; no label keeps the one that is there."""
        share = (depth / self.pixel + 0.5).clamp(0, 1)
        here = self.hu[part]
        here += share.mul_(hu - here)
        if label is not None:
            self.labels[part].masked_fill_(depth > 0, label)


def paint_frame(canvas: Canvas, anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """Table, skin, fat, wall, ribs, lungs and heart.

    Returns:
        depth below the wall of the cavity and below the diaphragm, (S, H, W) each.
    """
    everywhere, (x, y, z) = canvas.everywhere, canvas.at(canvas.everywhere)
    half_width, half_depth, middle = anatomy.cavity
    flare = 1 + 0.0004 * (z - 110)  # narrower towards the chest
    x = x / flare
    cavity = outline(x, y - middle, half_width, half_depth)
    front = half_depth - middle + anatomy.wall - 3
    wall = outline(x, y - (62 - front) / 2, half_width + anatomy.wall, (62 + front) / 2)
    ahead, behind = front + anatomy.fat, 66 + 0.5 * anatomy.fat
    skin = outline(x, y - (behind - ahead) / 2, half_width + anatomy.wall + 0.8 * anatomy.fat, (ahead + behind) / 2)
    canvas.paint(3 - (canvas.table - 0.98 * behind * anatomy.scale - 14).abs().expand_as(x), -150.0, 0, everywhere)
    canvas.paint(skin, 10.0, 0, everywhere)
    canvas.paint(skin - 2, canvas.textured("fat", everywhere), 0, everywhere)
    muscle = canvas.textured("muscle", everywhere)
    canvas.paint(wall - 4 * (canvas.grains[2] - 1).clamp_min(0), muscle, 0, everywhere)
    # A rib leaves the column every 27 mm and falls towards the front.
    angle = torch.atan2(x.abs(), y - middle)  # 0 behind
    origin = z - 42 * angle + anatomy.domes[0]
    number = ((origin + 13) / 27).floor()
    between = (origin - 27 * number) * 0.75
    reach = (0.75 + 0.55 * (3.2 - number)).clamp(0, 2.2)  # the lower, the shorter
    rib = 4.8 - (between**2 + (0.8 * (cavity + 5.5)) ** 2).sqrt()
    rib = torch.minimum(rib, 40 * (reach - angle).clamp(-1, 1))
    canvas.paint(rib, 330.0, 0, everywhere)
    canvas.paint(rib - 2, canvas.textured("bone", everywhere), 0, everywhere)
    canvas.paint(cavity, canvas.textured("fat", everywhere), 0, everywhere)
    # The diaphragm's height over the plane: two domes, and a middle part with the heart above.
    v = (y - middle) / half_depth
    side = half_width / 130
    rho = [(((x - c * side) / (72 * side)) ** 2 + v**2).sqrt() for c in (-60.0, 60.0)]
    heights = [dome + 72 * r**2.5 for dome, r in zip(anatomy.domes, rho, strict=True)]
    centre = 70 * (((x - 8) / 42) ** 2 + ((y + 28) / torch.where(y < -28, 75.0, 45.0)) ** 2) - 40
    height = smooth_least(smooth_least(heights[0], heights[1], 12.0), centre, 12.0)
    height = (height - 25 * (-v).clamp_min(0)).clamp_max(112)
    diaphragm = (z - height) / (1 + (2.5 * torch.minimum(*rho) ** 1.5) ** 2).sqrt()
    lung = torch.minimum(cavity, -diaphragm)
    vessels = 260 * (canvas.grains[0] - 1.3).clamp(0, 2)
    canvas.paint(lung, LUNG + 25 * canvas.grains[2] + vessels, 0, everywhere)
    heart = anatomy.solids["heart"]
    if part := canvas.around(heart):
        canvas.paint(heart.depth(*canvas.at(part)), canvas.textured("heart", part), 0, part)
    # Small vessels in the fat of the mesentery.
    mesentery = torch.minimum(cavity, diaphragm) - 8
    canvas.paint(mesentery.clamp_max(3 * (canvas.grains[0] - 1.9)), 0.5 * muscle, 0, everywhere)
    return cavity, diaphragm


def paint_hollow(
    canvas: Canvas, depth: Tensor, wall: str, content: Tensor, label: int, part: Part, gas: float | None
) -> None:
    """A wall, what it holds, and gas in front of the level `gas` (y, mm)."""
    canvas.paint(depth, canvas.textured(wall, part), label, part)
    canvas.paint(depth - WALL, content, None, part)
    if gas is not None:
        canvas.paint(torch.minimum(depth - WALL, gas - canvas.y[part]), GAS, None, part)


def paint_bowel(canvas: Canvas, anatomy: Anatomy, cavity: Tensor, diaphragm: Tensor) -> None:
    """Loops of small bowel and the colon; none has a class."""
    names = [f"loop {k}" for k in range(LOOPS)]
    names += ["descending colon", "ascending colon", "splenic flexure", "transverse colon"]
    for name in names:
        solid = anatomy.solids[name]
        if (part := canvas.around(solid)) is None:
            continue
        depth = torch.minimum(solid.depth(*canvas.at(part)), torch.minimum(cavity[part], diaphragm[part]) - 3)
        large = not name.startswith("loop")
        content = canvas.textured("stool" if large else "bowel", part)
        paint_hollow(canvas, depth, "bowel wall", content, 0, part, anatomy.gas["colon"] if large else None)


def paint_upper(canvas: Canvas, anatomy: Anatomy, cavity: Tensor, diaphragm: Tensor) -> None:
    """Stomach, spleen and liver with its vessels, which fill the space below the diaphragm."""
    solids = anatomy.solids

    def room(part: Part) -> Tensor:
        return torch.minimum(cavity[part], diaphragm[part]) - 2.5

    if part := canvas.around(solids["stomach"]):
        depth = smooth_least(solids["stomach"].depth(*canvas.at(part)), room(part), 4.0)
        depth = depth + 1.5 * canvas.grains[1][part]
        content = canvas.textured("stomach", part)
        paint_hollow(canvas, depth, "stomach wall", content, CLASSES.index("stomach"), part, anatomy.gas["stomach"])
    if part := canvas.around(solids["spleen"]):
        x, y, z = canvas.at(part)
        cx, cy, _ = middle_of(solids["spleen"]).tolist()
        depth = smooth_least(solids["spleen"].depth(x, y, z), room(part), 4.0)
        hollow = (((x - cx + 46) / 34) ** 2 + ((y - cy + 12) / 44) ** 2).sqrt()  # faces the stomach
        depth = smooth_least(depth, (hollow - 1) * 34, 8.0) + 1.0 * canvas.grains[1][part]
        canvas.paint(depth + 2.5, canvas.textured("fat", part), 0, part)
        value = canvas.textured("spleen", part)
        if canvas.looks.phase == "arterial":
            value = value + 18 * (2.2 * canvas.grains[1][part]).sin()  # red and white pulp fill at different rates
        canvas.paint(depth, value, CLASSES.index("spleen"), part)
    right, left, caudate = (solids[name] for name in ("right lobe", "left lobe", "caudate"))
    if parts := [part for part in map(canvas.around, (right, left, caudate)) if part is not None]:
        joined = [slice(min(p[k].start for p in parts), max(p[k].stop for p in parts)) for k in range(3)]
        part = joined[0], joined[1], joined[2]
        x, y, z = canvas.at(part)
        depth = -smooth_least(-right.depth(x, y, z), -left.depth(x, y, z), 10.0)
        # The visceral surface: what lies behind, below and to the left is cut away.
        dx, dy, dz = (middle_of(right) - torch.tensor(ELLIPSOIDS["right lobe"][0])).tolist()
        below = -(0.60 * (x - dx + 22) + 0.40 * (y - dy + 42) + 0.69 * (z - dz - 122)) - 2.5 * canvas.grains[2][part]
        depth = smooth_least(depth, below, 14.0)
        behind = -(0.35 * (x - dx + 16) + 0.93 * (y - dy + 54))  # the left lobe lies in front
        depth = torch.maximum(smooth_least(depth, torch.maximum(behind, -(x - dx + 30)), 10.0), caudate.depth(x, y, z))
        depth = smooth_least(depth, room(part), 4.0) + 1.0 * canvas.grains[1][part]
        liver = CLASSES.index("liver")
        canvas.paint(depth + 1.5, canvas.textured("fat", part), 0, part)
        canvas.paint(depth, canvas.textured("liver", part), liver, part)
        inside = torch.full_like(canvas.x, -1e3)
        inside[part] = depth
        for name in (name for name in solids if name.startswith(("hepatic vein", "portal branch"))):
            if here := canvas.around(solids[name]):
                vein = torch.minimum(solids[name].depth(*canvas.at(here)), inside[here] - 3)
                late = 0.2 if canvas.looks.phase == "arterial" and name.startswith("hepatic") else 0.7
                value = late * canvas.textured("veins", here) + (1 - late) * canvas.looks.hu["liver"]
                canvas.paint(vein, value, None, here)


def paint_back(canvas: Canvas, anatomy: Anatomy, cavity: Tensor) -> None:
    """Column, psoas, kidneys and adrenal glands in their fat."""
    solids = anatomy.solids
    for side in SIDES:
        kidney = solids[f"{side} kidney"]
        if part := canvas.around(kidney, 40.0):
            halo = 2 + 0.35 * min(anatomy.fat, 26.0)
            x, y, z = canvas.at(part)
            y = y.clamp_max(float(middle_of(kidney)[1]))  # and nothing else behind
            depth = torch.minimum(kidney.depth(x, y, z) + halo, cavity[part])
            canvas.paint(depth, canvas.textured("fat", part), 0, part)
    for name in ("psoas right", "psoas left", "crus right", "crus left"):
        if part := canvas.around(solids[name]):
            canvas.paint(solids[name].depth(*canvas.at(part)) + 1, canvas.textured("muscle", part), 0, part)
    # Quadratus and the muscles behind, then vertebrae with discs, arch and processes.
    middle = canvas.x.shape[2] // 2
    reach = max(1, round(110 / FIELD_OF_VIEW * canvas.x.shape[2]))
    part = (slice(None), slice(None), slice(max(0, middle - reach), middle + reach))
    x, y, z = canvas.at(part)
    ax = x.abs()

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> Tensor:
        level = (((ax - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).sqrt()
        return (1 - level) * min(rx, ry)

    square = torch.minimum(ellipse(58.0, 30.0, 20.0, 8.0), 0.5 * (z - 135))
    canvas.paint(square, canvas.textured("muscle", part), 0, part)
    canvas.paint(ellipse(6.0, 42.0, 14.0, 20.0), canvas.textured("muscle", part), 0, part)
    grow = 1 + 0.0006 * (z - 100)
    body = (1 - (((ax / grow) / 21) ** 2 + (y / grow / 16.5) ** 2).sqrt()) * 16
    phase = (z / 36 + anatomy.domes[0]).remainder(1.0) * 36  # a vertebra and a disc
    canvas.paint(body, 400.0, 0, part)
    canvas.paint(body - 2.2, canvas.textured("bone", part), 0, part)
    canvas.paint(torch.minimum(body, 4.5 - (phase - 18).abs()), 85.0, 0, part)
    spine = ellipse(0.0, 46.0, 4.0, 16.0) + 0.4 * (phase - 10).clamp(-8, 0)
    arch = torch.maximum(ellipse(0.0, 25.0, 16.0, 13.0), spine)
    arch = torch.maximum(arch, ellipse(26.0, 24.0, 17.0, 5.0) - 0.5 * ((phase - 26).abs() - 8).clamp_min(0))
    canvas.paint(arch, 380.0, 0, part)
    canvas.paint(arch - 2.5, canvas.textured("bone", part), 0, part)
    canvas.paint(ellipse(0.0, 25.0, 10.0, 8.0), 30.0, 0, part)
    for side in SIDES:
        kidney = solids[f"{side} kidney"]
        if part := canvas.around(kidney):
            at = canvas.at(part)
            sinus = solids[f"{side} sinus"].depth(*at)
            depth = smooth_least(kidney.depth(*at), -sinus, 3.0) + 0.6 * canvas.grains[1][part]
            inner = ((torch.minimum(depth, kidney.depth(*at)) - CORTEX + 2 * canvas.grains[1][part]) / 2).sigmoid()
            cortex, medulla = canvas.textured("cortex", part), canvas.textured("medulla", part)
            canvas.paint(sinus, -60 + 25 * canvas.grains[0][part], 0, part)
            canvas.paint(depth, cortex + inner * (medulla - cortex), CLASSES.index(f"{side} kidney"), part)


def paint_middle(canvas: Canvas, anatomy: Anatomy, cavity: Tensor) -> None:
    """Pancreas, duodenum, gallbladder, vessels, adrenal glands and esophagus."""
    solids = anatomy.solids

    def beside(depth: Tensor, part: Part) -> Tensor:
        """What the kidneys leave of it."""
        for side in SIDES:
            depth = torch.minimum(depth, -1.5 - solids[f"{side} kidney"].depth(*canvas.at(part)))
        return depth

    def simple(name: str, tissue: str, label: str | None = None, halo: float = 0.0, rough: float = 0.0) -> None:
        if part := canvas.around(solids[name], halo + 3 * rough):
            depth = solids[name].depth(*canvas.at(part))
            if name in ("pancreas", "splenic vein"):
                depth = beside(depth, part)
            if halo:
                canvas.paint(depth + halo, canvas.textured("fat", part), 0, part)
            depth = depth + rough * canvas.grains[0][part] if rough else depth
            canvas.paint(depth, canvas.textured(tissue, part), CLASSES.index(label or "background"), part)

    for side in SIDES:
        simple(f"renal vein {side}", "inferior vena cava")
    simple("pancreas", "pancreas", "pancreas", halo=0.12 * anatomy.fat, rough=1.2)
    simple("splenic vein", "veins")
    if part := canvas.around(solids["duodenum"]):
        depth = torch.minimum(solids["duodenum"].depth(*canvas.at(part)), cavity[part])
        depth = beside(depth, part) + canvas.grains[0][part]
        content = canvas.textured("duodenum", part)
        paint_hollow(canvas, depth, "duodenum wall", content, CLASSES.index("duodenum"), part, anatomy.gas["duodenum"])
    if "gallbladder" in solids and (part := canvas.around(solids["gallbladder"])):
        depth = torch.minimum(solids["gallbladder"].depth(*canvas.at(part)), cavity[part] - 3)
        canvas.paint(depth, canvas.textured("gallbladder", part), CLASSES.index("gallbladder"), part)
    simple("portal vein", "veins")
    simple("mesenteric vein", "veins", halo=2.0)
    for side in SIDES:
        simple(f"{side} adrenal gland", "adrenal gland", f"{side} adrenal gland", halo=3.0)
    simple("inferior vena cava", "inferior vena cava", "inferior vena cava")
    simple("mesenteric artery", "aorta", halo=3.0)
    simple("aorta", "aorta", "aorta")
    if part := canvas.around(solids["esophagus"]):
        depth = solids["esophagus"].depth(*canvas.at(part))
        end = 58 - canvas.z[part]  # where it enters the stomach
        depth = torch.minimum(depth, end)
        canvas.paint(depth, canvas.textured("esophagus", part), CLASSES.index("esophagus"), part)
        canvas.paint(torch.minimum(depth - 6, anatomy.gas["esophagus"] - canvas.y[part]), -500.0, None, part)


def picture(
    anatomy: Anatomy, looks: Looks, levels: Tensor, size: tuple[int, int], key: tuple[object, ...]
) -> tuple[Tensor, Tensor]:
    """Slices without noise, and their labels.

    Args:
        levels: (S,) z of the slices.
        key: of the streams of random numbers for displacement and texture.

    Returns:
        (S, H, W) HU, and (S, H, W) int64 class of the pixel's middle.
    """
    canvas = Canvas(anatomy, looks, levels, size, key)
    cavity, diaphragm = paint_frame(canvas, anatomy)
    paint_bowel(canvas, anatomy, cavity, diaphragm)
    paint_upper(canvas, anatomy, cavity, diaphragm)
    paint_back(canvas, anatomy, cavity)
    paint_middle(canvas, anatomy, cavity)
    return canvas.hu, canvas.labels.long()


def averaged(area: float) -> float:
    """Standard deviation of the noise in a pixel of so many square mm, that of a point being one.

    Noise filtered with a Gaussian of standard deviation w is as one number over 4 pi w^2.
    """
    grain = 4 * math.pi * NOISE_WIDTH**2
    return (grain / (grain + area)) ** 0.5


def add_noise(hu: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of a level drawn for the case, filtered in the plane.

    The level, uniform in `NOISE`, is that of a point; `averaged` gives that of a pixel.

    Args:
        hu: (S, H, W).
    """
    low, high = NOISE
    level = low + (high - low) * torch.rand((), generator=generator)
    level = level * averaged(FIELD_OF_VIEW**2 / (hu.shape[1] * hu.shape[2]))
    width = NOISE_WIDTH * hu.shape[2] / FIELD_OF_VIEW  # pixels
    steps = torch.arange(-int(3 * width) - 1, int(3 * width) + 2)
    kernel = (-0.5 * (steps / width) ** 2).exp()
    kernel = kernel / kernel.norm()
    noise = torch.randn(hu.shape, generator=generator)[:, None]
    if len(steps) == 3 and kernel[0] < 0.01:  # pixels wider than the filter
        return hu + level * noise[:, 0]
    border = len(steps) // 2
    noise = F.pad(noise, (border,) * 4, mode="circular")
    noise = F.conv2d(F.conv2d(noise, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return hu + level * noise[:, 0]
