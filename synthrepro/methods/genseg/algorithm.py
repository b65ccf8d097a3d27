r"""The algorithm of GenSeg: pre-training the generator, one step of the three levels, and the joint training loop.

A is the generator's architecture :math:`\alpha`, G its weights, H the discriminator, S the segmenter; a prime marks
what has taken its step. In each iteration, after a step of the discriminator,

.. math::

    G' &= U\bigl(G, \nabla_G L_\text{GAN}(G, A, H)\bigr), \\
    S' &= U\bigl(S, \nabla_S [L_\text{seg}(S;\, x, y) + \gamma\, L_\text{seg}(S;\, G'_A(\tilde m), \tilde m)]\bigr), \\
    A &\leftarrow A - \eta\, \frac{d}{dA} L_\text{seg}(S';\, x_\text{val}, y_\text{val}) ,

with :math:`\tilde m` an augmented mask. The discriminator is a constant of the derivative: that :math:`H` would have
been another one for another :math:`A` is left out, as the paper's formulas leave it out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional as F

from synthrepro.bilevel import ChainStep, Level, Update, adam, chain, stateless
from synthrepro.evidence import Config, Context
from synthrepro.models import pix2pix
from synthrepro.synthesis.released_postprocessing import released_postprocessing
from synthrepro.training import stream

Tensors = dict[str, Tensor]
BETAS = (0.5, 0.999)  # of every Adam of the GAN, as pix2pix and the released scripts have it


class GanSettings(Config):
    """How generator and discriminator are built and trained alone."""

    size: tuple[int, int]  # pixels; equal, a power of two
    generator_features: int  # of the generator's first level and of the discriminator's (64 in pix2pix)
    discriminator_layers: int  # 3: a receptive field of 70 pixels
    search: Literal["up", "down", "both"]  # which convolutions are mixtures (the released 2-D code: up)
    dropout: float  # of the generator's inner levels, its only noise
    pretrain_steps: int
    pretrain_lr: float
    l1_weight: float  # 100 in pix2pix
    batch: int  # real pairs a step, and later as many generated ones


class Settings(GanSettings):
    """How generator, discriminator, segmenter and architecture are trained together."""

    steps: int  # of the segmenter
    segmenter_lr: float
    loss: Literal["dice", "jaccard"]  # beside cross-entropy (released: Dice for JSRT, Jaccard for ISIC)
    gamma: float  # weight of the generated pairs
    generator_lr: float  # also the discriminator's
    architecture_lr: float
    every: int  # the architecture steps once in so many iterations (1 in the paper)
    estimator: Literal["exact", "finite_difference"]


@dataclass(frozen=True)
class Gan:
    """Generator and discriminator; their own parameters are where training starts and where it puts what it found."""

    generator: pix2pix.Generator
    discriminator: pix2pix.PatchDiscriminator


@dataclass(frozen=True)
class Batch:
    """What one iteration looks at.

    Attributes:
        images, labels: real training pairs, (B, C, H, W) in [0, 1] and (B, H, W); for the GAN and the segmenter.
        masks: augmented label maps (B, H, W), to be painted.
        validation: real validation pairs.
        seed: of the generator's dropout and of the released code's post-processing.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    validation: tuple[Tensor, Tensor]
    seed: int


