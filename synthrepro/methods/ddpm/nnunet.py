"""nnU-Net 2D (Isensee et al., Nature Methods 2021) as an arm, run by its own package `nnunetv2`.

The package is optional: ``pip install 'synthrepro[nnunet]'``. It plans, augments and trains as it sees fit, so that of
this project it gets the data alone. As in the paper (arXiv 2402.15216, Tables 3 and 4) it gets whole cases, one for
"1 %" of the labels and five for "10 %"; "0.1 %" would be less than one.

nnU-Net's scheme for CT clips to percentiles of the foreground and standardises. The images here are clipped and scaled
to [0, 1] already, by the unlabelled voxels, so the channel is called "noNorm" and is left as it is. The scheme for any
other channel, z-scores case by case, would take away that a value means the same tissue in every case.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from torch import Tensor

from synthrepro.data.task import Split, Task, fingerprint
from synthrepro.errors import UserError

EPOCHS = (1, 5, 10, 20, 50, 100, 250, 500, 750, 1000, 2000, 4000, 8000)  # for which nnU-Net has a trainer
COMMANDS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")


def nnunet(
    task: Task,
    cases: Sequence[str],
    folder: Path,
    *,
    spacing: float,
    epochs: int = 1000,
    device: torch.device,
) -> Tensor:
    """Train nnU-Net 2D on the slices of some cases and predict the label maps of all test slices.

    All cases train, none is held back ("fold all"), and the last epoch's weights predict, averaged over mirrored
    images, as is nnU-Net's default. It cannot be seeded: two runs differ. Killed and called again with the same folder,
    training goes on from nnU-Net's last checkpoint.

    Args:
        task: Of its splits "train" and "test" alone are read: images (N, C, H, W) in [0, 1] and labels (N, H, W).
        cases: Subjects of the "train" split, one or more.
        folder: Where nnU-Net's folders `raw`, `preprocessed`, `results` and `predictions` and its output, one .out and
            one .err file a command, are put; one run only.
        spacing: Side of a pixel, mm. A case's slices are stacked in the split's order at twice that distance, which
            only says which axis to slice.
        epochs: One of `EPOCHS`, of 250 iterations each; 1000 is nnU-Net's default.
        device: "cuda", "cpu" or "mps", without a number: ``CUDA_VISIBLE_DEVICES`` chooses among GPUs.

    Returns:
        (N, H, W) int64, one label map for each sample of the "test" split.

    Raises:
        UserError: `nnunetv2` is not installed, one of its commands fails or leaves a prediction out, no case is given,
            there is no trainer for so many epochs, or the folder belongs to other data.
        ValueError: A case is not in the "train" split, or the device has a number.
    """
    if not cases:
        raise UserError("nnU-Net learns from whole cases and has got none: give at least one.")
    if epochs not in EPOCHS:
        raise UserError(f"nnU-Net has no trainer for {epochs} epochs: take one of {', '.join(map(str, EPOCHS))}.")
    if device.index is not None:
        raise ValueError(f"nnU-Net takes no number of a device, but got {device}: set CUDA_VISIBLE_DEVICES.")
    plan, train, predict = (_find(command) for command in COMMANDS)
    folder = folder.absolute()
    test = task.splits["test"]
    data = folder / "raw" / f"Dataset001_{task.name}"
    _write(replace(task, splits={"train": task.splits["train"].take(cases), "test": test}), data, spacing)

    predictions = folder / "predictions"
    shutil.rmtree(predictions, ignore_errors=True)  # those of an earlier call must not stand in for missing ones
    trainer = ["-tr", _trainer(epochs)]
    workers = str(min(8, os.cpu_count() or 1))  # 8 is nnU-Net's default
    preparing = ["-d", "1", "-c", "2d", "--verify_dataset_integrity", "-npfp", workers, "-np", workers]
    _run([plan, *preparing], folder)
    _run([train, "1", "2d", "all", *trainer, "-device", device.type, "--c"], folder)
    where = ["-i", str(data / "imagesTs"), "-o", str(predictions)]
    _run([predict, *where, "-d", "1", "-c", "2d", "-f", "all", *trainer, "-device", device.type], folder)
    return _read(test, predictions, len(task.classes))


def _find(command: str) -> str:
    """A command's path; also next to this Python, whose environment may not be activated."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    if found := shutil.which(command, path=places):
        return found
    raise UserError(
        f"nnU-Net's command {command} is not there: pip install 'synthrepro[nnunet]', or leave nnU-Net out."
    )


