"""How SAM is asked, judged and trained: against closed forms, against what one image at a time gives, and resumed."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch.nn import functional as F

from synthrepro.evidence import Context
from synthrepro.methods import synthfm
from synthrepro.methods.synthfm import segmenting
from synthrepro.models.sam import (
    SamSize,
    by_predicted_iou,
    decode,
    embed,
    encode_prompts,
    freeze_encoder,
    from_side,
    sam,
)
from synthrepro.synthesis.prompts import BoxPrompts, PointPrompts
from synthrepro.training import seeded

SIDE = 48
TINY = SamSize(
    side=SIDE,
    patch=8,
    width=24,
    depth=2,
    heads=3,
    global_blocks=(1,),
    window=4,
    prompt_dim=32,
    mlp_dim=40,
    decoder_heads=4,
)
POINTS, BOXES = PointPrompts((1, 3), (0, 2)), BoxPrompts(0.02)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0):
    """No weight is at a special value, so that positions matter and one mask is not another."""
    network = seeded(lambda: sam(TINY), generator(seed))
    draws = generator(seed + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    return network.eval()


def settings(**changes) -> synthfm.TrainSettings:
    found = {"steps": 6, "batch": 2, "lr": 1e-3, "encoder_lr": 2e-4, "warm_up": 3, "weight_decay": 0.01}
    return synthfm.TrainSettings(**found | {"kinds": ("points",), "loss": "dice+ce", "precision": "no"} | changes)


# Losses, in numpy and double precision, one answer at a time


def dice_loss(logits: np.ndarray, y: np.ndarray) -> float:
    p = expit(logits)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def balanced_entropy(logits: np.ndarray, y: np.ndarray) -> float:
    each = -y * np.log(expit(logits)) - (1 - y) * np.log(expit(-logits))
    return (each * y).sum() / max(y.sum(), 1) / 2 + (each * (1 - y)).sum() / max((1 - y).sum(), 1) / 2


def true_iou(logits: np.ndarray, y: np.ndarray) -> float:
    found, there = logits > 0, y > 0.5
    return (found & there).sum() / max((found | there).sum(), 1)


def whole_loss(logits: np.ndarray, iou: np.ndarray, targets: np.ndarray, kind: str) -> float:
    parts, estimates = [], []
    for answers, expected, y in zip(logits, iou, targets, strict=True):
        each = [dice_loss(a, y) + (balanced_entropy(a, y) if kind == "dice+ce" else 0) for a in answers]
        parts.append(each[0] + min(each[1:]))
        estimates += [(e - true_iou(a, y)) ** 2 for e, a in zip(expected, answers, strict=True)]
    return np.mean(parts) + np.mean(estimates)


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (3, 4, 5, 6), estimates (3, 4) and targets (3, 5, 6), shares of pixels, in double precision."""
    draws = generator(seed)
    logits = 3 * torch.randn(3, 4, 5, 6, generator=draws, dtype=torch.float64)
    targets = (2 * torch.rand(3, 5, 6, generator=draws, dtype=torch.float64) - 0.5).clamp(0, 1)
    return logits, torch.rand(3, 4, generator=draws, dtype=torch.float64), targets


