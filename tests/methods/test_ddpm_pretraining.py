"""Pre-training and sampling: the diffusion's closed forms, resuming, several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel

from synthrepro.evidence.context import Context
from synthrepro.methods import ddpm
from synthrepro.methods.ddpm import pretraining

SHAPE = {"multipliers": (1, 2), "blocks": 1, "attention": (), "head_channels": 4, "groups": 4}
ALPHA = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def settings(**changes) -> ddpm.PretrainSettings:
    found = {"steps": 12, "batch": 4, "lr": 2e-3, "last_lr": 2e-4, "ema": 0.9999, "checkpoints": (5,)}
    return ddpm.PretrainSettings(**found | {"precision": "no", "compile": False, "processes": 1} | changes)


def fresh(seed: int = 0) -> UNet2DModel:
    return ddpm.unet_of((16, 16), 4, ddpm.UNetSettings(**SHAPE), seed)


def images() -> torch.Tensor:
    return torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def weights(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in unet.state_dict().items()}


def train(context: Context, **changes) -> dict[int, dict[str, torch.Tensor]]:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    keep = lambda unet, k: kept.update({k: weights(unet)})  # noqa: E731
    ddpm.pretrain(fresh(), images(), settings(**changes), "noise", 3, context, keep)
    return kept


def test_diffusion_is_equation_two():
    x, noise = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    steps = torch.tensor([0, 400, 999])
    kept = ALPHA[steps].float()[:, None, None, None]
    torch.testing.assert_close(ddpm.diffuse(x, noise, steps), kept.sqrt() * x + (1 - kept).sqrt() * noise)


def test_a_batch_depends_on_seed_and_iteration_alone_and_flips_half():
    pictures = torch.zeros(6, 1, 4, 4)
    pictures[..., 0] = torch.arange(1.0, 7.0)[:, None, None] / 10  # the left column tells the image and the flip
    x, noise, steps = ddpm.batch_of(pictures, 4000, 1, 5)
    for again, there in zip(ddpm.batch_of(pictures, 4000, 1, 5), (x, noise, steps), strict=True):
        assert torch.equal(again, there)
    assert not torch.equal(ddpm.batch_of(pictures, 4000, 1, 6)[1], noise)
    flipped = x[:, 0, 0, 3] > -1
    assert flipped.float().mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    assert (x.amin(), x.amax()) == (-1.0, pytest.approx(2 * 0.6 - 1))
    assert steps.min() >= 0
    assert steps.max() <= 999
    assert steps.float().mean() == pytest.approx(499.5, abs=4 * 289 / 4000**0.5)
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_the_loss_is_that_of_the_noise_or_of_the_image():
    x, noise, steps = ddpm.batch_of(images(), 4, 0, 0)
    seen = []

    def unet(inputs, t):
        seen.append((inputs, t))
        return SimpleNamespace(sample=torch.zeros_like(inputs))

    assert ddpm.loss_of(unet, x, noise, steps, "noise") == pytest.approx(float(noise.square().mean()))
    assert torch.equal(seen[0][0], ddpm.diffuse(x, noise, steps))
    assert torch.equal(seen[0][1], steps)
    assert ddpm.loss_of(unet, x, noise, steps, "image") == pytest.approx(float(x.square().mean()))
    assert torch.equal(seen[1][0], x)
    assert not seen[1][1].any()


def test_the_rate_falls_linearly_and_the_average_lags(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))
    )
    kept = train(Context(tmp_path))
    assert rates == pytest.approx([2e-3 + (2e-4 - 2e-3) * k / 12 for k in range(12)])
    assert set(kept) == {5, 12}
    start = weights(fresh())
    moved = {k: sum(float((kept[k][name] - start[name]).square().sum()) for name in start) for k in kept}
    assert 0 < moved[5] < moved[12]


def test_the_moving_average_is_that_of_its_decay(tmp_path, monkeypatch):
    path, step = [], torch.optim.Adam.step
    unet = fresh()

    def note(self, *arguments, **options):
        step(self, *arguments, **options)
        path.append(weights(unet))

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    kept = {}
    config = settings(ema=0.3)
    average = weights(unet)
    ddpm.pretrain(unet, images(), config, "noise", 3, Context(tmp_path), lambda u, k: kept.update({k: weights(u)}))
    for k, there in enumerate(path):
        decay = 0.0 if k == 0 else min(0.3, (1 + k) / (10 + k))
        average = {name: decay * average[name] + (1 - decay) * there[name] for name in there}
    for name, value in average.items():
        torch.testing.assert_close(kept[12][name], value, msg=name)
        torch.testing.assert_close(unet.state_dict()[name], path[-1][name], msg="the weights themselves are put back")


KILLED = """
import sys, time
from pathlib import Path
from synthrepro.evidence import context
sys.path.insert(0, {tests!r})
from test_ddpm_pretraining import Context, torch, train
torch.set_num_threads({threads})
context.CHECKPOINT_SECONDS = 0.0
save, saved = Context.save, []
def slow(self, name, value):
    save(self, name, value)
    saved.append(name)
    time.sleep(60 if len(saved) == 3 else 0)
