"""How the scenes of the task `lesion` look: skin under a dermatoscope, and layers of tissue under an ultrasound probe.

A scene's lesion comes from `lesion`; here it gets its surroundings and a picture. Everything lives in the unit square,
rows and columns from 0 to 1, so that a scene is the same at any resolution; only the noise belongs to the pixels.
Ranges are of uniform draws, and set by eye where no source is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthrepro.data.brain_mni import stream
from synthrepro.data.individuals import spline_weights

Range = tuple[float, float]


class Draws:
    """Random numbers for several subjects at once, each subject's from a stream of its own.

    Args:
        keys: of the streams, one a subject; B of them.
    """

    def __init__(self, keys: Sequence[tuple[object, ...]]) -> None:
        self.generators = [stream(*key) for key in keys]

    def uniform(self, bounds: Range, *shape: int) -> Tensor:
        """(B, *shape) uniform between two bounds."""
        low, high = bounds
        return low + (high - low) * torch.stack([torch.rand(shape, generator=each) for each in self.generators])

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) of N(0, 1)."""
        return torch.stack([torch.randn(shape, generator=each) for each in self.generators])


@dataclass(frozen=True)
class Grid:
    """Pixel centres in the unit square.

    Attributes:
        rows: (H,), columns: (W,), positions in (0, 1).
    """

    rows: Tensor
    columns: Tensor

    @property
    def pixel(self) -> float:
        """The longer side of a pixel."""
        return max(1 / len(self.rows), 1 / len(self.columns))

    def field(self, draws: Draws, spacing: float | Range, channels: int = 1) -> Tensor:
        """Gaussian random fields of unit variance, correlated over about `spacing` (one, or that along each axis).

        Returns:
            (B, channels, H, W).
        """
        along = spacing if isinstance(spacing, tuple) else (spacing, spacing)
        counts = [int(1 / step) + 4 for step in along]
        knots = draws.normal(channels, *counts)
        rows, columns = (
            spline_weights(points + step, step, count)
            for points, step, count in zip((self.rows, self.columns), along, counts, strict=True)
        )
        return rows @ knots @ columns.T


@dataclass(frozen=True)
class Lesion:
    """The lesions of several subjects.

    Attributes:
        inside: (B, H, W) in (0, 1), 1/2 on the border and steep where it is sharp.
        distance: (B, H, W) to the border along the ray from the centre, positive inside.
        angle: (B, H, W) of that ray, radians.
    """

    inside: Tensor
    distance: Tensor
    angle: Tensor


def pick(numbers: Tensor) -> Tensor:
    """Numbers (B,) or (B, C) as (B, 1, 1) or (B, C, 1, 1), to go with maps."""
    return numbers[..., None, None]


def bump(distance: Tensor, width: Tensor | float) -> Tensor:
    """Gaussian profile across a line."""
    return (-0.5 * (distance / width) ** 2).exp()