def segmentation_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Cross-entropy plus soft Dice or soft Jaccard of the foreground, per image, one pixel added above and below.

    With two classes this is the released scripts' binary cross-entropy with logits plus Dice (JSRT) or Jaccard (ISIC),
    the logit being the difference of the two.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W), int64.
    """
    jaccard = kind == "jaccard"
    one = 2 if jaccard else 1  # MONAI takes twice the overlap over twice the union
    loss = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, jaccard=jaccard, smooth_nr=one, smooth_dr=one
    )
    return loss(logits, labels[:, None])


def encode(labels: Tensor, classes: int) -> Tensor:
    """Label maps (B, H, W) as the generator's input, one channel a foreground class, -1 or 1: (B, K - 1, H, W).

    The released loaders hand out masks in 0 to 1.
    """
    return 2 * F.one_hot(labels, classes)[..., 1:].movedim(-1, 1).to(torch.get_default_dtype()) - 1


def paint(generator: nn.Module, params: Tensors, labels: Tensor, classes: int) -> Tensor:
    """Images in [0, 1] for label maps, (B, C, H, W). Normalisation and dropout act as in training, as in pix2pix.

    The released scripts mix value ranges here: the generator's tanh gives -1 to 1, the real images are in 0 to 1.
    """
    return (stateless(generator.train(), params, encode(labels, classes)) + 1) / 2


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Dropout draws from the global state: inside it starts from the seed, outside nothing is touched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def gan_losses(
    gan: Gan, params: Tensors, images: Tensor, labels: Tensor, classes: int, settings: GanSettings
) -> tuple[Tensor, Tensor]:
    """Generated images (B, C, H, W) in [0, 1], and what the generator loses by them: BCE + `l1_weight` x L1.

    The discriminator's own parameters are constants here.
    """
    masks = encode(labels, classes)
    fake = stateless(gan.generator.train(), params, masks)  # (B, C, H, W) in -1 to 1
    fixed = {name: p.detach() for name, p in gan.discriminator.named_parameters()}
    logits = stateless(gan.discriminator.train(), fixed, masks, fake)
    return (fake + 1) / 2, pix2pix.generator_loss(logits, fake, 2 * images - 1, settings.l1_weight)


def discriminator_step(
    gan: Gan,
    params: Tensors,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    classes: int,
) -> float:
    """One step of the discriminator on real and generated pairs; its loss."""
    masks = encode(labels, classes)
    with torch.no_grad():
        fake = stateless(gan.generator.train(), params, masks)
    optimiser.zero_grad()
    loss = pix2pix.discriminator_loss(gan.discriminator.train(), masks, 2 * images - 1, fake)
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def genseg_levels(
    gan: Gan,
    segmenter: nn.Module,
    params: dict[str, Tensors],
    updates: dict[str, Update],
    state: dict[str, Any],
    batch: Batch,
    classes: int,
    settings: Settings,
    *,
    as_coded: bool = False,
) -> list[Level]:
    """The two problems below the architecture, for :func:`synthrepro.bilevel.chain`.

    Args:
        params, updates, state: of "generator" (its weights without what is the hyperparameter) and "segmenter".
        as_coded: generated images as in the released ISIC script, detached, rounded to bytes and recoloured: nothing
            passes. (The JSRT script equalises them instead, but the real images with them.)
    """
    loss, gamma = settings.loss, settings.gamma

    def generator_loss(weights: Tensors, upstream: Any) -> Tensor:
        return gan_losses(gan, weights | upstream["hparams"], batch.images, batch.labels, classes, settings)[1]

    def segmenter_loss(weights: Tensors, upstream: Any) -> Tensor:
        images = paint(gan.generator, upstream["generator"] | upstream["hparams"], batch.masks, classes)
        if as_coded:
            images = released_postprocessing(images, stream(batch.seed, "postprocessing"), "isic").to(images)
        real = segmentation_loss(stateless(segmenter.train(), weights, batch.images), batch.labels, loss)
        return real + gamma * segmentation_loss(stateless(segmenter, weights, images), batch.masks, loss)

    losses = {"generator": generator_loss, "segmenter": segmenter_loss}
    return [Level(name, losses[name], params[name], updates[name], state[name]) for name in losses]


def genseg_step(
    gan: Gan,
    segmenter: nn.Module,
    params: dict[str, Tensors],
    hparams: Tensors,
    updates: dict[str, Update],
    state: dict[str, Any],
    batch: Batch,
    classes: int,
    settings: Settings,
    *,
    as_coded: bool = False,
) -> ChainStep:
    """One step of generator and segmenter, and the hypergradient of the validation loss after both.

    Args:
        hparams: the architecture parameters, or some of the generator's weights in their place.

    Others as :func:`genseg_levels`.
    """
    x, y = batch.validation

    def validation_loss(upstream: Any) -> Tensor:
        return segmentation_loss(stateless(segmenter.train(), upstream["segmenter"], x), y, settings.loss)

    with repeatable(batch.seed):
        levels = genseg_levels(gan, segmenter, params, updates, state, batch, classes, settings, as_coded=as_coded)
        return chain(levels, validation_loss, hparams, estimator=settings.estimator)


def plain_step(levels: list[Level], hparams: Tensors) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The same steps of generator and segmenter without a hypergradient: their parameters and states afterwards."""
    upstream: dict[str, Tensors] = {"hparams": hparams}
    state = {}
    for level in levels:
        params = {name: p.detach().requires_grad_() for name, p in level.params.items()}
        loss = level.loss(params, {name: _detached(values) for name, values in upstream.items()})
        gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        with torch.no_grad():
            before = level.update.init(params) if level.state is None else level.state
            stepped, state[level.name] = level.update.step(_detached(params), gradients, before)
        upstream[level.name] = stepped
    del upstream["hparams"]
    return upstream, state


