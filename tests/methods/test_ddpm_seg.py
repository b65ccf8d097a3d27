"""DDPM-Seg: what a pixel's features are, where they stand, and what the MLPs make of them."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthrepro.errors import UserError
from synthrepro.evidence import Context
from synthrepro.methods.ddpm.ddpm_seg import (
    DdpmSegSettings,
    Ensemble,
    FeatureFile,
    activations,
    ddpm_seg,
    file_bytes,
    pixel_features,
    predict,
    shared_noise,
    train_ensemble,
    usable,
    vote,
    widths,
    write_features,
)
from synthrepro.models.diffusion_unet import diffusion_unet
from synthrepro.training import seeded, stream

SETTINGS = DdpmSegSettings(
    blocks=(1, 2),
    steps=(50, 250),
    models=3,
    lr=1e-2,
    batch=64,
    first_epochs=1,
    patience=20,
    max_epochs=3,
    smallest=0,
    precision="float16",
)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """Two levels, four output blocks, the first two of them with attention and 16 channels."""
    return seeded(
        lambda: diffusion_unet(
            16, channels=8, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=8, groups=4, dropout=0.5
        ),
        stream(0, "unet"),
    )


def pictures(n: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Bright squares of different places and sizes in noise."""
    draws = torch.Generator().manual_seed(0)
    images, labels = 0.1 * torch.rand(n, 1, size, size, generator=draws), torch.zeros(n, size, size, dtype=torch.int64)
    for i in range(n):
        x, y = torch.randint(1, size // 2, (2,), generator=draws).tolist()
        labels[i, y : y + size // 3, x : x + size // 3] = 1
    return images + 0.8 * labels[:, None], labels


def test_features_are_the_outputs_of_the_unet_itself_resized(unet: nn.Module) -> None:
    images, noise = pictures(2)[0], shared_noise(16, 16)
    ups = unet.up_blocks
    # An output block is a ResBlock and its attention; the last one of a level ends with the ResBlock that upsamples.
    parts = [ups[0].attentions[0], ups[0].upsamplers[0], ups[1].resnets[0], ups[1].resnets[1]]
    seen: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda _, __, output: seen.append(output)) for part in parts]
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    unet.eval()
    with torch.no_grad():
        for t in (50, 250):
            kept = (1 - beta)[: t + 1].prod()
            noisy = kept.sqrt() * (2 * images - 1) + (1 - kept).sqrt() * noise
            unet(noisy.float(), t)
    for hook in hooks:
        hook.remove()
    wanted = torch.cat([F.interpolate(o, (16, 16), mode="bilinear") for o in seen], 1)
    unet.train()  # its dropout must not matter
    found = pixel_features(unet, images, (0, 1, 2, 3), (50, 250), noise)
    assert found.shape == (2, 2 * (16 + 16 + 8 + 8), 16, 16)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    some = pixel_features(unet, images, (3, 1), (250,), noise)  # the order in which blocks are asked for is no matter
    torch.testing.assert_close(some, torch.cat([wanted[:, 64:80], wanted[:, 88:]], 1), rtol=1e-4, atol=1e-4)


