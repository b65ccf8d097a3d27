"""nnU-Net as an arm: its package is not needed here, commands of the same names on PATH stand in for it.

They check what nnU-Net itself would check of the raw data set, and "predict" a threshold of the images they find.
"""

import json
import os
import stat
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthrepro.data.task import Card, Split, Task
from synthrepro.errors import UserError
from synthrepro.methods.ddpm.nnunet import COMMANDS, EPOCHS, nnunet

PLAN, TRAIN, PREDICT = COMMANDS
H, W = 6, 4

# Standard library alone: a command starts in no time.
PREPARE = """
    raw = Path(os.environ["nnUNet_raw"]) / "Dataset001_toy-ct"
    description = json.loads((raw / "dataset.json").read_text())
    images, labels = ({p.name for p in (raw / part).iterdir()} for part in ("imagesTr", "labelsTr"))
    assert len(images) == len(labels) == description["numTraining"]
    assert images == {name.replace(".nii.gz", "_0000.nii.gz") for name in labels}
    assert description["file_ending"] == ".nii.gz" and description["channel_names"] == {"0": "noNorm"}
    Path(os.environ["nnUNet_preprocessed"]).mkdir()
"""
LEARN = """
    assert Path(os.environ["nnUNet_preprocessed"]).is_dir()
    Path(os.environ["nnUNet_results"]).mkdir()
"""
ANSWER = """
    assert Path(os.environ["nnUNet_results"]).is_dir()
    out = Path(sys.argv[sys.argv.index("-o") + 1])
    out.mkdir()
    for path in Path(sys.argv[sys.argv.index("-i") + 1]).iterdir():
        file = gzip.decompress(path.read_bytes())
        found = bytes(int(3 * value) for value in array.array("f", file[352:]))
        kind = struct.pack("hh", 2, 8)  # of a NIfTI header: uint8
        (out / path.name.replace("_0000.nii.gz", ".nii.gz")).write_bytes(
            gzip.compress(file[:70] + kind + file[74:352] + found)
        )
"""


def make_split(prefix: str, counts: dict[str, int], seed: int) -> Split:
    """Images of random values; a label is the third of [0, 1] that its value is in. The cases' slices are mixed."""
    draws = torch.Generator().manual_seed(seed)
    subjects = [f"{prefix}/{case}" for case, n in counts.items() for _ in range(n)]
    order = torch.randperm(len(subjects), generator=draws).tolist()
    images = torch.rand(len(subjects), 1, H, W, generator=draws)
    return Split(images, (images[:, 0] * 3).long(), tuple(subjects[i] for i in order))


