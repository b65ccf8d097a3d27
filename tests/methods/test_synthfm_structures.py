"""What is pointed at in a medical image, and scores of it, against counts and means by hand."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from synthrepro.data import Split
from synthrepro.errors import UserError
from synthrepro.methods import synthfm

CLASSES = ("background", "Liver", "kidney", "spleen")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split(labels: torch.Tensor, subjects: str) -> Split:
    return Split(torch.zeros(len(labels), 1, *labels.shape[1:]), labels, tuple(subjects))


def scene() -> Split:
    """Four images of 20 x 20 of two subjects: a liver in three, two kidneys in one, a tiny spleen in one."""
    labels = torch.zeros(4, 20, 20, dtype=torch.int64)
    labels[0, 2:10, 2:12] = 1  # 80 pixels
    labels[0, 12:16, 1:5] = 2  # 16, one kidney
    labels[0, 12:17, 14:19] = 2  # 25, the other
    labels[1, 0:4, 0:5] = 1  # 20
    labels[1, 18, 18] = 3  # a pixel
    labels[2, 5:15, 5:15] = 1  # 100
    return split(labels, "aabb")


class TestStructures:
    def test_of_every_class_the_largest_part_is_kept(self):
        found = synthfm.structures_of(scene(), 4, 0.0)
        assert list(zip(found.images.tolist(), found.classes.tolist(), strict=True)) == [
            (0, 1), (0, 2), (1, 1), (1, 3), (2, 1)
        ]  # fmt: skip
        assert len(found) == 5
        assert found.labels.dtype == torch.int64
        masks = found.masks(torch.arange(5))
        assert masks.dtype == torch.int64
        assert masks.sum((1, 2)).tolist() == [80, 25, 20, 1, 100]
        assert masks[1, 12:17, 14:19].all()
        assert torch.equal(found.masks(torch.tensor([4, 1])), masks[[4, 1]])

    def test_parts_that_touch_at_a_corner_are_two_as_in_training(self):
        labels = torch.zeros(1, 8, 8, dtype=torch.int64)
        labels[0, 0:3, 0:3] = 1
        labels[0, 3:7, 3:7] = 1
        assert synthfm.structures_of(split(labels, "a"), 2, 0.0).masks(torch.tensor([0])).sum() == 16

    @pytest.mark.parametrize(("smallest", "areas"), [(25 / 400, [80, 25, 100]), (25.5 / 400, [80, 100])])
    def test_what_is_too_small_to_point_at_is_left_out(self, smallest, areas):
        found = synthfm.structures_of(scene(), 4, smallest)
        assert found.masks(torch.arange(len(found))).sum((1, 2)).tolist() == areas

    def test_two_small_parts_do_not_make_a_large_one(self):
        found = synthfm.structures_of(scene(), 4, 30 / 400)  # the kidneys have 41 pixels together
        assert 2 not in found.classes.tolist()

    def test_a_set_without_any_structure_is_refused(self):
        with pytest.raises(UserError, match="lower `smallest`") as caught:
            synthfm.structures_of(scene(), 4, 0.5)
        assert "\n" not in str(caught.value)

    def test_the_split_is_left_as_it_is(self):
        there = scene()
        before = there.labels.clone()
        synthfm.structures_of(there, 4, 0.0)
        assert torch.equal(there.labels, before)


class TestSample:
    def structures(self) -> synthfm.Structures:
        """Class 1 in 40 images, 2 in 8, 3 in 2."""
        classes = torch.tensor([1] * 40 + [2] * 8 + [3] * 2)
        return synthfm.Structures(torch.zeros(50, 2, 2, dtype=torch.int64), torch.arange(50), classes)

    def test_every_class_is_as_likely_and_every_image_of_it(self):
        there = self.structures()
        rows = there.sample(3000, generator())
        assert stats.chisquare(there.classes[rows].bincount()[1:]).pvalue > 0.01
        for start, end in ((0, 40), (40, 48), (48, 50)):
            counts = rows[(rows >= start) & (rows < end)].bincount(minlength=end)[start:end]
            assert stats.chisquare(counts).pvalue > 0.01

    def test_it_is_the_generators(self):
        there = self.structures()
        assert torch.equal(there.sample(20, generator(3)), there.sample(20, generator(3)))
        assert not torch.equal(there.sample(20, generator(3)), there.sample(20, generator(4)))


class TestFew:
    def test_images_of_each_subject_are_evenly_spread(self):
        labels = torch.arange(14)[:, None, None].expand(14, 2, 2).contiguous()
        there = split(labels, "a" * 9 + "b" * 2 + "c" * 3)
        chosen = synthfm.few(there, 3)
        assert chosen.labels[:, 0, 0].tolist() == [0, 4, 8, 9, 10, 11, 12, 13]
        assert chosen.subjects == tuple("aaabbccc")
        assert synthfm.few(there, 5).labels[:5, 0, 0].tolist() == [0, 2, 4, 6, 8]
        assert synthfm.few(there, 99).labels.shape == there.labels.shape
        assert [synthfm.few(there, n).individuals for n in (1, 2)] == [("a", "b", "c")] * 2

    def test_never_an_image_twice_and_never_too_few(self):
        for total in range(1, 25):
            there = split(torch.arange(total)[:, None, None].expand(total, 1, 1).contiguous(), "a" * total)
            for wanted in range(1, total + 1):
                rows = synthfm.few(there, wanted).labels[:, 0, 0].tolist()
                assert len(set(rows)) == wanted
                steps = [after - before for before, after in pairwise(rows)]
                assert not steps or max(steps) - min(steps) <= 1

    def test_subjects_may_lie_between_one_another(self):
        there = split(torch.arange(6)[:, None, None].expand(6, 1, 1).contiguous(), "ababab")
        chosen = synthfm.few(there, 2)
        assert list(zip(chosen.subjects, chosen.labels[:, 0, 0].tolist(), strict=True)) == [
            ("a", 0), ("a", 4), ("b", 1), ("b", 5)
        ]  # fmt: skip


class TestRows:
    def rows(self, answers: dict[str, torch.Tensor], spacing: float = 1.0):
        return synthfm.rows_of_subjects(answers, self.structures, scene(), "test", CLASSES, spacing)

    structures = synthfm.structures_of(scene(), 4, 2 / 400)  # livers of a in two images and of b in one, a kidney

    def truth(self) -> torch.Tensor:
        return self.structures.masks(torch.arange(len(self.structures))).bool()

    def test_perfect_answers(self):
        a, b = self.rows({"": self.truth()})
        assert (a["subject"], b["subject"], a["split"]) == ("a", "b", "test")
        for row in (a, b):
            assert row["dice"] == row["jaccard"] == row["surface_dice"] == row["dice_liver"] == 1
            assert row["hausdorff95"] == 0
        assert a["dice_kidney"] == 1
        assert "dice_kidney" not in b, "b has none"
        assert not any("dice_spleen" in row for row in (a, b)), "too small to be tested"

    def test_means_are_over_images_and_then_over_structures(self):
        answers = self.truth()
        answers[0, :6] = False  # the first liver's upper half: 40 of 80 pixels are found
        answers[1] = False  # no kidney
        answers[3] = ~answers[3]  # everything but the liver
        a, b = self.rows({"": answers})
        liver = (2 * 40 / (40 + 80) + 1) / 2
        assert a["dice_liver"] == pytest.approx(liver, abs=1e-5)
        assert a["dice_kidney"] == 0
        assert a["dice"] == pytest.approx(liver / 2, abs=1e-5), "not the mean of three images"
        assert a["jaccard"] == pytest.approx((0.5 + 1) / 2 / 2, abs=1e-5)
        assert (b["dice"], b["jaccard"]) == (0, 0)

    def test_an_empty_answer_is_a_diagonal_away_and_no_surface_agrees(self):
        answers = torch.zeros_like(self.truth())
        for row in self.rows({"": answers}, spacing=1.5):
            assert row["surface_dice"] == 0
            assert row["hausdorff95"] == pytest.approx(1.5 * math.hypot(20, 20), abs=1e-4)

    def test_distances_are_in_millimetres(self):
        answers = self.truth().roll(2, 2)  # two columns to the right
        one, three = (self.rows({"": answers}, spacing)[1] for spacing in (1.0, 3.0))
        assert one["hausdorff95"] == pytest.approx(2)
        assert three["hausdorff95"] == pytest.approx(6)
        assert one["surface_dice"] < 1
        shifted = self.truth().roll(1, 2)
        assert self.rows({"": shifted}, 3.0)[1]["surface_dice"] == 1, "a pixel is within the tolerance"

    def test_other_answers_have_a_dice_of_their_own_and_change_nothing(self):
        empty = torch.zeros_like(self.truth())
        alone, both = self.rows({"": self.truth()}), self.rows({"": self.truth(), "oracle": empty})
        for one, other in zip(alone, both, strict=True):
            assert other.pop("dice_oracle") == 0
            assert one == other
