"""The embedded task `abdomen-us`: the people of the task `abdomen`, under the curved array of an ultrasound scanner.

People and levels are those of `abdomen`. At each level an array lies on the front or the side of the belly and looks
into the axial plane; of a few places drawn, the one is taken from which most organs are seen, as who scans looks for a
window. An image is `FRAME` mm wide and high, the array at its top, and shows a sector; outside it are zeros. Labels are
those of the anatomy in the sector, moved with the skin where it is pressed on the array. Class 0 is what lies outside
the sector, and what an acoustic shadow hides: where echoes come back weaker than their gain expects by `SHADOW` dB.
Nobody could outline an organ there.

Steps, on scan lines (angle, depth), see `Sector`:

1. Tissue (`abdomen_mr.paint_tissues`) gives amplitude of its scatterers, attenuation and impedance (`ACOUSTICS`).
2. Echoes are complex: scatterers, of a circular Gaussian law, and interfaces where impedance changes along the beam,
   the brighter the more they face it. Both are weakened by the attenuation on the way there and back, so that gas and
   bone cast shadows and fluid makes what lies behind it brighter; gas leaves a weak reverberation in its shadow.
3. The point spread function is a Gaussian along depth and one across, which widens with depth. What is far larger than
   it shows fully developed speckle: the envelope is of Rayleigh's law (Wagner et al., IEEE Trans Sonics Ultrason
   30:156-163, 1983).
4. Noise of the receiver, gain that grows with depth (TGC) for an assumed attenuation, logarithm, scan conversion.

Frequency, aperture, gain, dynamic range and so on are the case's, the place of the array is the slice's. Impedances,
attenuations and echogenicities are set by hand within textbook ranges (Szabo, Diagnostic Ultrasound Imaging, 2nd
edition, Academic Press, 2014); nothing was measured. Refraction, aberration, side lobes and speckle reduction are left
out.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from synthrepro.data import abdomen_mr
from synthrepro.data.abdomen import draw_case
from synthrepro.data.abdomen_anatomy import FIELD_OF_VIEW
from synthrepro.data.abdomen_looks import CLASSES
from synthrepro.data.abdomen_mr import CODE, TISSUES, paint_tissues
from synthrepro.data.brain_mni import stream
from synthrepro.data.task import Card, Split, Task

FAMILY = "embedded"

FRAME = 256.0  # mm, height and width of an image
TOP = 4.0  # mm above the array
LINES, STEP = 160, 0.5  # scan lines; mm from one sample of a line to the next
PAINTED = 256  # least rows and columns of the field of view in which tissue is painted
DISPLAY = 0.5  # mm, greatest pixel of the display before it is brought to the image's size
PRESSED = 3.0  # mm of the array into the skin, so that no air is left between the two
TRIES = 5  # places of the array, of which one is taken


@dataclass(frozen=True)
class Acoustics:
    """A tissue.

    Attributes:
        echo: amplitude of its scatterers over that of the liver, dB.
        loss: attenuation one way, dB/cm at 1 MHz; it grows with the frequency.
        impedance: MRayl.
        patches: standard deviation of `echo` within it, dB, in patches of some 16 mm.
        layers: the same, dB, in streaks across the beam.
    """

    echo: float
    loss: float
    impedance: float
    patches: float = 0.7
    layers: float = 0.0


FLUID = -45.0  # dB
BLOOD = Acoustics(-38.0, 0.18, 1.60)
WALL = Acoustics(-4.0, 0.60, 1.67, 1.0)
ACOUSTICS = {
    "air": Acoustics(FLUID, 40.0, 0.60),
    "table": Acoustics(FLUID, 40.0, 0.60),
    "gas": Acoustics(-6.0, 40.0, 0.30),  # its impedance is as low as an echo takes that no display shows brighter
    "lung": Acoustics(-4.0, 30.0, 0.40),
    "skin": Acoustics(4.0, 0.80, 1.62),
    "fat": Acoustics(1.5, 0.55, 1.44, 2.0, 3.0),
    "sinus fat": Acoustics(8.0, 0.60, 1.46, 2.0),
    "muscle": Acoustics(-5.0, 0.75, 1.68, 1.0, 4.0),
    "small vessels": BLOOD,
    "veins": BLOOD,
    "aorta": BLOOD,
    "inferior vena cava": BLOOD,
    "heart": Acoustics(-14.0, 0.40, 1.64, 3.0),
    "liver": Acoustics(0.0, 0.50, 1.65, 0.8),
    "spleen": Acoustics(0.8, 0.48, 1.65, 0.6),
    "pancreas": Acoustics(3.0, 0.55, 1.64, 1.5),
    "cortex": Acoustics(-3.5, 0.50, 1.62, 0.8),
    "medulla": Acoustics(-9.0, 0.45, 1.62, 0.8),
    "adrenal gland": Acoustics(-5.0, 0.50, 1.62),
    "gallbladder": Acoustics(-50.0, 0.02, 1.52, 0.0),
    "esophagus": WALL,
    "stomach wall": WALL,
    "duodenum wall": WALL,
    "bowel wall": WALL,
    "stomach": Acoustics(-12.0, 0.30, 1.55, 4.0),
    "duodenum": Acoustics(-9.0, 0.40, 1.56, 3.0),
    "bowel": Acoustics(-7.0, 0.45, 1.57, 3.0),
    "stool": Acoustics(4.0, 3.0, 1.75, 5.0),
    "bone": Acoustics(-6.0, 10.0, 3.0),
    "cortical bone": Acoustics(-2.0, 16.0, 5.5),
    "disc": Acoustics(-4.0, 1.2, 1.70),
    "canal": Acoustics(-25.0, 0.20, 1.55),
}
SPREAD = {"stomach": 6.0, "duodenum": 3.0, "bowel": 3.0}  # standard deviation of `echo` over the cases, dB
SPREAD_ELSE = 1.0
CLEAR = 2.0  # dB/cm at 1 MHz; what weakens more casts a shadow

RANGES = {  # of the uniform draws of a case's array and scanner, see `Probe`; half_angle in degrees
    "radius": (45.0, 60.0),
    "half_angle": (27.0, 33.0),
    "depth": (165.0, 200.0),
    "frequency": (2.5, 4.0),
    "axial": (0.9, 1.5),
    "lateral": (1.0, 1.6),
    "widening": (0.016, 0.026),
    "assumed": (0.42, 0.54),
    "reach": (175.0, 270.0),
    "grey": (0.43, 0.58),
    "range": (48.0, 66.0),
    "dirt": (-34.0, -24.0),
}
SIDE, TILT = 70.0, 12.0  # degrees: from the middle of the front to either side; of the beam off the middle of the body
MIRROR = 8.0  # amplitude of an interface over that of the liver's scatterers, for a change of impedance by 100 % a mm
FACING = 3  # power of the cosine between the beam and an interface's normal
DIRT_FADES = 1.2  # dB that the reverberation behind gas loses in a mm
HALO = 8  # lines over which a shadow fades in
BLEND, MOST = 40.0, 30.0  # mm: depth over which the skin's displacement fades; greatest displacement
SHADOW = 18.0  # dB below what the gain expects
FIRST = 0.2  # share of the levels of `abdomen`, from the top, that ribs and lung hide from the front: they are left out


@dataclass(frozen=True)
class Probe:
    """A case's array and scanner.

    Attributes:
        radius: of the array, mm; half_angle: of the sector, radians; depth: of the deepest sample, mm.
        frequency: MHz.
        axial: full width of the point spread function at half maximum along depth, mm; lateral, widening: across, which
            is the root of lateral^2 + (widening depth)^2.
        assumed: attenuation for which the gain makes up, dB/cm at 1 MHz.
        reach: mm where soft tissue that attenuates as assumed is as bright as the noise.
        grey: of the liver, in [0, 1]; range: of the display, dB.
        dirt: amplitude of the reverberation that a mm of gas adds over what enters it, dB.
        echo: (tissues,) amplitude of the scatterers, dB.
    """

    radius: float
    half_angle: float
    depth: float
    frequency: float
    axial: float
    lateral: float
    widening: float
    assumed: float
    reach: float
    grey: float
    range: float
    dirt: float
    echo: Tensor

    @property
    def angles(self) -> Tensor:
        """(LINES,) of the scan lines off the middle one, radians."""
        return torch.linspace(-self.half_angle, self.half_angle, LINES)

    @property
    def depths(self) -> Tensor:
        """(D,) of the samples of a line, mm below the array."""
        return torch.arange(round(self.depth / STEP) + 1) * STEP

    @property
    def across(self) -> Tensor:
        """(D,) full width of the point spread function at half maximum across the beam, mm."""
        return (self.lateral**2 + (self.widening * self.depths) ** 2).sqrt()


def draw_probe(generator: torch.Generator) -> Probe:
    """Draw one; the number of draws does not depend on what they come to."""
    shares = torch.rand(len(RANGES), generator=generator).tolist()
    values = {name: low + (high - low) * u for (name, (low, high)), u in zip(RANGES.items(), shares, strict=True)}
    values["half_angle"] = math.radians(values["half_angle"])
    spread = torch.tensor([SPREAD.get(name, SPREAD_ELSE) for name in TISSUES])
    echo = torch.tensor([ACOUSTICS[name].echo for name in TISSUES])
    echo = echo + spread * torch.randn(len(TISSUES), generator=generator)
    return Probe(**values, echo=echo - echo[CODE["liver"]])


# ----- geometry


def to_frame(probe: Probe, angle: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Place in the image of points on scan lines: mm to the right of its left edge, and below its upper one."""
    reach = probe.radius + depth
    return FRAME / 2 + reach * angle.sin(), TOP + reach * angle.cos() - probe.radius * math.cos(probe.half_angle)


