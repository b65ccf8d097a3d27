import json
import multiprocessing
import os
import pty
import random
import signal
import termios
import time
from pathlib import Path

import pytest

from synthrepro.evidence import files

CPU = ("measure", "toy", "--profile", "cpu")


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, float]:
    """What the toy's cells come to: base from the method's name, then 30 steps of x -> 1.7 x + 0.1 mod 1."""
    values = {}
    for method in ("plain", "fanciful"):
        for seed in (0, 1):
            value = len(method) / 10 + seed
            for _ in range(30):
                value = (value * 1.7 + 0.1) % 1
            values[f"{method} {seed}"] = value
    return values


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_at_random_instants_and_resumed_gives_the_records_of_an_uninterrupted_run(checkout, uninterrupted, jobs):
    checkout.profile(steps=30, pause=0.02)
    instants = random.Random(int(jobs))
    kills = 0
    for attempt in range(5):
        finished, lines = set(checkout.values()), len(checkout.log())
        process = checkout.start_cli(*CPU, "--jobs", jobs)
        wait_until(lambda: len(checkout.log()) > lines or process.poll() is not None)  # noqa: B023
        if attempt < 4:  # the last may finish
            time.sleep(instants.uniform(0, 0.2))
            process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        since = checkout.log()[lines:]
        wait_until(lambda: not any(alive(int(words[-1])) for words in since))  # noqa: B023
        computed = {" ".join(words[1].split(".numbers.seed=")) for words in since if words[0] == "step"}
        assert not computed & finished, "a finished cell was computed again"
    assert process.returncode == 0
    assert kills >= 3
    assert checkout.values() == uninterrupted
    # A kill repeats at most the step it cut off, one a process: the rest comes from checkpoints.
    assert 4 * 30 <= checkout.count("step") <= 4 * 30 + kills * int(jobs)
    assert [path.name for path in checkout.runs.iterdir() if path.suffix != ".json"] == []


def test_two_processes_on_one_folder_compute_each_cell_once(checkout):
    checkout.profile(steps=5, pause=0.01, seeds=list(range(6)))
    processes = [checkout.start_cli(*CPU) for _ in range(2)]
    for process in processes:
        output, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert output.startswith("12 records")
    begun = [words for words in checkout.log() if words[0] == "begin"]
    assert len(begun) == len({words[1] for words in begun}) == 12
    assert {int(words[-1]) for words in begun} == {process.pid for process in processes}
    assert checkout.count("build") == 2


def test_a_cell_whose_process_is_killed_is_taken_over_by_the_one_that_waits(checkout):
    checkout.profile(steps=1, pause=3.0, methods=["plain"], seeds=[0])
    first = checkout.start_cli(*CPU)
    wait_until(lambda: checkout.count("step") == 1)
    second = checkout.start_cli(*CPU)
    time.sleep(1.5)
    assert checkout.count("begin") == 1, "the second did not wait"
    first.kill()
    first.communicate()
    _output, error = second.communicate(timeout=60)
    assert (second.returncode, error) == (0, "")
    assert checkout.count("begin") == 2
    assert list(checkout.values()) == ["plain 0"]


def test_jobs_run_side_by_side_share_the_cores_and_build_an_artefact_once(checkout, uninterrupted):
    checkout.profile(steps=30, pause=0.01)
    _output, error = checkout.cli(*CPU, "--jobs", "2")
    assert error == ""
    assert checkout.values() == uninterrupted
    begun = [words for words in checkout.log() if words[0] == "begin"]
    assert len({words[-1] for words in begun}) == 2
    assert {words[2] for words in begun} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert checkout.count("build") == 2
    record = json.loads(next(checkout.runs.glob("fanciful*seed=0*.json")).read_text())
    assert [name.startswith("base-") for name in record["artefacts"]] == [True]


def test_a_cell_that_raises_shows_its_traceback_once_and_the_others_are_measured(checkout):
    checkout.profile(methods=["plain", "broken", "fanciful"], seeds=[0])
    for jobs in ("1", "2"):
        _output, error = checkout.cli(*CPU, "--jobs", jobs, status=1)
        assert error.count("Traceback") == 1
        assert error.count("RuntimeError: the broken arm broke") == 1
        assert "1 of" in error.splitlines()[-1]
        assert "counting broken.numbers.seed=0" in error.splitlines()[-1]
        assert set(checkout.values()) == {"plain 0", "fanciful 0"}


