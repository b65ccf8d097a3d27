"""SynthFM's two modules together: which makes an image, what is asked for in it, and wider ranges."""

import ast
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from synthrepro import synthesis
from synthrepro.errors import UserError
from synthrepro.synthesis import shapes_to_image
from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.label_maps import SynthMorphMaps
from synthrepro.synthesis.shapes_to_image import ShapesToImage

DEFAULT = ShapesToImage()
SHAPES, MAPS = ShapesToImage(boundary=0.0), ShapesToImage(boundary=1.0)
QUICK = SynthMorphMaps(size=64, scales=(8, 16), warp_scales=(4, 8, 16), warp_sd=4.0)  # the same recipe, a quarter
SIZE = (64, 64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quick(**changes) -> ShapesToImage:
    return ShapesToImage(maps=QUICK, **changes)


def same(one: Draw, other: Draw) -> bool:
    """Whether two draws are equal bit for bit, parts within parts as well."""
    parts = [(a, vars(other)[name]) for name, a in vars(one).items()]
    return all(same(a, b) if isinstance(a, Draw) else torch.equal(a, b) for a, b in parts)


def parts_of(mask: torch.Tensor) -> int:
    """Connected regions, through edges."""
    return ndimage.label(mask.numpy())[1]


@pytest.mark.parametrize("settings", [SHAPES, MAPS, DEFAULT], ids=["shapes", "maps", "both"])
class TestAnyModule:
    def test_images_and_masks_are_what_the_contract_says(self, settings):
        images, masks = settings(3, SIZE, generator())
        assert images.shape == (3, 1, *SIZE)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.flatten(1).std(1).min() > 0.005
        assert masks.shape == (3, *SIZE)
        assert masks.dtype == torch.int64
        assert masks.unique().tolist() == [0, 1]
        assert masks.sum((1, 2)).min() > 0

    def test_a_replayed_draw_gives_the_same_bits_and_leaves_the_global_state(self, settings):
        state = torch.get_rng_state()
        draw = settings.draw(2, generator(3))
        first, second = settings.apply(draw, SIZE), settings.apply(draw, SIZE)
        again, other = settings(2, SIZE, generator(3)), settings(2, SIZE, generator(4))
        for i in range(2):
            assert torch.equal(first[i], second[i])
            assert torch.equal(first[i], again[i])
            assert not torch.equal(first[i], other[i])
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_sample_does_not_depend_on_its_batch(self, settings):
        images, masks = settings(4, SIZE, generator())
        few, few_masks = settings(2, SIZE, generator())
        assert torch.equal(images[:2], few)
        assert torch.equal(masks[:2], few_masks)
        draw = settings.draw(4, generator())
        alone, alone_mask = settings.apply(draw[3], SIZE)
        assert torch.equal(images[3:], alone)
        assert torch.equal(masks[3:], alone_mask)

    @pytest.mark.parametrize("size", [(64, 48), (48, 64)])
    def test_an_image_that_is_not_square_is_refused(self, settings, size):
        with pytest.raises(UserError, match=f"square, but {size[0]} x {size[1]} pixels are asked for") as caught:
            settings(1, size, generator())
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_draws_the_same_shapes(self, settings):
        draw = settings.draw(4, generator())
        here, there = settings.label_maps(draw, SIZE), settings.label_maps(draw, SIZE, "cuda")
        assert there.is_cuda
        assert (here != there.cpu()).float().mean() < 1e-3
        images, masks = settings.apply(draw, SIZE, "cuda")
        assert images.is_cuda
        assert masks.is_cuda


class TestModules:
    @pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
    def test_the_share_of_images_that_each_makes(self, share):
        count = 250 if 0 < share < 1 else 40
        tiny = SynthMorphMaps(size=16, labels=2, scales=(8,), warp_scales=())
        made = int(ShapesToImage(boundary=share, maps=tiny).draw(count, generator()).from_maps.sum())
        assert stats.binomtest(made, count, share).pvalue > 0.01
        if share in (0, 1):
            assert made == share * count

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
    def test_a_share_beyond_all_is_refused(self, share):
        with pytest.raises(UserError, match="from 0 to 1"):
            ShapesToImage(boundary=share)

    def test_an_image_is_what_its_module_alone_makes(self):
        settings = quick(boundary=0.5)
        draw = settings.draw(6, generator(1))
        assert 0 < draw.from_maps.sum() < 6
        labels = settings.label_maps(draw, SIZE)
        for i, from_maps in enumerate(draw.from_maps.tolist()):
            if from_maps:
                alone = settings.gaps.apply(settings.maps.apply(draw.maps[i], SIZE[0], "cpu"), draw.gaps[i])
            else:
                alone = settings.shapes.apply(draw.shapes[i], SIZE)
            assert torch.equal(labels[i : i + 1], alone)

    def test_both_modules_have_the_same_look_and_draws(self):
        draws = [quick(boundary=share).draw(4, generator()) for share in (0.0, 0.5, 1.0)]
        for name in ("look", "shapes", "maps", "gaps"):
            assert same(vars(draws[0])[name], vars(draws[1])[name])
            assert same(vars(draws[0])[name], vars(draws[2])[name])
        assert torch.equal(draws[0].target, draws[2].target)

    def test_gaps_between_structures_are_background_and_only_at_their_boundaries(self):
        settings = quick(boundary=1.0, gaps=replace(DEFAULT.gaps, width=(0.03, 0.03), jitter_chance=0.0))
        draw = settings.draw(4, generator())
        whole = settings.maps.apply(draw.maps, SIZE[0], "cpu")
        labels = settings.label_maps(draw, SIZE)
        assert whole.min() > 0
        gap = labels == 0
        assert torch.equal(labels[~gap], whole[~gap])
        assert 0.02 < gap.float().mean() < 0.9
        for one, hole in zip(whole.numpy(), gap.numpy(), strict=True):
            beside = ndimage.maximum_filter(one, 3) != ndimage.minimum_filter(one, 3)
            far = ndimage.distance_transform_cdt(~beside, "chessboard")
            radius = round(0.03 * SIZE[0])
            assert hole[beside].all()
            assert not hole[far >= radius].any()
        narrow = replace(settings, gaps=replace(DEFAULT.gaps, width=(0.0, 0.0)))
        assert torch.equal(narrow.label_maps(draw, SIZE), labels), "what a draw holds, applying does not change"
        assert narrow.label_maps(narrow.draw(4, generator()), SIZE).min() > 0

    def test_no_label_lies_beyond_those_that_looks_are_drawn_for(self):
        draw = quick(boundary=0.5).draw(20, generator())
        assert draw.look.level.shape == (20, DEFAULT.labels + 1)
        labels = quick().label_maps(draw, SIZE)
        assert labels.min() >= 0
        assert labels.max() <= DEFAULT.labels


class TestTarget:
    @pytest.mark.parametrize("boundary", [0.0, 1.0])
    def test_a_mask_is_one_whole_region_of_one_label(self, boundary):
        settings = quick(boundary=boundary)
        draw = settings.draw(20, generator())
        labels = settings.label_maps(draw, SIZE)
        _, masks = settings.apply(draw, SIZE)
        for label, mask in zip(labels, masks.bool(), strict=True):
            (value,) = label[mask].unique().tolist()
            assert value > 0
            assert parts_of(mask) == 1
            regions, _ = ndimage.label(label.numpy() == value)
            (region,) = np.unique(regions[mask.numpy()])
            np.testing.assert_array_equal(regions == region, mask)

    @pytest.mark.parametrize("boundary", [0.0, 1.0])
    def test_its_area_is_within_bounds_wherever_a_region_is(self, boundary):
        settings = quick(boundary=boundary, smallest=0.02, largest=0.05)
        draw = settings.draw(30, generator())
        labels = settings.label_maps(draw, SIZE)
        _, masks = settings.apply(draw, SIZE)
        found = 0
        for label, mask in zip(labels.numpy(), masks.numpy(), strict=True):
            areas = []
            for value in np.unique(label[label > 0]):
                regions, count = ndimage.label(label == value)
                areas += [(regions == i).mean() for i in range(1, count + 1)]
            if any(0.02 <= area <= 0.05 for area in areas):
                found += 1
                assert 0.02 <= mask.mean() <= 0.05
            else:
                assert mask.mean() == max(areas)
        assert found > 15

    def test_other_chances_ask_for_other_objects_of_the_same_image(self):
        draw = SHAPES.draw(1, generator(2))
        drawn = [SHAPES.apply(Draw(**vars(draw) | {"target": torch.tensor([u])}), SIZE) for u in (0.01, 0.99)]
        assert torch.equal(drawn[0][0], drawn[1][0])
        assert not torch.equal(drawn[0][1], drawn[1][1])

    def test_the_object_can_be_seen(self):
        """Its mean differs from its neighbourhood's in most images, and in which direction is a matter of chance."""
        images, masks = SHAPES(40, SIZE, generator())
        differences = []
        for image, mask in zip(images[:, 0].numpy(), masks.numpy().astype(bool), strict=True):
            around = ndimage.binary_dilation(mask, iterations=4) & ~mask
            if around.any():
                differences.append(image[mask].mean() - image[around].mean())
        assert np.mean(np.abs(differences) > 0.02) > 0.6
        assert stats.binomtest(int(np.sum(np.array(differences) > 0)), len(differences)).pvalue > 0.01

    def test_the_same_draw_at_another_size_is_the_same_scene(self):
        draw = SHAPES.draw(6, generator())
        small, large = (SHAPES.label_maps(draw, (side, side)) for side in (64, 192))
        assert (large[:, 1::3, 1::3] == small).float().mean() > 0.99


def ranges_of(settings, name: str = "") -> dict[str, tuple[float, float]]:
    """Every pair of floats of nested settings, by its path."""
    found = {}
    for field in fields(settings):
        value, path = getattr(settings, field.name), f"{name}.{field.name}".lstrip(".")
        if is_dataclass(value):
            found |= ranges_of(value, path)
        elif isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, float) for x in value):
            found[path] = value
    return found


