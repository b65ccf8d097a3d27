"""Measuring: every cell that has no record yet, once, in order of priority, however many processes take part."""

import concurrent.futures
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence import files
from synthrepro.evidence.context import Context
from synthrepro.evidence.experiments import Cell, Experiment, load_chapter
from synthrepro.evidence.profiles import load_profile
from synthrepro.evidence.records import Provenance, Record, code_of, from_json, read, record_key, records, to_json

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One cell to look after: small enough to be sent to another machine."""

    chapter: str
    experiment: str
    profile: str
    cell: Cell
    config: BaseModel
    stale: bool  # whether a stale record is measured again

    @property
    def resolved(self) -> dict[str, Any]:
        """The configuration as a record holds it."""
        return self.config.model_dump(mode="json")

    @property
    def key(self) -> str:
        return record_key(self.chapter, self.experiment, self.profile, self.cell, self.resolved)

    @property
    def path(self) -> Path:
        """Where this machine keeps its record."""
        return paths.RUNS / self.chapter / self.experiment / f"{self.key}.json"

    @property
    def lock(self) -> Path:
        return self.path.with_suffix(".lock")

    def scratches(self) -> Iterator[Path]:
        """Folders with checkpoints, one for each code that has begun this cell."""
        return self.path.parent.glob(f"{self.key}.*/")

    def settled(self, record: Record | None) -> bool:
        """Whether `record` makes measuring unnecessary."""
        return record is not None and not (self.stale and record.stale)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a record, its failure, or neither where another process has it.

    A failure is a traceback, or the sentence of a `UserError`: then nothing is wrong with the code.
    """

    record: Record | None = None
    failure: str | None = None
    sentence: bool = False


def measure(
    chapter: str,
    experiment: str | None = None,
    profile: str = "smoke",
    *,
    seeds: Collection[int] | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    stale: bool = False,
    dry_run: bool = False,
) -> list[Record]:
    """Measure the cells that have no record yet, and give the records of all cells that were asked for.

    A cell that another process is measuring is waited for, and taken over if that process dies. A cell that fails
    shows its traceback on standard error, and the others are measured all the same. Kill this at any moment and call
    it again: finished cells stay, a cell begun goes on from its last checkpoint.

    Args:
        chapter: name of a module of `synthrepro.methods`.
        experiment: one of the chapter's experiments; None for all.
        profile: `smoke`, `cpu`, `gpu` or `paper`.
        seeds: only the cells with these seeds.
        jobs: processes side by side on this machine; 1 stays in this process.
        scheduler: address of a Dask scheduler that hands the cells to its workers instead.
        stale: also measure the cells whose record is stale.
        dry_run: measure nothing, print what would be.

    Returns:
        Records in the order of the profile's cells.

    Raises:
        UserError: unknown chapter, experiment, profile or seed; or cells that failed, in one sentence.
    """
    todo = plan(chapter, experiment, profile, seeds=seeds, stale=stale)
    if dry_run:
        print(forecast(todo, jobs))
        return [record for _, record in todo if record]
    missing = [job for job, record in todo if not job.settled(record)]
    for job, record in todo:
        if job.settled(record) and (job.lock.exists() or any(job.scratches())):
            _tidy(job)
    if missing:
        with _executor(min(jobs, len(missing)), scheduler) as (executor, width):
            _work_off(missing, executor, width)
        todo = plan(chapter, experiment, profile, seeds=seeds, stale=stale)
    return [record for _, record in todo if record]


def plan(
    chapter: str,
    experiment: str | None,
    profile: str,
    *,
    seeds: Collection[int] | None = None,
    stale: bool = False,
) -> list[tuple[Job, Record | None]]:
    """Every cell that is asked for, in order of priority, with its record if it has one.

    Raises:
        UserError: unknown chapter, experiment, profile or seed.
        ValueError: the experiment lists a cell twice.
    """
    experiments = load_chapter(chapter)
    configs = load_profile(chapter, profile)
    for name in experiments:
        for task in {cell.task for cell in experiments[name].cells(configs[name])}:
            _codes_when_loaded(chapter, name, task)
    if experiment is not None and experiment not in experiments:
        raise UserError(f"Chapter {chapter} has no experiment {experiment!r}; it has {', '.join(experiments)}.")
    jobs: list[Job] = []
    known: dict[str, Record] = {}
    for name in experiments if experiment is None else [experiment]:
        jobs += [
            Job(chapter, name, profile, cell, configs[name], stale) for cell in experiments[name].cells(configs[name])
        ]
        known |= {record.key: record for record in records(chapter, name, profile)}
    for key, times in Counter(job.key for job in jobs).items():
        if times > 1:
            raise ValueError(f"{chapter}, profile {profile}, lists the cell {key} {times} times")
    if seeds is not None:
        wanted, listed = set(seeds), {job.cell.seed for job in jobs}
        if wanted - listed:
            raise UserError(
                f"Profile {profile} of {chapter} has no cell with seed {_listing(wanted - listed)}; "
                f"it has the seeds {_listing(listed)}."
            )
        jobs = [job for job in jobs if job.cell.seed in wanted]
    return [(job, known.get(job.key)) for job in jobs]