def pretrain(
    gan: Gan,
    pairs: Callable[[int], tuple[Tensor, Tensor]],
    classes: int,
    settings: GanSettings,
    seed: int,
    context: Context,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Train generator and discriminator in place on real pairs, the architecture fixed: pix2pix as it is.

    Args:
        pairs: step -> images (B, C, H, W) in [0, 1] and label maps (B, H, W).
        watch: called after each step with the number of steps done.
    """
    parts = {"generator": gan.generator, "discriminator": gan.discriminator}
    weights = pix2pix.weights(gan.generator)
    optimisers = {
        "generator": torch.optim.Adam(weights.values(), settings.pretrain_lr, BETAS),
        "discriminator": torch.optim.Adam(gan.discriminator.parameters(), settings.pretrain_lr, BETAS),
    }
    start = 0
    if saved := context.load("pretrain"):
        start = saved["step"]
        for name in parts:
            parts[name].load_state_dict(saved[name])
            optimisers[name].load_state_dict(saved[f"{name} optimiser"])
    everything: Tensors = dict(gan.generator.named_parameters())
    for i in context.progress(range(start, settings.pretrain_steps), "pix2pix"):
        images, labels = pairs(i)
        with repeatable(draw(seed, f"dropout {i}")):
            discriminator_step(gan, everything, optimisers["discriminator"], images, labels, classes)
            optimisers["generator"].zero_grad()
            gan_losses(gan, everything, images, labels, classes, settings)[1].backward()
            optimisers["generator"].step()
        watch(i + 1)
        if context.checkpoint_due():
            states = {name: part.state_dict() for name, part in parts.items()}
            states |= {f"{name} optimiser": each.state_dict() for name, each in optimisers.items()}
            context.save("pretrain", {"step": i + 1} | states)


Drive = Literal["validation", "gan", "none", "as-coded"]


def train_jointly(
    gan: Gan,
    segmenter: nn.Module,
    batches: Callable[[int], Batch],
    classes: int,
    settings: Settings,
    drive: Drive,
    hyper: Callable[[str], bool],
    context: Context,
    watch: Callable[[int], None] = lambda step: None,
) -> list[dict[str, float]]:
    """Train generator, discriminator, segmenter and architecture together, in place.

    Args:
        batches: step -> what the iteration looks at.
        drive: what moves the architecture. "validation": the hypergradient of the validation loss. "gan": the
            gradient of the generator's own loss on validation pairs, of first order. "none": nothing. "as-coded": as
            in the released ISIC script, nothing moves the architecture, and the segmenter takes two steps along its
            loss on validation images: one of Betty 0.2.0's that was meant to be undone, of length 0.01, and one of
            Adam at the rate of the architecture. (Left out: that optimiser's weight decay of 1e-5, and Betty's scaling
            of the first step by Adam's second moments. At the script's own rate for the segmenter, 1e-5, a step of
            0.01 weighs more than at a larger one.)
        hyper: says of each of the generator's parameters by name whether it is a hyperparameter. Other architecture
            parameters stay as they are, other weights train.
        watch: called after each step with the number of steps done, all networks holding their current parameters.

    Returns:
        A dictionary for each step of the architecture: losses, the hypergradient's length, and the cosines of its
        direct part and of what passes through the generator's weights.
    """
    generator, alpha = gan.generator, pix2pix.architecture(gan.generator)
    generator.requires_grad_(False)  # its own architecture takes part where it is no hyperparameter
    own = {name: p.detach().clone() for name, p in generator.named_parameters()}
    params = {
        "generator": {name: p for name, p in own.items() if not hyper(name) and name not in alpha},
        "segmenter": {name: p.detach().clone() for name, p in segmenter.named_parameters()},
    }
    hparams: Tensors = {name: p.requires_grad_() for name, p in own.items() if hyper(name)}
    updates = {"generator": adam(settings.generator_lr, BETAS), "segmenter": adam(settings.segmenter_lr)}
    state: dict[str, Any] = {name: updates[name].init(params[name]) for name in params}
    critic = torch.optim.Adam(gan.discriminator.parameters(), settings.generator_lr, BETAS)
    upper = torch.optim.Adam(hparams.values(), settings.architecture_lr, BETAS) if hparams else None
    leak = adam(settings.architecture_lr, BETAS)
    leaked = leak.init(params["segmenter"])
    start, trail = 0, []
    if saved := context.load("joint"):
        start, trail = saved["step"], saved["trail"]
        params, state, leaked = (to(saved[name], context.device) for name in ("params", "state", "leaked"))
        gan.discriminator.load_state_dict(saved["discriminator"])
        critic.load_state_dict(saved["critic"])
        with torch.no_grad():
            for name, p in hparams.items():
                p.copy_(saved["hparams"][name])
        if upper is not None:
            upper.load_state_dict(saved["upper"])
    for i in context.progress(range(start, settings.steps), "joint training"):
        batch = batches(i)
        # Not in the first iteration: an Adam step from a fresh state has a derivative that means nothing.
        due = (i + 1) % settings.every == 0 and i > 0
        with repeatable(batch.seed):
            discriminator_step(gan, params["generator"] | hparams, critic, batch.images, batch.labels, classes)
        if due and drive == "validation":
            step = genseg_step(gan, segmenter, params, hparams, updates, state, batch, classes, settings)
            params, state = step.params, step.state
            trail.append(_point(step))
            _move(upper, hparams, step.hypergradient)
        else:
            levels = genseg_levels(
                gan, segmenter, params, updates, state, batch, classes, settings, as_coded=drive == "as-coded"
            )
            with repeatable(batch.seed):
                params, state = plain_step(levels, _detached(hparams))
        if due and drive == "gan":
            with repeatable(batch.seed):
                loss = gan_losses(gan, params["generator"] | hparams, *batch.validation, classes, settings)[1]
            gradients = torch.autograd.grad(loss, list(hparams.values()))
            _move(upper, hparams, dict(zip(hparams, gradients, strict=True)))
        if drive == "as-coded":
            params["segmenter"], leaked = _leak(segmenter, params["segmenter"], leak, leaked, batch, settings)
        put(generator, params["generator"] | _detached(hparams))
        put(segmenter, params["segmenter"])
        watch(i + 1)
        if context.checkpoint_due():
            saved = {"step": i + 1, "trail": trail, "params": params, "state": state, "leaked": leaked}
            saved |= {"hparams": _detached(hparams), "discriminator": gan.discriminator.state_dict()}
            saved |= {"critic": critic.state_dict(), "upper": upper.state_dict() if upper else {}}
            context.save("joint", saved)
    return trail


def _leak(
    segmenter: nn.Module, params: Tensors, update: Update, state: Any, batch: Batch, settings: Settings
) -> tuple[Tensors, Any]:
    """What the released ISIC script does to the segmenter in place of moving the architecture."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    x, y = batch.validation
    loss = segmentation_loss(stateless(segmenter.train(), leaves, x), y, settings.loss)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        moved = {n: p - 0.01 / length * g for (n, p), g in zip(params.items(), gradients, strict=True)}
        return update.step(moved, dict(zip(params, gradients, strict=True)), state)


def _move(optimiser: torch.optim.Optimizer | None, hparams: Tensors, gradient: Tensors) -> None:
    assert optimiser is not None
    for name, p in hparams.items():
        p.grad = gradient[name]
    optimiser.step()


def _point(step: ChainStep) -> dict[str, float]:
    def length(part: Tensors) -> float:
        return float(torch.stack([d.square().sum() for d in part.values()]).sum().sqrt())

    cosines = step.cosines
    return {
        "generator": float(step.losses["generator"]),
        "segmenter": float(step.losses["segmenter"]),
        "validation": float(step.outer_loss),
        "hypergradient": length(step.hypergradient),
        "direct": length(step.direct),
        "through_weights": length(step.through_weights),
        "cosine_direct": cosines["direct"],
        "cosine_through_weights": cosines["through_weights"],
    }


def draw(seed: int, name: str) -> int:
    """A number for one purpose of a seed, to seed what has no generator of its own."""
    return int(torch.randint(2**62, (), generator=stream(seed, name)))


def put(module: nn.Module, params: Tensors) -> None:
    """Write parameters into a module."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, p in params.items():
            own[name].copy_(p)


def to(tree: Any, device: torch.device) -> Any:
    """A nest of dictionaries with its tensors on the device."""
    if isinstance(tree, dict):
        return {key: to(value, device) for key, value in tree.items()}
    return tree.to(device) if isinstance(tree, Tensor) else tree


def _detached(params: Tensors) -> Tensors:
    return {name: p.detach() for name, p in params.items()}