def test_a_cell_whose_data_are_spoilt_says_so_in_a_sentence_and_no_traceback(checkout):
    checkout.profile(methods=["plain", "spoilt"], seeds=[0, 1])
    for jobs in ("1", "2"):
        _output, error = checkout.cli(*CPU, "--jobs", jobs, status=1)
        assert "Traceback" not in error
        assert "counting spoilt.numbers.seed=0: numbers.txt is spoilt: get it again." in error.splitlines()
        last = error.splitlines()[-1]
        assert last.endswith("cells failed for one reason: numbers.txt is spoilt: get it again.")
    checkout.profile(methods=["spoilt", "broken"], seeds=[0])
    _output, error = checkout.cli(*CPU, status=1)
    assert "2 of 2 cells failed, reasons above" in error.splitlines()[-1]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_stops_cleanly(checkout, jobs):
    checkout.profile(steps=1000, pause=0.01)
    process = checkout.start_cli(*CPU, "--jobs", jobs)
    wait_until(lambda: checkout.count("step") > 3)
    process.send_signal(signal.SIGINT)
    _output, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "synthrepro: interrupted; run the same command again, it goes on where it stopped.\n"
    workers = {int(words[-1]) for words in checkout.log()}
    wait_until(lambda: not any(alive(pid) for pid in workers))
    assert not list(checkout.runs.glob("*.json"))


def test_a_dead_worker_is_one_clear_error(checkout):
    checkout.profile(steps=1000, pause=0.01)
    process = checkout.start_cli(*CPU, "--jobs", "2")
    wait_until(lambda: checkout.count("step") > 3)
    os.kill(int(checkout.log()[-1][-1]), signal.SIGKILL)
    _output, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("synthrepro: A worker process died")
    assert error.count("\n") == 1


def test_dry_run_lists_cells_steps_and_time_and_measures_nothing(checkout):
    output, _ = checkout.cli(*CPU, "--dry-run")
    assert output.splitlines()[0] == "measure  counting  plain.numbers.seed=0  3 steps  unknown time"
    assert output.splitlines()[-1] == "4 of 4 cells to measure, unknown time with 1 at a time."
    assert not checkout.log()
    checkout.cli(*CPU, "--seeds", "0")
    for path, seconds in zip(sorted(checkout.runs.glob("*.json")), (30, 50), strict=True):
        record = json.loads(path.read_text())
        record["provenance"]["seconds"] = seconds
        path.write_text(json.dumps(record))
    output, _ = checkout.cli(*CPU, "--dry-run", "--seeds", "0-1", "--jobs", "2")
    assert [line.split()[0] for line in output.splitlines()[:-1]] == ["done", "measure", "done", "measure"]
    assert output.splitlines()[-1] == "2 of 4 cells to measure, 40 s with 2 at a time."


def test_cells_are_measured_in_the_order_of_the_profile(checkout):
    checkout.cli(*CPU)
    begun = [words[1] for words in checkout.log() if words[0] == "begin"]
    assert begun == [f"{method}.numbers.seed={seed}" for method in ("plain", "fanciful") for seed in (0, 1)]


def test_a_seed_added_to_the_profile_keeps_the_records_and_another_number_of_steps_does_not(checkout):
    checkout.cli(*CPU)
    checkout.profile(seeds=[0, 1, 2])
    checkout.cli(*CPU)
    assert checkout.count("begin") == 6
    checkout.profile(steps=4)
    checkout.cli(*CPU)
    assert checkout.count("begin") == 10


def test_an_unknown_seed_is_an_error(checkout):
    _, error = checkout.cli(*CPU, "--seeds", "0-3", status=1)
    assert error == "synthrepro: Profile cpu of toy has no cell with seed 2, 3; it has the seeds 0, 1.\n"


def test_a_record_of_other_code_is_stale_and_measured_again_only_when_asked(checkout):
    checkout.cli(*CPU)
    checkout.chapter.write_text(checkout.chapter.read_text() + "\n# a comment\n")
    assert "stale" not in checkout.cli(*CPU)[0]
    old = checkout.values()
    checkout.chapter.write_text(checkout.chapter.read_text().replace("* 1.7", "* 1.9"))
    output, _ = checkout.cli(*CPU)
    assert "4 of them stale" in output
    assert checkout.values() == old
    assert checkout.count("begin") == 4
    output, _ = checkout.cli(*CPU, "--dry-run")
    assert output.startswith("stale  ")
    output, _ = checkout.cli(*CPU, "--stale")
    assert "stale" not in output
    assert all(value != old[cell] for cell, value in checkout.values().items())
    checkout.cli(*CPU, "--stale")
    assert checkout.count("begin") == 8
    assert checkout.count("build") == 2, "the builders' code is what it was"


