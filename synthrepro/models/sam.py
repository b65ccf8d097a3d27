"""SAM in three parts (image encoder, prompt encoder, mask decoder), for batches of images.

Kirillov et al., Segment Anything, ICCV 2023, with the modules of Meta's package `segment_anything`, whose checkpoints
fit as they are. SynthFM (arXiv 2504.08177) keeps the image encoder frozen and trains the mask decoder from scratch; no
code of it was released.

Meta's decoder repeats one image for many prompts. Training has many images with one set of prompts each, which
:func:`decode` takes. For several sets on one image, ``expand`` its embedding.

Points are (x, y) = (column, row) in pixels, boxes (x0, y0, x1, y1). SAM sees squares of one fixed side: an image's
longest side is resized to it and the rest is padded at the right and the bottom. :func:`to_side` and :func:`from_side`
take prompts there and masks back.
"""

import hashlib
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from monai.metrics import compute_dice
from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F

from synthrepro.errors import UserError

PIXEL_MEAN = (123.675, 116.28, 103.53)  # of 255, red, green and blue, as ImageNet's
PIXEL_SD = (58.395, 57.12, 57.375)
OFFICIAL = {  # SHA-256 of Meta's files; the digits in their names begin their MD5
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}


@dataclass(frozen=True)
class SamSize:
    """What fixes the shape of all weights. The defaults are what Meta's three sizes share.

    Raises:
        UserError: The numbers do not divide, or there is no such block.
    """

    width: int
    """Channels of the image encoder's tokens."""
    depth: int
    """Blocks of the image encoder."""
    heads: int
    """Of the image encoder's attention."""
    global_blocks: tuple[int, ...]
    """Blocks, from 0, that attend to all of the image; the others attend within windows."""
    side: int = 1024
    """Pixels of the prepared image, which is square."""
    patch: int = 16
    """Pixels of a token's side."""
    window: int = 14
    """Tokens of a window's side; the grid of tokens is padded to whole windows."""
    prompt_dim: int = 256
    """Channels of embeddings of image and prompts, and of the IoU head's hidden layers."""
    mlp_dim: int = 2048
    """Hidden channels of the mask decoder's transformer."""
    decoder_depth: int = 2
    decoder_heads: int = 8

    def __post_init__(self) -> None:
        for what, number, divisor in (
            (f"side of {self.side} pixels", self.side, self.patch),
            (f"width of {self.width}", self.width, self.heads),
            (f"prompt_dim of {self.prompt_dim}", self.prompt_dim, 8),  # masks are read from an eighth of the channels
            (f"prompt_dim of {self.prompt_dim}", self.prompt_dim, 2 * self.decoder_heads),  # attention has half of them
        ):
            if number % divisor:
                raise UserError(f"SAM's {what} is no multiple of {divisor}: change one of them.")
        if not all(0 <= block < self.depth for block in self.global_blocks):
            raise UserError(f"SAM's global_blocks {self.global_blocks} are not all from 0 to {self.depth - 1}.")


VIT_B = SamSize(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))
VIT_L = SamSize(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))
VIT_H = SamSize(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))
SIZES = {"vit_b": VIT_B, "vit_l": VIT_L, "vit_h": VIT_H}


def sam(size: SamSize) -> Sam:
    """SAM with fresh weights, drawn from the global random state as PyTorch's modules do.

    It has no dropout: training and evaluation mode are the same. Positional embeddings within the image encoder begin
    at 0, so that an untrained one does not know where a token is, but for the padding at borders.

    Returns:
        Meta's `Sam`, with `image_encoder`, `prompt_encoder`, `mask_decoder`, and `size` besides.
    """
    network = Sam(
        image_encoder=ImageEncoderViT(
            img_size=size.side,
            patch_size=size.patch,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            out_chans=size.prompt_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=size.window,
            global_attn_indexes=size.global_blocks,
        ),
        prompt_encoder=_prompt_encoder(size),
        mask_decoder=_mask_decoder(size),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_SD),
    )
    network.size = size
    return network


def _prompt_encoder(size: SamSize) -> PromptEncoder:
    grid = size.side // size.patch
    return PromptEncoder(
        embed_dim=size.prompt_dim,
        image_embedding_size=(grid, grid),
        input_image_size=(size.side, size.side),
        mask_in_chans=16,
    )


