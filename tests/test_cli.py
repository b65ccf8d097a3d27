import json
import subprocess
import sys
import time

import pytest

from synthrepro import cli

NOTEBOOK = [
    ("markdown", [], "# Toy"),
    ("code", ["parameters"], 'profile = "cpu"\nseeds: list = [0]  # which = what\nfail = False\npause = 0'),
    ("code", [], "import time\nprint('a word on the way')\ntime.sleep(pause)\nassert not fail, 'asked to fail'"),
    (
        "code",
        [],
        "from synthrepro.evidence import measure\nprint(len(measure('toy', 'counting', profile, seeds=seeds)))",
    ),
]


def write_notebook(checkout, cells=NOTEBOOK):
    import nbformat

    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for kind, tags, source in cells:
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        notebook.cells.append(make(source, metadata={"tags": tags}))
    path = checkout.root / "notebooks" / "toy.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def printed(path):
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    return [
        line for output in outputs if output["output_type"] == "stream" for line in "".join(output["text"]).split("\n")
    ]


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys\nfrom synthrepro.cli import main\ntry: main(['--help'])\n"
        "finally: print([m for m in ('torch', 'pydantic', 'papermill') if m in sys.modules], file=sys.stderr)"
    )
    started = time.monotonic()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 5
    assert process.stderr == "[]\n"
    for name in ("chapters", "run", "measure", "table", "claims", "publish", "data", "doctor"):
        assert f"\n    {name} " in process.stdout


@pytest.mark.parametrize(("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0,2,5-6", [0, 2, 5, 6])])
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert cli._seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1-b"])
def test_what_is_no_list_of_seeds_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["measure", "toy", "--profile", "cpu", f"--seeds={text}"])
    assert f"{text!r} is no list of seeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("True", True),
        ("true", True),
        ("null", None),
        ("[0, 1]", [0, 1]),
        ("gpu", "gpu"),
        ("a: b", "a: b"),
    ],
)
def test_a_parameter_is_a_value_where_it_reads_as_one_and_text_otherwise(text, value):
    assert cli._value(text) == value
    assert type(cli._value(text)) is type(value)


def test_chapters_are_listed_with_their_experiments(checkout):
    output, _ = checkout.cli("chapters")
    assert output == (
        "toy: Toy: numbers that take their time, and a log of every step that is really computed.\n"
        "    counting  (cpu)\n"
    )


def test_a_reader_that_has_seen_enough_is_no_error(checkout):
    with checkout.start_cli("measure", "toy", "--profile", "cpu", "--dry-run") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_unknown_chapters_and_experiments_are_one_sentence(checkout):
    _, error = checkout.cli("measure", "tyo", "--profile", "cpu", status=1)
    assert error == "synthrepro: There is no chapter 'tyo'; the chapters are toy.\n"
    _, error = checkout.cli("measure", "toy", "adding", "--profile", "cpu", status=1)
    assert error == "synthrepro: Chapter toy has no experiment 'adding'; it has counting.\n"


def test_a_defect_keeps_its_traceback(checkout):
    checkout.chapter.write_text(checkout.chapter.read_text() + "\nraise ValueError('a defect')\n")
    _, error = checkout.cli("measure", "toy", "--profile", "cpu", status=1)
    assert "Traceback" in error
    assert error.endswith("ValueError: a defect\n")


def test_measure_says_what_it_did_and_is_silent_on_standard_error(checkout):
    output, error = checkout.cli("measure", "toy", "counting", "--profile", "cpu", "--seeds", "0")
    assert output.startswith("2 records after ")
    assert error == ""


def test_run_executes_the_notebook_with_its_parameters(checkout):
    write_notebook(checkout)
    output, error = checkout.cli("run", "toy", "--profile", "cpu", "-p", "seeds=[0, 1]")
    path = checkout.root / "runs" / "toy" / "toy-cpu.ipynb"
    assert output == f"{path}\n"
    assert error == ""
    assert printed(path) == ["a word on the way", "", "4", ""]
    assert checkout.count("begin") == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tyo", "--profile", "cpu"), "There is no chapter 'tyo'; the chapters are toy."),
        (("toy", "--profile", "cup"), "There is no profile 'cup'; the profiles are smoke, cpu, gpu, paper."),
        (
            ("toy", "--profile", "cpu", "-p", "sedes=1"),
            "toy.ipynb has no parameter 'sedes'; it has fail, pause, profile, seeds.",
        ),
        (("toy", "--profile", "cpu", "-p", "seeds"), "-p seeds should be -p NAME=VALUE."),
        (("toy", "--profile", "cpu", "-p", "profile=gpu"), "The profile is given with --profile, not with -p."),
    ],
)
def test_run_refuses_what_it_does_not_know_before_anything_starts(checkout, arguments, sentence):
    write_notebook(checkout)
    _, error = checkout.cli("run", *arguments, status=1)
    assert error == f"synthrepro: {sentence}\n"
    assert not (checkout.root / "runs").exists()


