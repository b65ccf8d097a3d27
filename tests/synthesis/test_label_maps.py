import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch.nn import functional as F

from synthrepro.errors import UserError
from synthrepro.synthesis import Draw
from synthrepro.synthesis.label_maps import Erosion, SynthMorphMaps, choose_target, erode, largest_at

MAPS = SynthMorphMaps()
SMALL = SynthMorphMaps(size=64, scales=(8, 16), warp_scales=(4, 8, 16), warp_sd=4.0)  # the same shapes, fewer pixels
SQUARE, CROSS = ndimage.generate_binary_structure(2, 2), ndimage.generate_binary_structure(2, 1)
U = [0.0, 0.3, 0.6, 0.999]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(count: int, size: int = 64) -> torch.Tensor:
    return SMALL.apply(SMALL.draw(count, generator()), size, "cpu")


class TestSynthMorphMaps:
    def test_maps_are_what_the_contract_says(self):
        labels = maps(3, 50)
        assert labels.shape == (3, 50, 50)
        assert labels.dtype == torch.int64
        assert labels.min() >= 1
        assert labels.max() <= 16
        assert not torch.equal(labels[0], labels[1])

    def test_control_points_are_as_far_apart_as_stated_and_few(self):
        draw = MAPS.draw(2, generator())
        assert {name: tuple(value.shape[1:]) for name, value in vars(draw).items()} == {
            "noise0": (16, 8, 8),
            "noise1": (16, 4, 4),
            "warp0": (16, 2, 16, 16),
            "warp1": (16, 2, 8, 8),
            "warp2": (16, 2, 4, 4),
        }

    @pytest.mark.parametrize(("name", "largest"), [("noise0", 1.0), ("noise1", 1.0), ("warp0", 16.0), ("warp2", 16.0)])
    def test_control_points_are_normal_of_one_uniform_sd_a_scale(self, name, largest):
        controls = vars(MAPS.draw(400, generator()))[name].flatten(2)  # (B, labels, values)
        sd = controls.flatten(1).square().mean(1).sqrt()
        assert stats.kstest(sd, "uniform", args=(0, largest)).pvalue > 0.01
        unit = controls / sd[:, None, None]
        assert stats.kstest(unit.flatten()[::7], "norm").pvalue > 0.01
        # one SD for all labels: a label's own mean square is 1, up to the sampling error of that many values
        spread = unit.square().mean(2).var().item()
        assert spread == pytest.approx(2 / controls.shape[2], rel=0.1)

    def test_scales_have_their_own_sd(self):
        draw = MAPS.draw(400, generator())
        sds = [value.flatten(1).std(1) for value in vars(draw).values()]
        assert np.abs(np.corrcoef(torch.stack(sds)) - np.eye(5)).max() < 0.2

    def test_displacements_stay_within_the_largest_sd(self):
        draw = MAPS.draw(6, generator())
        for i in range(3):
            field = F.interpolate(vars(draw)[f"warp{i}"].flatten(1, 2), 256, mode="bilinear", align_corners=True)
            assert field.flatten(1).square().mean(1).sqrt().max() < 16.0
            # linear in between: no step is larger than the largest difference of neighbours over their distance
            steps = vars(draw)[f"warp{i}"].diff(dim=-1).abs().max() * (vars(draw)[f"warp{i}"].shape[-1] - 1) / 255
            assert field.diff(dim=-1).abs().max() <= steps * 1.001

    def test_noise_without_a_warp_is_interpolated_from_corner_to_corner_and_added_up(self):
        still = replace(MAPS, warp_sd=0.0)
        draw = still.draw(2, generator())
        expected = sum(
            F.interpolate(n, (256, 256), mode="bilinear", align_corners=True) for n in (draw.noise0, draw.noise1)
        )
        torch.testing.assert_close(still.fields(draw), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(replace(still, warp_scales=()).fields(draw), expected)

    def test_each_label_is_warped_by_its_own_displacement_of_rows_and_columns(self):
        draw = SMALL.draw(1, generator())
        noise = replace(SMALL, warp_scales=()).fields(draw)[0].double().numpy()
        grid = np.mgrid[:64, :64].astype(float)
        fields = SMALL.fields(draw)[0]
        for k in range(16):
            warp = sum(
                F.interpolate(w[:, k].double(), (64, 64), mode="bilinear", align_corners=True)[0]
                for w in (draw.warp0, draw.warp1, draw.warp2)
            )
            expected = ndimage.map_coordinates(noise[k], grid + np.asarray(warp), order=1, mode="nearest")
            np.testing.assert_allclose(fields[k], expected, atol=1e-4)

    def test_labels_are_equally_frequent(self):
        share = F.one_hot(maps(300), 17)[..., 1:].float().mean((1, 2))  # (B, labels)
        error = share.std(0) / 300**0.5
        assert ((share.mean(0) - 1 / 16).abs() < 4 * error).all()

    def test_the_map_is_the_largest_field_at_its_own_size_and_interpolated_at_others(self):
        draw = SMALL.draw(3, generator())
        fields = SMALL.fields(draw)
        assert torch.equal(SMALL.apply(draw, 64, "cpu"), fields.argmax(1) + 1)
        for size in (37, 63, 200, 256):
            dense = F.interpolate(fields, (size, size), mode="bilinear").argmax(1) + 1
            assert (SMALL.apply(draw, size, "cpu") != dense).float().mean() < 1e-4

    def test_maps_of_two_sizes_agree_where_their_pixels_do(self):
        draw = SMALL.draw(4, generator())
        native, larger = SMALL.apply(draw, 64, "cpu"), SMALL.apply(draw, 192, "cpu")
        assert (larger[:, 1::3, 1::3] != native).float().mean() < 1e-3
        assert (larger != native.repeat_interleave(3, 1).repeat_interleave(3, 2)).float().mean() > 0.01  # no stairs

    def test_a_label_can_win_between_pixels_where_it_wins_at_none(self):
        fields = torch.tensor([[[[4.0, 0.0], [4.0, 0.0]], [[0.0, 4.0], [0.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]]]])
        assert largest_at(fields, 8)[0, 0].tolist() == [0, 0, 0, 2, 2, 1, 1, 1]

    def test_a_sample_depends_on_neither_its_batch_nor_its_turn(self):
        draw = SMALL.draw(4, generator())
        labels = SMALL.apply(draw, 100, "cpu")
        assert torch.equal(SMALL.apply(draw, 100, "cpu"), labels)
        assert torch.equal(SMALL.apply(draw[2], 100, "cpu"), labels[2:3])
        assert torch.equal(SMALL.apply(SMALL.draw(2, generator()), 100, "cpu"), labels[:2])

    def test_global_random_state_is_left_alone(self):
        state = torch.get_rng_state()
        maps(1)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_draws_the_same_maps(self):
        draw = SMALL.draw(4, generator())
        there = SMALL.apply(draw, 256, "cuda")
        assert (there.cpu() != SMALL.apply(draw, 256, "cpu")).float().mean() < 1e-3

    def test_nothing_to_draw_is_refused(self):
        with pytest.raises(UserError, match="need a label"):
            SynthMorphMaps(scales=())


def octagon(radius: int) -> list[np.ndarray]:
    return [SQUARE if i % 2 == 0 else CROSS for i in range(radius)]


class TestErosion:
    def test_it_is_the_erosion_of_each_label_by_the_octagon_of_its_radius(self):
        labels = maps(3, 96)
        labels[:, 20:40, 30:60] = 0
        radius = torch.randint(0, 6, (3, 16), generator=generator())
        eroded = erode(labels, radius)
        for b in range(3):
            expected = np.zeros((96, 96), dtype=int)
            for k in range(1, 17):
                region = labels[b].numpy() == k
                for structure in octagon(int(radius[b, k - 1])):
                    region = ndimage.binary_erosion(region, structure, border_value=1)
                expected[region] = k
            np.testing.assert_array_equal(eroded[b], expected)

    def test_the_gap_is_background_and_what_stays_keeps_its_label(self):
        labels = maps(2)
        eroded = erode(labels, torch.full((2, 16), 2))
        assert torch.equal(eroded[eroded > 0], labels[eroded > 0])
        beside = eroded[:, :, 1:] != eroded[:, :, :-1]
        assert ((eroded[:, :, 1:] == 0) | (eroded[:, :, :-1] == 0))[beside].all()
        assert 0 < (eroded == 0).float().mean() < 1

    def test_a_radius_is_the_number_of_pixels_lost(self):
        labels = torch.ones(1, 20, 20, dtype=torch.int64)
        labels[:, :, 10:] = 2
        assert erode(labels, torch.tensor([[3, 0]]))[0, 5].tolist() == 7 * [1] + 3 * [0] + 10 * [2]

    def test_no_width_changes_nothing_and_an_image_of_one_label_loses_nothing(self):
        labels = maps(2)
        erosion = Erosion(width=(0.0, 0.0))
        assert torch.equal(erosion.apply(labels, erosion.draw(2, generator())), labels)
        whole = torch.full((1, 32, 32), 5)
        assert torch.equal(erode(whole, torch.full((1, 16), 4)), whole)

    def test_widths_are_drawn_an_image_and_jittered_a_label_in_some(self):
        erosion = Erosion(labels=4, width=(0.01, 0.03), jitter_chance=0.3, jitter=(0.5, 1.5))
        width = erosion.draw(2000, generator()).width
        alike = (width == width[:, :1]).all(1)
        assert alike.sum().item() == pytest.approx(0.7 * 2000, abs=4 * (2000 * 0.21) ** 0.5)
        assert stats.kstest(width[alike, 0], "uniform", args=(0.01, 0.02)).pvalue > 0.01
        factor = width[~alike] / 0.02
        assert 0.25 < factor.min() < 0.4
        assert 2.0 < factor.max() < 2.25
        assert factor.mean().item() == pytest.approx(1, abs=0.05)

    def test_widths_are_fractions_of_the_shorter_side(self):
        draw = Draw(width=torch.tensor([[0.05, 0.05]]))
        for side in (20, 100):
            labels = torch.ones(1, side, 200, dtype=torch.int64)
            labels[:, :, 100:] = 2
            assert (Erosion(labels=2).apply(labels, draw) == 0)[0, 0].sum() == 2 * 0.05 * side

    def test_a_sample_does_not_depend_on_its_batch(self):
        labels, erosion = maps(4), Erosion(width=(0.0, 0.05))
        draw = erosion.draw(4, generator())
        eroded = erosion.apply(labels, draw)
        assert torch.equal(erosion.apply(labels, draw), eroded)
        assert torch.equal(erosion.apply(labels[3:], draw[3]), eroded[3:])
        assert torch.equal(erosion.draw(2, generator()).width, draw.width[:2])

    def test_misfits_are_refused(self):
        labels, erosion = maps(2), Erosion(labels=3)
        with pytest.raises(UserError, match=r"must be 0 to 3, but .* to 16"):
            erosion.apply(labels, erosion.draw(2, generator()))
        with pytest.raises(UserError, match="3 samples for 2"):
            erosion.apply(labels, erosion.draw(3, generator()))
        with pytest.raises(UserError, match=r"torch\.float32"):
            erosion.apply(labels.float(), erosion.draw(2, generator()))


def blocks() -> torch.Tensor:
    """Regions of 9 and 16 (twice: of label 1, touching at a corner), 40 and 100 pixels of 1600."""
    labels = torch.zeros(1, 40, 40, dtype=torch.int64)
    labels[0, 2:5, 2:5] = 2
    labels[0, 10:14, 10:14] = 1
    labels[0, 14:18, 14:18] = 1
    labels[0, 20:22, 0:20] = 2
    labels[0, 22:32, 0:10] = 3
    return labels


class TestChooseTarget:
    @pytest.mark.parametrize("size", [64, 300, 512])
    def test_the_target_is_one_whole_region_of_one_label(self, size):
        labels = maps(4, size)
        masks = choose_target(labels, torch.tensor(U), 0.005, 0.1)
        assert masks.shape == labels.shape
        assert masks.dtype == torch.int64
        for label, mask in zip(labels, masks.bool(), strict=True):
            (value,) = label[mask].unique().tolist()
            regions, _ = ndimage.label(label.numpy() == value)
            (region,) = np.unique(regions[mask.numpy()])
            assert region > 0
            np.testing.assert_array_equal(regions == region, mask)

    def test_areas_are_within_bounds(self):
        share = choose_target(maps(100), torch.rand(100, generator=generator()), 0.01, 0.05).float().mean((1, 2))
        assert share.min() >= 0.01
        assert share.max() <= 0.05

    def test_every_admissible_region_is_as_likely(self):
        labels, u = blocks().expand(1200, -1, -1), (torch.arange(1200) + 0.5) / 1200
        masks = choose_target(labels, u, 16 / 1600, 40 / 1600)
        counts = masks.flatten(1).unique(dim=0, return_counts=True)[1]
        assert counts.tolist() == [400, 400, 400]  # 16, 16 and 40 pixels; not 9, not 100
        random = choose_target(labels[:600], torch.rand(600, generator=generator()), 0.0, 1.0)
        counts = random.flatten(1).unique(dim=0, return_counts=True)[1]
        assert len(counts) == 5
        assert stats.chisquare(counts).pvalue > 0.01

    def test_corners_do_not_connect(self):
        masks = choose_target(blocks().expand(2, -1, -1), torch.tensor([0.1, 0.9]), 16 / 1600, 16 / 1600)
        assert masks.sum((1, 2)).tolist() == [16, 16]
        assert (masks[0] * masks[1]).sum() == 0

    def test_without_an_admissible_region_it_is_the_largest(self):
        for bounds in ((0.5, 1.0), (0.0, 1e-6), (30 / 1600, 30 / 1600)):
            mask = choose_target(blocks(), torch.tensor([0.7]), *bounds)
            assert torch.equal(mask, (blocks() == 3).long())

    def test_a_region_between_the_sampled_pixels_is_found(self):
        labels = torch.zeros(1, 1024, 1024, dtype=torch.int64)
        labels[0, 5, 4:9] = 3
        assert torch.equal(choose_target(labels, torch.tensor([0.5]), 0.01, 1.0), (labels == 3).long())

    def test_regions_that_are_apart_on_the_image_stay_apart(self):
        labels = torch.full((1, 1024, 1024), 1)
        labels[:, :, 511:513] = 2  # sampled every 4 pixels, at 2, 6, ...: not seen
        mask = choose_target(labels, torch.tensor([0.5]), 0.0, 1.0)
        assert mask.sum() == 1024 * 511

    def test_the_background_is_never_a_target_and_alone_is_refused(self):
        labels = maps(2)
        labels[1] = 0
        with pytest.raises(UserError, match="Label map 1 of the batch is background only"):
            choose_target(labels, torch.tensor([0.5, 0.5]), 0.01, 0.5)

    def test_misfits_are_refused(self):
        with pytest.raises(UserError, match="3 numbers to choose by for 1"):
            choose_target(blocks(), torch.zeros(3), 0.1, 0.2)
        with pytest.raises(UserError, match="smallest <= largest"):
            choose_target(blocks(), torch.zeros(1), 0.2, 0.1)
        with pytest.raises(UserError, match=r"\(B, H, W\)"):
            choose_target(blocks()[0], torch.zeros(1), 0.1, 0.2)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_chooses_and_erodes_the_same(self):
        labels, radius = maps(4, 512), torch.full((4, 16), 3)
        eroded = erode(labels.cuda(), radius)
        assert torch.equal(eroded.cpu(), erode(labels, radius))
        masks = choose_target(eroded, torch.tensor(U).cuda(), 0.005, 0.1)
        assert masks.is_cuda
        assert torch.equal(masks.cpu(), choose_target(eroded.cpu(), torch.tensor(U), 0.005, 0.1))


def test_a_large_image_takes_no_longer_than_training_has():
    erosion, seconds = Erosion(), []
    for seed in range(3):
        start = time.process_time()
        labels = MAPS.apply(MAPS.draw(1, generator(seed)), 1024, "cpu")
        labels = erosion.apply(labels, erosion.draw(1, generator(seed)))
        choose_target(labels, torch.tensor([0.5]), 0.005, 0.2)
        seconds.append((time.process_time() - start) / torch.get_num_threads())
    assert min(seconds) < 0.5  # two images a second on one thread
