import dataclasses
import hashlib
import re

import pytest
import torch
from safetensors.torch import save_file
from segment_anything.build_sam import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.models import sam as module
from synthrepro.models.sam import (
    OFFICIAL,
    PIXEL_MEAN,
    PIXEL_SD,
    VIT_B,
    VIT_H,
    VIT_L,
    SamSize,
    by_oracle,
    by_predicted_iou,
    checkpoint_hash,
    decode,
    embed,
    encode_prompts,
    freeze_encoder,
    fresh_decoder,
    from_side,
    is_official,
    load_sam,
    prepare,
    sam,
    single,
    to_side,
)
from synthrepro.training import seeded

SIDE = 48
TINY = SamSize(
    side=SIDE,
    patch=8,
    width=24,
    depth=3,
    heads=3,
    global_blocks=(1,),
    window=4,  # does not divide the 6 x 6 tokens
    prompt_dim=32,
    mlp_dim=40,
    decoder_heads=4,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, size: SamSize = TINY):
    """No weight is at a special value: positions matter, and norms are not the identity."""
    network = seeded(lambda: sam(size), generator(seed))
    draws = generator(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draws))
    return network


def some_prompts(batch: int = 3, seed: int = 1):
    points = SIDE * torch.rand(batch, 4, 2, generator=generator(seed))
    labels = torch.tensor([[1, 0, 1, 0], [1, 0, -1, -1], [1, -1, -1, -1]])[:batch]
    corners = SIDE * torch.rand(batch, 2, 2, generator=generator(seed + 1))
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    masks = torch.randn(batch, 1, 24, 24, generator=generator(seed + 2))
    return points, labels, boxes, masks


def some_images(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed))


def parameters(part) -> int:
    return sum(p.numel() for p in part.parameters())


def settings(network) -> list:
    """What the shapes of the weights do not tell."""
    names = ("window_size", "num_heads", "img_size", "input_image_size", "depth")
    return [(type(m).__name__, m.extra_repr(), [getattr(m, n, None) for n in names]) for m in network.modules()]


@pytest.mark.parametrize(
    ("size", "official", "millions"),
    [(VIT_B, build_sam_vit_b, 89.7), (VIT_L, build_sam_vit_l, 308.3), (VIT_H, build_sam_vit_h, 637.0)],
)
def test_official_sizes_have_the_official_weights(size, official, millions):
    with torch.device("meta"):
        ours, theirs = sam(size), official()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert parameters(ours.image_encoder) / 1e6 == pytest.approx(millions, abs=0.05)
    assert parameters(ours.mask_decoder) / 1e6 == pytest.approx(4.06, abs=0.005)
    assert settings(ours) == settings(theirs)
    assert torch.equal(ours.pixel_mean, theirs.pixel_mean)
    assert torch.equal(ours.pixel_std, theirs.pixel_std)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"side": 50}, "side of 50 pixels is no multiple of 8"),
        ({"width": 25}, "width of 25 is no multiple of 3"),
        ({"prompt_dim": 36}, "prompt_dim of 36 is no multiple of 8"),
        ({"decoder_heads": 3}, "prompt_dim of 32 is no multiple of 6"),
        ({"global_blocks": (3,)}, r"global_blocks \(3,\) are not all from 0 to 2"),
    ],
)
def test_a_size_that_does_not_divide_is_an_error(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY, **change)


# transformers' SAM is another implementation.


