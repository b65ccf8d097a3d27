import pytest

from synthrepro.evidence.fingerprint import fingerprint

SOURCES = {
    "__init__.py": "",
    "paths.py": "ROOT = 1\n",
    "cli.py": "def main(): pass\n",
    "unused.py": "x = 1\n",
    "evidence/__init__.py": "from pkg.evidence import records\n",
    "evidence/records.py": "r = 1\n",
    "ground/__init__.py": '"""Ground."""\nfrom .noise import draw\n',
    "ground/noise.py": "from ..deep import depth\nspare = 1\ndef draw(n):\n    '''Draw n.'''\n    return n * depth\n",
    "ground/lazy.py": "value = 1\n",
    "ground/plain.py": "value = 1\n",
    "deep.py": "import pkg.paths\ndepth = 3\n",
    "sub/__init__.py": "y = 1\n",
    "sub/inner.py": "z = 1\n",
    "methods/__init__.py": "",
    "methods/one.py": """
import pkg.sub.inner
from pkg.ground import draw, plain
from pkg.evidence import records
from pkg import cli


class A:
    '''A class.'''

    def run(self):
        '''Run.'''
        from pkg.ground.lazy import value
        return value
""",
}


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "pkg"
    for name, text in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def changed(package, name, old, new):
    before = fingerprint("pkg.methods.one", package)
    text = (package / name).read_text()
    assert old in text
    (package / name).write_text(text.replace(old, new))
    return fingerprint("pkg.methods.one", package) != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("methods/one.py", "class A:", "# a comment\n\n\nclass A:  # another\n"),
        ("methods/one.py", "'''Run.'''", "'''Run it, and say more.\n\n        At length.\n        '''"),
        ("methods/one.py", "        '''Run.'''\n", ""),
        ("methods/one.py", "'''A class.'''", '"""A good class."""'),
        ("ground/__init__.py", '"""Ground."""', '"""The ground."""'),
        ("ground/noise.py", "return n * depth", "return (\n        n*depth\n    )"),
    ],
)
def test_comments_layout_and_docstrings_do_not_count(package, name, old, new):
    assert not changed(package, name, old, new)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("methods/one.py", "return value", "return value + 1"),
        ("methods/one.py", "return value", "return None"),
        ("ground/plain.py", "1", "2"),  # from pkg.ground import plain, a submodule
        ("ground/lazy.py", "1", "2"),  # imported inside a function
        ("ground/noise.py", "n *", "n +"),  # through ground/__init__.py, a relative import
        ("deep.py", "3", "4"),  # at third hand, relative from the parent
        ("sub/inner.py", "1", "2"),  # import pkg.sub.inner
        ("sub/__init__.py", "y = 1", "print(1)"),  # which runs pkg/sub/__init__.py first
        ("__init__.py", "", "print(1)\n"),
    ],
)
def test_the_code_of_whatever_a_module_imports_counts(package, name, old, new):
    assert changed(package, name, old, new)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("unused.py", "1", "2"),
        ("__init__.py", "", "import pkg.unused\n"),
        ("sub/__init__.py", "y = 1", "y = 2"),  # defined, and used by nobody
        ("evidence/__init__.py", "records", "records, files"),
        ("evidence/records.py", "1", "2"),
        ("cli.py", "pass", "return 1"),
        ("paths.py", "1", "2"),
    ],
)
def test_what_is_not_imported_or_only_carries_evidence_does_not_count(package, name, old, new):
    assert not changed(package, name, old, new)


def test_an_unknown_module_is_an_error(package):
    with pytest.raises(FileNotFoundError, match=r"no module pkg\.methods\.two"):
        fingerprint("pkg.methods.two", package)


def test_one_source_has_one_fingerprint_on_every_python(package):
    # Syntax trees gain fields with new Pythons (type_params in 3.12); a record must not go stale by that.
    assert fingerprint("pkg.methods.one", package) == "3e6b6c781b0a247a"


