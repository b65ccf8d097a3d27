"""Fingerprint of code: it changes when what is computed may change, and not when a comment does."""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# They carry evidence, they do not compute it.
LEFT_OUT = {"evidence", "cli", "paths", "errors"}


def fingerprint(module: str, package: Path, name: str | None = None, task: str | None = None) -> str:
    """Hash of the syntax trees of the definitions that `module` needs, in all modules of the package.

    With `name`, what counts is what the experiment of this name reaches through its `run` function and its artefacts'
    builders, or what a function of this name reaches: every function, class and constant named on the way, followed
    through imports to where it is defined. So a chapter may gain an experiment, or a library an estimator, and the
    other records stay. With `task`, what its reader reaches counts too (`load` of the module of `data` that is named
    like the task): the registry knows readers by name only.

    Comments, layout and docstrings do not count. A module that is used as a whole (`from package import module`)
    counts as a whole, a class too; so does any statement that a module runs when it is imported and that is no
    definition. A module named only in a string (`importlib.import_module(name)`) is not seen. Reads the sources,
    imports nothing.

    Args:
        module: dotted name, such as `synthrepro.methods.learn2synth`.
        package: folder of the top package, such as `.../synthrepro`.
        name: of an experiment or a function of `module`.
        task: such as `brain-mni`; one without a module of its own adds nothing.

    Raises:
        FileNotFoundError: the package has no such module.
    """
    first = _module(module, package)
    if first is None:
        raise FileNotFoundError(f"{package} holds no module {module}")
    entries = set(first.definitions) if name is None else first.entries(name)
    waiting = [(module, entry) for entry in (entries if entries <= set(first.definitions) else first.definitions)]
    if task and (reader := _module(f"{package.name}.data.{task.replace('-', '_')}", package)):
        waiting.append((reader.name, "load"))
    found: dict[str, set[str]] = {}
    while waiting:
        name_of, wanted = waiting.pop()
        inside = _module(name_of, package)
        if inside is None or LEFT_OUT.intersection(name_of.split(".")[1:2]):
            continue
        if name_of not in found:
            found[name_of] = set()
            waiting += inside.needs(inside.loose)
            # Importing a.b.c runs a/__init__.py and a/b/__init__.py first.
            waiting += [(name_of.rsplit(".", level)[0], "") for level in range(1, name_of.count(".") + 1)]
        for definition in inside.definitions if wanted == "*" else [wanted]:
            if definition not in found[name_of]:
                found[name_of].add(definition)
                for statement in inside.definitions.get(definition, []):
                    waiting += [target for local, target in inside.imported(statement) if local == definition]
                    waiting += inside.needs([statement])
    digests = [(name_of, _module(name_of, package).digest(names)) for name_of, names in sorted(found.items())]  # type: ignore[union-attr]
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Module:
    """A source: the statements that define each name at its top level, and those that define nothing."""

    name: str
    package: str  # where its relative imports start from
    folder: Path  # of the top package
    tree: ast.Module
    definitions: dict[str, list[ast.stmt]]
    loose: list[ast.stmt]

    def entries(self, name: str) -> set[str]:
        """The functions that an experiment names: `run`, and its artefacts' builders; else the one of that name."""
        calls = (node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and node.args)
        named = [call for call in calls if ast.unparse(call.args[0]) == repr(name)]
        given = [part for call in named for part in call.args[4:5] + call.args[6:7]]
        given += [keyword.value for call in named for keyword in call.keywords if keyword.arg in ("run", "artefacts")]
        return {node.id for part in given for node in ast.walk(part) if isinstance(node, ast.Name)} or {name}

    def needs(self, statements: Iterable[ast.stmt]) -> list[tuple[str, str]]:
        """(module, name) of what these statements use; `*` for a module as a whole."""
        found = []
        for statement in statements:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                continue  # one at the top level; which of its names count, the ones that use them say
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and node.id in self.definitions:
                    found.append((self.name, node.id))
                found += [target for _, target in self.imported(node)]
        return found

    def imported(self, node: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
        """Of an import: the name it binds here, and the module and the name there that it stands for."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], (alias.name, "*")
        elif isinstance(node, ast.ImportFrom):
            base = self.package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                whole = alias.name != "*" and _path(f"{source}.{alias.name}", self.folder)
                yield alias.asname or alias.name, (f"{source}.{alias.name}", "*") if whole else (source, alias.name)

    def digest(self, names: set[str]) -> str:
        """Hash of the statements that define these names, and of the loose ones; of an import, only these names."""
        imports = set()
        kept = list(self.loose)
        for name in names:
            for statement in self.definitions.get(name, []):
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    imports |= {(local, *target) for local, target in self.imported(statement) if local == name}
                elif statement not in kept:
                    kept.append(statement)
        kept = [statement for statement in self.tree.body if statement in kept]  # the order of the source
        canonical = _canonical(ast.Module(kept, [])) if kept else ()
        return hashlib.sha256(repr((sorted(imports), canonical)).encode()).hexdigest()


def _path(module: str, package: Path) -> Path | None:
    top, *rest = module.split(".")
    if top != package.name:
        return None
    path = package.joinpath(*rest)
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


def _module(name: str, package: Path) -> _Module | None:
    path = _path(name, package)
    if path is None:
        return None
    inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return _read(path.read_text(encoding="utf-8"), name, inside, package)


@cache
def _read(source: str, name: str, inside: str, folder: Path) -> _Module:
    tree = ast.parse(source)
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    definitions: dict[str, list[ast.stmt]] = {}
    loose = []
    for statement in tree.body:
        names = _names(statement)
        if names is None:
            loose.append(statement)
        for defined in names or ():
            definitions.setdefault(defined, []).append(statement)
    return _Module(name, inside, folder, tree, definitions, loose)


def _names(statement: ast.stmt) -> set[str] | None:
    """What a top-level statement defines; None if it does something else."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {statement.name}
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        case ast.Assign() | ast.AnnAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        case _:
            return None


def _canonical(node: Any) -> Any:
    """The tree as nested tuples, without docstrings; empty fields are dropped, as they differ between Pythons."""
    if isinstance(node, list):
        return tuple(_canonical(item) for item in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if (
        isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ):
        fields["body"] = fields["body"][1:]
    kept = (
        (name, _canonical(value))
        for name, value in sorted(fields.items())
        if value not in (None, []) or name == "value"
    )
    return (type(node).__name__, *kept)
