"""What a task is: images with labels, split by subject, and a card that says what they are."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image with its label map.

    Attributes:
        image: (C, H, W) float32 in [0, 1].
        label: (H, W) int64, values index `Task.classes`.
        subject: id of the individual the image shows.
    """

    image: Tensor
    label: Tensor
    subject: str


@dataclass(frozen=True)
class Split:
    """A stacked set of samples.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N, H, W) int64.
        subjects: id of the individual of each sample, N of them (an individual may give several samples).
    """

    images: Tensor
    labels: Tensor
    subjects: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, i: int) -> Sample:
        return Sample(self.images[i], self.labels[i], self.subjects[i])

    @property
    def individuals(self) -> tuple[str, ...]:
        """The distinct subjects, in order of appearance."""
        return tuple(dict.fromkeys(self.subjects))

    def take(self, subjects: Iterable[str]) -> "Split":
        """All samples of the named subjects, in this split's order.

        Raises:
            ValueError: a subject is not in this split.
        """
        wanted = set(subjects)
        if missing := sorted(wanted - set(self.subjects)):
            raise ValueError(f"this split has no subject {missing[0]!r}; it has {', '.join(self.individuals)}.")
        rows = [i for i, subject in enumerate(self.subjects) if subject in wanted]
        return Split(self.images[rows], self.labels[rows], tuple(self.subjects[i] for i in rows))


@dataclass(frozen=True)
class Card:
    """What a task is, how it came about and what to doubt: one or a few sentences each, for a reader.

    Attributes:
        what: what the images show and how they came about.
        splits: how subjects were parted.
        doubt: why a result on this task may not carry over.
        source: where the data come from, with the reference to cite.
        licence: under which terms.
    """

    what: str
    splits: str
    doubt: str
    source: str
    licence: str


@dataclass(frozen=True)
class Task:
    """Images, labels, splits and card.

    Attributes:
        name: registry name.
        classes: class names; the index is the label value and 0 is background.
        channels: image channels.
        splits: "train", "validation", "test" and any further test sets "test-<domain>".
        card: what the task is.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: Mapping[str, Split]
    card: Card


def fingerprint(task: Task) -> str:
    """SHA-256 over every tensor and subject of every split: equal exactly if the data are."""
    digest = hashlib.sha256(repr((task.name, task.classes, task.channels)).encode())
    for name, split in sorted(task.splits.items()):
        digest.update(repr((name, split.subjects)).encode())
        for tensor in (split.images, split.labels):
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