@pytest.fixture
def task() -> Task:
    splits = {
        "train": make_split("a", {"1": 3, "2": 2, "3": 4}, 0),
        "test": make_split("b", {"z": 3, "x": 1, "y": 2}, 1),
    }
    return Task("toy-ct", ("background", "liver", "left kidney"), 1, splits, Card("", "", "", "", ""))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with stand-ins of nnU-Net's three commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in ((PLAN, PREPARE), (TRAIN, LEARN), (PREDICT, ANSWER)):
        stand_in(folder, name, body)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def stand_in(folder: Path, name: str, body: str) -> None:
    head = "import array, gzip, json, os, struct, sys\nfrom pathlib import Path\n"
    call = "with open(__file__ + '.calls', 'a') as calls:\n    calls.write(json.dumps(sys.argv[1:]) + '\\n')\n"
    path = folder / name
    path.write_text(f"#!{sys.executable} -IS\n{head}{call}{textwrap.dedent(body)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(folder: Path, name: str) -> list[list[str]]:
    path = folder / f"{name}.calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(task: Task, folder: Path, cases: tuple[str, ...] = ("a/1", "a/3"), epochs: int = 1000) -> torch.Tensor:
    return nnunet(task, cases, folder, spacing=1.5, epochs=epochs, device=torch.device("cpu"))


def test_predictions_come_back_slice_by_slice_in_the_splits_order(task: Task, commands: Path, tmp_path: Path):
    before = dict(os.environ)
    predicted = run(task, tmp_path / "run")
    assert predicted.dtype == torch.int64
    assert torch.equal(predicted, task.splits["test"].labels)
    assert dict(os.environ) == before  # nnU-Net's folders are set for its commands alone


def test_the_raw_data_set_is_what_nnunet_expects(task: Task, commands: Path, tmp_path: Path):
    run(task, tmp_path / "run", cases=("a/3", "a/1"))
    raw = tmp_path / "run" / "raw" / "Dataset001_toy-ct"
    description = json.loads((raw / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "liver": 1, "left kidney": 2}
    train = task.splits["train"]
    assert description["cases"]["train"] == list(train.take(["a/1", "a/3"]).individuals)
    assert description["cases"]["test"] == list(task.splits["test"].individuals)
    assert description["numTraining"] == 2
    for k, case in enumerate(description["cases"]["train"]):
        image, label = (
            nib.load(raw / f"imagesTr/train_{k:04d}_0000.nii.gz"),
            nib.load(raw / f"labelsTr/train_{k:04d}.nii.gz"),
        )
        own = train.take([case])
        # Axes of a NIfTI file are columns, rows, slices; slices are the farthest apart, for nnU-Net slices along that.
        np.testing.assert_array_equal(np.asarray(image.dataobj), own.images[:, 0].numpy().transpose(2, 1, 0))
        np.testing.assert_array_equal(np.asarray(label.dataobj), own.labels.numpy().transpose(2, 1, 0))
        assert image.get_data_dtype() == np.float32
        assert label.get_data_dtype() == np.uint8
        assert image.header.get_zooms() == (1.5, 1.5, 3.0)


@pytest.mark.parametrize(
    ("epochs", "trainer"), [(1000, "nnUNetTrainer"), (1, "nnUNetTrainer_1epoch"), (50, "nnUNetTrainer_50epochs")]
)
def test_what_the_commands_are_told(task: Task, commands: Path, tmp_path: Path, epochs: int, trainer: str):
    folder = tmp_path / "run"
    run(task, folder, epochs=epochs)
    ((*plan, _, fingerprinting, _, preprocessing),) = calls(commands, PLAN)
    assert plan == ["-d", "1", "-c", "2d", "--verify_dataset_integrity"]
    assert 1 <= int(fingerprinting) == int(preprocessing) <= 8
    assert calls(commands, TRAIN) == [["1", "2d", "all", "-tr", trainer, "-device", "cpu", "--c"]]
    where = ["-i", str(folder / "raw/Dataset001_toy-ct/imagesTs"), "-o", str(folder / "predictions")]
    how = ["-d", "1", "-c", "2d", "-f", "all", "-tr", trainer, "-device", "cpu"]
    assert calls(commands, PREDICT) == [where + how]


def test_a_run_goes_on_in_its_folder_and_on_its_data_only(task: Task, commands: Path, tmp_path: Path):
    folder = tmp_path / "run"
    stand_in(commands, TRAIN, "sys.exit('killed')")
    with pytest.raises(UserError, match="killed"):
        run(task, folder)
    for path in folder.glob("preprocessed"):
        path.rmdir()
    stand_in(commands, TRAIN, LEARN)
    assert torch.equal(run(task, folder), task.splits["test"].labels)
    with pytest.raises(UserError, match=r"dataset\.json is of another run.*empty folder"):
        run(task, folder, cases=("a/1",))
    changed = Split(1 - task.splits["test"].images, task.splits["test"].labels, task.splits["test"].subjects)
    other = Task(task.name, task.classes, 1, {**task.splits, "test": changed}, task.card)
    with pytest.raises(UserError, match="of another run"):
        run(other, folder)
    with pytest.raises(UserError, match="Dataset001_toy-ct is of another run"):
        run(Task("other", task.classes, 1, task.splits, task.card), folder)


def test_without_the_package_it_says_how_to_get_it(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(
        UserError, match=r"nnUNetv2_plan_and_preprocess is not there: pip install 'synthrepro\[nnunet\]'"
    ):
        run(task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_last_line_of_a_failed_command_is_told(name: str, task: Task, commands: Path, tmp_path: Path):
    stand_in(commands, name, "print('at work'); raise RuntimeError('no memory left')")
    with pytest.raises(UserError, match=rf"{name} failed \(RuntimeError: no memory left\): see .*{name}\.err"):
        run(task, tmp_path / "run")
    assert (tmp_path / "run" / f"{name}.out").read_text() == "at work\n"
    stand_in(commands, name, "sys.exit(3)")
    with pytest.raises(UserError, match=rf"{name} failed \(exit status 3\)"):
        run(task, tmp_path / "silent")


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("path.unlink()", r"predicted nothing for case {case}, .*test_0001\.nii\.gz is missing"),
        ("path.write_bytes(b'')", r"test_0001\.nii\.gz for case {case} cannot be read"),
        (
            "path.write_bytes(gzip.compress(file[:42] + struct.pack('hhh', 5, 6, 1) + file[48:] + bytes(99)))",
            r"does not fit case {case}: it has the shape \(1, 6, 5\)",
        ),
        ("path.write_bytes(gzip.compress(file[:-1] + b'\\3'))", r"does not fit case {case}: .*values up to 3 where"),
    ],
)
def test_every_prediction_is_checked(fault: str, match: str, task: Task, commands: Path, tmp_path: Path):
    read = "path = out / 'test_0001.nii.gz'; file = gzip.decompress(path.read_bytes())"
    stand_in(commands, PREDICT, f"{textwrap.dedent(ANSWER)}\n{read}\n{fault}\n")
    with pytest.raises(UserError, match=match.format(case=task.splits["test"].individuals[1])):
        run(task, tmp_path / "run")


def test_predictions_of_an_earlier_call_do_not_stand_in(task: Task, commands: Path, tmp_path: Path):
    run(task, tmp_path / "run")
    for name in (PLAN, TRAIN, PREDICT):
        stand_in(commands, name, "")
    with pytest.raises(UserError, match="predicted nothing"):
        run(task, tmp_path / "run")


def test_what_it_cannot_do_is_refused_before_anything_is_written(task: Task, commands: Path, tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="whole cases and has got none"):
        run(task, folder, cases=())
    with pytest.raises(UserError, match="no trainer for 7 epochs: take one of 1, 5,"):
        run(task, folder, epochs=7)
    with pytest.raises(ValueError, match="no subject 'a/9'"):
        run(task, folder, cases=("a/9",))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        nnunet(task, ("a/1",), folder, spacing=1.0, device=torch.device("cuda:1"))
    assert not folder.exists()
    assert 1000 in EPOCHS
