"""What the project says of itself in several places agrees, and its pages lead where they say."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from synthrepro import cli
from tools.pages import pages_of_toc

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOC = pages_of_toc(ROOT / "_toc.yml")
PAPERS = ("learn2synth", "genseg", "ddpm", "synthfm", "seggen")  # in the order of the landing page
PROSE = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]


def locked() -> dict[str, set[str]]:
    """Package -> its versions in requirements.lock; a few have one for each Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def recipe(target: str) -> str:
    """The lines of a target of the Makefile."""
    match = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match, target
    return match.group(1)


# ----- one set of versions


def test_the_lock_meets_every_requirement_of_the_project():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["book"], *extras["dev"], *extras["cluster"]]
    versions = locked()
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert name in versions, f"{name} is not in requirements.lock: make lock"
        assert all(requirement.specifier.contains(version) for version in versions[name]), name


def test_every_package_of_the_lock_has_a_hash():
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[a-z0-9-]+==)", lock, flags=re.MULTILINE)[1:]
    assert len(entries) > 100
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_lock_is_made_from_the_same_extras_as_make_lock_says():
    said = (ROOT / "requirements.lock").read_text().splitlines()[1]
    made = " ".join(recipe("lock").replace("\\\n", " ").split())
    for option in ("--universal", "--generate-hashes", "--python-version 3.11"):
        assert option in said
        assert option in made
    assert re.findall(r"--extra (\w+)", said) == re.findall(r"--extra (\w+)", made)


def test_what_installs_the_rest_is_in_the_lock():
    assert {"uv", "setuptools"} <= locked().keys()


def test_the_conda_environment_has_the_versions_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    # Everything from the lock itself, and from conda nothing that the lock has too.
    assert pip == ["-r requirements.lock"]
    names = {re.split(r"[=<> ]", entry)[0] for entry in conda}
    assert names & locked().keys() == set()
    (python,) = [entry.split("=", 1)[1] for entry in conda if entry.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == PROJECT["version"] == released[0]


def test_the_licence_is_the_same_everywhere():
    assert (ROOT / "LICENSE").read_text().startswith(f"{PROJECT['license']} License")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == PROJECT["license"]


# ----- commands


def test_continuous_integration_runs_the_two_commands_and_nothing_more():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "not executable"
    lines = script.read_text().splitlines()
    assert lines[1] == "set -eu"
    assert lines[-2:] == ["make test", "make book"]
    assert len(lines) == 5


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_every_command_that_the_prose_shows_exists(page: Path):
    text = page.read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    shown = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for line in shown:
        if line.startswith("synthrepro "):
            options = cli._parser().parse_args(line.partition("#")[0].split()[1:])
            assert getattr(options, "chapter", PAPERS[0]) in (*PAPERS, "nearest_mean")
    for command in re.findall(r"`synthrepro (\w+)", text):
        with pytest.raises(SystemExit, match="0"):
            cli._parser().parse_args([command, "--help"])


# ----- pages


def test_every_page_and_every_notebook_is_in_the_table_of_contents_once():
    there = [path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "book").glob("*.md")]
    there += [path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(TOC) == sorted(there)


def test_the_landing_page_links_the_chapters_there_are_and_only_names_those_to_come():
    index = (ROOT / "book" / "index.md").read_text()
    paragraphs = index.partition("## The five papers")[2].partition("\n## ")[0].strip().split("\n\n")
    for paragraph, name in zip(paragraphs, PAPERS, strict=True):
        assert (f"../notebooks/{name}.ipynb" in paragraph) == (ROOT / "notebooks" / f"{name}.ipynb").exists(), name
        assert ("../notebooks/" in paragraph) != ("*Chapter to come.*" in paragraph), name


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_every_file_that_a_page_links_to_is_there(page: Path):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_git_ignores_every_folder_that_the_commands_and_the_readers_of_data_fill():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/_build/", "/runs/", "/.venv/", "/data/"} <= set(ignored)
