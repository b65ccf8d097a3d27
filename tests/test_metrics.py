import pytest
import torch

from synthrepro.metrics import dice, hausdorff95, jaccard, surface_dice


def square(left: int, classes: int = 3, value: int = 1) -> torch.Tensor:
    label = torch.zeros(1, 16, 16, dtype=torch.int64)
    label[0, 4:8, left : left + 4] = value
    return label


def test_overlaps_of_two_shifted_squares() -> None:
    truth, shifted = square(4), square(6)  # 16 pixels each, 8 in common
    assert dice(shifted, truth, 2).item() == pytest.approx(0.5)
    assert jaccard(shifted, truth, 2).item() == pytest.approx(8 / 24)


def test_a_class_the_label_map_lacks_is_not_a_number() -> None:
    scores = dice(square(4), square(4), 3)
    assert scores.shape == (1, 2)
    assert scores[0, 0] == 1
    assert scores[0, 1].isnan()


def test_boundary_distances_are_in_millimetres() -> None:
    truth, shifted = square(4), square(6)
    assert hausdorff95(shifted, truth, 2, spacing=1.5).item() == pytest.approx(3.0)
    assert surface_dice(shifted, truth, 2, tolerance=3.0, spacing=1.5).item() == pytest.approx(1.0)
    assert surface_dice(shifted, truth, 2, tolerance=1.4, spacing=1.5).item() < 1.0


def test_shapes_and_classes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 16, 16\).*\(16, 16\).*\(B, H, W\)"):
        dice(square(4), square(4)[0], 2)
    with pytest.raises(ValueError, match="holds class 5"):
        dice(square(4), square(4, value=5), 2)
