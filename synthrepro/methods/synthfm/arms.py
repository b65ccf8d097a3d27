r"""Every arm of the comparison: what each starts from, what it is trained on, and that training, shared by all cells.

A decoder trained without medical images is one and the same for all tasks and prompts, so cells differ in what they are
tested on and share what was trained (artefact `decoder`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from synthrepro.data import Split, Task, check_task, load_task
from synthrepro.evidence import Cell, Context
from synthrepro.methods.synthfm.segmenting import Kind, Loss, TrainSettings, train, unfrozen
from synthrepro.methods.synthfm.starts import StartSettings, Target, natural, start
from synthrepro.methods.synthfm.structures import Structures, structures_of
from synthrepro.models.sam import SIZES, align_attention, embed, freeze_encoder, fresh_decoder, sam
from synthrepro.synthesis.shapes_to_image import ShapesToImage
from synthrepro.training import seeded, stream


@dataclass(frozen=True)
class Arm:
    """What an arm is.

    Attributes:
        label: as tables name it.
        images: what it is trained on: "synthetic" images of SynthFM, "leaves" (dead leaves), "medical" images with
            their labels, or None for a start that is taken as it is.
        boundary: share of the synthetic images that the boundary-aware module makes.
        encoder: "frozen", "trained" or "random" (and frozen).
        decoder: whether mask decoder and prompt encoder begin anew: "fresh" the mask decoder, "both", or "kept".
        loss: see :func:`~synthrepro.methods.synthfm.segmenting.loss_of`; None for that of the configuration.
        kinds: prompts it is trained with; None for those of the configuration.
    """

    label: str
    images: Literal["synthetic", "leaves", "medical"] | None = "synthetic"
    boundary: float = 0.5
    encoder: Literal["frozen", "trained", "random"] = "frozen"
    decoder: Literal["fresh", "both", "kept"] = "fresh"
    loss: Loss | None = None
    kinds: tuple[Kind, ...] | None = None


ARMS = {
    "start": Arm("what it started from", images=None, decoder="kept"),
    "synthfm": Arm("SynthFM"),
    "shape-only": Arm("SynthFM, shape-aware module only", boundary=0.0),
    "boundary-only": Arm("SynthFM, boundary-aware module only", boundary=1.0),
    "fine-tuned-encoder": Arm("SynthFM, encoder trained too", encoder="trained"),
    "random-encoder": Arm("SynthFM on a random encoder", encoder="random"),
    "fresh-prompts": Arm("SynthFM, prompt encoder anew", decoder="both"),
    "boxes": Arm("SynthFM, trained with boxes and masks too", kinds=("points", "box", "mask")),
    "dice-only": Arm("SynthFM, Dice loss alone", loss="dice"),
    "dead-leaves": Arm("decoder trained on dead leaves", images="leaves"),
    "supervised": Arm("supervised, as MedSAM", images="medical", encoder="trained", decoder="kept"),
}

POOL_BATCH = 16  # images that are drawn together
RANGES = {"halved": 0.5, "ours": 1.0, "doubled": 2.0}  # widths of the generator's ranges


class ArmSettings(StartSettings):
    """Configuration that an arm's training depends on.

    Attributes:
        train: how arms are trained.
        pool: drawn images that are made once, of which every iteration takes some at random; a frozen encoder encodes
            them once, too. null for new images in every iteration, as the paper has it.
        tasks: name of a task -> its options.
        supervised: "embedded" and "real" -> tasks whose training images a supervised arm learns from, which are those
            of the family of the task it is tested on; all of them must be there.
    """

    train: TrainSettings
    pool: int | None
    tasks: dict[str, dict[str, Any]]
    supervised: dict[str, tuple[str, ...]]


def task_of(name: str, config: ArmSettings) -> Task:
    """A task with the configuration's options."""
    return load_task(name, **config.tasks.get(name, {}))