def test_run_needs_a_notebook_with_a_parameters_cell(checkout):
    _, error = checkout.cli("run", "toy", "--profile", "cpu", status=1)
    assert error == f"synthrepro: Chapter toy has no notebook; it belongs at {checkout.root}/notebooks/toy.ipynb.\n"
    path = write_notebook(checkout, [("code", [], "profile = 'cpu'")])
    _, error = checkout.cli("run", "toy", "--profile", "cpu", status=1)
    assert error == f"synthrepro: {path} has no cell tagged 'parameters'; tag the one that assigns profile.\n"


def test_a_failed_cell_gives_the_traceback_and_the_partial_notebook(checkout):
    write_notebook(checkout)
    _, error = checkout.cli("run", "toy", "--profile", "cpu", "-p", "fail=True", status=1)
    path = checkout.root / "runs" / "toy" / "toy-cpu.ipynb"
    assert "AssertionError: asked to fail" in error
    assert "assert not fail" in error
    assert error.splitlines()[-1] == (
        f"synthrepro: Cell [3] of toy.ipynb failed with AssertionError; the notebook as far as it came is {path}."
    )
    assert printed(path) == ["a word on the way", ""]
    assert checkout.count("begin") == 0


def test_the_time_limit_is_for_the_whole_run_and_leaves_the_partial_notebook(checkout):
    sleeps = [("code", [], "import time; time.sleep(1.2)")] * 4
    write_notebook(checkout, [*NOTEBOOK[:3], *sleeps])
    _, error = checkout.cli("run", "toy", "--profile", "cpu", "--timeout", "3", status=1)
    path = checkout.root / "runs" / "toy" / "toy-cpu.ipynb"
    assert error.splitlines()[-1] == (
        f"synthrepro: toy.ipynb was not finished after 3 s; the notebook as far as it came is {path}."
    )
    assert printed(path) == ["a word on the way", ""]


def test_a_dead_kernel_is_one_sentence(checkout):
    write_notebook(checkout, [*NOTEBOOK[:3], ("code", [], "import os; os._exit(1)")])
    _, error = checkout.cli("run", "toy", "--profile", "cpu", status=1)
    assert error.splitlines()[-1].startswith("synthrepro: The kernel of toy.ipynb died")
    assert "Traceback" not in error


def test_run_without_jupyter_says_what_to_install(checkout):
    write_notebook(checkout)
    code = "import sys; sys.modules['papermill'] = None; from synthrepro.cli import main; sys.exit(main())"
    _, error = checkout.start("-c", code, "run", "toy", "--profile", "cpu").communicate(timeout=60)
    assert error == "synthrepro: Running a chapter needs Jupyter; install it with: pip install 'synthrepro[book]'.\n"


def test_data_lists_the_tasks_and_a_check_fails_where_files_are_wrong(capsys, monkeypatch):
    from synthrepro import data

    assert cli.main(["data", "list"]) == 0
    assert "brain-mni (embedded): ready" in capsys.readouterr().out
    assert cli.main(["data", "check", "brain-mni"]) == 0
    report = data.Report("brain-oasis", "real", (), (), "There is no folder.", "oasis-brains.org", "on request")
    monkeypatch.setattr(data, "check_task", lambda name: report)
    assert cli.main(["data", "check", "brain-oasis"]) == 1
    assert "brain-oasis (real): There is no folder." in capsys.readouterr().out


def test_doctor_gives_each_part_a_line_and_each_problem_a_remedy(capsys, monkeypatch, tmp_path):
    parts = ["python", "torch", "gpu", "memory", "disk", "data", "kernel"]
    monkeypatch.setattr(cli.paths, "DATA", tmp_path)
    cli.main(["doctor"])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == parts

    monkeypatch.setattr(cli.paths, "DATA", tmp_path / "nowhere")
    monkeypatch.setenv("SYNTHREPRO_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "papermill", None)
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1e9}))
    assert cli.main(["doctor"]) == 1
    problems = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert {name: text for _, name, text in problems}.items() >= {
        "disk": f"1 GB free for {cli.paths.RUNS}: make room, or set SYNTHREPRO_RUNS elsewhere",
        "data": f"{tmp_path}/nowhere does not exist: make the folder, or set SYNTHREPRO_DATA to the right one",
    }.items()
    assert any("pip install 'synthrepro[book]'" in text for _, name, text in problems if name == "kernel")
