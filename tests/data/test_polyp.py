"""The task `polyp` on a small folder in its layout."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from synthrepro.data import polyp
from synthrepro.data.polyp import ENDS, Options, sequence_of
from synthrepro.errors import UserError

COUNTS = {"size": (12, 16), "subjects": (2, 1, 2)}
FRAMES = (1, 25, 26, 27, 200, 205, 206, 571, 572, 612)  # two or more frames of some sequences, one of others


@pytest.fixture
def folder(tmp_path: Path, save_pair: Callable) -> Path:
    for i in FRAMES:
        save_pair(*(tmp_path / "CVC-ClinicDB" / kind / f"{i}.tif" for kind in ("Original", "Ground Truth")), seed=i)
    for name in ("cju0qkwl35piu0993l0dewei2", "cju0qoxqj9q6s0835b43399p4"):
        save_pair(*(tmp_path / "Kvasir-SEG" / kind / f"{name}.jpg" for kind in ("images", "masks")))
    return tmp_path


def test_the_sequences_are_those_of_the_published_table():
    assert len(ENDS) == 29
    assert sorted({*ENDS}) == list(ENDS)
    sequences = [sequence_of(Path(f"{i}.tif")) for i in range(1, 613)]
    assert [sequences.count(f"sequence {k}") for k in (1, 3, 10, 29)] == [25, 17, 6, 21]
    assert sequences[24] != sequences[25]
    for number in (0, 613):
        with pytest.raises(UserError, match=rf"{number}\.tif belongs to no sequence"):
            sequence_of(Path(f"{number}.tif"))


@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_is_never_divided(folder: Path, seed: int):
    splits = polyp.load(Options(**COUNTS, seed=seed), folder).splits
    individuals = [set(splits[name].individuals) for name in ("train", "validation", "test")]
    assert [len(names) for names in individuals] == [2, 1, 2]
    assert len(set.union(*individuals)) == 5
    size = {"sequence 1": 2, "sequence 2": 2, "sequence 10": 2, "sequence 11": 1, "sequence 27": 1, "sequence 28": 1,
            "sequence 29": 1}  # fmt: skip
    for name in ("train", "validation", "test"):
        subjects = splits[name].subjects
        assert all(subjects.count(subject) == size[subject] for subject in subjects), "each with all of its frames"


def test_kvasir_is_a_test_set_if_it_is_there(folder: Path):
    assert len(polyp.load(Options(**COUNTS), folder).splits["test-kvasir"].individuals) == 2
    assert len(polyp.files(folder)) == 2 * (len(FRAMES) + 2)
    polyp.check(folder)
    shutil.rmtree(folder / "Kvasir-SEG")
    assert "test-kvasir" not in polyp.load(Options(**COUNTS), folder).splits


def test_the_same_frame_in_two_formats_is_an_error(folder: Path, save_pair: Callable):
    save_pair(folder / "CVC-ClinicDB" / "Original" / "26.png")
    with pytest.raises(UserError, match=r"26\.tif and 26\.png are of the same case"):
        polyp.check(folder)