def as_it_starts(arm: Arm, model: str, seed: int, config: StartSettings, context: Context) -> tuple[Sam, str]:
    """An arm's SAM as its training starts, on the CPU, with what is frozen frozen, and the address of its start."""
    network, address = start(model, seed, config, context)
    if arm.encoder == "random":
        fresh: Any = seeded(lambda: sam(network.size), stream(seed, "encoder"))
        network.image_encoder = fresh.image_encoder
    if arm.decoder != "kept":
        fresh_decoder(network, stream(seed, "decoder"), "fresh" if arm.decoder == "both" else "kept")
        align_attention(network)
    network.requires_grad_(True)
    if arm.encoder != "trained":
        freeze_encoder(network)
    if arm.decoder != "both":  # MedSAM keeps the prompt encoder as it is, too
        network.prompt_encoder.requires_grad_(False)
    return network, address


def trained(cell: Cell, task: str, config: ArmSettings, context: Context) -> Sam:
    """A cell's SAM, trained now unless another cell has done it.

    Args:
        task: Name of the task that is tested on; only a supervised arm's training depends on it.
    """
    arm, model = ARMS[cell.method], str(cell.setting["model"])
    network, address = as_it_starts(arm, model, cell.seed, config, context)
    if arm.images is not None:
        spec: dict[str, Any] = {"method": cell.method, "model": model, "seed": cell.seed, "start": address}
        spec |= {"config": only(config, arm, model, task), "ranges": "ours", "data": {}}
        if arm.images == "synthetic":
            spec["ranges"] = cell.setting["ranges"]
        if arm.images == "medical":
            for each in config.supervised[check_task(task).family]:
                context.data(task_of(each, config))
                spec["data"][each] = context.data_hashes[each]
        saved = torch.load(context.artefact("decoder", spec) / "trained.pt", weights_only=True)
        missing, unknown = network.load_state_dict(saved, strict=False)
        assert not unknown, "the same network was saved"
        assert all(name.startswith("image_encoder.") for name in missing), "only a frozen encoder is not saved"
    return network.to(context.device).eval()


def only(config: ArmSettings, arm: Arm, model: str, task: str) -> dict[str, Any]:
    """The configuration as JSON, without what this arm's training does not depend on."""
    dump = config.model_dump(mode="json", include=set(ArmSettings.model_fields))
    if arm.kinds:
        dump["train"]["kinds"] = list(arm.kinds)
    if arm.loss:
        dump["train"]["loss"] = arm.loss
    if arm.images == "medical":
        dump["pool"] = None
    dump["checkpoints"] = {name: file for name, file in dump["checkpoints"].items() if name == model}
    names: tuple[str, ...] = ()
    dump["supervised"] = {}
    if arm.images == "medical":
        family = check_task(task).family
        names = config.supervised[family]
        dump["supervised"] = {family: list(names)}
    dump["tasks"] = {name: options for name, options in dump["tasks"].items() if name in names}
    return dump


