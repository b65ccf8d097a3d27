"""MR physics: tissue constants, gradient-echo signal equations, receive-chain noise.

Times are in milliseconds, angles in degrees, signals in units of the equilibrium magnetisation of pure water.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tissue:
    """T1 and T2* in ms, and proton density relative to cerebrospinal fluid, at 3 T."""

    t1: float
    t2_star: float
    pd: float


# Grey and white matter T1 and T2* (mean of the frontal and occipital values): Wansapura et al., "NMR relaxation times
# in the human brain at 3.0 tesla", J Magn Reson Imaging 9:531-538 (1999).
# T1 of CSF, which hardly depends on the field: Rooney et al., Magn Reson Med 57:308-318 (2007).
# Proton density: water contents .97, .78, .65 g/ml of Ernst, Kreis and Ross, J Magn Reson B 102:1-8 (1993), over CSF's.
# T2* of CSF is our assumption; above 200 ms it changes the signal at TE = 5 ms by less than 3 %.
TISSUES = {
    "CSF": Tissue(t1=4300.0, t2_star=400.0, pd=1.0),
    "GM": Tissue(t1=1331.0, t2_star=46.7, pd=0.78 / 0.97),
    "WM": Tissue(t1=832.0, t2_star=46.6, pd=0.65 / 0.97),
}


def flash(t1: Tensor, t2_star: Tensor, pd: Tensor, *, flip: float, tr: float, te: float) -> Tensor:
    """Steady-state signal of a spoiled gradient echo (FLASH): the Ernst equation.

        S = PD sin(a) (1 - E1) / (1 - cos(a) E1) exp(-TE / T2*),   E1 = exp(-TR / T1)

    Args:
        t1, t2_star, pd: tissue maps of one shape; ms, ms, relative proton density.
        flip: flip angle a, degrees.
        tr, te: repetition and echo time, ms.

    Source: Ernst and Anderson, Rev Sci Instrum 37:93-102 (1966); Haase et al., J Magn Reson 67:258-266 (1986).
    """
    angle = math.radians(flip)
    e1 = torch.exp(-tr / t1)
    return pd * math.sin(angle) * (1 - e1) / (1 - math.cos(angle) * e1) * torch.exp(-te / t2_star)


def mprage(
    t1: Tensor, t2_star: Tensor, pd: Tensor, *, flip: float, tr: float, ti: float, echo_spacing: float, pulses: int,
    te: float,
) -> Tensor:  # fmt: skip
    """Magnitude of the steady-state MPRAGE signal at the centre of k-space.

    A cycle of length `tr` is an ideal inversion, a delay, a train of `pulses` spoiled excitations `echo_spacing` apart
    whose middle one falls `ti` after the inversion, and free recovery. Each part maps the longitudinal magnetisation
    (per unit of equilibrium) affinely, so the steady state is the fixed point of the cycle.

    Args:
        t1, t2_star, pd: tissue maps of one shape; ms, ms, relative proton density.
        flip: flip angle of the train, degrees.
        tr, ti, echo_spacing, te: ms; the train must fit into the cycle.
        pulses: excitations a train.

    Raises:
        ValueError: the train does not fit between inversion and end of cycle.

    Source: Mugler and Brookeman, Magn Reson Med 15:152-157 (1990); the recursion is that of Deichmann et al.,
    NeuroImage 12:112-127 (2000).
    """
    half = pulses // 2
    delay, recovery = ti - half * echo_spacing, tr - ti - (pulses - half) * echo_spacing
    if delay < 0 or recovery < 0:
        raise ValueError(
            f"a train of {pulses} pulses {echo_spacing} ms apart centred at TI = {ti} ms does not fit in TR = {tr} ms."
        )
    angle = math.radians(flip)
    e1 = torch.exp(-echo_spacing / t1)
    shrink = math.cos(angle) * e1

    def relax(m: Tensor, time: float) -> Tensor:
        return 1 - (1 - m) * torch.exp(-time / t1)

    def train(m: Tensor, n: int) -> Tensor:
        return m * shrink**n + (1 - e1) * (1 - shrink**n) / (1 - shrink)

    def cycle(m: Tensor) -> Tensor:
        return relax(train(relax(-m, delay), pulses), recovery)

    offset = cycle(torch.zeros_like(t1))
    steady = offset / (1 - (cycle(torch.ones_like(t1)) - offset))
    at_centre = train(relax(-steady, delay), half)
    return (pd * math.sin(angle) * at_centre * torch.exp(-te / t2_star)).abs()


def rician(signal: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Magnitude of `signal` with independent Gaussian noise N(0, sigma^2) on the real and the imaginary channel.

    Source: Gudbjartsson and Patz, Magn Reson Med 34:910-914 (1995).
    """
    noise = sigma * torch.randn(2, *signal.shape, generator=generator)
    return torch.hypot(signal + noise[0], noise[1])


def rescale(images: Tensor) -> Tensor:
    """Divide every image by its own 99.5th percentile, so that the bright tissue is near 1, whatever the units.

    Args:
        images: (..., H, W), not negative. A percentile of the pixels, not the maximum: one noisy pixel sets no scale.
    """
    pixels = images.flatten(-2)
    rank = max(1, round(0.005 * pixels.shape[-1]))  # far cheaper than torch.quantile, which sorts
    top = pixels.topk(rank, dim=-1).values[..., -1, None, None]
    return images / top.clamp_min(torch.finfo(images.dtype).tiny)
