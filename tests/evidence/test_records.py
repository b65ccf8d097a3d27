import json
import math

import numpy as np
import pytest
import torch

from synthrepro.evidence import Cell, Provenance, Record
from synthrepro.evidence.records import from_json, record_key, to_json

CPU = ("measure", "toy", "--profile", "cpu")
PROVENANCE = Provenance(
    "abc", False, "c0de", {"numbers": "da7a"}, "3.11.1", "2.12", None, "CPU", 1.5, 10.0, "2026-01-01"
)


def record(**changes) -> Record:
    cell = Cell("fixed", "brain-mni", 0, {"noise": "0.05", "exponent": 0.5, "levels": 3})
    content = {
        "chapter": "toy",
        "experiment": "counting",
        "profile": "cpu",
        "cell": cell,
        "config": {"rate": 1e-3, "steps": 4},
        "config_hash": "0",
        "metrics": {"dice": 0.5, "curve": [0.1, 0.2]},
        "cases": [{"subject": "s1", "split": "test", "dice": 0.5}],
        "artefacts": ["base-1"],
        "provenance": PROVENANCE,
    }
    return Record(**{**content, **changes})


def test_a_record_survives_its_line_of_json():
    line = to_json(record())
    assert "\n" not in line
    assert from_json(line) == record()
    assert from_json(line).key == record().key
    assert from_json(line).cell.setting == {"exponent": 0.5, "levels": 3, "noise": "0.05"}
    assert [type(value) for value in from_json(line).cell.setting.values()] == [float, int, str]


def test_numbers_that_are_not_finite_are_stored_as_null_and_read_as_nan():
    line = to_json(
        record(metrics={"dice": math.nan, "curve": [1.0, math.inf]}, cases=[{"subject": "a", "hd95": math.nan}])
    )
    assert json.loads(line)["metrics"] == {"dice": None, "curve": [1.0, None]}
    read = from_json(line)
    assert math.isnan(read.metrics["dice"])
    assert read.metrics["curve"][0] == 1.0
    assert math.isnan(read.metrics["curve"][1])
    assert math.isnan(read.cases[0]["hd95"])


def test_tensors_and_arrays_are_stored_as_plain_numbers():
    metrics = {"dice": torch.tensor(0.5), "curve": np.array([1.0, 2.0]), "n": np.int64(3)}
    assert from_json(to_json(record(metrics=metrics))).metrics == {"dice": 0.5, "curve": [1.0, 2.0], "n": 3}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", to_json(record())[:-20], to_json(record()).replace('"seed": 0', '"seed": "x"')]
)
def test_what_is_no_whole_record_is_refused(text):
    with pytest.raises(ValueError, match="Record"):
        from_json(text)


def test_the_key_tells_apart_whatever_identifies_a_record_and_nothing_else():
    cell = Cell("fixed", "brain-mni", 0, {"noise": "0.05"})
    key = record_key("toy", "counting", "cpu", cell, {"steps": 3})
    assert key.startswith("fixed.brain-mni.noise=0.05.seed=0.cpu.")
    others = {
        record_key("tox", "counting", "cpu", cell, {"steps": 3}),
        record_key("toy", "counted", "cpu", cell, {"steps": 3}),
        record_key("toy", "counting", "gpu", cell, {"steps": 3}),
        record_key("toy", "counting", "cpu", Cell("fixed", "brain-mni", 1, {"noise": "0.05"}), {"steps": 3}),
        record_key("toy", "counting", "cpu", Cell("fixed", "brain-mni", 0, {"noise": 0.05}), {"steps": 3}),
        record_key("toy", "counting", "cpu", cell, {"steps": 4}),
    }
    assert len(others | {key}) == 7
    changed = record(metrics={}, cases=[], artefacts=[], config_hash="1")
    assert changed.key == record().key


def test_a_cell_is_hashable_readable_and_indifferent_to_the_order_of_its_setting():
    one, other = Cell("bias", "brain-mni", 2, {"b": 1, "a": "x/y"}), Cell("bias", "brain-mni", 2, {"a": "x/y", "b": 1})
    assert one == other
    assert len({one, other}) == 1
    assert one.key == other.key == "bias.brain-mni.a=x%2Fy.b=1.seed=2"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("a.b", "task", 0), "'a.b'"),
        (("a", "../task", 0), "'../task'"),
        (("a", "task", 0, {"k=": 1}), "'k='"),
        (("a", "task", 0, {"k": [1]}), "'k'"),
    ],
)
def test_a_cell_whose_name_would_be_ambiguous_is_refused(arguments, word):
    with pytest.raises(ValueError, match=word.replace(".", r"\.")):
        Cell(*arguments)


def test_publishing_sorts_is_stable_and_leaves_smoke_out(checkout):
    checkout.cli(*CPU)
    checkout.cli("publish")
    text = checkout.published.read_text()
    cells = [json.loads(line)["cell"] for line in text.splitlines()]
    assert [(cell["method"], cell["seed"]) for cell in cells] == [
        ("fanciful", 0), ("fanciful", 1), ("plain", 0), ("plain", 1),
    ]  # fmt: skip
    checkout.profile("smoke")
    checkout.cli("measure", "toy", "--profile", "smoke")
    output, _ = checkout.cli("publish")
    assert output == "Nothing new to publish.\n"
    assert checkout.published.read_text() == text