def to_lines(probe: Probe, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Angle in radians and depth in mm of places in the image, mm; the inverse of `to_frame`."""
    right, down = x - FRAME / 2, y - TOP + probe.radius * math.cos(probe.half_angle)
    return torch.atan2(right, down), torch.hypot(right, down) - probe.radius


def centres(size: tuple[int, int], finer: int = 1) -> tuple[Tensor, Tensor]:
    """x and y in mm of the middles of the pixels, (H, W) each, with `finer` of them to a pixel along each side."""
    rows, columns = ((torch.arange(n * finer) + 0.5) * (FRAME / (n * finer)) for n in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return x, y


@dataclass(frozen=True)
class Sector:
    """Where in the field of view of `abdomen` the array lies, mm.

    Attributes:
        x, y: of the middle of the array's face, to the right and down.
        axis: radians by which the middle line is turned from straight down, clockwise as one looks at the image.
        lift: (LINES,) mm by which the body is moved along each line, so that its skin lies on the face.
    """

    x: float
    y: float
    axis: float
    lift: Tensor

    def places(self, probe: Probe, angle: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """x and y in the field of view of points on scan lines, of any shape."""
        line = (angle / probe.half_angle + 1) * (LINES - 1) / 2
        below = line.clamp(0, LINES - 1).long().clamp_max(LINES - 2)
        lift = torch.lerp(self.lift[below], self.lift[below + 1], (line - below).clamp(0, 1))
        reach = probe.radius + depth + lift * (-depth.clamp_min(0) / BLEND).exp()
        # Turned clockwise, what was straight down goes to the left.
        turned = angle - self.axis
        x = self.x + reach * turned.sin() + probe.radius * math.sin(self.axis)
        return x, self.y + reach * turned.cos() - probe.radius * math.cos(self.axis)


def look_up(planes: Tensor, x: Tensor, y: Tensor, mode: str = "bilinear") -> Tensor:
    """Values of planes (K, H, W) that fill the field of view at places in mm, (...); (K, ...). Edge values beyond."""
    grid = (torch.stack([x, y], -1) * (2 / FIELD_OF_VIEW) - 1).view(1, 1, -1, 2)
    found = F.grid_sample(planes[None], grid, mode=mode, padding_mode="border", align_corners=False)
    return found.view(len(planes), *x.shape)


def body_of(codes: Tensor) -> Tensor:
    """(S, H, W), one in the body and zero outside; codes (S, H, W) are of `TISSUES`."""
    return ((codes != CODE["air"]) & (codes != CODE["table"])).float()


def put_on(body: Tensor, probe: Probe, side: float, tilt: float) -> Sector:
    """Lay the array on the skin.

    Args:
        body: (H, W), see `body_of`.
        side: radians from the front, positive to the image's right; tilt: of the beam off the middle of the body.
    """
    middle_x, middle_y = (
        float((body.sum(axis) * (torch.arange(n) + 0.5)).sum() / body.sum() * FIELD_OF_VIEW / n)
        for axis, n in ((0, body.shape[1]), (1, body.shape[0]))
    )
    body = body[None]
    out = torch.arange(FIELD_OF_VIEW, 0, -0.5)  # from without
    x, y = middle_x + out * math.sin(side), middle_y - out * math.cos(side)
    within = (x > 0) & (x < FIELD_OF_VIEW) & (y > 0) & (y < FIELD_OF_VIEW)
    first = int((look_up(body, x, y, "nearest")[0] * within).argmax())
    bare = Sector(float(x[first]), float(y[first]), side + tilt, torch.zeros(LINES))
    depth = torch.arange(-20.0, 40.0, 0.5)
    places = bare.places(probe, probe.angles[:, None].expand(-1, len(depth)), depth.expand(LINES, -1))
    found = look_up(body, *places, "nearest")[0]  # (LINES, depths)
    skin = depth[found.argmax(1)].where(found.any(1), MOST)
    skin = F.avg_pool1d(F.pad(skin[None, None], (8, 8), mode="replicate"), 17, 1)[0, 0]
    return Sector(bare.x, bare.y, bare.axis, skin.clamp_max(MOST) + PRESSED)


def seen(codes: Tensor, labels: Tensor, probe: Probe, sector: Sector) -> float:
    """How much of the organs lies in the sector before any shadow: the roots of their areas, summed."""
    angle, depth = probe.angles[::8], probe.depths[::8]
    grid = torch.meshgrid(depth, angle, indexing="ij")
    planes = torch.stack([labels, codes]).float()
    label, code = look_up(planes, *sector.places(probe, grid[1], grid[0]), "nearest")
    block = blocks()[code.long()]
    area = (block.cumsum(0) == 0) * (probe.radius + grid[0])
    return float(torch.zeros(len(CLASSES)).index_add_(0, label.long().flatten(), area.flatten())[1:].sqrt().sum())


def blocks() -> Tensor:
    """(tissues,) 1 where one casts a shadow."""
    return torch.tensor([float(ACOUSTICS[name].loss > CLEAR) for name in TISSUES])


# ----- echoes


@dataclass(frozen=True)
class Medium:
    """What the scan lines cross.

    Attributes:
        amplitude: of the scatterers, that of the liver being one; loss: dB/cm at 1 MHz; impedance: MRayl;
            gas: share that is gas or lung; all (S, D, LINES), from the array's face on.
    """

    amplitude: Tensor
    loss: Tensor
    impedance: Tensor
    gas: Tensor


def circular(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Circular complex Gaussian numbers of unit mean square, real and imaginary part first: (2, *shape)."""
    return torch.randn(2, *shape, generator=generator) * 0.5**0.5


def gaussian(steps: Tensor, width: Tensor | float) -> Tensor:
    """Gaussian of a full width at half maximum over the last axis, of unit energy."""
    kernel = (-4 * math.log(2) * (steps / width) ** 2).exp()
    return kernel / kernel.norm(dim=-1, keepdim=True)


def spread(field: Tensor, probe: Probe) -> Tensor:
    """Convolve with the point spread function; white noise keeps its mean square.

    Args:
        field: (2, S, D, LINES).
    """
    reach = math.ceil(1.3 * probe.axial / STEP)
    kernel = gaussian(torch.arange(-reach, reach + 1) * STEP, probe.axial)  # (taps,)
    pitch = (probe.radius + probe.depths) * (2 * probe.half_angle / (LINES - 1))  # mm between lines
    width = probe.across / pitch  # lines
    half = math.ceil(1.3 * float(width.max()))
    kernels = gaussian(torch.arange(-half, half + 1), width[:, None])  # (D, taps)
    field = F.pad(field, (half, half, reach, reach), mode="reflect")
    field = weighted(field, kernel, 2)
    return weighted(field, kernels.T[:, :, None], 3)


def weighted(field: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Weighted sum of a field and its copies shifted along an axis, which gets shorter by one less than the weights."""
    length = field.shape[axis] - len(weights) + 1
    out = torch.zeros_like(field.narrow(axis, 0, length))
    for k, weight in enumerate(weights):
        out.addcmul_(field.narrow(axis, k, length), weight)
    return out


def arriving(loss: Tensor, probe: Probe) -> Tensor:
    """Share of the amplitude that comes back from each place, (S, D, LINES), where `loss` is that of a `Medium`.

    An aperture sees past the edge of what shades it, so shadows fade in over `HALO` lines.
    """
    way = (loss * (2 * probe.frequency * STEP / 10)).cumsum(-2)  # dB there and back
    share = (way * (-math.log(10) / 20)).exp()
    half = HALO // 2
    return F.avg_pool1d(F.pad(share.flatten(0, 1), (half, half), mode="replicate"), 2 * half + 1, 1).view(loss.shape)


def gain(probe: Probe) -> Tensor:
    """dB by which the scanner amplifies each depth, (D,); no more where only noise is left."""
    return 2 * probe.assumed * probe.frequency / 10 * probe.depths.clamp_max(0.9 * probe.reach)


def lit(medium: Medium, probe: Probe) -> Tensor:
    """Where no shadow hides everything, (S, D, LINES), one or zero: see `SHADOW`."""
    decibel = 20 * arriving(medium.loss, probe).clamp_min(1e-12).log10() + gain(probe)[:, None]
    return (decibel > -SHADOW).float()


def echoes(medium: Medium, probe: Probe, generator: torch.Generator) -> Tensor:
    """Envelope before gain, that of the liver at no depth having unit mean square: (S, D, LINES)."""
    shape = tuple(medium.amplitude.shape)
    arrives = arriving(medium.loss, probe)
    log = medium.impedance.log()
    along = torch.gradient(log, spacing=STEP, dim=-2)[0]
    pitch = (probe.radius + probe.depths)[:, None] * (2 * probe.half_angle / (LINES - 1))
    beside = torch.gradient(log, dim=-1)[0] / pitch
    cosine = along.abs() / torch.hypot(along, beside).clamp_min(1e-6)
    mirror = MIRROR * along.abs() * cosine**FACING
    field = circular(shape, generator) * medium.amplitude
    field[0] += mirror
    field = field * arrives
    # What enters gas comes back again and again.
    enters = (arrives * medium.gas * 10 ** (probe.dirt / 20)).double()
    fade = 10 ** (DIRT_FADES / 20 * probe.depths.double()[:, None])
    dirt = ((enters * fade).cumsum(-2) / fade).float() * STEP
    field += dirt * circular(shape, generator)
    field = spread(field, probe)
    level = -2 * probe.assumed * probe.frequency * probe.reach / 10  # dB
    field += 10 ** (level / 20) * circular(shape, generator)
    return torch.hypot(field[0], field[1])


def compress(envelope: Tensor, probe: Probe) -> Tensor:
    """Gain that grows with depth, and logarithm: grey in [0, 1], (S, D, LINES)."""
    decibel = 20 * envelope.clamp_min(1e-12).log10() + gain(probe)[:, None]
    return (probe.grey + decibel / probe.range).clamp_(0, 1)


def convert(lines: Tensor, probe: Probe, size: tuple[int, int]) -> Tensor:
    """Scan conversion: from (S, D, LINES) to (S, H, W), zero outside the sector.

    It is done on pixels of at most `DISPLAY` mm, over which those of the image average.
    """
    finer = max(1, math.ceil(FRAME / min(size) / DISPLAY))
    fine = F.avg_pool2d(torch.cat([on_lines(lines, probe, size, finer), inside(probe, size, finer)[None]]), finer)
    return fine[:-1] / fine[-1].clamp_min(1 / finer**2) * inside(probe, size)


def on_lines(lines: Tensor, probe: Probe, size: tuple[int, int], finer: int = 1, mode: str = "bilinear") -> Tensor:
    """Values of (S, D, LINES) at the pixels, (S, finer H, finer W); zero outside the sector."""
    angle, depth = to_lines(probe, *centres(size, finer))
    grid = torch.stack([angle / probe.half_angle, depth * (2 / float(probe.depths[-1])) - 1], -1)[None]
    found = F.grid_sample(lines[None], grid, mode=mode, padding_mode="border", align_corners=True)[0]
    return found * inside(probe, size, finer)


def inside(probe: Probe, size: tuple[int, int], finer: int = 1) -> Tensor:
    """(finer H, finer W), one where the middle of a pixel is in the sector, else zero."""
    angle, depth = to_lines(probe, *centres(size, finer))
    return ((angle.abs() <= probe.half_angle) & (depth >= 0) & (depth <= probe.depths[-1])).float()


def streaks(depths: int, generator: torch.Generator) -> Tensor:
    """A field of about unit variance, fine along the beam and long across it: (D, LINES)."""
    coarse = torch.randn(1, 1, math.ceil(depths * STEP / 1.5) + 1, 14, generator=generator)
    return 1.3 * F.interpolate(coarse, (depths, LINES), mode="bilinear", align_corners=True)[0, 0]


def medium_of(codes: Tensor, grains: Tensor, sectors: list[Sector], probe: Probe, generator: torch.Generator) -> Medium:
    """What the scan lines cross in each slice.

    Args:
        codes: (S, H, W) of `TISSUES`; grains: (3, S, H, W) of unit variance.
    """
    tissues = [ACOUSTICS[name] for name in TISSUES]
    table = torch.stack(
        [
            probe.echo,
            torch.tensor([tissue.loss for tissue in tissues]),
            torch.tensor([tissue.impedance for tissue in tissues]),
            torch.tensor([float(name in ("gas", "lung")) for name in TISSUES]),
            torch.tensor([tissue.patches for tissue in tissues]),
            torch.tensor([tissue.layers for tissue in tissues]),
        ],
        1,
    )
    angle, depth = probe.angles.expand(len(probe.depths), -1), probe.depths[:, None].expand(-1, LINES)
    found = []
    for code, grain, sector in zip(codes, grains[1], sectors, strict=True):
        planes = table[code].permute(2, 0, 1).clone()
        planes[0] += planes[4] * grain
        echo, loss, impedance, gas, _, layers = look_up(planes, *sector.places(probe, angle, depth))
        echo = echo + layers * streaks(len(probe.depths), generator)
        found.append(torch.stack([10 ** (echo / 20), loss, impedance, gas]))
    return Medium(*torch.stack(found, 1))


def case(seed: int, part: str, i: int, slices: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Slices of a case from top to bottom.

    Returns:
        (slices, H, W) in [0, 1], and (slices, H, W) int64 classes.
    """
    key = (seed, part, i)
    anatomy, _ = draw_case(*key)
    probe = draw_probe(stream(*key, "probe"))
    side = max(PAINTED, math.ceil(max(size) * FIELD_OF_VIEW / FRAME))
    top, bottom = anatomy.span
    levels = top + (bottom - top) * (FIRST + (1 - FIRST) * (torch.arange(slices) + 0.5) / slices)
    codes, labels, grains = paint_tissues(anatomy, levels, (side, side), key)
    tries = torch.rand(slices, TRIES, 2, generator=stream(*key, "window")) * 2 - 1
    sectors = []
    for code, body, label, places in zip(codes, body_of(codes), labels, tries.tolist(), strict=True):
        drawn = [put_on(body, probe, math.radians(SIDE * u), math.radians(TILT * v)) for u, v in places]
        sectors.append(max(drawn, key=lambda sector: seen(code, label, probe, sector)))
    generator = stream(*key, "echoes")
    medium = medium_of(codes, grains, sectors, probe, generator)
    images = convert(compress(echoes(medium, probe, generator), probe), probe, size)
    angle, depth = to_lines(probe, *centres(size))
    shown = torch.stack(
        [
            look_up(label.float()[None], *sector.places(probe, angle, depth), "nearest")[0]
            for label, sector in zip(labels, sectors, strict=True)
        ]
    )
    return images, (shown * on_lines(lit(medium, probe), probe, size, mode="nearest")).long()


# ----- the task


def files(folder: Path) -> list[Path]:
    """The files the task needs: none."""
    return []


def check(folder: Path) -> None:
    """Nothing can be missing or wrong."""


class Options(abdomen_mr.Options):
    """Options of the task.

    Attributes:
        size: rows and columns of an image, 256 mm x 256 mm whatever the size.
        cases: for training, validation and test.
        slices: of each case.
        seed: of everything.
    """


def load(options: Options, folder: Path) -> Task:
    """Build the task: splits "train", "validation" and "test".

    Case i of a split shows the person who is case i of that split of `abdomen` with the same seed. It is the same
    whatever the number of cases. Its slices lie next to one another, top to bottom; subjects are "train-003".

    Args:
        folder: not used.
    """

    def build(part: str, count: int) -> Split:
        images = torch.empty(count * options.slices, 1, *options.size)
        labels = torch.empty(count * options.slices, *options.size, dtype=torch.int64)
        for i in range(count):
            rows = slice(i * options.slices, (i + 1) * options.slices)
            images[rows, 0], labels[rows] = case(options.seed, part, i, options.slices, options.size)
        return Split(images, labels, tuple(f"{part}-{i:03d}" for i in range(count) for _ in range(options.slices)))

    parts = zip(("train", "validation", "test"), options.cases, strict=True)
    return Task("abdomen-us", CLASSES, 1, {part: build(part, count) for part, count in parts}, CARD)


CARD = Card(
    what=(
        "Synthetic B-mode ultrasound of the upper abdomen in axial planes, with the thirteen organs of FLARE22: the "
        "people of the task abdomen under a curved array on the front or the side of the belly, at a place drawn for "
        "every slice. Sector, speckle, attenuation and gain over depth, shadows behind bone and gas, brightness behind "
        "fluid, echoes of interfaces and logarithmic compression are computed on scan lines from the echogenicity, the "
        "attenuation and the impedance of each tissue. Labels end where the sector ends and where a shadow hides all."
    ),
    splits="By case, each one person, the same ones as in the task abdomen with the same seed.",
    doubt=(
        "Nothing here was measured on a scanner. Acoustic properties are set by hand within textbook ranges; sound "
        "goes straight on, without refraction, aberration, side lobes or speckle reduction. Organs are healthy, smooth "
        "and all of one mould, and planes are axial, where people who scan turn the array to follow an organ. Some "
        "slices show few organs or none, the esophagus is hardly ever seen, and small organs are a few pixels at the "
        "default size. Labels are exact also where the picture hardly shows a border. A result here says that a method "
        "can work, not how well it does on patients."
    ),
    source=(
        "Code of this package. Anatomy as in the task abdomen; acoustic properties by hand within the ranges of Szabo, "
        "Diagnostic Ultrasound Imaging (2nd edition, Academic Press, 2014). Classes after FLARE22 (Ma et al., Lancet "
        "Digital Health 6:e815, 2024), of which nothing is contained."
    ),
    licence="That of this package.",
)