def _trainer(epochs: int) -> str:
    if epochs == 1000:
        return "nnUNetTrainer"
    return f"nnUNetTrainer_{epochs}epoch" + ("s" if epochs > 1 else "")


def _rows(split: Split) -> Mapping[str, list[int]]:
    """The samples of each case, in the split's order."""
    rows: dict[str, list[int]] = {}
    for i, subject in enumerate(split.subjects):
        rows.setdefault(subject, []).append(i)
    return rows


def _write(task: Task, data: Path, spacing: float) -> None:
    """Write nnU-Net's raw data set: imagesTr, labelsTr, imagesTs and, at the end, dataset.json."""
    train, test = _rows(task.splits["train"]), _rows(task.splits["test"])
    description = {
        "channel_names": {str(c): "noNorm" for c in range(task.channels)},
        "labels": {"background": 0} | {name: k for k, name in enumerate(task.classes) if k > 0},
        "numTraining": len(train),
        "file_ending": ".nii.gz",
        # nnU-Net ignores the rest: which case is which file, and whether a run that goes on has the same data.
        "cases": {"train": list(train), "test": list(test)},
        "spacing": spacing,
        "fingerprint": fingerprint(task),
    }
    text = json.dumps(description, indent=2) + "\n"
    written = data / "dataset.json"
    if others := [path for path in data.parent.glob("Dataset*") if path != data]:
        raise UserError(f"{others[0]} is of another run: give nnU-Net an empty folder.")
    if written.is_file():
        if written.read_text() != text:
            raise UserError(f"{written} is of another run, on other data: give nnU-Net an empty folder.")
        return
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (data / name).mkdir(parents=True, exist_ok=True)
    for prefix, rows, images in (("train", train, "imagesTr"), ("test", test, "imagesTs")):
        split = task.splits[prefix]
        for k, some in enumerate(rows.values()):
            for c in range(task.channels):
                path = data / images / f"{prefix}_{k:04d}_{c:04d}.nii.gz"
                _save(split.images[some, c].numpy().astype(np.float32), path, spacing)
            if prefix == "train":
                labels = split.labels[some].numpy().astype(np.uint8)
                _save(labels, data / "labelsTr" / f"{prefix}_{k:04d}.nii.gz", spacing)
    written.write_text(text)


def _save(slices: np.ndarray, path: Path, spacing: float) -> None:
    """Slices (Z, H, W) as a volume whose axes are W, H and Z, as NIfTI has it."""
    nib.save(nib.Nifti1Image(slices.transpose(2, 1, 0), np.diag([spacing, spacing, 2 * spacing, 1.0])), path)


def _run(command: Sequence[str], folder: Path) -> None:
    """Run one of nnU-Net's commands on its folders, with its output going to files."""
    name = Path(command[0]).name
    places = {f"nnUNet_{place}": str(folder / place) for place in ("raw", "preprocessed", "results")}
    errors = folder / f"{name}.err"
    with (folder / f"{name}.out").open("wb") as out, errors.open("wb") as err:
        status = subprocess.run(command, env=os.environ | places, stdout=out, stderr=err, check=False).returncode
    if status:
        lines = [line.strip() for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit status {status}"
        raise UserError(f"nnU-Net's command {name} failed ({reason}): see {errors} and the .out file beside it.")


def _read(split: Split, predictions: Path, classes: int) -> Tensor:
    """Read the predicted volumes, one a case, back to the split's order."""
    maps = torch.empty_like(split.labels)
    for k, (case, rows) in enumerate(_rows(split).items()):
        path = predictions / f"test_{k:04d}.nii.gz"
        if not path.is_file():
            raise UserError(f"nnU-Net has predicted nothing for case {case}, {path} is missing: run it again.")
        try:
            image: Any = nib.load(path)
            volume = np.asarray(image.dataobj).transpose()  # (Z, H, W)
        except (ImageFileError, OSError, EOFError) as error:
            raise UserError(f"nnU-Net's prediction {path} for case {case} cannot be read: run it again.") from error
        found = torch.from_numpy(volume.astype(np.int64))
        if found.shape != maps[rows].shape or found.min() < 0 or found.max() >= classes:
            raise UserError(
                f"nnU-Net's prediction {path} does not fit case {case}: it has the shape {tuple(found.shape)} and "
                f"values up to {int(found.max())} where {tuple(maps[rows].shape)} and {classes - 1} at most belong: "
                "empty the folder and run it again."
            )
        maps[rows] = found
    return maps