def transformers_name(name: str) -> str:
    for ours, theirs in (
        (r"^image_encoder\.", "vision_encoder."),
        (r"patch_embed\.proj", "patch_embed.projection"),
        (r"\.blocks\.", ".layers."),
        (r"neck\.0", "neck.conv1"),
        (r"neck\.1", "neck.layer_norm1"),
        (r"neck\.2", "neck.conv2"),
        (r"neck\.3", "neck.layer_norm2"),
        (r"\.norm(\d)\.", r".layer_norm\1."),
        (r"norm_final_attn", "layer_norm_final_attn"),
        (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
        (r"point_embeddings", "point_embed"),
        (r"mask_downscaling\.0", "mask_embed.conv1"),
        (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
        (r"mask_downscaling\.3", "mask_embed.conv2"),
        (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
        (r"mask_downscaling\.6", "mask_embed.conv3"),
        (r"output_upscaling\.0", "upscale_conv1"),
        (r"output_upscaling\.1", "upscale_layer_norm"),
        (r"output_upscaling\.3", "upscale_conv2"),
        (r"(mlps\.\d|iou_prediction_head)\.layers\.0", r"\1.proj_in"),
        (r"(mlps\.\d|iou_prediction_head)\.layers\.1", r"\1.layers.0"),
        (r"(mlps\.\d|iou_prediction_head)\.layers\.2", r"\1.proj_out"),
    ):
        name = re.sub(ours, theirs, name)
    return name


@pytest.fixture(scope="module")
def peers():
    from transformers.models.sam.modeling_sam import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": TINY.width,
            "output_channels": TINY.prompt_dim,
            "num_hidden_layers": TINY.depth,
            "num_attention_heads": TINY.heads,
            "image_size": TINY.side,
            "patch_size": TINY.patch,
            "window_size": TINY.window,
            "global_attn_indexes": list(TINY.global_blocks),
            "num_pos_feats": TINY.prompt_dim // 2,
        },
        prompt_encoder_config={"hidden_size": TINY.prompt_dim, "image_size": TINY.side, "patch_size": TINY.patch},
        mask_decoder_config={
            "hidden_size": TINY.prompt_dim,
            "mlp_dim": TINY.mlp_dim,
            "num_hidden_layers": TINY.decoder_depth,
            "num_attention_heads": TINY.decoder_heads,
            "iou_head_hidden_dim": TINY.prompt_dim,
            "layer_norm_eps": 1e-5,  # Meta's; the default here, 1e-6, is that of the encoder
        },
    )
    ours, theirs = tiny().eval(), seeded(lambda: SamModel(config), generator()).eval()
    state = {transformers_name(name): tensor for name, tensor in ours.state_dict().items()}
    state["shared_image_embedding.positional_embedding"] = state["prompt_encoder.shared_embedding.positional_embedding"]
    theirs.load_state_dict(state)
    return ours, theirs


@torch.no_grad()
def test_image_embeddings_are_those_of_transformers(peers):
    ours, theirs = peers
    images = some_images(3, 3, SIDE, SIDE)
    there = theirs.get_image_embeddings(prepare(images, SIDE))
    assert there.shape == (3, 32, 6, 6)
    assert there.std() > 0.1
    torch.testing.assert_close(embed(ours, images), there, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["points", "boxes", "points boxes", "points masks", "points boxes masks"])
def test_prompts_and_masks_are_those_of_transformers(peers, kinds):
    ours, theirs = peers
    points, labels, boxes, masks = some_prompts()
    points, labels = (points, labels) if "points" in kinds else (None, None)
    boxes, masks = boxes if "boxes" in kinds else None, masks if "masks" in kinds else None
    sparse, dense = encode_prompts(ours, points, labels, boxes, masks)
    prompts = {  # of one prompt an image
        "input_points": None if points is None else points[:, None],
        "input_labels": None if labels is None else labels[:, None],
        "input_boxes": None if boxes is None else boxes[:, None],
        "input_masks": masks,
    }
    there_sparse, there_dense = theirs.prompt_encoder(**prompts)
    tokens = {"points": 5, "boxes": 2, "points boxes": 6, "points masks": 5, "points boxes masks": 6}[kinds]
    assert sparse.shape == (3, tokens, 32)
    assert dense.shape == (3, 32, 6, 6)
    torch.testing.assert_close(sparse, there_sparse[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense, there_dense, rtol=1e-4, atol=1e-4)

    embeddings = embed(ours, some_images(3, 1, SIDE, SIDE))
    logits, iou = decode(ours, embeddings, sparse, dense)
    there = [theirs(image_embeddings=embeddings, multimask_output=many, **prompts) for many in (False, True)]
    assert logits.shape == (3, 4, 24, 24)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, torch.cat([t.pred_masks[:, 0] for t in there], dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(iou, torch.cat([t.iou_scores[:, 0] for t in there], dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single(logits, iou), there[0].pred_masks[:, 0, 0], rtol=1e-4, atol=1e-4)


# Meta's decoder takes one image a call.


@torch.no_grad()
def test_a_batch_of_images_gives_what_one_image_a_call_gives():
    network = tiny()
    points, labels, boxes, masks = some_prompts()
    embeddings = embed(network, some_images(3, 1, SIDE, SIDE))
    sparse, dense = encode_prompts(network, points, labels, boxes, masks)
    logits, iou = decode(network, embeddings, sparse, dense)
    for i in range(3):
        alone = encode_prompts(network, *(given[i : i + 1] for given in (points, labels, boxes, masks)))
        there = network.mask_decoder.predict_masks(embeddings[i : i + 1], network.prompt_encoder.get_dense_pe(), *alone)
        torch.testing.assert_close(logits[i : i + 1], there[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(iou[i : i + 1], there[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=0.1)


@torch.no_grad()
def test_many_prompts_on_one_image_by_expanding_its_embedding():
    network = tiny()
    points, labels, *_ = some_prompts()
    embedding = embed(network, some_images(1, 1, SIDE, SIDE))
    prompts = encode_prompts(network, points, labels)
    there = network.mask_decoder.predict_masks(embedding, network.prompt_encoder.get_dense_pe(), *prompts)
    ours = decode(network, embedding.expand(3, -1, -1, -1), *prompts)
    for a, b in zip(ours, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="1 images, 3 sparse and 3 dense"):
        decode(network, embedding, *prompts)


def test_where_a_padding_point_is_does_not_matter_and_a_mask_alone_has_no_token():
    network = tiny()
    points, labels, _, masks = some_prompts()
    moved = torch.where((labels == -1)[..., None], points + 7, points)
    for a, b in zip(encode_prompts(network, points, labels), encode_prompts(network, moved, labels), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        encode_prompts(network, points, labels)[0][2, 1:],
        network.prompt_encoder.not_a_point_embed.weight.expand(4, -1),
    )
    sparse, dense = encode_prompts(network, None, None, masks=masks)
    assert sparse.shape == (3, 0, 32)
    logits, _ = decode(network, embed(network, some_images(3, 1, SIDE, SIDE)), sparse, dense)
    assert logits.shape == (3, 4, 24, 24)


def test_prompts_that_do_not_fit_are_errors():
    network = tiny()
    points, labels, boxes, masks = some_prompts()
    for given, words in (
        ((None, None), "points with their labels"),
        ((points, None), "points with their labels"),
        ((points, labels[:, :3]), r"labels \(3, 3\)"),
        ((points, 2 * labels), r"1 \(positive\), 0 \(negative\)"),
        ((points, labels, boxes[:2]), r"shape \(3, 4\), not \(2, 4\)"),
        ((None, None, None, masks[..., :20]), r"shape \(3, 1, 24, 24\), not \(3, 1, 24, 20\)"),
    ):
        with pytest.raises(ValueError, match=words):
            encode_prompts(network, *given)


# Images and coordinates


@pytest.mark.parametrize("shape", [(3, 40, 72), (3, 90, 31), (3, 30, 30), (3, 48, 48)])
def test_images_are_prepared_as_metas_predictor_does(shape):
    network = tiny()
    image = some_images(*shape)
    image = F.avg_pool2d(image[None], 5, 1, 2)[0]
    eight_bits = (255 * image).round().byte()
    resized = ResizeLongestSide(SIDE).apply_image(eight_bits.permute(1, 2, 0).numpy())
    there = network.preprocess(torch.from_numpy(resized).permute(2, 0, 1).float())
    ours = prepare(eight_bits[None] / 255, SIDE)
    assert ours.shape == (1, 3, SIDE, SIDE)
    assert (ours[0] - there).abs().max() < 1.5 / min(PIXEL_SD)  # Pillow rounds to 8 bits twice
    assert torch.equal(ours[0] == 0, there == 0), "the padding is at the same place"


def test_grey_images_have_three_equal_channels_before_the_means():
    grey = some_images(2, 1, 20, 48)
    prepared = prepare(grey, SIDE)
    mean, sd = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_SD))
    torch.testing.assert_close((prepared * sd + mean)[:, :, :20] / 255, grey.expand(-1, 3, -1, -1))
    assert not prepared[:, :, 20:].any(), "padding is 0 after the means are subtracted"
    assert torch.equal(prepared, prepare(grey.expand(-1, 3, -1, -1), SIDE))


@pytest.mark.parametrize("bits", [torch.uint8, torch.uint16, torch.int64, torch.bool])
def test_images_of_integers_are_errors(bits):
    with pytest.raises(UserError, match=rf"{bits}: bring them to floating point in \[0, 1\]"):
        prepare(torch.ones(1, 1, 8, 8).to(bits), SIDE)


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan")])
def test_images_outside_0_to_1_are_errors(value):
    images = some_images(2, 1, 8, 8)
    images[1, 0, 3, 3] = value
    with pytest.raises(UserError, match=r"bring them to \[0, 1\]"):
        prepare(images, SIDE)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 2, 8, 8)])
def test_images_of_another_shape_are_errors(shape):
    with pytest.raises(ValueError, match=r"\(B, 1 or 3, H, W\)"):
        prepare(torch.zeros(shape), SIDE)


@pytest.mark.parametrize("size", [(40, 72), (90, 31), (30, 30), (48, 48)])
def test_points_and_boxes_are_scaled_as_metas_predictor_does(size):
    points, _, boxes, _ = some_prompts()
    official = ResizeLongestSide(SIDE)
    torch.testing.assert_close(to_side(points, size, SIDE), official.apply_coords_torch(points, size))
    torch.testing.assert_close(to_side(boxes, size, SIDE), official.apply_boxes_torch(boxes, size))
    whole = to_side(torch.tensor([[0, 0, size[1], size[0]]]), size, SIDE)  # integers are not rounded on the way
    filled = prepare(torch.zeros(1, 1, *size), SIDE)[0, 0] != 0
    assert whole[0].tolist() == pytest.approx([0, 0, int(filled.any(0).sum()), int(filled.any(1).sum())], abs=1e-4)


@pytest.mark.parametrize("size", [(40, 72), (90, 31), (30, 30), (48, 48)])
def test_masks_come_back_as_metas_predictor_brings_them(size):
    logits = torch.randn(2, 4, 24, 24, generator=generator())
    there = tiny().postprocess_masks(logits, ResizeLongestSide.get_preprocess_shape(*size, SIDE), size)
    torch.testing.assert_close(from_side(logits, size, SIDE), there)
    torch.testing.assert_close(from_side(logits[:, 2], size, SIDE), there[:, 2])


def test_an_objects_pixels_its_point_and_its_mask_stay_together():
    image = torch.zeros(1, 1, 60, 96)
    image[..., 36:48, 64:80] = 1  # rows and columns
    prepared = prepare(image, SIDE)[0, 0]
    bright = prepared > prepared[0, 0] + 0.5 * (prepared.max() - prepared[0, 0])
    bright[30:] = False  # padding, where 0 is brighter than black
    x, y = to_side(torch.tensor([72.0, 42.0]), (60, 96), SIDE).long().tolist()
    assert bright[y, x]
    assert bright.nonzero().amin(0).tolist() == [18, 32]
    back = from_side(20 * bright.float()[None] - 10, (60, 96), SIDE)[0] > 0
    assert torch.equal(back, image[0, 0] > 0.5)


# Choosing one of the masks


def test_the_choices_take_the_masks_they_name():
    logits = torch.full((3, 4, 8, 8), -1.0)
    truth = torch.zeros(3, 8, 8, dtype=torch.int64)
    truth[:2, 2:6, 2:6] = 1
    logits[0, 0] = logits[1, 0] = 9 * truth[0] - 1.0  # the first mask is perfect, and not a candidate
    logits[0, 3, 2:6, 2:5] = 1  # three quarters of the object
    logits[0, 1] = 1  # all of the image
    logits[1, 2, 1:7, 2:6] = 1  # half as much again
    logits[1, 3, 2:4, 2:6] = 1  # half of it
    logits[2, :3] = 1  # there is no object, and mask 3 is empty
    iou = torch.tensor([[9.0, 0.1, 0.3, 0.2], [9.0, 0.3, 0.2, 0.1], [9.0, 0.1, 0.2, 0.3]])
    assert torch.equal(single(logits, iou), logits[:, 0])
    assert torch.equal(by_predicted_iou(logits, iou), logits[[0, 1, 2], [2, 1, 3]])
    assert torch.equal(by_oracle(logits, truth), logits[[0, 1, 2], [3, 2, 3]])
    with pytest.raises(ValueError, match=r"Masks \(3, 4, 8\)"):
        by_oracle(logits, truth[:, :4])


# Files


def test_saved_weights_come_back_and_leave_the_random_state_alone(tmp_path):
    network = tiny()
    torch.save(network.state_dict(), tmp_path / "sam.pth")
    save_file(network.state_dict(), tmp_path / "sam.safetensors")
    torch.save({name: tensor.double() for name, tensor in network.state_dict().items()}, tmp_path / "double.pth")
    images, (points, labels, *_) = some_images(3, 1, 40, 30), some_prompts()
    wanted = decode(network, embed(network, images), *encode_prompts(network, points, labels))
    before = torch.get_rng_state()
    for name in ("sam.pth", "sam.safetensors", "double.pth"):
        back = load_sam(tmp_path / name, TINY)
        found = decode(back, embed(back, images), *encode_prompts(back, points, labels))
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(back.preprocess(images), network.preprocess(images))
        assert {t.device.type for t in (*back.parameters(), *back.buffers())} == {"cpu"}
        assert all(p.requires_grad for p in back.parameters())
        fresh_decoder(back, generator(), "fresh")
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_that_is_missing_or_no_state_dict_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*absent\.pth"):
        load_sam(tmp_path / "absent.pth", TINY)
    with pytest.raises(UserError, match=r"There is no file .*absent\.pth"):
        checkpoint_hash(tmp_path / "absent.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("<html>Not found</html>")
        with pytest.raises(UserError, match=rf"{name} is no file of weights"):
            load_sam(tmp_path / name, TINY)
    torch.save(tiny().state_dict(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:10_000])
    with pytest.raises(UserError, match=r"cut\.pth is no file of weights"):
        load_sam(tmp_path / "cut.pth", TINY)
    torch.save({"model": tiny().state_dict(), "epoch": 3}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"more\.pth holds more than a state dict"):
        load_sam(tmp_path / "more.pth", TINY)


def test_code_within_a_file_is_not_run(tmp_path):
    torch.save(tiny(), tmp_path / "pickled.pth")
    with pytest.raises(UserError, match=r"pickled\.pth is no file of weights"):
        load_sam(tmp_path / "pickled.pth", TINY)


def test_weights_of_another_size_are_an_error_that_names_the_first_mismatch(tmp_path):
    # Of ViT-L's names and shapes, with no values: a state dict of views takes no room.
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in sam(VIT_L).state_dict().items()}
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, tmp_path / "large.pth")
    words = (
        r"large\.pth does not fit this size of SAM \(image_encoder\.pos_embed is of shape \(1, 64, 64, 1024\), "
        r"not \(1, 64, 64, 768\); it looks like vit_l\)"
    )
    with pytest.raises(UserError, match=words) as error:
        load_sam(tmp_path / "large.pth", VIT_B)
    assert str(error.value).count("\n") == 0


def test_missing_and_surplus_weights_are_errors(tmp_path):
    state = tiny().state_dict()
    last = list(state)[-1]
    torch.save({name: t for name, t in state.items() if name != last}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=rf"\({re.escape(last)} is missing\)"):
        load_sam(tmp_path / "less.pth", TINY)
    torch.save(state | {"head.weight": torch.zeros(1)}, tmp_path / "surplus.pth")
    with pytest.raises(UserError, match=r"\(head\.weight is too many\)"):
        load_sam(tmp_path / "surplus.pth", TINY)


def test_a_file_is_official_by_its_bytes_and_not_by_its_name(tmp_path, monkeypatch):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    path.write_bytes(b"weights")
    assert checkpoint_hash(path) == hashlib.sha256(b"weights").hexdigest()
    assert not is_official(path)
    monkeypatch.setitem(module.OFFICIAL, "sam_vit_b_01ec64.pth", checkpoint_hash(path))
    assert is_official(path)
    assert is_official(path.rename(tmp_path / "mine.pth"))


def test_there_are_three_official_hashes():
    assert len(set(OFFICIAL.values())) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in OFFICIAL.values())