class TestLosses:
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (segmenting.dice_losses, dice_loss),
            (segmenting.balanced_cross_entropies, balanced_entropy),
        ],
    )
    def test_each_is_its_formula(self, ours, theirs):
        logits, _, targets = example()
        expected = [[theirs(a, y) for a in one] for one, y in zip(logits.numpy(), targets.numpy(), strict=True)]
        np.testing.assert_allclose(ours(logits, targets), expected, rtol=1e-12)

    def test_dice_of_certain_answers_is_that_of_sets(self):
        truth = torch.zeros(1, 8, 8, dtype=torch.float64)
        truth[0, :4] = 1  # 32 pixels
        answers = torch.full((1, 3, 8, 8), -1e3, dtype=torch.float64)
        answers[0, 0, :4] = 1e3  # the same
        answers[0, 1, 2:6] = 1e3  # half of it, and as many others
        expected = [0, 1 - (2 * 16 + 1) / (32 + 32 + 1), 1 - 1 / 33]  # the last answers nothing
        np.testing.assert_allclose(segmenting.dice_losses(answers, truth)[0], expected, atol=1e-12)

    @pytest.mark.parametrize("area", [1, 7, 63])
    def test_an_object_weighs_as_much_as_the_rest_whatever_its_size(self, area):
        truth = (torch.arange(64) < area).double().view(1, 8, 8)
        logits = torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64)
        expected = (np.log1p(np.exp(-0.7)) + np.log1p(np.exp(0.7))) / 2
        assert segmenting.balanced_cross_entropies(logits, truth).item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("kind", ["dice", "dice+ce"])
    def test_the_whole_is_the_single_answer_the_best_of_three_and_the_estimates_error(self, kind):
        logits, iou, targets = example()
        expected = whole_loss(logits.numpy(), iou.numpy(), targets.numpy(), kind)
        found = synthfm.loss_of(logits, iou, targets, kind)
        assert float(found) == pytest.approx(expected, rel=1e-5)

    def test_an_estimate_of_an_empty_answer_to_an_empty_object_is_finite(self):
        empty = torch.zeros(1, 4, 4)
        value = synthfm.loss_of(torch.full((1, 4, 4, 4), -9.0), torch.zeros(1, 4), empty, "dice+ce")
        assert 0 <= float(value) < 0.1

    @pytest.mark.parametrize("kind", ["dice", "dice+ce"])
    def test_the_gradient_is_that_of_finite_differences(self, kind):
        logits, iou, targets = example(1)
        assert logits.abs().min() > 1e-4, "no answer flips within a step"
        given = [logits.float().requires_grad_(), iou.float().requires_grad_()]
        synthfm.loss_of(*given, targets.float(), kind).backward()
        arrays = [logits.numpy().copy(), iou.numpy().copy()]
        for tensor, array in zip(given, arrays, strict=True):
            numeric = np.zeros_like(array)
            for place in np.ndindex(array.shape):
                kept, values = array[place], []
                for step in (1e-5, -1e-5):
                    array[place] = kept + step
                    values.append(whole_loss(*arrays, targets.numpy(), kind))
                array[place] = kept
                numeric[place] = (values[0] - values[1]) / 2e-5
            assert np.abs(numeric).max() > 1e-3
            np.testing.assert_allclose(tensor.grad, numeric, rtol=1e-3, atol=1e-6)

    def test_of_three_answers_only_the_best_learns_and_estimates_teach_no_mask(self):
        logits, iou, targets = (each.float() for each in example(2))
        logits.requires_grad_()
        synthfm.loss_of(logits, iou, targets, "dice").backward()
        learns = logits.grad.abs().amax((2, 3)) > 0
        best = segmenting.dice_losses(logits, targets)[:, 1:].argmin(1)
        assert learns[:, 0].all()
        assert torch.equal(learns[:, 1:], F.one_hot(best, 3).bool())
        before = logits.grad.clone()
        logits.grad = None
        synthfm.loss_of(logits, iou + 5, targets, "dice").backward()
        assert torch.equal(logits.grad, before)


