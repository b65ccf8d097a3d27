r"""What decoders start from: SAM's own weights where somebody has them, else a small promptable baseline of our own.

The baseline is a small SAM, trained as SAM was on images that need no download: dead leaves, and crops of the
photographs that scikit-image ships, whose masks are those of an unsupervised segmentation. It is called "promptable
baseline (dead leaves)" and never SAM, which saw eleven million photographs and a billion masks.
"""

from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from synthrepro.data.photographs import Crops
from synthrepro.errors import UserError
from synthrepro.evidence import Config, Context
from synthrepro.methods.synthfm.segmenting import TrainSettings, train
from synthrepro.models.sam import OFFICIAL, SIZES, SamSize, align_attention, checkpoint_hash, embed, load_sam, sam
from synthrepro.synthesis.dead_leaves import DeadLeaves
from synthrepro.synthesis.label_maps import choose_target
from synthrepro.synthesis.prompts import BoxPrompts, PointPrompts
from synthrepro.training import seeded, stream


class SamSettings(Config):
    """Shape of the baseline's network; see :class:`~synthrepro.models.sam.SamSize`."""

    side: int
    patch: int
    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int
    prompt_dim: int
    mlp_dim: int
    decoder_heads: int

    def size(self) -> SamSize:
        """As the builders take it."""
        return SamSize(**self.model_dump())


class Prompting(Config):
    """Where images are prompted, in training and in tests; lengths in shares of the image's shorter side.

    Attributes:
        positive, negative: fewest and most points of a training image.
        margin: distance of positive points from the object's border.
        ring: distances between which negative points lie outside of it.
        jitter: most by which a side of a box is moved outwards, as in MedSAM.
    """

    positive: tuple[int, int]
    negative: tuple[int, int]
    margin: float
    ring: tuple[float, float]
    jitter: float

    def points(self) -> PointPrompts:
        """Of training images."""
        return PointPrompts(self.positive, self.negative, self.margin, self.ring)

    def boxes(self) -> BoxPrompts:
        """Of training images."""
        return BoxPrompts(self.jitter)


class Target(Config):
    """Area of the object that is asked for in a training image, in shares of the image."""

    smallest: float
    largest: float


class StartSettings(Config):
    """Configuration that a start depends on.

    Attributes:
        sam: shape of the baseline.
        pretrain: how it is trained.
        photographs: share of its images that are crops of photographs; the others are dead leaves.
        pretrainings: baselines; seed s starts from the one of seed s mod this.
        prompting: in its training too.
        target: of its training images too.
        checkpoints: "vit_b", "vit_l" or "vit_h" -> file with SAM's published weights, null where there is none.
    """

    sam: SamSettings
    pretrain: TrainSettings
    photographs: float
    pretrainings: int
    prompting: Prompting
    target: Target
    checkpoints: dict[str, str | None]


def start_spec(seed: int, config: StartSettings) -> dict[str, Any]:
    """What a baseline depends on; see :func:`train_promptable`."""
    names = {"sam", "pretrain", "photographs", "prompting", "target"}
    return config.model_dump(mode="json", include=names) | {"seed": seed % config.pretrainings}


def start(model: str, seed: int, config: StartSettings, context: Context) -> tuple[Sam, str]:
    """What decoders start from, on the CPU, and its address: a baseline's artefact, or SAM's checksum.

    Args:
        model: "promptable" for the baseline, or a key of `checkpoints`.

    Raises:
        UserError: SAM is asked for and its file is not named, cannot be read, or is not a published one.
    """
    if model == "promptable":
        folder = context.artefact("promptable", start_spec(seed, config))
        return load_sam(folder / "sam.pt", config.sam.size()), folder.name
    file = config.checkpoints.get(model)
    if file is None:
        raise UserError(f"Model {model!r} needs SAM's weights: name the file of {model} under `checkpoints`.")
    digest = checkpoint_hash(Path(file))
    if digest not in OFFICIAL.values():
        raise UserError(f"{file} does not have the checksum of a published checkpoint of SAM: download it again.")
    network = load_sam(Path(file), SIZES[model])
    address = f"sam-{digest[:16]}"
    context.artefacts = sorted({*context.artefacts, address})
    return network, address


def train_promptable(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `promptable`: a small SAM, trained as SAM was, without medical images and without SAM's photographs.

    Args:
        spec: sam, pretrain, photographs, prompting, target, seed.
        folder: Gets ``sam.pt``, its state, and ``trail.pt``, the loss of every tenth iteration.
    """
    shape = SamSettings(**spec["sam"])
    settings, prompting = TrainSettings(**spec["pretrain"]), Prompting(**spec["prompting"])
    seed, device = spec["seed"], context.device
    network: Any = seeded(lambda: sam(shape.size()), stream(seed, "promptable")).to(device)
    align_attention(network)
    network.requires_grad_(True)

    def batches(k: int) -> tuple[Tensor, Tensor]:
        generator = stream(seed, f"pre-training images {k}")
        return natural(settings.batch, spec["photographs"], shape.side, Target(**spec["target"]), generator, device)

    trail = train(
        network,
        batches,
        lambda images: embed(network, images),
        prompting.points(),
        prompting.boxes(),
        settings,
        seed,
        context,
    )
    torch.save(network.state_dict(), folder / "sam.pt")
    torch.save(torch.tensor(trail), folder / "trail.pt")


def natural(
    count: int, photographs: float, side: int, target: Target, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A batch of crops of photographs and of dead leaves: (B, 3, side, side) in [0, 1], and masks (B, side, side)."""
    crops = round(count * photographs)
    parts = []
    if crops:
        cut = Crops()
        parts.append(cut.apply(cut.draw(crops, generator), (side, side)))
    if count > crops:
        leaves = DeadLeaves()
        parts.append(leaves.apply(leaves.draw(count - crops, generator), side, device))
    images = torch.cat([images.to(device) for images, _ in parts])
    maps = torch.cat([maps.to(device) for _, maps in parts])
    which = torch.rand(count, generator=generator)
    return images, choose_target(maps, which, target.smallest, target.largest)