def _frame(grid: Grid, centre: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (B, H, W) along and across a direction, from a centre (B, 2) and an angle (B,)."""
    y, x = grid.rows[:, None] - pick(centre[:, 0]), grid.columns - pick(centre[:, 1])
    cos, sin = pick(turn.cos()), pick(turn.sin())
    return cos * x + sin * y, cos * y - sin * x


def ovals(
    grid: Grid,
    draws: Draws,
    slots: int,
    count: Range,
    radius: Range,
    amount: Range,
    edge: Range,
    *,
    rim: float = 0.0,
    corner: bool = False,
) -> Tensor:
    """Smooth ovals, what a lesion is not: up to `slots` a subject.

    Args:
        count: of a subject's; none below zero. amount: of each in its middle. edge: width of the border.
        radius: log-uniform between these.
        rim: amount taken away along the border.
        corner: whether they lie near a corner instead of anywhere.

    Returns:
        (B, H, W) their amounts, added up.
    """
    number = draws.uniform(count)
    centre, turn = draws.uniform((0.0, 1.0), slots, 2), draws.uniform((0.0, torch.pi), slots)
    if corner:
        centre = centre.round() + 0.1 * (centre - 0.5)
    size = radius[0] * (radius[1] / radius[0]) ** draws.uniform((0.0, 1.0), slots)
    stretch, height = draws.uniform((0.6, 1.0), slots), draws.uniform(amount, slots)
    width, wave = draws.uniform(edge, slots), 0.12 * draws.normal(slots, 2)
    total = torch.zeros(len(number), len(grid.rows), len(grid.columns))
    for slot in range(slots):
        has = (number > slot).nonzero()[:, 0]  # the others are spared the work
        u, v = _frame(grid, centre[has, slot], turn[has, slot])
        u, v = u / pick(size[has, slot]), v / pick(size[has, slot] * stretch[has, slot])
        bend = 1 + pick(wave[has, slot, 0]) * u.tanh() + pick(wave[has, slot, 1]) * (u * v).tanh()
        depth = (bend - (u**2 + v**2).sqrt()) * pick(size[has, slot])
        total[has] += pick(height[has, slot]) * (depth / pick(width[has, slot])).sigmoid()
        if rim:
            total[has] -= rim * bump(depth, 0.012)
    return total


def strokes(grid: Grid, draws: Draws, slots: int, count: Range, width: Range) -> Tensor:
    """Thin curves such as hairs: up to `slots` a subject.

    Args:
        count: of a subject's; none below zero. width: of each.

    Returns:
        (B, H, W) in [0, 1], the share of each pixel they cover.
    """
    number = draws.uniform(count)
    centre, turn = draws.uniform((0.0, 1.0), slots, 2), draws.uniform((0.0, torch.pi), slots)
    bend, half = draws.uniform((-0.8, 0.8), slots), draws.uniform((0.15, 0.6), slots)
    thick = draws.uniform(width, slots)
    bare = torch.ones(len(number), len(grid.rows), len(grid.columns))
    for slot in range(slots):
        has = (number > slot).nonzero()[:, 0]
        u, v = _frame(grid, centre[has, slot], turn[has, slot])
        sigma = (thick[has, slot] ** 2 + (0.4 * grid.pixel) ** 2).sqrt()  # thinner than a pixel is fainter
        cover = pick(thick[has, slot] / sigma) * bump(v - pick(bend[has, slot]) * u**2, pick(sigma))
        bare[has] *= 1 - cover * ((pick(half[has, slot]) - u.abs()) / 0.02).sigmoid()
    return 1 - bare


def finish(image: Tensor, draws: Draws, noise: Range) -> Tensor:
    """Gaussian noise of a level drawn for each image, and clipping to [0, 1]; image (B, C, H, W)."""
    level = draws.uniform(noise, 1)
    return (image + pick(level) * draws.normal(*image.shape[1:])).clamp(0, 1)


# --- dermoscopy -------------------------------------------------------------------------------------------------------

# Optical density of a unit of each in red, green and blue. Melanin absorbs the more the shorter the wave, haemoglobin
# green most.
MELANIN, HAEMOGLOBIN, INK = torch.tensor([[0.50, 0.80, 1.05], [0.12, 0.75, 0.60], [1.2, 0.9, 0.3]])[..., None, None]


@dataclass(frozen=True)
class Skin:
    """A style of dermoscopy.

    Attributes:
        melanin, haemoglobin: of the skin between spots, in units of density.
        hairs: how many.
        ticks: how much a ruler's ticks darken. vignette: loss of light towards the corners.
        exposure: gain of all colours. cast: of red, green and blue. gamma: exponent. noise: standard deviation.
    """

    melanin: Range = (0.1, 0.9)
    haemoglobin: Range = (0.10, 0.40)
    hairs: Range = (-6.0, 8.0)
    ticks: Range = (0.0, 0.0)
    vignette: Range = (0.0, 0.25)
    exposure: Range = (0.65, 1.15)
    cast: tuple[Range, Range, Range] = ((0.85, 1.05), (0.85, 1.05), (0.85, 1.05))
    gamma: Range = (0.9, 1.1)
    noise: Range = (0.005, 0.02)


SKINS = {
    "standard": Skin(),
    "camera": Skin(
        ticks=(0.3, 0.8),
        exposure=(1.1, 1.8),
        vignette=(0.6, 0.9),
        cast=((0.65, 0.80), (0.80, 0.95), (1.05, 1.25)),
        gamma=(1.4, 2.0),
        noise=(0.03, 0.06),
    ),
    "skin": Skin(melanin=(1.2, 1.7), haemoglobin=(0.05, 0.25), hairs=(6.0, 16.0), exposure=(0.9, 1.6)),
}


def dermoscopy(lesion: Lesion, grid: Grid, scene: Draws, imaging: Draws, style: str) -> Tensor:
    """Skin with a lesion under a dermatoscope.

    A channel is `light * exp(-density)`, with a density that is linear in the amounts of melanin and haemoglobin
    (Tsumura, Haneishi and Miyake, J. Opt. Soc. Am. A 16:2169, 1999), to the camera's gamma and times its cast.

    Args:
        scene: of what belongs to the subject, whatever the style. imaging: of what belongs to the picture.
        style: key of `SKINS`.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    skin = SKINS[style]
    coarse, middle, fine = grid.field(scene, 0.25, 3), grid.field(scene, 0.1, 3), grid.field(scene, 0.035, 2)
    # The lesion is brown, red or paler than the skin; its amounts vary within, as its texture does.
    mixture = scene.uniform((0.0, 1.0), 3).softmax(1) * scene.uniform((0.0, 1.4), 1)
    network = (fine[:, 0].abs() * 2).clamp_max(1.5) - 1
    globules = (fine[:, 1] - 0.8).clamp(0, 1) * 2
    streaks = (pick(scene.uniform((9.0, 22.0)).round()) * lesion.angle + 2 * middle[:, 1]).sin()
    textures = torch.stack([network, globules, streaks * bump(lesion.distance, 0.04)], 1)
    texture = 1 + (pick(mixture) * textures).sum(1)
    kind, brown, blood = scene.uniform((0.0, 1.0)), scene.uniform((0.75, 1.4)), scene.uniform((-0.1, 0.3))
    red, pale = kind < 0.2, kind > 0.8
    brown = torch.where(red, 0.3 * brown, torch.where(pale, -0.5 * brown, brown))
    blood = torch.where(red, 1.1 + blood, torch.where(pale, blood - 0.2, blood))
    variegation = (1 + 0.25 * coarse[:, 0] + 0.2 * middle[:, 0]).clamp_min(0.4)
    melanin = pick(brown) * variegation * texture.clamp_min(0.1) * lesion.inside
    haemoglobin = pick(blood) * (1 + 0.3 * coarse[:, 1]) * lesion.inside
    # The skin is mottled, with smooth spots, freckles, bruises and vessels.
    melanin = melanin + ovals(grid, scene, 4, (-1.0, 4.0), (0.05, 0.18), (0.3, 1.1), (0.02, 0.05))
    haemoglobin = haemoglobin + ovals(grid, scene, 2, (-0.5, 2.0), (0.1, 0.3), (0.3, 1.3), (0.03, 0.08))
    melanin = melanin + 0.5 * (grid.field(scene, 0.05)[:, 0] - pick(scene.uniform((1.4, 3.2)))).clamp_min(0)
    paths, where = grid.field(scene, 0.18)[:, 0], grid.field(scene, 0.3)[:, 0]
    vessels = bump(paths, 0.12) * (where - pick(scene.uniform((0.0, 2.5)))).clamp(0, 1)
    haemoglobin = haemoglobin + 0.6 * vessels + 0.06 * middle[:, 1] + pick(imaging.uniform(skin.haemoglobin))
    melanin = melanin + 0.08 * coarse[:, 2] + 0.05 * middle[:, 2] + pick(imaging.uniform(skin.melanin))
    # On it lie the marks of a pen, a coloured sticker and hairs.
    density = MELANIN * melanin[:, None] + HAEMOGLOBIN * haemoglobin[:, None]
    density = density + INK * strokes(grid, scene, 3, (-3.0, 3.0), (0.008, 0.02))[:, None]
    sticker = ovals(grid, scene, 1, (-0.5, 1.0), (0.15, 0.4), (1.0, 1.0), (0.004, 0.004), corner=True)[:, None]
    density = (1 - sticker) * density + sticker * pick(scene.uniform((0.0, 1.2), 3))
    hairs = strokes(grid, imaging, 16, skin.hairs, (0.003, 0.008))[:, None]
    density = density.clamp_min(0) + pick(imaging.uniform((0.5, 1.2), 1)) * hairs
    # The light falls off, and something shades it from one side.
    y, x = grid.rows[:, None] - 0.5, grid.columns - 0.5
    slope, vignette = imaging.uniform((-0.3, 0.3), 2), imaging.uniform(skin.vignette)
    light = 1 + pick(slope[:, 0]) * y + pick(slope[:, 1]) * x - 2 * pick(vignette) * (x**2 + y**2)
    side, turn = imaging.uniform((0.25, 0.6)), imaging.uniform((0.0, 2 * torch.pi))
    beyond = (pick(turn.cos()) * x + pick(turn.sin()) * y - pick(side)) / 0.05
    light = light * (1 - pick(imaging.uniform((0.0, 0.5))) * beyond.sigmoid())
    ticks = ((36 * torch.pi * x).cos() > 0.8) & ((y - 0.44).abs() < 0.03)
    light = light * (1 - pick(imaging.uniform(skin.ticks)) * ticks) * pick(imaging.uniform(skin.exposure))
    cast = torch.stack([imaging.uniform(bounds) for bounds in skin.cast], 1)  # (B, 3)
    image = (light.clamp_min(0.03)[:, None] * (-density).exp()) ** pick(imaging.uniform(skin.gamma, 1)) * pick(cast)
    return finish(image, imaging, skin.noise)


# --- ultrasound -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A style of ultrasound. Levels and losses are in nepers, the natural logarithm of an amplitude.

    Attributes:
        speckle: correlation length of the speckle along rows and columns, a pair and no range.
        attenuation: loss from top to bottom. shadows: loss under places of bad contact.
        gland: level of the gland above fat. lobules: how many dark smooth ones.
        gain: grey value of fat. dynamic: levels from black to white. noise: standard deviation.
    """

    speckle: Range = (0.014, 0.026)
    attenuation: Range = (0.3, 1.0)
    shadows: Range = (0.0, 0.5)
    gland: Range = (0.1, 0.6)
    lobules: Range = (-1.0, 3.0)
    gain: Range = (0.4, 0.7)
    dynamic: Range = (4.0, 5.0)
    noise: Range = (0.01, 0.03)


PROBES = {
    "standard": Probe(),
    "probe": Probe(
        speckle=(0.025, 0.05), attenuation=(1.5, 2.5), gain=(0.65, 0.9), dynamic=(2.6, 3.2), noise=(0.03, 0.06)
    ),
    "tissue": Probe(shadows=(1.0, 2.5), gland=(-0.6, -0.1), lobules=(3.0, 7.0)),
}


def ultrasound(lesion: Lesion, grid: Grid, scene: Draws, imaging: Draws, style: str) -> Tensor:
    """Layers of tissue with a lesion, seen by an ultrasound probe along the top edge.

    The grey value is the logarithm of an echo: of its mean level, and of speckle, the magnitude of a complex Gaussian
    field (Burckhardt, IEEE Trans. Sonics Ultrason. 25:1, 1978), here the root mean square of three.

    Args:
        scene: of what belongs to the subject, whatever the style. imaging: of what belongs to the picture.
        style: key of `PROBES`.

    Returns:
        (B, 1, H, W) in [0, 1].
    """
    probe = PROBES[style]
    coarse, middle = grid.field(scene, 0.25, 2), grid.field(scene, (0.06, 0.12), 2)
    # Skin, fat, gland and muscle, from the top; fat and muscle are streaked, a bright sheet lies on the muscle.
    depth = grid.rows[:, None] + 0.03 * grid.field(scene, (0.4, 0.2))[:, 0]
    ends = [scene.uniform(bounds) for bounds in ((0.03, 0.08), (0.15, 0.40), (0.7, 1.0))]
    skin, fat, gland = (((depth - pick(end)) / 0.015).sigmoid() for end in ends)  # below the end of each
    level = 0.9 * (1 - skin) + pick(imaging.uniform(probe.gland)) * (fat - gland)
    level = level + 0.2 * coarse[:, 0] + 0.15 * middle[:, 0] + 0.8 * bump(depth - pick(ends[2]), 0.012)
    level = level + 0.35 * grid.field(scene, (0.025, 0.5))[:, 0] * (gland + 0.5 * (skin - fat))
    # The lesion is darker than what is around it or, less often, brighter, and may have a bright rim.
    kind, change = scene.uniform((0.0, 1.0)), scene.uniform((1.6, 2.6))
    change = torch.where(kind < 0.35, 0.75 * change, -change)
    variegation = (1 + 0.25 * coarse[:, 1] + 0.2 * middle[:, 1]).clamp_min(0.45)
    level = level + pick(change) * variegation * lesion.inside
    level = level + pick(scene.uniform((-0.3, 0.6))) * bump(lesion.distance + 0.015, 0.015)
    # So are smooth cysts, lobules of fat in a bright capsule, and vessels.
    cysts = ovals(grid, scene, 2, (-1.5, 2.0), (0.04, 0.12), (0.8, 2.0), (0.004, 0.01))
    lobules = ovals(grid, imaging, 7, probe.lobules, (0.04, 0.14), (0.4, 1.3), (0.006, 0.03), rim=0.4)
    level = level - cysts - lobules - 1.2 * strokes(grid, scene, 3, (-1.0, 3.0), (0.008, 0.02))
    # What lies above weakens or spares the beam.
    loss = pick(scene.uniform((-2.0, 2.5))) * lesion.inside - 2 * cysts.clamp_max(1.5)
    level = level - loss.cumsum(1) / len(grid.rows)
    contact = grid.field(imaging, (1.0, 0.08))[:, 0].mean(1, keepdim=True)  # (B, 1, W)
    level = level - pick(imaging.uniform(probe.shadows)) * (contact - 0.5).clamp_min(0) * (0.3 + depth)
    level = level - pick(imaging.uniform(probe.attenuation)) * depth
    speckle = (grid.field(imaging, probe.speckle, 6).square().sum(1) / 6).sqrt()
    image = pick(imaging.uniform(probe.gain)) + (level + (speckle + 0.02).log()) / pick(imaging.uniform(probe.dynamic))
    return finish(image[:, None], imaging, probe.noise)
