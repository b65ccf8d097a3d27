"""Signal equations against closed forms and against a Bloch simulation; noise against its known moments."""

import math

import pytest
import torch
from torch import Tensor

from synthrepro.data.mri import TISSUES, Tissue, flash, mprage, rescale, rician

FLASH = {"tr": 20.0, "te": 5.0}
MPRAGE = {"flip": 9.0, "tr": 2300.0, "ti": 900.0, "echo_spacing": 7.0, "pulses": 176, "te": 3.0}


def maps(tissue: Tissue) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.tensor([value], dtype=torch.float64) for value in (tissue.t1, tissue.t2_star, tissue.pd))


@pytest.mark.parametrize("name", TISSUES)
def test_flash_is_brightest_at_the_ernst_angle(name: str):
    tissue = TISSUES[name]
    ernst = math.degrees(math.acos(math.exp(-FLASH["tr"] / tissue.t1)))
    angles = [ernst - 0.1, ernst, ernst + 0.1]
    below, peak, above = (float(flash(*maps(tissue), flip=angle, **FLASH)) for angle in angles)
    assert peak > below
    assert peak > above


def test_flash_with_full_recovery_is_the_proton_density_times_the_echo_decay():
    tissue = TISSUES["WM"]
    signal = flash(*maps(tissue), flip=90.0, tr=1e5, te=5.0)
    assert float(signal) == pytest.approx(tissue.pd * math.exp(-5.0 / tissue.t2_star))


def test_flash_agrees_with_a_train_of_spoiled_pulses():
    tissue, angle = TISSUES["GM"], math.radians(20.0)
    m = 1.0
    for _ in range(2000):
        signal = m * math.sin(angle)
        m = 1 - (1 - m * math.cos(angle)) * math.exp(-FLASH["tr"] / tissue.t1)
    expected = tissue.pd * signal * math.exp(-FLASH["te"] / tissue.t2_star)
    assert float(flash(*maps(tissue), flip=20.0, **FLASH)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("flip", "brighter", "darker"), [(3.0, "GM", "WM"), (30.0, "WM", "GM")])
def test_grey_and_white_matter_swap_brightness_between_3_and_30_degrees(flip: float, brighter: str, darker: str):
    signal = {name: float(flash(*maps(TISSUES[name]), flip=flip, **FLASH)) for name in ("GM", "WM")}
    assert signal[brighter] > 1.1 * signal[darker]


@pytest.mark.parametrize("name", TISSUES)
def test_mprage_agrees_with_a_pulse_by_pulse_simulation(name: str):
    tissue, angle = TISSUES[name], math.radians(MPRAGE["flip"])
    decay = lambda time: math.exp(-time / tissue.t1)  # noqa: E731
    half = MPRAGE["pulses"] // 2
    m = 1.0
    for _ in range(50):  # cycles, to the steady state
        m = 1 - (1 + m) * decay(MPRAGE["ti"] - half * MPRAGE["echo_spacing"])
        for pulse in range(MPRAGE["pulses"]):
            if pulse == half:
                centre = m * math.sin(angle)
            m = 1 - (1 - m * math.cos(angle)) * decay(MPRAGE["echo_spacing"])
        m = 1 - (1 - m) * decay(MPRAGE["tr"] - MPRAGE["ti"] - half * MPRAGE["echo_spacing"])
    expected = abs(tissue.pd * centre) * math.exp(-MPRAGE["te"] / tissue.t2_star)
    assert float(mprage(*maps(tissue), **MPRAGE)) == pytest.approx(expected, rel=1e-9)


def test_mprage_is_t1_weighted():
    csf, gm, wm = (float(mprage(*maps(TISSUES[name]), **MPRAGE)) for name in ("CSF", "GM", "WM"))
    assert csf < 0.6 * gm < 0.6 * wm


def test_mprage_refuses_a_train_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        mprage(*maps(TISSUES["GM"]), **(MPRAGE | {"pulses": 400}))


def test_rician_noise_has_the_moments_of_its_distribution():
    draws = torch.Generator().manual_seed(0)
    sigma = 0.07
    background = rician(torch.zeros(400, 400), sigma, draws)  # Rayleigh
    assert float(background.mean()) == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.01)
    assert float(background.var()) == pytest.approx((2 - math.pi / 2) * sigma**2, rel=0.02)
    tissue = rician(torch.full((400, 400), 0.8), sigma, draws)
    assert float((tissue**2).mean()) == pytest.approx(0.8**2 + 2 * sigma**2, rel=0.002)
    assert float(tissue.std()) == pytest.approx(sigma, rel=0.01)


def test_rescaling_forgets_the_unit_and_the_brightest_pixel():
    image = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = rescale(image)
    spiked = 7.0 * image
    spiked[:, 0, 0] = 1e3
    inner = expected[:, 1:, 1:]
    torch.testing.assert_close(rescale(spiked)[:, 1:, 1:], inner, rtol=1e-3, atol=0)
    assert (expected > 1).float().mean() < 0.006
    assert rescale(torch.zeros(1, 8, 8)).isfinite().all()
