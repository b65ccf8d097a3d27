"""Images and masks from nothing: SynthFM's two modules, shape-aware and boundary-aware, with one look for both.

Sengupta et al., "SynthFM: Training Modality-agnostic Foundation Models for Medical Image Segmentation without Real
Medical Data" (ISBI 2025, arXiv 2504.08177). The shape-aware module draws closed Bézier shapes; the boundary-aware one
takes SynthMorph's label maps, whose regions share boundaries, and erodes them at random, so that gaps of background lie
between neighbours. In what measure the two are mixed is not public, and no range is: every number here is ours.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from synthrepro.errors import UserError
from synthrepro.synthesis.appearance import Appearance
from synthrepro.synthesis.draws import Draw, spawn, uniform
from synthrepro.synthesis.label_maps import Erosion, SynthMorphMaps, choose_target
from synthrepro.synthesis.noise import Limits, scale_range
from synthrepro.synthesis.shapes import BezierShapes

# What the ranges of shapes and gaps may be when they are widened; those of the look say so themselves.
SHAPE_LIMITS = {
    "radius": Limits(0.01, 0.6, log=True),
    "irregularity": Limits(0.0, 1.0),
    "elongation": Limits(1.0, 6.0, log=True),
    "bend": Limits(-1.0, 1.0),
    "hole": Limits(0.1, 0.95),
}
GAP_LIMITS = {"width": Limits(0.0, 0.03)}


@dataclass(frozen=True)
class ShapesToImage:
    """Training images of SynthFM: each is of the one module or of the other, and asks for one object."""

    boundary: float = 0.5
    """Share of the images that the boundary-aware module makes."""
    smallest: float = 0.001
    """Area of the object asked for, from this share of the image"""
    largest: float = 0.4
    """to this one, where there is such an object."""
    shapes: BezierShapes = field(default_factory=BezierShapes)
    maps: SynthMorphMaps = field(default_factory=SynthMorphMaps)
    gaps: Erosion = field(default_factory=Erosion)
    look: Appearance = field(default_factory=Appearance)

    def __post_init__(self) -> None:
        if not 0 <= self.boundary <= 1:
            raise UserError(f"boundary is {self.boundary}: it is a share of the images, from 0 to 1.")

    @property
    def labels(self) -> int:
        """Values of the label maps are 0 (background) to this."""
        return max(self.shapes.number[1], self.maps.labels)

    def scaled(self, factor: float) -> Self:
        """Every range of shapes, gaps and look `factor` times as wide about its middle.

        Counts and chances stay, and so does SynthMorph's recipe, which is published.
        """
        return replace(
            self,
            shapes=_scaled(self.shapes, factor, SHAPE_LIMITS),
            gaps=_scaled(self.gaps, factor, GAP_LIMITS),
            look=self.look.scaled(factor),
        )

    def __call__(
        self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """:meth:`draw`, then :meth:`apply`."""
        return self.apply(self.draw(count, generator), size, device)

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw `count` images.

        A sample draws for both modules, so that the two of a sample have the same look.

        Args:
            generator: On the CPU; numbers are taken from it for the parts in turn, a sample's own for each.

        Returns:
            On the CPU: ``from_maps`` (B,) bool, which module makes it; ``shapes``, ``maps``, ``gaps`` and ``look``,
            the parts' draws; ``target`` (B,), which object is asked for, from 0 to below 1.

        Raises:
            UserError: The generator is not on the CPU.
        """
        parts: dict[str, Any] = {}
        states = spawn(count, generator)
        chance, target = uniform(states, ()), uniform(states, ())
        drawn = [self._draw_one(state) for state in states]
        for name in ("shapes", "maps", "gaps", "look"):
            parts[name] = _stacked([one[name] for one in drawn])
        return Draw(from_maps=chance < self.boundary, target=target, **parts)

    def _draw_one(self, generator: torch.Generator) -> dict[str, Draw]:
        return {
            "shapes": self.shapes.draw(1, generator),
            "maps": self.maps.draw(1, generator),
            "gaps": self.gaps.draw(1, generator),
            "look": self.look.draw(1, self.labels + 1, generator),
        }

    @torch.no_grad()
    def apply(self, draw: Draw, size: tuple[int, int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The images and masks of a draw.

        Args:
            draw: From :meth:`draw`.
            size: Rows and columns, which must be equal where a label map of SynthMorph's is among the images.
            device: Where the images are made.

        Returns:
            Images (B, 1, H, W), float32, [0, 1], and masks of the objects asked for, (B, H, W), int64, {0, 1}.

        Raises:
            UserError: The image is not square.
        """
        labels = self.label_maps(draw, size, device)
        masks = choose_target(labels, draw.target, self.smallest, self.largest)
        return self.look.apply(labels, draw.look), masks

    @torch.no_grad()
    def label_maps(self, draw: Draw, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
        """The label maps (B, H, W), int64, that images and masks are made of; arguments and errors as :meth:`apply`."""
        if size[0] != size[1]:
            raise UserError(f"SynthFM's images are square, but {size[0]} x {size[1]} pixels are asked for.")
        labels = torch.zeros(len(draw), *size, dtype=torch.int64, device=device)
        for from_maps in (False, True):
            rows = (draw.from_maps == from_maps).nonzero()[:, 0]
            if not len(rows):
                continue
            if from_maps:
                made = self.gaps.apply(self.maps.apply(draw.maps[rows], size[0], device), draw.gaps[rows])
            else:
                made = self.shapes.apply(draw.shapes[rows], size, device)
            labels[rows.to(device)] = made
        return labels


def _scaled(settings: Any, factor: float, limits: dict[str, Limits]) -> Any:
    ranges = {name: scale_range(getattr(settings, name), factor, limit) for name, limit in limits.items()}
    return replace(settings, **ranges)


def _stacked(draws: list[Draw]) -> Draw:
    """One draw of several of one sample each; parts within parts as well."""
    found: dict[str, Any] = {}
    for name, first in vars(draws[0]).items():
        values = [getattr(draw, name) for draw in draws]
        found[name] = _stacked(values) if isinstance(first, Draw) else torch.cat(values)
    return Draw(**found)
