"""What a cell's function is given beside its configuration: a place for checkpoints, artefacts, a device, progress."""

import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from synthrepro.evidence import files

if TYPE_CHECKING:
    import torch

    from synthrepro.data import Task

T = TypeVar("T")
CHECKPOINT_SECONDS = 60.0


class Context:
    """Handed to `Experiment.run` and to the builders of artefacts.

    Attributes:
        folder: scratch of this cell. It outlives a killed process and goes when the cell is finished.
        artefacts: `<name>-<hash>` of each artefact used so far.
        data_hashes: task name -> hash of its samples, of each task passed through `data`.
    """

    def __init__(
        self,
        folder: Path,
        builders: Mapping[str, Callable[[dict[str, Any], Path, "Context"], None]] | None = None,
        shared: Path | None = None,
        codes: Mapping[str, str] | None = None,
    ) -> None:
        """A context by hand, as tests use it, needs `folder` only.

        Args:
            folder: where `save` and `load` look; made if missing.
            builders: the experiment's artefacts.
            shared: where artefacts stand; `folder` if not given.
            codes: fingerprints of the builders' code, part of an artefact's address.
        """
        self.folder = folder
        self.artefacts: list[str] = []
        self.data_hashes: dict[str, str] = {}
        self._builders = builders or {}
        self._shared = shared or folder
        self._codes = codes or {}
        self._started = self._saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        clock = folder / "seconds"
        self._before = float(clock.read_text()) if clock.exists() else 0.0

    @property
    def device(self) -> "torch.device":
        """The GPU where there is one."""
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def seconds(self) -> float:
        """Time spent on this cell, that of interrupted attempts up to their last checkpoint included."""
        return self._before + time.monotonic() - self._started

    def checkpoint_due(self) -> bool:
        """True once a minute: `if context.checkpoint_due(): context.save("checkpoint", state)`."""
        due = time.monotonic() - self._saved >= CHECKPOINT_SECONDS
        if due:
            self._saved = time.monotonic()
        return due

    def save(self, name: str, value: Any) -> None:
        """Keep what `torch.save` can write and `torch.load(weights_only=True)` can read: tensors, numbers, containers.

        A process killed in the middle leaves the value saved before.
        """
        import torch

        files.write(self.folder / f"{name}.pt", lambda path: torch.save(value, path))
        files.write(self.folder / "seconds", lambda path: path.write_text(repr(self.seconds)))

    def load(self, name: str) -> Any:
        """What `save` kept under this name, on the CPU; None if nothing."""
        import torch

        path = self.folder / f"{name}.pt"
        # On the CPU: the state of a generator must stay there, and load_state_dict moves the rest itself.
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def progress(self, items: Iterable[T], desc: str) -> Iterable[T]:
        """The same items; with a progress bar where standard error is a terminal and no other process draws on it."""
        from tqdm import tqdm

        worker = multiprocessing.parent_process() is not None
        return tqdm(items, desc=desc, leave=False, disable=worker or not sys.stderr.isatty())

    def data(self, task: "Task") -> "Task":
        """The same task; the fingerprint of its samples goes into the record."""
        from synthrepro.data import fingerprint

        self.data_hashes[task.name] = fingerprint(task)[:16]
        return task

    def artefact(self, name: str, spec: dict[str, Any]) -> Path:
        """Folder of what several cells share, built here if nobody has built it yet.

        Its address is the hash of its name, of `spec` and of its builder's code. One process builds, the others wait;
        a killed build is begun again by whoever needs it next and finds the checkpoints of its context.

        Args:
            name: key of the experiment's `artefacts`.
            spec: JSON values that determine the content.

        Raises:
            KeyError: the experiment has no such artefact.
        """
        address = f"{name}-{files.digest([name, spec, self._codes.get(name)])[:16]}"
        target = self._shared / address
        with files.lock(self._shared / f"{address}.lock", wait=True):
            if not target.exists():
                scratch, partial = self._shared / f"{address}.scratch", self._shared / f"{address}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                context = Context(scratch, self._builders, self._shared, self._codes)
                self._builders[name](spec, partial, context)
                files.write(partial / "spec.json", lambda path: path.write_text(json.dumps(spec)))
                partial.rename(target)
                shutil.rmtree(scratch)
        self.artefacts = sorted({*self.artefacts, address})
        return target