def _listing(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


@cache
def _codes_when_loaded(chapter: str, experiment: str, task: str) -> tuple[str, dict[str, str]]:
    """Fingerprints of the code this process computes with, the experiment's and its artefacts' builders'.

    Taken once, right after the import: sources edited later make this process's records stale at once.
    """
    found = load_chapter(chapter)[experiment]
    reader = None if found.across_tasks else task
    codes = {name: code_of(chapter, builder.__name__, reader) for name, builder in found.artefacts.items()}
    return code_of(chapter, experiment, task), codes


def forecast(todo: list[tuple[Job, Record | None]], jobs: int = 1) -> str:
    """What `--dry-run` prints: a line a cell, then how many there are to measure and how long that may take.

    A cell is expected to take the median of its experiment's records in the same profile.
    """

    @cache
    def seconds(chapter: str, experiment: str, profile: str) -> float | None:
        known = [record.provenance.seconds for record in records(chapter, experiment, profile)]
        return statistics.median(known) if known else None

    lines, times = [], []
    for job, record in todo:
        state = "measure" if not job.settled(record) else "stale" if record and record.stale else "done"
        steps = load_chapter(job.chapter)[job.experiment].steps(job.cell, job.config)
        expected = seconds(job.chapter, job.experiment, job.profile)
        lines.append(f"{state:8} {job.experiment}  {job.cell.key}  {steps} steps  {duration(expected)}")
        if state == "measure":
            times.append(expected)
    known_times = [time for time in times if time is not None]
    total = duration(sum(known_times) / jobs if len(known_times) == len(times) else None)
    return "\n".join([*lines, f"{len(times)} of {len(todo)} cells to measure, {total} with {jobs} at a time."])


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: `40 s`, `12 min`, `3.5 h`."""
    if seconds is None:
        return "unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _work_off(jobs: list[Job], executor: concurrent.futures.Executor, width: int) -> None:
    """Settle every job, at most `width` at a time, first come first served."""
    from tqdm import tqdm

    waiting, elsewhere, failed = list(jobs), list[Job](), list[tuple[Job, Outcome]]()
    running: dict[concurrent.futures.Future[Outcome], Job] = {}
    polled = time.monotonic()
    with tqdm(total=len(jobs), desc="cells", unit="cell", disable=not sys.stderr.isatty()) as bar:
        while waiting or running or elsewhere:
            if elsewhere and time.monotonic() - polled >= POLL_SECONDS:
                waiting, elsewhere, polled = elsewhere + waiting, [], time.monotonic()
            while waiting and len(running) < width:
                job = waiting.pop(0)
                running[executor.submit(attempt, job)] = job
            if not running:
                time.sleep(POLL_SECONDS)
                continue
            done, _ = concurrent.futures.wait(running, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    outcome = future.result()
                except concurrent.futures.BrokenExecutor:
                    raise
                except Exception:  # a Dask cluster that lost the cell
                    outcome = Outcome(failure=traceback.format_exc())
                if outcome.failure:
                    failed.append((job, outcome))
                    between = ": " if outcome.sentence else "\n"
                    tqdm.write(f"{job.experiment} {job.cell.key}{between}{outcome.failure}", file=sys.stderr)
                elif outcome.record is None:
                    elsewhere.append(job)
                    continue
                else:
                    _keep(outcome.record, job.path)  # a Dask worker may have another disk
                bar.update()
    if failed:
        reasons = {outcome.failure for _, outcome in failed if outcome.sentence}
        if len(reasons) == 1 and all(outcome.sentence for _, outcome in failed):
            raise UserError(f"{len(failed)} of {len(jobs)} cells failed for one reason: {reasons.pop()}")
        names = ", ".join(f"{job.experiment} {job.cell.key}" for job, _ in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} cells failed, reasons above: {names}.")


def attempt(job: Job) -> Outcome:
    """Measure one cell, unless it has a record by now or another process is at it."""
    experiment = load_chapter(job.chapter)[job.experiment]
    code, codes = _codes_when_loaded(job.chapter, job.experiment, job.cell.task)
    with files.lock(job.lock, wait=False) as mine:
        if not mine:
            return Outcome()
        record = read(job.path, lambda task: code)
        if not job.settled(record):
            # Code is part of the name: a checkpoint must not be carried on by other code than began it.
            scratch = job.path.with_suffix(f".{code[:8]}")
            context = Context(scratch, experiment.artefacts, paths.RUNS / job.chapter / "artefacts", codes)
            try:
                record = _measured(job, experiment, context, code)
                _keep(record, job.path)
            except UserError as error:
                return Outcome(failure=str(error), sentence=True)
            except Exception:
                return Outcome(failure=traceback.format_exc())
        for scratch in job.scratches():
            shutil.rmtree(scratch)
        return Outcome(record)


def _tidy(job: Job) -> None:
    """Remove what a process left that was killed after it had written the record."""
    with files.lock(job.lock, wait=False) as mine:
        if mine:
            for scratch in job.scratches():
                shutil.rmtree(scratch)


def _measured(job: Job, experiment: Experiment, context: Context, code: str) -> Record:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    _forget_peak_memory()
    result = experiment.run(job.cell, job.config, context)
    commit, dirty = _git()
    torch = sys.modules.get("torch")
    provenance = Provenance(
        commit=commit,
        dirty=dirty,
        code=code,
        data=dict(sorted(context.data_hashes.items())),
        python=platform.python_version(),
        torch=metadata.version("torch"),
        cuda=torch.version.cuda if torch else None,
        device=_device(),
        seconds=round(context.seconds, 3),
        peak_memory=_peak_memory(),
        started=started,
    )
    record = Record(
        chapter=job.chapter,
        experiment=job.experiment,
        profile=job.profile,
        cell=job.cell,
        config=job.resolved,
        config_hash=files.digest(job.resolved)[:16],
        metrics=result.metrics,
        cases=result.cases,
        artefacts=context.artefacts,
        provenance=provenance,
    )
    return from_json(to_json(record))  # as every reader will see it, and proof that it can be read


def _keep(record: Record, path: Path) -> None:
    text = to_json(record) + "\n"
    if not path.exists() or path.read_text() != text:
        files.write(path, lambda temporary: temporary.write_text(text))


@cache
def _git() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--", "synthrepro"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _cuda() -> Any:
    """`torch.cuda` if this process computes on a GPU, else None; never imports torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def _device() -> str:
    if cuda := _cuda():
        return str(cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _forget_peak_memory() -> None:
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float:
    """MB since `_forget_peak_memory`; without /proc, since the process began."""
    if cuda := _cuda():
        return round(cuda.max_memory_allocated() / 1e6, 1)
    try:
        # Not getrusage: its maximum is inherited from the process that started this one.
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return round(int(status["VmHWM"].removesuffix("kB")) * 1024 / 1e6, 1)
    except (OSError, KeyError):
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)


class _InProcess(concurrent.futures.Executor):
    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*arguments, **options))
        return future


