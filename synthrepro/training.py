"""What every method trains with: losses, batches, seeds."""

import hashlib
from collections.abc import Callable

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional as F


def soft_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One minus soft Dice of the softmax, over all classes, background included.

    As Learn2Synth's released code: squared denominators, a smoothing of (pixels / classes) in each class's numerator
    and denominator, a mean over classes and cases.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W), int64, values 0 to K - 1.
    """
    smooth = labels[0].numel() / logits.shape[1]
    loss = DiceLoss(softmax=True, to_onehot_y=True, squared_pred=True, smooth_nr=smooth, smooth_dr=smooth)
    return loss(logits, labels[:, None])


def logit_mse_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of the logits from +5 (the pixel's class) and -5 (every other).

    The loss of Learn2Synth's released commands (``logitmse``); shapes as :func:`soft_dice_loss`.
    """
    target = 10.0 * F.one_hot(labels, logits.shape[1]).movedim(-1, 1) - 5.0
    return F.mse_loss(logits, target.to(logits))


LOSSES = {"dice": soft_dice_loss, "logit_mse": logit_mse_loss}


@torch.no_grad()
def segment(network: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Most likely class of each pixel.

    Args:
        network: Gives logits (B, K, H, W); it is put into evaluation mode for the call.
        images: (N, C, H, W).

    Returns:
        Label maps (N, H, W), int64.
    """
    training = network.training
    network.eval()
    maps = torch.cat([network(part).argmax(1) for part in images.split(batch)])
    network.train(training)
    return maps


def seeded(build: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """Build a network whose initial weights depend on the generator alone.

    Modules draw their initial weights from the global random state, which is put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return build()


def stream(seed: int, name: str) -> torch.Generator:
    """The generator of one purpose of a seed, such as ``"weights"`` or ``"real 17"`` (step 17 of the real images).

    Arms that share a seed share its draws, and a killed run goes on at any step with no generator's state to restore.
    """
    digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