# What is trained


def test_with_the_encoder_frozen_gradients_reach_all_of_the_decoder_and_nothing_of_the_encoder():
    network = tiny()
    freeze_encoder(network)
    points, labels, boxes, masks = some_prompts()
    embeddings = embed(network, some_images(3, 1, SIDE, SIDE))
    assert not embeddings.requires_grad
    logits, iou = decode(network, embeddings, *encode_prompts(network, points, labels, boxes, masks))
    (logits.square().mean() + iou.square().mean()).backward()
    assert all(p.grad is None for p in network.image_encoder.parameters())
    still = [name for name, p in network.mask_decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert network.prompt_encoder.point_embeddings[1].weight.grad.any(), "it is not part of the encoder"
    network = tiny()
    embed(network, some_images(1, 1, SIDE, SIDE)).square().mean().backward()
    assert all(p.grad is not None for p in network.image_encoder.parameters())


def test_training_and_evaluation_mode_are_the_same():
    network = tiny()
    points, labels, *_ = some_prompts()
    images = some_images(3, 1, SIDE, SIDE)
    logits = [
        decode(network.train(mode), embed(network, images), *encode_prompts(network, points, labels))[0]
        for mode in (True, False)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("prompts", ["kept", "fresh"])
def test_a_fresh_decoder_is_what_the_generator_says(prompts):
    network, other = tiny(0).eval(), tiny(1)
    freeze_encoder(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for one in (network, other):
        fresh_decoder(one, generator(3), prompts)
    after, there = network.state_dict(), other.state_dict()
    for name in before:
        part = name.partition(".")[0]
        fresh = part == "mask_decoder" or (part == "prompt_encoder" and prompts == "fresh")
        assert torch.equal(after[name], before[name]) != fresh, name
        assert torch.equal(after[name], there[name]) == fresh, name
    assert not network.mask_decoder.training
    assert other.mask_decoder.training
    assert not any(p.requires_grad for p in network.image_encoder.parameters())
    assert all(p.requires_grad for p in network.mask_decoder.parameters())


def test_a_fresh_decoder_is_as_meta_builds_it_and_the_same_with_either_prompt_encoder():
    networks = tiny(), tiny()
    matrix = networks[0].prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    for network, prompts in zip(networks, ("kept", "fresh"), strict=True):
        fresh_decoder(network, generator(3), prompts)
    decoders = [network.mask_decoder.state_dict() for network in networks]
    assert all(torch.equal(decoders[0][name], decoders[1][name]) for name in decoders[0])
    assert torch.equal(networks[0].prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, matrix)
    assert not torch.allclose(networks[1].prompt_encoder.get_dense_pe(), networks[0].prompt_encoder.get_dense_pe())

    wide = dataclasses.replace(TINY, prompt_dim=256, mlp_dim=2048, decoder_heads=8)
    network = tiny(0, wide)
    fresh_decoder(network, generator(4), "fresh")
    decoder = network.mask_decoder.requires_grad_(False)
    assert float(decoder.iou_token.weight.std()) == pytest.approx(1, abs=0.15)  # an embedding's normal distribution
    weight = decoder.transformer.layers[0].mlp.lin1.weight  # a linear layer's uniform distribution
    assert float(weight.abs().max()) == pytest.approx(256**-0.5, rel=1e-3)
    assert float(weight.std()) == pytest.approx((3 * 256) ** -0.5, rel=0.01)
    assert torch.equal(decoder.transformer.layers[0].norm1.weight, torch.ones(256))
    matrix = network.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert float(matrix.std()) == pytest.approx(1, abs=0.15)


def test_a_fresh_decoder_leaves_the_random_state_alone_and_knows_its_options():
    network = tiny()
    before = torch.get_rng_state()
    fresh_decoder(network, generator(3), "fresh")
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="kept or fresh, not 'new'"):
        fresh_decoder(network, generator(3), "new")


def test_a_fresh_decoder_learns_a_square_from_a_point():
    network = tiny()
    freeze_encoder(network)
    fresh_decoder(network, generator(3), "kept")
    truth = torch.zeros(2, 24, 24)
    truth[0, 4:12, 4:12] = truth[1, 12:20, 10:22] = 1
    images = F.interpolate(truth[:, None], SIDE)
    points = torch.tensor([[[15.0, 15.0]], [[31.0, 31.0]]])
    optimiser = torch.optim.Adam(network.mask_decoder.parameters(), 3e-3)
    embeddings, prompts = embed(network, images), encode_prompts(network, points, torch.ones(2, 1))
    prompts = tuple(part.detach() for part in prompts)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(single(*decode(network, embeddings, *prompts)), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = single(*decode(network, embeddings, *prompts)) > 0
    assert (found == truth.bool()).float().mean() > 0.97


def test_aligned_attention_looks_where_the_prompt_is_before_any_training():
    """Scores of a point's token and the image's tokens are highest near the point, of positional encodings alone."""
    network = tiny(size=dataclasses.replace(TINY, prompt_dim=64))
    module.align_attention(network)
    encoder, attention = network.prompt_encoder, network.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    grid = encoder.image_embedding_size[0]
    positions = encoder.get_dense_pe()[0].flatten(1).T  # (hw, C)
    with torch.no_grad():
        keys, queries = attention.k_proj(positions), attention.q_proj(positions)
        keys, queries = keys - keys.mean(0), queries - queries.mean(0)
        scores = queries @ keys.T  # of every place with every other
    place = torch.arange(grid)
    rows, columns = (x.flatten().float() for x in torch.meshgrid(place, place, indexing="ij"))
    distance = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    near, far = scores[distance <= 1].mean(), scores[distance >= grid // 2].mean()
    assert near > 0 > far
    # symmetric and without a negative eigenvalue, as it cannot be where queries and keys are drawn apart
    torch.testing.assert_close(scores, scores.T, atol=1e-5, rtol=1e-4)


def test_alignment_changes_the_keys_between_tokens_and_image_and_nothing_else():
    network, same = tiny(), tiny()
    module.align_attention(network)
    before, after = same.state_dict(), network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("k_proj" in name and ("cross_attn" in name or "final_attn" in name) for name in changed)