def test_nothing_runs_above_the_highest_block(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(unet.up_blocks[1].resnets[1], "forward", never)
    pixel_features(unet, pictures(1)[0], (1, 2), (50,), shared_noise(16, 16))
    with pytest.raises(AssertionError):
        pixel_features(unet, pictures(1)[0], (3,), (50,), shared_noise(16, 16))


def test_in_the_papers_shape_a_pixel_has_33_times_c_features() -> None:
    """8448 for c = 256, so 33 c; of the blocks, 4c, 2c, 2c, 2c and c at each of three steps."""
    c = 8
    paper = diffusion_unet(32, channels=c, attention=(4, 2, 1), head_channels=8, groups=4)
    blocks, steps = (5, 6, 7, 8, 12), (50, 150, 250)
    assert widths(paper, blocks, steps) == 3 * [4 * c, 2 * c, 2 * c, 2 * c, c]
    found = pixel_features(paper, torch.rand(1, 1, 32, 32), blocks, steps, shared_noise(32, 32))
    assert found.shape == (1, 33 * c, 32, 32)
    assert 33 * 256 == 8448


def test_the_file_of_the_papers_40_images_has_44_gigabytes() -> None:
    assert file_bytes(40, 256, 256, 8448, "float16") == 40 * 65536 * 8448 * 2 == 44_291_850_240
    assert file_bytes(40, 256, 256, 8448, "float32") == 88_583_700_480


def test_all_images_share_the_noise(unet: nn.Module) -> None:
    image, noise = pictures(1)[0], shared_noise(16, 16)
    assert noise.shape == (1, 1, 16, 16)
    assert torch.equal(noise, shared_noise(16, 16))
    assert abs(float(shared_noise(64, 64).std()) - 1) < 0.05
    twice = pixel_features(unet, image.repeat(2, 1, 1, 1), (2,), (900,), noise)
    torch.testing.assert_close(twice[0], twice[1])
    other = pixel_features(unet, image, (2,), (900,), -noise)
    assert (other[0] - twice[0]).abs().mean() > 0.1 * twice.abs().mean()


def test_the_file_holds_the_features_a_row_a_pixel(unet: nn.Module, tmp_path: Path) -> None:
    images, noise = pictures(3)[0], shared_noise(16, 16)
    for precision, error in (("float32", 0.0), ("float16", 2**-10)):
        settings = SETTINGS.model_copy(update={"precision": precision})
        file = write_features(unet, images, settings, noise, Context(tmp_path / precision))
        mapped = np.load(tmp_path / precision / "features.npy", mmap_mode="r")
        assert mapped.dtype == precision
        # Images one by one: the kernels' order of summation depends on the batch.
        one = [pixel_features(unet, image[None], settings.blocks, settings.steps, noise) for image in images]
        rows = torch.cat(one).movedim(1, -1).flatten(0, 2)  # (3 H W, D)
        assert mapped.shape == rows.shape
        torch.testing.assert_close(torch.from_numpy(mapped.astype("f4")), rows, rtol=error, atol=1e-6)
        chosen = torch.tensor([767, 0, 300, 300])
        assert np.array_equal(file.read(chosen).numpy(), mapped[chosen.numpy()])


def test_a_killed_run_computes_only_the_missing_images(
    unet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, noise = pictures(3)[0], shared_noise(16, 16)
    write_features(unet, images, SETTINGS, noise, Context(tmp_path / "whole"))
    write, written = FeatureFile.write, []

    def dies(self: FeatureFile, image: int, features: Tensor) -> None:
        written.append(image)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(self, image, features)

    monkeypatch.setattr(FeatureFile, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        write_features(unet, images, SETTINGS, noise, Context(tmp_path / "cut"))
    write_features(unet, images, SETTINGS, noise, Context(tmp_path / "cut"))
    assert written == [0, 1, 2, 2]
    whole, cut = (np.load(tmp_path / name / "features.npy") for name in ("whole", "cut"))
    assert np.array_equal(whole, cut)


def test_a_full_disk_is_noticed_beforehand(unet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = file_bytes(3, 16, 16, 48, "float16")
    full = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full._replace(free=needed - 1))
    with pytest.raises(UserError, match=re.escape("features of 3 images need 0.0 GB")):
        write_features(unet, pictures(3)[0], SETTINGS, shared_noise(16, 16), Context(tmp_path))
    assert not (tmp_path / "features.npy").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full._replace(free=needed))
    write_features(unet, pictures(3)[0], SETTINGS, shared_noise(16, 16), Context(tmp_path))


def test_features_beyond_half_precision_are_an_error(tmp_path: Path) -> None:
    file = FeatureFile.create(tmp_path / "features.npy", 4, 2, "float16")
    file.write(0, torch.full((2, 2, 2), 65504.0))
    with pytest.raises(UserError, match="beyond the range of float16"):
        file.write(0, torch.full((2, 2, 2), 70000.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks": (1, 4)}, "no output block 4: this UNet has 4"),
        ({"blocks": (-1,)}, "no output block -1"),
        ({"steps": (50, 1000)}, "from 0 to 999"),
        ({"steps": (-1,)}, "from 0 to 999"),
    ],
)
def test_blocks_and_steps_must_exist(
    unet: nn.Module, tmp_path: Path, changed: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ddpm_seg(unet, *pictures(2), 2, SETTINGS.model_copy(update=changed), 0, Context(tmp_path))


def test_noise_of_another_size_is_an_error(unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="noise"):
        list(activations(unet, pictures(1)[0], (1,), (50,), shared_noise(8, 8)))


@pytest.mark.parametrize(("classes", "hidden"), [(4, (128, 32)), (29, (128, 32)), (30, (256, 128))])
def test_an_mlp_of_the_ensemble_is_the_released_mlp(classes: int, hidden: tuple[int, int]) -> None:
    """Same outputs, statistics and gradients as linear, ReLU, BatchNorm, linear, ReLU, BatchNorm, linear."""
    ensemble = Ensemble(3, 20, classes, 0).double()
    x = torch.randn(3, 64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mlps = []
    for k in range(3):
        a, b = hidden
        layers = [nn.Linear(20, a), nn.ReLU(), nn.BatchNorm1d(a), nn.Linear(a, b), nn.ReLU(), nn.BatchNorm1d(b)]
        mlp = nn.Sequential(*layers, nn.Linear(b, classes)).double()
        with torch.no_grad():
            for i in (0, 3, 6):
                mlp[i].weight.copy_(ensemble.weights[i // 3][k])
                mlp[i].bias.zero_()
        mlps.append(mlp)
    found = ensemble(x)
    wanted = torch.stack([mlp(part) for mlp, part in zip(mlps, x, strict=True)])
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for k, mlp in enumerate(mlps):
        torch.testing.assert_close(ensemble.weights[0].grad[k], mlp[0].weight.grad)
        torch.testing.assert_close(ensemble.scales[1].grad[k], mlp[5].weight.grad)
    with torch.no_grad():  # with the running statistics, and weights and biases of BatchNorm that are not 1 and 0
        for k, mlp in enumerate(mlps):
            for i in (0, 1):
                mlp[3 * i + 2].weight.copy_(ensemble.scales[i][k].fill_(k - 0.5))
                mlp[3 * i + 2].bias.copy_(ensemble.shifts[i][k].fill_(k + 0.5))
        wanted = torch.stack([mlp.eval()(part) for mlp, part in zip(mlps, x, strict=True)])
        torch.testing.assert_close(ensemble.eval()(x), wanted)
        torch.testing.assert_close(ensemble(x[0])[0], wanted[0])


def test_first_weights_are_normal_and_each_mlps_own() -> None:
    few, many = Ensemble(2, 500, 3, 7), Ensemble(5, 500, 3, 7)
    for a, b in zip(few.weights, many.weights, strict=True):
        assert torch.equal(a, b[:2])
    assert not torch.equal(many.weights[0][0], many.weights[0][1])
    assert abs(float(many.weights[0].detach().std()) - 0.02) < 2e-4
    assert all(float(bias.detach().abs().max()) == 0 for bias in many.biases)


def test_small_annotations_are_left_out_in_their_image_alone() -> None:
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0, 0, :3], labels[1, 0] = 1, 1
    left = usable(labels, 3, smallest=4)
    assert left.tolist() == [*range(3, 32)]
    assert len(usable(labels, 3, smallest=3)) == 32


def test_the_majority_decides_and_the_lowest_class_a_draw() -> None:
    answers = torch.tensor([[2, 2, 0, 3], [2, 1, 2, 3], [1, 0, 2, 1], [0, 2, 0, 1]])
    assert vote(answers, 4).tolist() == [2, 2, 0, 1]
    many = torch.randint(5, (10, 300), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vote(many, 5), many.mode(0).values)


def test_prediction_is_the_vote_on_the_whole_features(unet: nn.Module) -> None:
    """The first layer, applied before the resizing, gives what it would give after it; images go many at a time."""
    images, noise = torch.cat([pictures(5)[0]] * 60), shared_noise(16, 16)
    ensemble = Ensemble(3, 48, 3, 0)
    ensemble(torch.randn(3, 640, 48, generator=torch.Generator().manual_seed(0)))  # running statistics
    ensemble.eval()
    features = pixel_features(unet, images[:5], SETTINGS.blocks, SETTINGS.steps, noise)
    with torch.no_grad():
        logits = ensemble(features.movedim(1, -1).flatten(0, 2))  # (M, P, C)
    wanted = logits.argmax(2).mode(0).values.view(5, 16, 16)
    assert wanted.float().std() > 0.1
    found = predict(unet, ensemble, images, SETTINGS, noise)
    assert found.shape == (300, 16, 16)
    assert found.dtype == torch.int64
    assert (found == torch.cat([wanted] * 60)).float().mean() > 0.999  # a tie of two logits may round either way


def test_it_learns_to_find_squares(unet: nn.Module, tmp_path: Path) -> None:
    images, labels = pictures(12)
    settings = SETTINGS.model_copy(update={"max_epochs": 20, "blocks": (2, 3), "steps": (0, 50)})
    predictor = ddpm_seg(unet, images[:6], labels[:6], 2, settings, 0, Context(tmp_path))
    found = predictor(images[6:])
    dice = 2 * (found * labels[6:]).sum() / (found.sum() + labels[6:].sum())
    assert dice > 0.9
    assert not (tmp_path / "features.npy").exists()
    # A cell killed after the training finds the MLPs.
    again = ddpm_seg(unet, images[:6], labels[:6], 2, settings, 0, Context(tmp_path))
    assert torch.equal(again(images[6:]), found)


def toy(folder: Path, n: int = 2, size: int = 8, dim: int = 5) -> tuple[FeatureFile, Tensor]:
    draws = torch.Generator().manual_seed(1)
    file = FeatureFile.create(folder / "toy.npy", n * size * size, dim, "float16")
    labels = torch.zeros(n, size, size, dtype=torch.int64)
    for i in range(n):
        x = torch.randn(dim, size, size, generator=draws)
        file.write(i, x)
        labels[i] = x[0] > 0
    return file, labels


def states(network: Ensemble) -> list[Tensor]:
    return list(network.state_dict().values())


@pytest.mark.parametrize("dies_at", [1, 7, 11])
def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    file, labels = toy(tmp_path)
    settings = SETTINGS.model_copy(update={"batch": 30, "max_epochs": 4, "patience": 1})
    whole = train_ensemble(file, labels, 2, settings, 0, Context(tmp_path / "whole"))
    monkeypatch.setattr(Context, "checkpoint_due", lambda self: True)
    save, saved = Context.save, []

    def dies(self: Context, name: str, value: object) -> None:
        save(self, name, value)
        saved.append(name)
        if len(saved) == dies_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Context, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train_ensemble(file, labels, 2, settings, 0, Context(tmp_path / "cut"))
    resumed = train_ensemble(file, labels, 2, settings, 0, Context(tmp_path / "cut"))
    for a, b in zip(states(whole), states(resumed), strict=True):
        assert torch.equal(a, b)
    other = train_ensemble(file, labels, 2, settings, 1, Context(tmp_path / "other"))
    assert not torch.equal(other.weights[2], whole.weights[2])


def test_an_mlp_stops_as_the_released_code_says_whatever_the_others_do(tmp_path: Path) -> None:
    """One MLP, trained here step by step, and the same MLP in an ensemble of four."""
    file, labels = toy(tmp_path)
    settings = SETTINGS.model_copy(update={"batch": 30, "max_epochs": 8, "patience": 2, "models": 4})
    ensemble = train_ensemble(file, labels, 2, settings, 0, Context(tmp_path / "ensemble"))
    x, y = file.read(torch.arange(128)).float(), labels.flatten()
    ends = []
    for k in range(4):
        alone = Ensemble(4, 5, 2, 0)
        optimiser = torch.optim.Adam(alone.parameters(), settings.lr)
        best, waited, steps, stop = 1e7, 0, 0, False
        for epoch in range(8):
            order = torch.randperm(128, generator=stream(0, f"pixels {k} {epoch}"))
            for rows in order.split(30):
                optimiser.zero_grad()
                loss = F.cross_entropy(alone(x[rows])[k], y[rows])
                loss.backward()
                optimiser.step()
                steps += 1
                if epoch > 0:  # after first_epochs = 1
                    waited = 0 if loss.item() < best else waited + 1
                    best = min(best, loss.item())
                    stop = waited > 2
                if stop:
                    break
            if stop:
                break
        ends.append(steps)
        torch.testing.assert_close(ensemble.weights[0][k], alone.weights[0][k], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ensemble.mean1[k], alone.mean1[k], rtol=1e-3, atol=1e-4)
    assert len(set(ends)) > 1
    assert max(ends) < 8 * 5


def test_a_last_batch_of_one_pixel_is_left_out(tmp_path: Path) -> None:
    file, labels = toy(tmp_path)
    settings = SETTINGS.model_copy(update={"batch": 127, "max_epochs": 2})  # 128 pixels
    train_ensemble(file, labels, 2, settings, 0, Context(tmp_path))


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    file, labels = toy(tmp_path)
    with pytest.raises(UserError, match="No class has 65 pixels"):
        train_ensemble(file, labels, 2, SETTINGS.model_copy(update={"smallest": 65}), 0, Context(tmp_path))


def peak() -> int:
    """Most bytes that this process has had in RAM since :func:`test_memory_does_not_grow_with_the_images` asked."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux only")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Of 40 images whose features have 84 MB, 168 MB in the released precision, and 2 MB an image."""
    n, size, dim = 40, 64, 256
    settings = SETTINGS.model_copy(update={"models": 1, "max_epochs": 1, "batch": 1024})
    labels = torch.zeros(n, size, size, dtype=torch.int64)

    def run(folder: Path, n: int) -> int:
        folder.mkdir()
        Path("/proc/self/clear_refs").write_text("5")  # begin counting anew
        before = peak()
        file = FeatureFile.create(folder / "features.npy", n * size * size, dim, "float16")
        for i in range(n):
            file.write(i, torch.full((dim, size, size), float(i)))
        train_ensemble(file, labels[:n], 2, settings, 0, Context(folder))
        return peak() - before

    run(tmp_path / "warm", 2)
    grown = run(tmp_path / "few", 2), run(tmp_path / "many", n)
    assert (tmp_path / "many" / "features.npy").stat().st_size > 80e6
    assert grown[1] - grown[0] < 50e6