def _mask_decoder(size: SamSize) -> MaskDecoder:
    transformer = TwoWayTransformer(
        depth=size.decoder_depth,
        embedding_dim=size.prompt_dim,
        num_heads=size.decoder_heads,
        mlp_dim=size.mlp_dim,
    )
    return MaskDecoder(transformer_dim=size.prompt_dim, transformer=transformer, iou_head_hidden_dim=size.prompt_dim)


def load_sam(path: Path, size: SamSize) -> Sam:
    """SAM from a state dict as Meta publishes it, or as ``torch.save(network.state_dict(), path)`` writes it.

    Nothing is ever downloaded, and the random state is left alone. Weights are float32, whatever the file has.

    Args:
        path: ``.safetensors``, or anything else that PyTorch saved. Only tensors are read, no code is run.

    Raises:
        UserError: The file is missing or cannot be read, or is of another size.
    """
    state = _read(Path(path))
    with torch.device("meta"):  # draws nothing
        network = sam(size)
    mismatch = _mismatch(state, network.state_dict())
    if mismatch:
        likely = [name for name, other in SIZES.items() if _looks_like(state, other)]
        guess = f"; it looks like {likely[0]}" if likely else ""
        raise UserError(f"{path} does not fit this size of SAM ({mismatch}{guess}): name another file or size.")
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return network


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"There is no file {path}: get SAM's weights, such as sam_vit_b_01ec64.pth, or name another.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path} is no file of weights that can be read: get SAM's weights again.") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} holds more than a state dict: save the weights alone, as Meta does.")
    return state


def _mismatch(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    for name, tensor in wanted.items():
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != tensor.shape:
            return f"{name} is of shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
    extra = [name for name in state if name not in wanted]
    return f"{extra[0]} is too many" if extra else None


def _looks_like(state: dict[str, Tensor], size: SamSize) -> bool:
    blocks = {name.split(".")[2] for name in state if name.startswith("image_encoder.blocks.")}
    position = state.get("image_encoder.pos_embed")
    return position is not None and position.shape[-1] == size.width and len(blocks) == size.depth


def checkpoint_hash(path: Path) -> str:
    """SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        UserError: There is no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}: get SAM's weights, such as sam_vit_b_01ec64.pth, or name another.")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_official(path: Path) -> bool:
    """Whether the file is, byte for byte, one of Meta's three, under whatever name; raises as :func:`checkpoint_hash`.

    The hashes in `OFFICIAL` are not published by Meta, which has but the first digits of the MD5 in the files' names;
    they are those that several projects give which download the files, such as micro-sam.
    """
    return checkpoint_hash(path) in OFFICIAL.values()


def prepare(images: Tensor, side: int) -> Tensor:
    """Images as the image encoder takes them.

    Grey becomes three equal channels; the longest side is resized to `side`, bilinear with antialiasing; SAM's means
    are subtracted and its SDs divided by; zeros are added at the right and the bottom. Meta resizes images of 8 bits
    and rounds to 8 bits; here nothing is rounded. No contrast is stretched, by Meta or here:
    windows of CT and the like are the caller's.

    Args:
        images: (B, 1, H, W) or (B, 3, H, W), floating point, in [0, 1].

    Returns:
        (B, 3, side, side).

    Raises:
        UserError: The images are of another kind of number or are not in [0, 1].
        ValueError: They are of another shape.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"Images must be of shape (B, 1 or 3, H, W), not {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise UserError(f"SAM's images are {images.dtype}: bring them to floating point in [0, 1] first.")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # NaN as well
        raise UserError(f"SAM's images are from {low:.3g} to {high:.3g}: bring them to [0, 1] first.")
    height, width = _resized((images.shape[2], images.shape[3]), side)
    images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=True)
    mean, sd = (images.new_tensor(values)[:, None, None] / 255 for values in (PIXEL_MEAN, PIXEL_SD))  # (3, 1, 1)
    return F.pad((images - mean) / sd, (0, side - width, 0, side - height))  # (B, 3, side, side)


def _resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    return ResizeLongestSide.get_preprocess_shape(*size, side)


