import json

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from synthrepro.errors import UserError
from synthrepro.models.diffusion_unet import (
    Segmenter,
    decode,
    diffusion_unet,
    embed,
    encode,
    fold,
    freeze,
    load_unet,
    without_steps,
)
from synthrepro.training import seeded

SMALL = {"size": 32, "channels": 8, "multipliers": (1, 2, 2), "blocks": 1, "attention": (8,)}
SMALL |= {"head_channels": 8, "groups": 4}


def small(seed: int = 0, **changes) -> UNet2DModel:
    unet = seeded(lambda: diffusion_unet(**SMALL | changes), torch.Generator().manual_seed(seed))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norms that are not the identity
        for p in unet.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
    return unet


def images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(7))


def segmenter(step: int = 30, **changes) -> Segmenter:
    return seeded(lambda: Segmenter(small(), 5, 16, step, **changes), torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("channels", "millions"), [(128, 138.28), (256, 552.80)])
def test_has_the_parameters_of_adm(channels, millions):
    with torch.device("meta"):
        unet = diffusion_unet(256, channels)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_decoder_has_eighteen_output_blocks_of_which_ddpm_seg_reads_8448_features():
    with torch.device("meta"):
        unet = diffusion_unet(256, 256)
    widths = [resnet.out_channels for block in unet.up_blocks for resnet in block.resnets]
    assert len(widths) == 18
    assert 3 * sum(widths[i] for i in (5, 6, 7, 8, 12)) == 8448


def test_encode_and_decode_are_the_forward_pass_of_diffusers():
    unet, x, steps = small(), 2 * images() - 1, torch.tensor([3, 700])
    embedding = embed(unet, steps)
    *_, last = decode(unet, encode(unet, x, embedding), embedding)
    there = unet.conv_out(unet.conv_act(unet.conv_norm_out(last)))
    torch.testing.assert_close(there, unet(x, steps).sample, rtol=1e-4, atol=1e-4)


def test_one_step_for_all_images_is_the_same_as_a_step_an_image():
    unet, x = small(), 2 * images() - 1
    one, each = (embed(unet, t) for t in (5, torch.tensor([5, 5])))
    torch.testing.assert_close(encode(unet, x, one)[-1], encode(unet, x, each)[-1])


@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_outside_the_schedule_is_an_error(step):
    with pytest.raises(UserError, match="from 0 to 999"):
        Segmenter(small(), 5, 16, step)


def test_the_segmenter_depends_on_its_step_and_the_plain_unet_has_none():
    x = images()
    assert not torch.allclose(segmenter(0).eval()(x), segmenter(900).eval()(x))
    plain = Segmenter(without_steps(small()), 5, 16)
    assert not [name for name, _ in plain.named_parameters() if "time" in name]
    assert plain.eval()(x).shape == (2, 5, 32, 32)


def test_folding_keeps_the_outputs_before_and_after_fine_tuning_and_takes_the_step_out():
    network, x = segmenter(200).eval(), images()
    torch.testing.assert_close(fold(network)(x), network(x), rtol=1e-4, atol=1e-5)
    freeze(network, "full")
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(3):
        network.train()(x).square().mean().backward()
        optimiser.step()
    folded = fold(network.eval())
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in folded.named_parameters() if "time" in name]
    saved = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in folded.parameters())
    assert saved == sum(p.numel() for name, p in network.named_parameters() if "time" in name)
    assert [name for name, _ in network.named_parameters() if "time" in name], "the original is left alone"


def test_folding_takes_the_segmenters_own_step():
    network, x = segmenter(900).eval(), images()
    torch.testing.assert_close(fold(network)(x), network(x), rtol=1e-4, atol=1e-5)
    folded = fold(network)
    network.step = 0
    assert not torch.allclose(folded(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["linear", "decoder", "full"])
def test_a_strategy_trains_its_parts_and_no_other(strategy):
    network = segmenter()
    freeze(network, strategy)
    network(images()).square().mean().backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trains = {
        "linear": lambda name: name.startswith("head."),
        "decoder": lambda name: name.startswith(("head.", "unet.up_blocks.")),
        "full": lambda name: True,
    }[strategy]
    wanted = {name for name, _ in network.named_parameters() if trains(name)}
    # a bias under a norm over few values, or a key's bias under softmax, may have no gradient to speak of
    assert moved <= wanted
    assert {name for name in wanted if name.endswith("conv2.weight")} <= moved
    if strategy != "full":
        assert not [name for name in moved if "mid_block" in name or "time_embedding" in name or "down_blocks" in name]
    if strategy == "decoder":
        assert "unet.up_blocks.0.resnets.0.time_emb_proj.weight" in moved


def test_an_unknown_strategy_is_an_error():
    with pytest.raises(UserError, match="linear, decoder, full"):
        freeze(segmenter(), "half")


def test_the_head_may_see_several_layers():
    network = segmenter(layers=(0, 3))
    widths = [r.out_channels for b in network.unet.up_blocks for r in b.resnets]
    assert network.head[0].in_channels == widths[-1] + widths[0] + widths[3]
    assert network(images()).shape == (2, 5, 32, 32)


def test_a_noised_input_is_what_diffusers_adds_noise_to():
    from diffusers import DDPMScheduler

    noise = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(3))
    network, x = segmenter(250, noise=noise), images()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    noised = scheduler.add_noise(2 * x - 1, noise.expand_as(x), torch.tensor([250]))
    clean = segmenter(250)
    torch.testing.assert_close(network.encode(x)[-1], clean.encode((noised + 1) / 2)[-1], rtol=1e-4, atol=1e-4)


def test_nothing_is_dropped():
    network = Segmenter(small(dropout=0.5), 5, 16).train()
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} <= {0.0}


def test_a_checkpoint_is_read_by_diffusers_alone(tmp_path):
    unet = small()
    unet.save_pretrained(tmp_path, safe_serialization=True)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    x = images()
    theirs = UNet2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(x, 5).sample, unet(x, 5).sample)
    ours = load_unet(tmp_path, small(1))
    torch.testing.assert_close(ours(x, 5).sample, unet(x, 5).sample)


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_unet(tmp_path, small())
    small(channels=16, groups=4).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="another network"):
        load_unet(tmp_path / "wide", small())
    unet = small()
    unet.save_pretrained(tmp_path / "short")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "short" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["conv_in.weight"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"missing keys, such as conv_in\.weight"):
        load_unet(tmp_path / "short", small())
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_unet(tmp_path / "short", small())
    config = tmp_path / "short" / "config.json"
    assert json.loads(config.read_text())["norm_num_groups"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 34}, "cannot be halved"),
        ({"groups": 3}, "do not divide"),
        ({"head_channels": 5}, "heads of 5"),
    ],
)
def test_a_shape_that_cannot_be_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        diffusion_unet(**SMALL | changes)
