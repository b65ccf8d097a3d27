"""The door: registry, options, reports, splits; and what this package must not lean on."""

import ast
from pathlib import Path

import pytest
import torch

from synthrepro import data
from synthrepro.data import TASKS, Split, check_task, fingerprint, list_tasks, load_task
from synthrepro.errors import UserError

TINY = {"subjects": [1, 1, 1], "size": [32, 32], "spacing": 6.0, "slices": 1}


@pytest.fixture
def split() -> Split:
    return Split(torch.rand(4, 1, 2, 2), torch.arange(16).view(4, 2, 2), ("b", "a", "b", "c"))


def test_a_split_gives_samples_individuals_and_parts(split: Split):
    assert len(split) == 4
    assert split.individuals == ("b", "a", "c")
    sample = split[1]
    assert sample.subject == "a"
    assert torch.equal(sample.image, split.images[1])
    assert torch.equal(sample.label, split.labels[1])
    part = split.take(["c", "b"])
    assert part.subjects == ("b", "b", "c")
    assert torch.equal(part.labels, split.labels[[0, 2, 3]])


def test_taking_somebody_who_is_not_there_is_an_error(split: Split):
    with pytest.raises(ValueError, match="no subject 'd'"):
        split.take(["a", "d"])


def test_loading_twice_gives_the_same_object_also_with_lists_for_tuples():
    assert load_task("brain-mni", **TINY) is load_task(
        "brain-mni", **{key: tuple(value) if isinstance(value, list) else value for key, value in TINY.items()}
    )
    assert load_task("brain-mni", **TINY) is not load_task("brain-mni", **TINY, seed=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": (64, 64)}, ["no option 'sizes'", "spacing", "subjects"]),
        ({"size": (64,)}, ["'size"]),
        ({"size": (64, 0)}, ["'size.1'", "greater than 0", "not 0"]),
        ({"spacing": 0.5}, ["'spacing'", "greater than or equal to 1"]),
        ({"spacing": 12.0}, ["'spacing'", "less than or equal to 9"]),
        ({"contrast": "t2w"}, ["'contrast'", "'flash3'", "not 't2w'"]),
        ({"noise": (0.1, 0.05)}, ["'noise'", "(low, high)"]),
        ({"subjects": (1, 0, 1)}, ["'subjects.1'"]),
        ({"variation": -1.0}, ["'variation'"]),
        ({"seed": "x"}, ["'seed'", "not 'x'"]),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_it(options: dict, words: list[str]):
    with pytest.raises(UserError) as caught:
        load_task("brain-mni", **options)
    message = str(caught.value)
    assert message.startswith("Task brain-mni")
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("door", [load_task, check_task])
def test_an_unknown_task_is_an_error_that_lists_the_known(door: object):
    with pytest.raises(UserError, match=r"no task 'brain'; the tasks are .*brain-mni"):
        door("brain")


def test_the_report_says_what_is_there_and_where_it_is_had_and_under_which_licence():
    report = check_task("brain-mni")
    assert report.problem is None
    assert len(report.present) == 3
    assert not report.missing
    text = str(report)
    for word in ("ready", "embedded", "nilearn", "McGill", "BSD-3", report.present[0].name):
        assert word in text
    assert [entry.name for entry in list_tasks()] == list(TASKS)


def test_the_report_lists_what_is_missing(tmp_path: Path):
    (tmp_path / "brain-mni").mkdir()
    report = check_task("brain-mni", root=tmp_path)
    assert len(report.missing) == 3
    assert str(report).count("missing: ") == 3
    assert "reinstall nilearn" in report.problem


def test_the_card_says_semi_synthetic_and_one_anatomy():
    card = load_task("brain-mni", **TINY).card
    assert "Semi-synthetic" in card.what
    assert "One average anatomy" in card.doubt
    assert "slabs" in card.splits


def test_a_fingerprint_sees_every_pixel_label_and_subject():
    def task(split: Split) -> data.Task:
        card = data.Card("", "", "", "", "")
        return data.Task("t", ("background", "x"), 1, {"train": split}, card)

    images, labels = torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64)
    base = fingerprint(task(Split(images, labels, ("a", "b"))))
    assert base == fingerprint(task(Split(images.clone(), labels.clone(), ("a", "b"))))
    other_image, other_label = images.clone(), labels.clone()
    other_image[1, 0, 2, 2] = 1e-7
    other_label[0, 1, 1] = 1
    for split in (
        Split(other_image, labels, ("a", "b")),
        Split(images, other_label, ("a", "b")),
        Split(images, labels, ("a", "c")),
    ):
        assert fingerprint(task(split)) != base


def test_data_stands_on_no_method_and_on_no_generator_of_one():
    """A method must not be examined by its own generator."""
    folder = Path(data.__file__).parent
    forbidden = {"synthesis", "methods", "evidence", "cli", "bilevel"}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports relatively, out of the package"
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            used = {name.split(".")[1] for name in names if name.startswith("synthrepro.")}
            assert not used & forbidden, f"{path.name} imports {used & forbidden}"