def test_other_code_does_not_carry_on_a_checkpoint(checkout, uninterrupted):
    checkout.chapter.write_text(checkout.chapter.read_text().replace("* 1.7", "* 1.9"))
    checkout.profile(steps=30, pause=0.02, methods=["plain"], seeds=[0])
    process = checkout.start_cli(*CPU)
    wait_until(lambda: checkout.count("step") > 20)
    process.kill()
    process.communicate()
    checkout.chapter.write_text(checkout.chapter.read_text().replace("* 1.9", "* 1.7"))
    checkout.cli(*CPU)
    assert checkout.values() == {"plain 0": uninterrupted["plain 0"]}
    assert [path.suffix for path in checkout.runs.iterdir()] == [".json"], "the old checkpoint is still there"


def test_what_a_process_killed_after_its_record_left_behind_is_removed(checkout):
    checkout.cli(*CPU)
    record = next(checkout.runs.glob("plain*seed=0*.json"))
    record.with_suffix(".lock").touch()
    record.with_suffix(".0ddc0de0").mkdir()
    checkout.cli(*CPU)
    assert {path.suffix for path in checkout.runs.iterdir()} == {".json"}
    assert checkout.count("begin") == 4


def test_a_torn_file_is_named_left_out_and_measured_again(checkout):
    checkout.cli(*CPU)
    torn = next(checkout.runs.glob("plain*seed=0*.json"))
    whole = checkout.values()
    torn.write_text(torn.read_text()[:100])
    (checkout.runs / "foreign.json").write_text('{"who": "knows"}')
    _, error = checkout.cli(*CPU)
    assert f"{torn} is no whole record and is left out" in error
    assert "foreign.json is no whole record" in error
    assert checkout.count("begin") == 5
    (checkout.runs / "foreign.json").unlink()
    assert checkout.values() == whole


def test_progress_is_shown_on_a_terminal(checkout):
    checkout.profile(steps=3, pause=0.2, methods=["plain"], seeds=[0])
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    with checkout.start(
        "-c", "import sys; from synthrepro.cli import main; sys.exit(main())", *CPU, stderr=end
    ) as process:
        output, _ = process.communicate(timeout=60)
    os.close(end)
    shown = os.read(terminal, 10000).decode()
    os.close(terminal)
    assert "cells: 100%" in shown
    assert "1/1" in shown
    assert "cells" not in output


def test_measuring_needs_neither_jupyter_nor_torch(checkout):
    code = (
        "import sys; from synthrepro.evidence import measure; measure('toy', 'counting', 'cpu');"
        "print([m for m in ('torch', 'papermill', 'nbclient', 'nbformat', 'IPython') if m in sys.modules])"
    )
    output, error = checkout.start("-c", code).communicate(timeout=60)
    assert (output, error) == ("[]\n", "")


def test_without_dask_the_scheduler_option_says_what_to_install(checkout):
    code = (
        "import sys; sys.modules['distributed'] = None\n"
        "from synthrepro.evidence import measure\n"
        "try: measure('toy', 'counting', 'cpu', scheduler='tcp://127.0.0.1:1')\n"
        "except ValueError as error: print(error)"
    )
    output, error = checkout.start("-c", code).communicate(timeout=60)
    assert output == "--scheduler needs Dask; install it with: pip install 'synthrepro[cluster]'.\n", error


def test_a_scheduler_that_does_not_answer_is_one_sentence(checkout):
    pytest.importorskip("distributed")
    _, error = checkout.cli(*CPU, "--scheduler", "tpc://127.0.0.1:1", status=1)
    assert error.startswith("synthrepro: No Dask scheduler answers at tpc://127.0.0.1:1: ")
    assert error.count("\n") == 1


def test_a_dask_cluster_measures_the_cells(checkout):
    pytest.importorskip("distributed")
    code = (
        "from distributed import LocalCluster\n"
        "from synthrepro.evidence import measure\n"
        "with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:\n"
        "    print(len(measure('toy', 'counting', 'cpu', scheduler=cluster.scheduler_address)))"
    )
    output, error = checkout.start("-c", code).communicate(timeout=60)
    assert output == "4\n", error
    assert len(checkout.values()) == checkout.count("begin") == 4


def _add_one(path: Path, times: int) -> None:
    for _ in range(times):
        with files.lock(path.with_suffix(".lock"), wait=True):
            files.write(path, lambda temporary: temporary.write_text(str(int(path.read_text()) + 1)))


def test_a_lock_is_exclusive_even_though_its_file_comes_and_goes(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_one, args=(path, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert path.read_text() == "150"
    assert [p.name for p in tmp_path.iterdir()] == ["count"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    files.write(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