def test_what_is_published_is_not_measured_again_without_runs(checkout):
    checkout.cli(*CPU)
    checkout.cli("publish")
    for path in checkout.runs.glob("*.json"):
        path.unlink()
    output, _ = checkout.cli(*CPU)
    assert output.startswith("4 records")
    assert checkout.count("begin") == 4


def test_publishing_replaces_a_stale_line_by_a_fresh_record_and_never_the_reverse(checkout):
    code = checkout.chapter.read_text()
    checkout.cli(*CPU)
    checkout.cli("publish")
    old = checkout.published.read_text()

    checkout.chapter.write_text(code.replace("* 1.7", "* 1.9"))
    checkout.cli(*CPU, "--seeds", "0", "--stale")
    checkout.cli("publish")
    lines = checkout.published.read_text().splitlines()
    assert [line in old for line in lines] == [False, True, False, True]

    # Back at the first code, the newer records of seed 0 are the stale ones.
    checkout.chapter.write_text(code)
    checkout.published.write_text(old)
    checkout.cli("publish")
    assert checkout.published.read_text() == old


def test_a_sibling_that_comes_out_the_same_vouches_for_the_other_seeds(checkout):
    code = checkout.chapter.read_text()
    checkout.cli(*CPU)
    checkout.cli("publish")
    old = checkout.published.read_text().splitlines()

    checkout.chapter.write_text(code.replace("* 1.7", "* (3.4 / 2)"))  # other code, the same numbers
    assert checkout.cli(*CPU, "--dry-run", "--stale")[0].count("measure  ") == 4
    checkout.cli(*CPU, "--seeds", "0", "--stale")
    checkout.cli("publish")
    lines = checkout.published.read_text().splitlines()
    assert [line in old for line in lines] == [False, True, False, True]
    before = json.loads(old[0])["provenance"]["code"]
    assert [json.loads(line)["provenance"].get("same_as") for line in lines] == [[before], None] * 2
    assert checkout.cli(*CPU, "--dry-run", "--stale")[0].count("measure  ") == 0
    checkout.cli("publish")  # the copies in runs/ know of no other code
    assert checkout.published.read_text().splitlines() == lines

    checkout.chapter.write_text(code.replace("* 1.7", "* (6.8 / 4)"))  # and again: one seed vouches for both codes
    checkout.cli(*CPU, "--seeds", "0", "--stale")
    checkout.cli("publish")
    assert checkout.cli(*CPU, "--dry-run", "--stale")[0].count("measure  ") == 0


def test_a_sibling_of_another_setting_or_with_other_numbers_vouches_for_nobody(checkout):
    code = checkout.chapter.read_text()
    checkout.cli(*CPU)
    checkout.cli("publish")
    checkout.chapter.write_text(code.replace("* 1.7", "* 1.9"))  # a change that shows in every cell
    checkout.cli(*CPU, "--seeds", "0", "--stale")
    checkout.cli("publish")
    assert checkout.cli(*CPU, "--dry-run", "--stale")[0].count("measure  ") == 2

    checkout.chapter.write_text(code.replace("* 1.7", "* (3.4 / 2)"))
    checkout.profile(methods=["plain"])
    checkout.cli(*CPU, "--seeds", "0", "--stale")
    checkout.cli("publish")
    checkout.profile()
    wanted = [
        line.split()[2] for line in checkout.cli(*CPU, "--dry-run", "--stale")[0].splitlines() if "measure  " in line
    ]
    assert [name.split(".")[0] for name in wanted].count("fanciful") == 2


def test_a_broken_line_of_the_committed_file_is_an_error_that_names_it(checkout):
    checkout.cli(*CPU)
    checkout.cli("publish")
    lines = checkout.published.read_text().splitlines()
    checkout.published.write_text("\n".join([lines[0], "<<<<<<< HEAD", *lines[1:]]) + "\n")
    _, error = checkout.cli(*CPU, status=1)
    assert error == f"synthrepro: {checkout.published}, line 2: not a record; restore the committed file.\n"


def test_a_record_says_where_it_comes_from(checkout):
    checkout.cli(*CPU)
    content = json.loads(next(checkout.runs.glob("plain*seed=0*.json")).read_text())
    assert content["config"] == {"steps": 3, "pause": 0.0}
    assert len(content["config_hash"]) == 16
    assert content["cases"] == [{"subject": "s1", "split": "test", "dice": content["metrics"]["value"]}]
    provenance = content["provenance"]
    assert provenance["torch"] == torch.__version__.partition("+")[0]
    assert provenance["device"]
    assert 0 < provenance["seconds"] < 10
    assert 10 < provenance["peak_memory"] < 200
    assert provenance["started"].endswith("+00:00")
    assert provenance["commit"] is None


def test_a_record_names_the_commit_and_whether_the_package_differed_from_it(checkout, monkeypatch):
    def git(*arguments: str) -> str:
        import subprocess

        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=checkout.root, capture_output=True, text=True, check=True
        ).stdout.strip()

    def provenance() -> tuple[str, bool]:
        content = json.loads(next(checkout.runs.glob("plain*seed=0*.json")).read_text())
        return content["provenance"]["commit"], content["provenance"]["dirty"]

    git("init", "-q")
    git("add", "synthrepro")
    git("commit", "-qm", "one")
    checkout.cli(*CPU)
    assert provenance() == (git("rev-parse", "HEAD"), False)
    checkout.chapter.write_text(checkout.chapter.read_text().replace("* 1.7", "* 1.9"))
    checkout.cli(*CPU, "--stale")
    assert provenance() == (git("rev-parse", "HEAD"), True)