Context.save = slow
train(Context(Path({folder!r})))
"""


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    folder = tmp_path / "killed"
    places = {"tests": os.path.dirname(__file__), "folder": str(folder), "threads": torch.get_num_threads()}
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(**places)])

    def done() -> int:
        path = folder / "checkpoint.pt"
        return torch.load(path, weights_only=True)["step"] if path.exists() else 0

    while done() < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert done() == 3
    whole, resumed = train(Context(tmp_path / "whole")), train(Context(folder))
    assert list(whole) == list(resumed) == [5, 12]
    assert all(torch.equal(whole[k][name], resumed[k][name]) for k in whole for name in whole[k])


def test_trainings_of_other_precision_follow_one_another(tmp_path):
    for precision in ("bf16", "no"):
        assert set(train(Context(tmp_path / precision), precision=precision)) == {5, 12}


def spec(processes: int) -> dict:
    options = {"size": [16, 16], "cases": [1, 1, 1], "slices": 4, "unlabelled": 2, "unlabelled_slices": 4}
    config = json.loads(settings(processes=processes).model_dump_json())
    found = {"task": "abdomen", "options": options, "channels": 4, "objective": "noise", "seed": 0}
    return found | {"unet": SHAPE, "config": config, "data": "none"}


def test_two_processes_train_what_one_trains(tmp_path):
    folders = []
    for processes in (1, 2):
        folder = tmp_path / f"made-{processes}"
        folder.mkdir()
        ddpm.train_ddpm(spec(processes), folder, Context(tmp_path / f"scratch-{processes}"))
        folders.append(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["losses.pt", "step-12", "step-5"]
    x, steps = torch.randn(3, 1, 16, 16), torch.tensor([0, 300, 999])
    one, two, untrained = (
        unet(x, steps).sample for unet in [*(UNet2DModel.from_pretrained(f / "step-12") for f in folders), fresh()]
    )
    # of the outputs, not of the weights: Adam makes much of the rounding in a bias that a norm takes away again
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert (one - untrained).abs().max() > 0.01


class Gaussian(torch.nn.Module):
    """The best noise predictor there is for images of independent N(0, s^2) pixels."""

    device = torch.device("cpu")

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s = s

    def forward(self, x, t):
        kept = ALPHA[t].float()
        return SimpleNamespace(sample=(1 - kept).sqrt() * x / (kept * self.s**2 + 1 - kept))


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1000), ("ddim", 250), ("dpm-solver", 100)])
def test_every_sampler_draws_from_the_distribution_of_a_perfect_network(sampler, steps, tmp_path):
    drawn = 2 * ddpm.sample(Gaussian(0.25), 6, (40, 40), sampler, steps, 0, Context(tmp_path), batch=4) - 1
    assert drawn.shape == (6, 1, 40, 40)
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.std() == pytest.approx(0.25, rel=0.04)


def test_a_sample_is_that_of_its_seed(tmp_path):
    draws = [ddpm.sample(fresh(), 3, (16, 16), "ddpm", 5, seed, Context(tmp_path)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].min() >= 0
    assert draws[0].max() <= 1


def test_training_lowers_the_loss(tmp_path):
    config = settings(steps=100, lr=5e-3)
    pictures = images() * 0 + torch.linspace(0, 1, 16)
    losses = ddpm.pretrain(fresh(), pictures, config, "noise", 0, Context(tmp_path), lambda unet, k: None)
    assert len(losses) == 100
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


def test_the_schedulers_are_the_papers():
    for sampler in ("ddpm", "ddim", "dpm-solver"):
        torch.testing.assert_close(pretraining.scheduler_of(sampler).alphas_cumprod.double(), ALPHA, rtol=1e-4, atol=0)