def to_side(points: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Points (..., 2) or boxes (..., 4) in pixels of an image of `size` (H, W), in pixels of the prepared image.

    As Meta has it: coordinates are multiplied, and the prompt encoder adds half a pixel of the prepared image. Where
    an image is made larger, points so lie up to half a pixel of the image towards the top left of a pixel's centre.
    """
    height, width = _resized(size, side)
    scale = torch.tensor([width / size[1], height / size[0]], device=points.device)
    return points * scale.repeat(points.shape[-1] // 2)


def from_side(logits: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Mask logits (..., h, w) of the prepared image, at any resolution, as (..., H, W) of an image of `size` (H, W).

    As Meta's `postprocess_masks`: bilinear to the prepared image, cut off its padding, bilinear to the image.
    """
    height, width = _resized(size, side)
    masks = logits.reshape(-1, 1, *logits.shape[-2:])
    masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)[..., :height, :width]
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    return masks.reshape(*logits.shape[:-2], *size)


def embed(sam: Sam, images: Tensor) -> Tensor:
    """Embeddings (B, C, h, w) of images (B, 1 or 3, H, W) in [0, 1]; raises as :func:`prepare`."""
    return sam.image_encoder(prepare(images, sam.image_encoder.img_size))


def encode_prompts(
    sam: Sam,
    points: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of one set of prompts an image.

    Points that pad a set to the batch's N have the label -1, and their coordinates do not matter. SAM gives them a
    token ("not a point") that the decoder attends to, and without a box adds one more such token itself. So a padded
    set is close to, but not, the same prompt as the set alone.

    Args:
        points: (B, N, 2), in pixels of the prepared image; None where there is a box or a mask.
        labels: (B, N): 1 positive, 0 negative, -1 padding.
        boxes: (B, 4), in pixels of the prepared image.
        masks: (B, 1, 4h, 4w), logits as :func:`decode` gives them.

    Returns:
        Sparse embeddings (B, T, C), of T = N + 1 tokens without and N + 2 with a box, and dense ones (B, C, h, w).

    Raises:
        ValueError: There is no prompt, their shapes do not fit, or a label is none of the three.
    """
    given = [prompt for prompt in (points, boxes, masks) if prompt is not None]
    if not given or (points is None) != (labels is None):
        raise ValueError("Give points with their labels, a box or a mask.")
    count, resolution = given[0].shape[0], sam.prompt_encoder.mask_input_size
    if points is not None and labels is not None:
        if points.shape != (*labels.shape, 2) or labels.dim() != 2:
            raise ValueError(
                f"Points {tuple(points.shape)} and labels {tuple(labels.shape)} are not (B, N, 2), (B, N)."
            )
        if not torch.isin(labels, torch.tensor([-1, 0, 1], device=labels.device)).all():
            raise ValueError("Labels of points are 1 (positive), 0 (negative) and -1 (padding).")
    if boxes is not None and boxes.shape != (count, 4):
        raise ValueError(f"Boxes must be of shape {(count, 4)}, not {tuple(boxes.shape)}.")
    if masks is not None and masks.shape != (count, 1, *resolution):
        raise ValueError(f"Masks must be of shape {(count, 1, *resolution)}, not {tuple(masks.shape)}.")
    return sam.prompt_encoder(
        points=None if points is None else (points, labels),
        boxes=boxes,
        masks=masks,
    )


def decode(sam: Sam, embeddings: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of a batch of images, each with its own prompts.

    What `MaskDecoder.predict_masks` computes for one image a call, without its `repeat_interleave`.

    Args:
        embeddings: (B, C, h, w), of the images, see :func:`embed`.
        sparse, dense: (B, T, C) and (B, C, h, w), of the prompts, see :func:`encode_prompts`.

    Returns:
        Logits (B, 4, 4h, 4w), positive inside, and predicted IoU (B, 4), which is not confined to [0, 1]. The first
        mask is the one for prompts that are not ambiguous, the other three are for those that are.

    Raises:
        ValueError: Images and prompts are not equally many.
    """
    if not len(embeddings) == len(sparse) == len(dense):
        raise ValueError(f"There are {len(embeddings)} images, {len(sparse)} sparse and {len(dense)} dense prompts.")
    decoder = sam.mask_decoder
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])  # (1 + 4, C)
    tokens = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], dim=1)  # (B, 5 + T, C)
    source = embeddings + dense
    positions = sam.prompt_encoder.get_dense_pe()  # (1, C, h, w), and broadcast
    tokens, source_tokens = decoder.transformer(source, positions, tokens)  # (B, 5 + T, C), (B, hw, C)
    features = decoder.output_upscaling(source_tokens.transpose(1, 2).reshape(source.shape))  # (B, C / 8, 4h, 4w)
    filters = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = torch.stack(filters, dim=1) @ features.flatten(2)  # (B, 4, 16hw)
    return logits.unflatten(2, features.shape[-2:]), decoder.iou_prediction_head(tokens[:, 0])