class TestSmall:
    @pytest.mark.parametrize("side", [12, 24, 48, 96, 192])
    def test_a_square_mask_is_averaged(self, side):
        masks = torch.randint(2, (2, side, side), generator=generator())
        grid = 4 * SIDE // 8
        found = segmenting.small(masks, tiny())
        assert found.shape == (2, grid, grid)
        if side >= grid:
            expected = masks.double().view(2, grid, side // grid, grid, side // grid).mean((2, 4))
        else:
            expected = masks.double().repeat_interleave(grid // side, 1).repeat_interleave(grid // side, 2)
        torch.testing.assert_close(found.double(), expected)

    def test_padding_is_at_the_right_and_the_bottom_and_is_nothing(self):
        for size in ((48, 32), (32, 48), (96, 64), (64, 96)):
            masks = torch.randint(2, (1, *size), generator=generator())
            rows, columns = (24 * length // max(size) for length in size)
            found = segmenting.small(masks, tiny())
            window = max(size) // 24
            expected = masks.double().view(1, rows, window, columns, window).mean((2, 4))
            torch.testing.assert_close(found[:, :rows, :columns].double(), expected)
            assert found.sum() == pytest.approx(float(expected.sum()), rel=1e-6)

    def test_sizes_that_do_not_divide_keep_place_and_area(self):
        masks = torch.zeros(1, 84, 70, dtype=torch.int64)
        masks[0, 20:50, 30:60] = 1
        found = segmenting.small(masks, tiny())[0].double()
        scale = 24 / 84
        assert found.sum() == pytest.approx(30 * 30 * scale**2, rel=0.03)
        rows = torch.arange(24) + 0.5
        assert float((found.sum(1) * rows).sum() / found.sum()) == pytest.approx(35 * scale, abs=0.2)
        assert float((found.sum(0) * rows).sum() / found.sum()) == pytest.approx(45 * scale, abs=0.2)

    def test_it_lies_where_answers_are_read(self):
        masks = torch.zeros(1, 40, 60, dtype=torch.int64)
        masks[0, 8:30, 12:50] = 1
        back = from_side(segmenting.small(masks, tiny()), (40, 60), SIDE) > 0.5
        overlap = 2 * (back & (masks == 1)).sum() / (back.sum() + masks.sum())
        assert overlap > 0.96


def prompts_of(kind: str, count: int) -> synthfm.Prompt:
    draws = generator(5)
    points = 10 + 20 * torch.rand(count, 3, 2, generator=draws)
    labels = torch.tensor([1, 0, -1]).repeat(count, 1)
    box = torch.cat([10 * torch.rand(count, 2, generator=draws), 30 + 10 * torch.rand(count, 2, generator=draws)], 1)
    return {
        "points": synthfm.Prompt(points, labels),
        "box": synthfm.Prompt(box=box),
        "both": synthfm.Prompt(points, labels, box),
        "mask": synthfm.Prompt(points, labels, again=True),
        "box again": synthfm.Prompt(box=box, again=True),
    }[kind]


def only(prompt: synthfm.Prompt, i: int) -> synthfm.Prompt:
    return synthfm.Prompt(*(None if part is None else part[i : i + 1] for part in prompt[:3]), prompt.again)


class TestAnswer:
    @pytest.mark.parametrize("kind", ["points", "box", "both", "mask", "box again"])
    @torch.no_grad()
    def test_a_batch_gives_what_one_image_at_a_time_gives(self, kind):
        network, images = tiny(), torch.rand(3, 1, SIDE, SIDE, generator=generator())
        prompt, embeddings = prompts_of(kind, 3), embed(network, images)
        logits, iou = synthfm.answer(network, embeddings, prompt, (SIDE, SIDE))
        assert logits.shape == (3, 4, 24, 24)
        assert iou.shape == (3, 4)
        assert logits.std((0, 2, 3)).min() > 0.01
        for i in range(3):
            one = synthfm.answer(network, embed(network, images[i : i + 1]), only(prompt, i), (SIDE, SIDE))
            torch.testing.assert_close(one[0][0], logits[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one[1][0], iou[i], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("size", "scale"), [((24, 24), 2), ((24, 16), 2), ((16, 24), 2), ((96, 72), 0.5)])
    @pytest.mark.parametrize("kind", ["points", "box", "both"])
    @torch.no_grad()
    def test_prompts_are_in_pixels_of_the_image(self, size, scale, kind):
        network = tiny()
        embeddings = embed(network, torch.rand(2, 1, *size, generator=generator()))
        there = prompts_of(kind, 2)  # in the prepared image
        here = synthfm.Prompt(
            *(None if part is None else part / scale if i != 1 else part for i, part in enumerate(there[:3]))
        )
        logits, iou = synthfm.answer(network, embeddings, here, size)
        expected = decode(network, embeddings, *encode_prompts(network, *there[:3]))
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(iou, expected[1], rtol=1e-4, atol=1e-4)
        moved = synthfm.answer(network, embeddings, there, size)[0]
        assert (moved - logits).abs().max() > 1e-3, "another place is another prompt"

    def test_the_second_answer_is_to_the_first_as_a_mask_prompt_without_its_gradient(self):
        network, prompt = tiny(), prompts_of("mask", 2)
        embeddings = embed(network, torch.rand(2, 1, SIDE, SIDE, generator=generator())).detach()
        given = (prompt.points, prompt.labels, None)
        with torch.no_grad():
            first = decode(network, embeddings, *encode_prompts(network, *given))
            best = by_predicted_iou(*first)[:, None]
        expected = decode(network, embeddings, *encode_prompts(network, *given, best))
        found = synthfm.answer(network, embeddings, prompt, (SIDE, SIDE))
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
        assert (found[0] - first[0]).abs().max() > 1e-3
        grads = [
            torch.autograd.grad(x[0].square().mean(), [*network.mask_decoder.transformer.parameters()])
            for x in (found, expected)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_prompt_moves_with_its_parts(self):
        prompt = prompts_of("mask", 2).to(torch.device("meta"))
        assert prompt.points.is_meta
        assert prompt.labels.is_meta
        assert prompt.box is None
        assert prompt.again


# Training


def scenes(k: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright discs: images (B, 1, 48, 48) and masks."""
    draws = generator(1000 + k)
    x, y = 12 + 24 * torch.rand(2, count, 1, 1, generator=draws)
    axis = torch.arange(SIDE)
    masks = ((axis - x) ** 2 + (axis[:, None] - y) ** 2 < 8**2).long()
    noise = 0.1 * torch.rand(count, SIDE, SIDE, generator=draws)
    return (0.2 + 0.6 * masks + noise)[:, None], masks


def train(network, context: Context, batches=scenes, **changes) -> list[float]:
    encode = lambda images: embed(network, images)  # noqa: E731
    return synthfm.train(network, batches, encode, POINTS, BOXES, settings(**changes), 3, context)


def weights(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def moved(before: dict[str, torch.Tensor], network) -> set[str]:
    return {name for name, value in network.state_dict().items() if not torch.equal(before[name], value)}


def test_a_frozen_encoder_keeps_its_bits_and_the_decoder_moves(tmp_path):
    network = tiny()
    freeze_encoder(network)
    before = weights(network)
    trail = train(network, Context(tmp_path), steps=11)
    changed = moved(before, network)
    assert changed
    assert all(name.startswith(("mask_decoder.", "prompt_encoder.")) for name in changed)
    assert {name for name in before if name.startswith("mask_decoder.")} <= changed
    assert len(trail) == 2, "of every tenth iteration"
    assert not network.training


def test_what_is_not_frozen_is_trained_and_the_matrix_of_positions_is_not(tmp_path):
    network = tiny()
    before = weights(network)
    train(network, Context(tmp_path), kinds=("points", "box", "mask"))
    assert {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"} == set(before) - moved(before, network)


def rates_of(monkeypatch, network, context, **changes) -> list[list[float]]:
    seen, step = [], torch.optim.AdamW.step

    def note(self, *arguments, **options):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    train(network, context, **changes)
    return seen


def test_rates_rise_and_fall_and_the_encoder_has_its_own(tmp_path, monkeypatch):
    factors = [min(1, (k + 1) / 3) * (1 - k / 6) for k in range(6)]
    network = tiny()
    seen = rates_of(monkeypatch, network, Context(tmp_path / "both"))
    np.testing.assert_allclose(seen, [[2e-4 * f, 1e-3 * f] for f in factors], rtol=1e-12)
    monkeypatch.undo()
    freeze_encoder(network)
    seen = rates_of(monkeypatch, network, Context(tmp_path / "frozen"), warm_up=0)
    np.testing.assert_allclose(seen, [[1e-3 * (1 - k / 6)] for k in range(6)], rtol=1e-12)


def test_kinds_of_prompts_take_turns_and_all_arms_of_a_seed_get_the_same(tmp_path, monkeypatch):
    seen = []
    real = segmenting.answer
    monkeypatch.setattr(
        segmenting, "answer", lambda sam, e, prompt, size: seen.append(prompt) or real(sam, e, prompt, size)
    )
    for seed in (0, 7):
        train(tiny(seed), Context(tmp_path / str(seed)), kinds=("points", "box", "mask"))
    first, second = seen[:6], seen[6:]
    assert [(p.points is None, p.box is None, p.again) for p in first[:3]] == [
        (False, True, False),
        (True, False, False),
        (False, True, True),
    ]
    for one, other in zip(first, second, strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert not torch.equal(first[0].points, first[3].points)
    assert not torch.equal(
        first[0].points, segmenting.training_prompt(scenes(0)[1], "points", POINTS, BOXES, 4, 0).points
    )


def test_training_prompts_fit_their_masks():
    masks = torch.cat([scenes(k)[1] for k in range(20)])
    prompt = segmenting.training_prompt(masks, "points", POINTS, BOXES, 0, 0)
    x, y = prompt.points.long().unbind(-1)
    values = masks[torch.arange(len(masks))[:, None], y, x]
    assert (values[prompt.labels == 1] == 1).all()
    assert (values[prompt.labels == 0] == 0).all()
    box = segmenting.training_prompt(masks, "box", POINTS, BOXES, 0, 0).box
    tight = BoxPrompts(0.0).apply(masks, BoxPrompts(0.0).draw(len(masks), generator()))
    outwards = (box - tight) * torch.tensor([-1, -1, 1, 1])
    assert outwards.min() >= 0
    assert outwards.max() <= 0.02 * SIDE + 1e-4


def test_training_lowers_the_loss_and_finds_the_discs(tmp_path):
    network = tiny()
    trail = train(network, Context(tmp_path), lambda k: scenes(k, 4), steps=61, batch=4, lr=4e-3, encoder_lr=2e-3)
    assert len(trail) == 7
    assert np.mean(trail[-3:]) < 0.5 * trail[0]
    images, masks = scenes(9999, 8)
    prompt = segmenting.training_prompt(masks, "points", POINTS, BOXES, 0, 0)
    with torch.no_grad():
        logits, iou = synthfm.answer(network, embed(network, images), prompt, (SIDE, SIDE))
    found = from_side(by_predicted_iou(logits, iou), (SIDE, SIDE), SIDE) > 0
    dice = 2 * (found & (masks == 1)).sum((1, 2)) / (found.sum((1, 2)) + masks.sum((1, 2)))
    assert dice.mean() > 0.7


@pytest.mark.parametrize("frozen", [True, False])
def test_in_half_precision_the_loss_is_still_single(frozen, tmp_path, monkeypatch):
    kinds = []
    real = segmenting.loss_of

    def note(logits, iou, targets, kind):
        value = real(logits, iou, targets, kind)
        kinds.append((logits.dtype, value.dtype, bool(value.isfinite())))
        return value

    monkeypatch.setattr(segmenting, "loss_of", note)
    network = tiny()
    if frozen:
        freeze_encoder(network)
    train(network, Context(tmp_path), precision="bf16", kinds=("points", "box", "mask"))
    assert kinds == [(torch.bfloat16, torch.float32, True)] * 6
    assert {value.dtype for value in network.parameters()} == {torch.float32}


def killed(network, folder, **changes) -> None:
    """Train until the third checkpoint is written, and stop in the fourth iteration's."""
    context, calls = Context(folder), []

    def due() -> bool:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return True

    context.checkpoint_due = due
    with pytest.raises(KeyboardInterrupt):
        train(network, context, **changes)
    assert context.load("training")["step"] == 3


@pytest.mark.parametrize("frozen", [True, False])
def test_a_training_that_was_killed_ends_with_the_same_bits(frozen, tmp_path):
    changes = {"kinds": ("points", "box", "mask"), "steps": 12}
    whole, part = tiny(), tiny()
    again = tiny() if frozen else tiny(7)  # nothing of it counts but what is frozen, which no checkpoint holds
    for network in (whole, part, again):
        if frozen:
            freeze_encoder(network)
    trails = [train(whole, Context(tmp_path / "whole"), **changes)]
    killed(part, tmp_path / "part", **changes)
    saved = Context(tmp_path / "part").load("training")["sam"]
    assert any(name.startswith("image_encoder.") for name in saved) is not frozen
    trails.append(train(again, Context(tmp_path / "part"), **changes))
    assert trails[0] == trails[1]
    assert len(trails[0]) == 2
    assert not moved(weights(whole), again)
    assert moved(weights(whole), part)
