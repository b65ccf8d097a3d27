"""The command line, `synthrepro`. Parts are imported where they are used, so that `--help` costs no torch."""

import argparse
import ast
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthrepro import paths
from synthrepro.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and give its exit status: 0, or 1 with a sentence on standard error, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            return int(options.command(options) or 0)
        except UserError as error:
            print(f"synthrepro: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("synthrepro: interrupted; run the same command again, it goes on where it stopped.", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `synthrepro table ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _warn(
    message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    where = "" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}: "
    print(f"synthrepro: {where}{message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synthrepro",
        description="Segmenting with synthetic data: five papers, re-implemented, re-run and judged in the open.",
        epilog="`synthrepro COMMAND --help` says more about a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Any], text: str, more: str = "") -> Any:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}")
        added.set_defaults(command=run)
        return added

    command("chapters", _chapters, "list the chapters and their experiments")

    run = command(
        "run",
        _run,
        "execute a chapter's notebook",
        "The executed notebook goes to runs/CHAPTER/CHAPTER-PROFILE.ipynb, also where a cell fails.",
    )
    run.add_argument("chapter", metavar="CHAPTER")
    run.add_argument("--profile", required=True, metavar="P", help="smoke | cpu | gpu | paper")
    run.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set another variable of the notebook's parameters cell; repeat for several",
    )
    run.add_argument("--timeout", type=_positive, metavar="S", help="stop after S seconds (default: no limit)")

    measure = command(
        "measure",
        _measure,
        "measure the cells that have no record yet",
        "Kill it at any moment and run it again: finished cells stay, a cell begun goes on from its checkpoint. "
        "Several of these commands at a time share the work.",
    )
    measure.add_argument("chapter", metavar="CHAPTER")
    measure.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help="default: all of the chapter")
    measure.add_argument("--profile", required=True, metavar="P", help="smoke | cpu | gpu | paper")
    measure.add_argument("--seeds", type=_seeds, metavar="LIST", help="only these seeds of the profile: 0-4 or 0,2,5")
    places = measure.add_mutually_exclusive_group()
    places.add_argument("--jobs", type=_positive, default=1, metavar="N", help="cells side by side (default: 1)")
    places.add_argument("--scheduler", metavar="ADDRESS", help="give the cells to a Dask cluster: tcp://HOST:PORT")
    measure.add_argument("--dry-run", action="store_true", help="only list the cells, their steps and expected time")
    measure.add_argument("--stale", action="store_true", help="also measure again what other code has measured")

    table = command("table", _table, "print an experiment's table: the paper beside the records")
    table.add_argument("chapter", metavar="CHAPTER")
    table.add_argument("experiment", metavar="EXPERIMENT")
    table.add_argument("--format", choices=("md", "csv", "json"), default="md", help="default: md")

    claims = command("claims", _claims, "print the papers' claims and their verdicts")
    claims.add_argument("--format", choices=("md", "json"), default="md", help="default: md")

    command("publish", _publish, "fold runs/ into the committed book/records/", "Smoke records are left out.")

    data = command("data", _data_list, "list the tasks and their data, or check one")
    data_commands = data.add_subparsers(metavar="list | check NAME", required=True)
    data_list = data_commands.add_parser("list", help="every task: where it comes from, licence, whether it is here")
    data_list.set_defaults(command=_data_list)
    data_check = data_commands.add_parser("check", help="check the files of one task and name the first that is wrong")
    data_check.add_argument("name", metavar="NAME")
    data_check.set_defaults(command=_data_check)

    command("doctor", _doctor, "check this machine, and say what to do about each problem")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seeds(text: str) -> list[int]:
    """`0-4` or `0,2,5-7` -> the numbers."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds such as 0-4 or 0,2,5")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def _chapters(options: argparse.Namespace) -> None:
    from synthrepro.evidence import chapters
    from synthrepro.evidence.profiles import PROFILES, read_profiles

    # From the profile files: importing five chapters takes half a minute.
    for name, title in chapters().items():
        print(f"{name}: {title}")
        profiles = read_profiles(name)
        for experiment in dict.fromkeys(experiment for sections in profiles.values() for experiment in sections):
            there = [profile for profile in PROFILES if experiment in profiles.get(profile, {})]
            print(f"    {experiment}  ({', '.join(there)})")


def _measure(options: argparse.Namespace) -> None:
    from synthrepro.evidence import measure

    started = time.monotonic()
    found = measure(
        options.chapter,
        options.experiment,
        options.profile,
        seeds=options.seeds,
        jobs=options.jobs,
        scheduler=options.scheduler,
        stale=options.stale,
        dry_run=options.dry_run,
    )
    if not options.dry_run:
        stale = sum(record.stale for record in found)
        note = f", {stale} of them stale: other code measured them, --stale measures them again" if stale else ""
        print(f"{len(found)} records after {time.monotonic() - started:.0f} s{note}.")


def _table(options: argparse.Namespace) -> None:
    from synthrepro.evidence import tables

    print(tables.render(options.chapter, options.experiment, options.format).rstrip())


def _claims(options: argparse.Namespace) -> None:
    from synthrepro.evidence import claims

    print(claims.render(options.format).rstrip())


def _publish(options: argparse.Namespace) -> None:
    from synthrepro.evidence import publish

    changed = publish()
    for path, lines in changed.items():
        print(f"{path}: {lines} records")
    if not changed:
        print("Nothing new to publish.")


def _run(options: argparse.Namespace) -> None:
    from synthrepro.evidence import load_profile

    load_profile(options.chapter, options.profile)
    notebook = paths.NOTEBOOKS / f"{options.chapter}.ipynb"
    if not notebook.exists():
        raise UserError(f"Chapter {options.chapter} has no notebook; it belongs at {notebook}.")
    known = _notebook_parameters(notebook)
    parameters = {"profile": options.profile}
    for assignment in options.parameters:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"-p {assignment} should be -p NAME=VALUE.")
        if name == "profile":
            raise UserError("The profile is given with --profile, not with -p.")
        parameters[name] = _value(value)
    for name in parameters:
        if name not in known:
            raise UserError(f"{notebook.name} has no parameter {name!r}; it has {', '.join(sorted(known)) or 'none'}.")
    output = paths.RUNS / options.chapter / f"{options.chapter}-{options.profile}.ipynb"
    _execute(notebook, output, parameters, options.timeout)
    print(output)


def _notebook_parameters(notebook: Path) -> set[str]:
    """Names assigned in the cell tagged `parameters`.

    Read from the syntax tree: papermill's own inspection misses a line that it cannot parse, and only warns.
    """
    from synthrepro.evidence.experiments import assigned_names

    for cell in json.loads(notebook.read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return assigned_names(ast.parse("".join(cell["source"])))
    raise UserError(f"{notebook} has no cell tagged 'parameters'; tag the one that assigns profile.")


def _value(text: str) -> Any:
    """A Python or YAML value where the text is one, else the text."""
    import yaml

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text) if text in ("true", "false", "null") else text


def _execute(notebook: Path, output: Path, parameters: dict[str, Any], timeout: int | None) -> None:
    try:
        import papermill
        from nbclient.exceptions import CellTimeoutError, DeadKernelError
    except ImportError:
        raise UserError("Running a chapter needs Jupyter; install it with: pip install 'synthrepro[book]'.") from None
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that it cannot parse
    output.parent.mkdir(parents=True, exist_ok=True)
    # nbclient's limit is one a cell; asked before each, it can be what is left of the whole.
    deadline = time.monotonic() + (timeout or 0)
    limit = {"timeout_func": lambda cell: max(1, round(deadline - time.monotonic()))} if timeout else {}
    try:
        papermill.execute_notebook(
            notebook,
            output,
            parameters,
            kernel_name="python3",  # whatever name the notebook was last saved under
            language="python",
            progress_bar=sys.stderr.isatty(),
            # The kernel warns that loopback is not encrypted and reports how it was shut down.
            extra_arguments=["--log-level=CRITICAL"],
            **limit,
        )
    except papermill.PapermillExecutionError as error:
        print(str(error).strip("\n"), file=sys.stderr)
        what = f"Cell [{error.exec_count}] of {notebook.name} failed with {error.ename}"
    except CellTimeoutError:
        what = f"{notebook.name} was not finished after {timeout} s"
    except DeadKernelError:
        what = f"The kernel of {notebook.name} died, killed perhaps for want of memory"
    else:
        return
    raise UserError(f"{what}; the notebook as far as it came is {output}.")


def _data_list(options: argparse.Namespace) -> None:
    from synthrepro.data import list_tasks

    print(*list_tasks(), sep="\n")


def _data_check(options: argparse.Namespace) -> int:
    from synthrepro.data import check_task

    report = check_task(options.name)
    print(report)
    return 1 if report.problem else 0


def _doctor(options: argparse.Namespace) -> int:
    problems = 0
    for check in (_check_python, _check_torch, _check_gpu, _check_memory, _check_disk, _check_data, _check_kernel):
        state, advice = check()
        name = check.__name__.removeprefix("_check_")
        problems += advice is not None
        print(f"{'ok' if advice is None else 'PROBLEM':8} {name:7} {state}{'' if advice is None else f': {advice}'}")
    return 1 if problems else 0


# Each check gives what is the case, and what to do about it, None where all is well.
Check = tuple[str, str | None]


def _check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{version} at {sys.executable}", None if sys.version_info >= (3, 11) else "install Python 3.11 or newer"


def _check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"cannot be imported ({error})", "run make setup, or pip install torch"
    return f"{torch.__version__}, {torch.get_num_threads()} threads", None


def _check_gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return "unknown without torch", None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        advice = None if free > 0.2 * total else "end what else uses it, or take a profile of smaller size"
        return f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free", advice
    if shutil.which("nvidia-smi"):
        return "there is a driver, but torch cannot use it", "install a torch build for this driver, see nvidia-smi"
    return "none; the profiles smoke and cpu need none", None


def _check_memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{total:.0f} GB", None if total >= 4 else "use the smoke profile, with --jobs 1"


def _check_disk() -> Check:
    folder = next(path for path in (paths.RUNS, *paths.RUNS.parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    return f"{free:.0f} GB free for {paths.RUNS}", None if free >= 5 else "make room, or set SYNTHREPRO_RUNS elsewhere"


def _check_data() -> Check:
    if paths.DATA.is_dir():
        return f"{paths.DATA} holds {', '.join(sorted(p.name for p in paths.DATA.iterdir())) or 'nothing'}", None
    if os.environ.get("SYNTHREPRO_DATA"):
        return f"{paths.DATA} does not exist", "make the folder, or set SYNTHREPRO_DATA to the right one"
    return "no folder; only the real data sets need one, see synthrepro data list", None


def _check_kernel() -> Check:
    try:
        import papermill  # noqa: F401
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError as error:
        return f"no Jupyter ({error})", "pip install 'synthrepro[book]'"
    advice = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return "there is no kernel python3", advice
    # jupyter_client reads the bare names as "the Python that runs me".
    if program in ("python", "python3") or Path(program).resolve() == Path(sys.executable).resolve():
        return "python3 runs this Python", None
    return f"python3 runs another Python, {program}", advice
