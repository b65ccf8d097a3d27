"""Tasks: images, labels, splits and a card; `load_task` is the door.

Two families: *embedded* tasks need no download (built from what an installed library ships), *real* ones read a data
set's own published folder layout under `$SYNTHREPRO_DATA/<name>`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import brain_mni
from .task import Card, Sample, Split, Task, fingerprint

__all__ = ["TASKS", "Card", "Entry", "Report", "Sample", "Split", "Task", "check_task", "fingerprint", "list_tasks", "load_task"]


@dataclass(frozen=True)
class Entry:
    loader: Callable[..., Task]


TASKS = {"brain-mni": Entry(brain_mni.load)}


@lru_cache(maxsize=8)
def _load(name: str, root: Path | None, options: tuple[tuple[str, Any], ...]) -> Task:
    return TASKS[name].loader(root, **dict(options))


def load_task(name: str, root: Path | None = None, **options: Any) -> Task:
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return _load(name, root, tuple(sorted(frozen.items())))