def train_decoder(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `decoder`: what an arm has trained.

    Args:
        spec: method, model, seed, ranges (key of `RANGES`), config (:class:`ArmSettings`), start (address of what it
            starts from, so that another start makes another decoder), data (hashes of the tasks it learns from).
        folder: Gets ``trained.pt``, the state of all but a frozen encoder, and ``trail.pt``, the loss of every tenth
            iteration.
    """
    arm, seed, device = ARMS[spec["method"]], spec["seed"], context.device
    config = ArmSettings(**spec["config"])
    network, _ = as_it_starts(arm, spec["model"], seed, config, context)
    network.to(device)
    batch, side, target = config.train.batch, network.image_encoder.img_size, config.target

    def images_of(k: int) -> tuple[Tensor, Tensor]:
        if arm.images == "medical":
            return medical(sources, batch, seed, k, device)
        return drawn(arm, spec["ranges"], batch, side, target, stream(seed, f"images {k}"), device)

    batches: Any = images_of
    encode: Any = lambda images: embed(network, images)  # noqa: E731
    if arm.images == "medical":
        tasks = [task_of(name, config) for name in spec["data"]]
        splits = [(task.splits["train"], len(task.classes)) for task in tasks]
        sources = [(split, structures_of(split, classes, target.smallest)) for split, classes in splits]
    elif config.pool is not None:
        images, masks = pooled(arm, spec, config, context)
        if arm.encoder != "trained":
            encode = kept_embeddings(network, images, batch, config.train.precision, context)

        def batches(k: int) -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(masks), (batch,), generator=stream(seed, f"pool {k}"))
            return rows if arm.encoder != "trained" else images[rows].float().to(device), masks[rows].long().to(device)

    prompting = config.prompting
    trail = train(network, batches, encode, prompting.points(), prompting.boxes(), config.train, seed, context)
    torch.save({name: value.cpu() for name, value in unfrozen(network).items()}, folder / "trained.pt")
    torch.save(torch.tensor(trail), folder / "trail.pt")


def drawn(
    arm: Arm, ranges: str, count: int, side: int, target: Target, random: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A batch of an arm's drawn images: (B, 1 or 3, side, side) in [0, 1], and masks (B, side, side)."""
    if arm.images == "leaves":
        return natural(count, 0.0, side, target, random, device)
    generator = ShapesToImage(boundary=arm.boundary, smallest=target.smallest, largest=target.largest)
    return generator.scaled(RANGES[ranges])(count, (side, side), random, device)


def pooled(arm: Arm, spec: dict[str, Any], config: ArmSettings, context: Context) -> tuple[Tensor, Tensor]:
    """So many drawn images, float16, and their masks, uint8, which arms that want the same ones share."""
    side = config.sam.side if spec["model"] == "promptable" else SIZES[spec["model"]].side
    wanted = {"images": arm.images, "boundary": arm.boundary, "ranges": spec["ranges"], "side": side}
    wanted |= {"count": config.pool, "target": config.target.model_dump(), "seed": spec["seed"]}
    file = context.artefact("images", wanted) / "images.pt"
    found = torch.load(file, weights_only=True, mmap=True)
    return found["images"], found["masks"]


def draw_images(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `images`: drawn images, made once.

    Args:
        spec: images, boundary, ranges, side, count, target, seed.
        folder: Gets ``images.pt``: images (N, C, side, side), float16, and masks (N, side, side), uint8.
    """
    arm = Arm("", images=spec["images"], boundary=spec["boundary"])
    parts = []
    for k in context.progress(range(-(-spec["count"] // POOL_BATCH)), "drawing"):
        target, random = Target(**spec["target"]), stream(spec["seed"], f"images {k}")
        images, masks = drawn(arm, spec["ranges"], POOL_BATCH, spec["side"], target, random, context.device)
        parts.append((images.half().cpu(), masks.to(torch.uint8).cpu()))
    images, masks = (torch.cat(part)[: spec["count"]] for part in zip(*parts, strict=True))
    torch.save({"images": images, "masks": masks}, folder / "images.pt")


@torch.no_grad()
def kept_embeddings(network: Sam, images: Tensor, batch: int, precision: str, context: Context) -> Any:
    """Rows of images -> their embeddings, which a frozen encoder makes once; kept on the CPU."""
    device, parts = context.device, []
    for rows in context.progress(torch.arange(len(images)).split(batch), "encoding"):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(embed(network, images[rows].float().to(device)).float().cpu())
    embeddings = torch.cat(parts)
    return lambda rows: embeddings[rows].to(device)


def medical(
    sources: list[tuple[Split, Structures]], count: int, seed: int, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Batch k of the supervised arm, of one task: images (B, 1, H, W), and masks (B, H, W) of one structure of each.

    Tasks take turns at random, however many images they have, and so do the structures of a task.
    """
    generator = stream(seed, f"medical {k}")
    split, structures = sources[int(torch.randint(len(sources), (), generator=generator))]
    rows = structures.sample(count, generator)
    return split.images[structures.images[rows]].to(device), structures.masks(rows).to(device)