@contextmanager
def _executor(jobs: int, scheduler: str | None) -> Iterator[tuple[concurrent.futures.Executor, int]]:
    """Where cells are computed, and how many at a time."""
    if scheduler is not None:
        try:
            from distributed import Client
        except ImportError:
            raise UserError("--scheduler needs Dask; install it with: pip install 'synthrepro[cluster]'.") from None
        try:
            client = Client(scheduler, timeout=10)
        except (OSError, ValueError) as error:
            raise UserError(f"No Dask scheduler answers at {scheduler}: {error}.") from None
        with client:
            yield client.get_executor(pure=False), sys.maxsize
    elif jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        pool = concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _start_worker, (max(1, cores // jobs),)
        )
        before = set(multiprocessing.active_children())
        try:
            with pool:
                try:
                    # Start every worker, then wake the thread that watches them: CPython's pool begins to watch a
                    # worker at the next submission, and may sleep through the death of the last one till then.
                    for _ in range(jobs + 1):
                        pool.submit(int)
                    yield pool, jobs
                except BaseException:
                    for worker in set(multiprocessing.active_children()) - before:
                        worker.terminate()
                    raise
        except concurrent.futures.BrokenExecutor:
            raise UserError(
                "A worker process died, killed perhaps for want of memory; run the same command again, it goes on "
                "where it stopped, and give it fewer --jobs."
            ) from None
    else:
        yield _InProcess(), 1


def _start_worker(threads: int) -> None:
    """Set up a worker process: its share of the cores, and an end with its parent's end, whatever ends that."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