CHAPTER = """
from pkg.deep import depth
from pkg.ground.noise import draw
from pkg.evidence import Experiment

SIZE = 3


def shared(n):
    return SIZE * n


def first_run(cell):
    return shared(depth)


def second_run(cell):
    return shared(draw(1))


def build_first(spec):
    return spec


def build_second(spec):
    return [spec]


EXPERIMENTS = {
    "first": Experiment("first", "", 0, 0, first_run, 0, {"base": build_first}),
    "second": Experiment("second", run=second_run, artefacts={"base": build_second}),
}
"""


def changed_experiments(package, name, old, new):
    (package / "methods/one.py").write_text(CHAPTER)
    before = {e: fingerprint("pkg.methods.one", package, e) for e in ("first", "second")}
    text = (package / name).read_text()
    assert old in text
    (package / name).write_text(text.replace(old, new))
    return [e for e, was in before.items() if fingerprint("pkg.methods.one", package, e) != was]


@pytest.mark.parametrize(
    ("name", "old", "new", "touched"),
    [
        ("methods/one.py", "shared(draw(1))", "shared(draw(2))", ["second"]),
        ("methods/one.py", "shared(depth)", "shared(depth + 1)", ["first"]),
        ("methods/one.py", "SIZE * n", "SIZE + n", ["first", "second"]),
        ("methods/one.py", "SIZE = 3", "SIZE = 4", ["first", "second"]),
        ("methods/one.py", "return spec", "return 2 * spec", ["first"]),  # the builder of an artefact
        ("methods/one.py", "return [spec]", "return []", ["second"]),
        ("methods/one.py", '"second": Exp', '"third": Experiment("third", "", 0, 0, shared, 0), "second": Exp', []),
        ("ground/noise.py", "n * depth", "n + depth", ["second"]),
        ("ground/noise.py", "spare = 1", "spare = 2", []),  # beside what is used, in another module
        ("ground/noise.py", "from ..deep import depth", "from ..deep import depth, other", []),
        ("ground/noise.py", "from ..deep import depth", "from ..sub import y as depth", ["second"]),
        ("ground/__init__.py", "import draw", "import draw, spare", []),
        ("deep.py", "depth = 3", "depth = 4", ["first", "second"]),
        ("deep.py", "depth = 3", "depth = 3\nother = 4", []),
        ("deep.py", "depth = 3", "depth = 3\ndepth += 4", ["first", "second"]),
    ],
)
def test_an_experiment_counts_what_its_run_function_reaches(package, name, old, new, touched):
    assert changed_experiments(package, name, old, new) == touched


def test_the_reader_of_the_task_counts_and_no_other_does(package):
    (package / "methods/one.py").write_text(CHAPTER)
    (package / "data").mkdir()
    (package / "data/__init__.py").write_text("")
    for task in ("brain_a", "brain_b"):
        (package / f"data/{task}.py").write_text("from pkg.deep import depth\ndef load():\n    return 1\n")

    def codes():
        return {t: fingerprint("pkg.methods.one", package, "first", t) for t in ("brain-a", "brain-b", "other", None)}

    before = codes()
    assert before["other"] == before[None] != before["brain-a"]
    (package / "data/brain_a.py").write_text("def load():\n    return 2\n")
    assert [task for task, code in codes().items() if code != before[task]] == ["brain-a"]


def test_a_function_counts_what_it_reaches_whatever_experiment_uses_it(package):
    (package / "methods/one.py").write_text(CHAPTER)
    before = [fingerprint("pkg.methods.one", package, name) for name in ("build_first", "build_second")]
    (package / "methods/one.py").write_text(CHAPTER.replace("return spec", "return 2 * spec"))
    after = [fingerprint("pkg.methods.one", package, name) for name in ("build_first", "build_second")]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_where_the_run_function_cannot_be_told_the_whole_module_counts(package):
    (package / "methods/one.py").write_text("def a(): return 1\n\n\ndef b(): return 2\n")
    before = fingerprint("pkg.methods.one", package, "first")
    (package / "methods/one.py").write_text("def a(): return 1\n\n\ndef b(): return 3\n")
    assert fingerprint("pkg.methods.one", package, "first") != before