def single(logits: Tensor, iou: Tensor) -> Tensor:
    """The mask for prompts that are not ambiguous, (B, 4h, 4w): SAM's ``multimask_output=False``.

    Args:
        logits, iou: (B, 4, 4h, 4w) and (B, 4), see :func:`decode`; the IoU is not looked at.
    """
    return logits[:, 0]


def by_predicted_iou(logits: Tensor, iou: Tensor) -> Tensor:
    """Of the last three masks the one of which SAM expects most, (B, 4h, 4w): the paper's ranking (section 3).

    Args:
        logits, iou: (B, 4, 4h, 4w) and (B, 4), see :func:`decode`.
    """
    return _pick(logits, iou[:, 1:].argmax(1))


def by_oracle(logits: Tensor, masks: Tensor) -> Tensor:
    """Of the last three masks the one that is closest to the truth by Dice, (B, H, W).

    IoU would choose the same. A bound on what a choice can achieve, not a result: the truth is looked at.

    Args:
        logits: (B, 4, H, W), of any resolution.
        masks: True masks (B, H, W) of the same resolution, values 0 and 1.

    Raises:
        ValueError: The resolutions differ.
    """
    if masks.shape != (len(logits), *logits.shape[-2:]):
        raise ValueError(f"Masks {tuple(masks.shape)} do not go with logits {tuple(logits.shape)}.")
    three = (logits[:, 1:] > 0).float()
    scores = compute_dice(three, masks[:, None].to(three).expand_as(three), ignore_empty=False)  # (B, 3)
    return _pick(logits, scores.argmax(1))


def _pick(logits: Tensor, choice: Tensor) -> Tensor:
    return logits[torch.arange(len(logits), device=logits.device), 1 + choice]


def fresh_decoder(sam: Sam, generator: torch.Generator, prompts: Literal["kept", "fresh"]) -> None:
    """Give SAM a mask decoder with fresh weights in place, and leave the image encoder alone.

    Weights are drawn as Meta's modules do when they are built. They depend on the generator alone, and the decoder's
    are the same whatever becomes of the prompt encoder. The modules are new ones: make an optimiser afterwards.

    "From scratch" leaves open what becomes of the prompt encoder. With "fresh" it is drawn anew as well, and with it
    the random matrix of the positional encoding. This is a buffer, which no training changes, and the encoding of
    points, boxes and the image embedding's positions alike.

    Args:
        generator: On the CPU.
        prompts: "kept" keeps the prompt encoder, "fresh" draws it too.

    Raises:
        ValueError: `prompts` is neither.
    """
    if prompts not in ("kept", "fresh"):
        raise ValueError(f"The prompt encoder is kept or fresh, not {prompts!r}.")
    device = sam.mask_decoder.iou_token.weight.device
    with torch.random.fork_rng(devices=[]):  # modules draw from the global state of the CPU
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        sam.mask_decoder = _mask_decoder(sam.size).train(sam.training).to(device)
        if prompts == "fresh":
            sam.prompt_encoder = _prompt_encoder(sam.size).train(sam.training).to(device)


def align_attention(sam: Sam) -> None:
    """Let the attention between tokens and image begin with equal projections of queries and keys, in place.

    Then a prompt's token and the image's tokens attend to each other from the start where their positional encodings
    are alike, that is, near the prompt. Meta's modules draw the two apart, and training first has to find out what a
    position is, which takes a small network long: this is ours, for decoders that begin from nothing and learn from
    thousands of images rather than millions.
    """
    transformer = sam.mask_decoder.transformer
    between = [
        part
        for layer in transformer.layers
        for part in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token)
    ]
    with torch.no_grad():
        for attention in [*between, transformer.final_attn_token_to_image]:
            attention.k_proj.load_state_dict(attention.q_proj.state_dict())


def freeze_encoder(sam: Sam) -> None:
    """Let no gradient reach the image encoder; the prompt encoder, which has weights as well, is left as it is."""
    sam.image_encoder.requires_grad_(False)