class TestScaled:
    def test_by_one_is_itself(self):
        once = DEFAULT.scaled(1.0)
        for path, bounds in ranges_of(DEFAULT).items():
            assert ranges_of(once)[path] == pytest.approx(bounds, rel=1e-9), path
        draws = [each(2, SIZE, generator()) for each in (replace(DEFAULT, maps=QUICK), replace(once, maps=QUICK))]
        torch.testing.assert_close(draws[0][0], draws[1][0], rtol=0, atol=1e-4)
        assert torch.equal(draws[0][1], draws[1][1])

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_every_range_is_so_much_wider_within_its_limits(self, factor):
        before, after = ranges_of(DEFAULT), ranges_of(DEFAULT.scaled(factor))
        assert set(before) == set(after)
        own = {**shapes_to_image.SHAPE_LIMITS, **shapes_to_image.GAP_LIMITS, **DEFAULT.look.limits}
        own |= DEFAULT.look.noise.limits
        changed = 0
        for path, (low, high) in before.items():
            limits = own.get(path.rpartition(".")[2])
            if limits is None:  # SynthMorph's, and where shapes and gaps are
                assert after[path] == (low, high), path
                continue
            a, b = after[path]
            if limits.log:
                low, high, a, b = np.log([low, high, a, b])
            middle, half = (low + high) / 2, (high - low) / 2 * factor
            ends = (np.log(limits.low), np.log(limits.high)) if limits.log else (limits.low, limits.high)
            assert a == pytest.approx(max(middle - half, ends[0]), abs=1e-9), path
            assert b == pytest.approx(min(middle + half, ends[1]), abs=1e-9), path
            changed += 1
        assert changed > 15
        assert DEFAULT.scaled(factor).look.gamma == factor * DEFAULT.look.gamma

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_images_of_other_ranges_are_images(self, factor):
        settings = quick(boundary=0.5).scaled(factor)
        images, masks = settings(16, SIZE, generator())
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.isfinite().all()
        assert all(parts_of(mask) == 1 for mask in masks)

    def test_modules_bounds_and_recipe_stay(self):
        other = ShapesToImage(boundary=0.3, smallest=0.01, largest=0.2).scaled(2.0)
        assert (other.boundary, other.smallest, other.largest) == (0.3, 0.01, 0.2)
        assert other.maps == DEFAULT.maps
        assert (other.shapes.number, other.shapes.controls) == (DEFAULT.shapes.number, DEFAULT.shapes.controls)
        assert other.look.noise.kinds == DEFAULT.look.noise.kinds

    def test_wider_ranges_make_sizes_and_contrasts_differ_more(self):
        """Of logarithms of radii, SD in proportion to the width."""
        spread = [
            ShapesToImage(boundary=0.0, maps=QUICK).scaled(f).draw(60, generator()).shapes.radius.log().std()
            for f in (0.5, 1.0)
        ]
        assert spread[1] / spread[0] == pytest.approx(2, rel=1e-3)


def test_synthesis_imports_no_data_and_no_method():
    """What a network learns from must not know what it is tested on."""
    folder = Path(synthesis.__file__).parent
    forbidden = {"data", "methods", "evidence", "cli"}
    paths = list(folder.rglob("*.py"))
    assert folder / "shapes_to_image.py" in paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports relatively, out of the package"
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            used = {name.split(".")[1] for name in names if name.startswith("synthrepro.")}
            assert not used & forbidden, f"{path.name} imports {used & forbidden}"
