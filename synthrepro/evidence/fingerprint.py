"""Fingerprint of code: it changes when what is computed may change, and not when a comment does."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# They carry evidence, they do not compute it.
LEFT_OUT = {"evidence", "cli", "paths", "errors"}


def fingerprint(module: str, package: Path, name: str | None = None) -> str:
    """Hash of the syntax trees of `module` and of all modules of the package that it imports, at any depth.

    With `name`, only those definitions of `module` count that the experiment of this name reaches through its `run`
    function and its artefacts' builders, so that a chapter may gain an experiment and keep the records of the others;
    or those that a function of this name reaches.

    Comments, layout and docstrings do not count. An import counts wherever it stands, inside functions too; a module
    named only in a string (`importlib.import_module(name)`) is not seen. Reads the sources, imports nothing.

    Args:
        module: dotted name, such as `synthrepro.methods.learn2synth`.
        package: folder of the top package, such as `.../synthrepro`.
        name: of an experiment or a function of `module`.

    Raises:
        FileNotFoundError: the package has no such module.
    """
    if _path(module, package) is None:
        raise FileNotFoundError(f"{package} holds no module {module}")
    digests: dict[str, str] = {}
    waiting = [module]
    while waiting:
        found = waiting.pop()
        path = _path(found, package)
        if path is None or found in digests or LEFT_OUT.intersection(found.split(".")[1:2]):
            continue
        inside = found if path.name == "__init__.py" else found.rpartition(".")[0]
        digests[found], imported = _read(path.read_text(encoding="utf-8"), inside, name if found == module else None)
        waiting += imported
        # Importing a.b.c runs a/__init__.py and a/b/__init__.py first.
        waiting += [found.rsplit(".", level)[0] for level in range(1, found.count(".") + 1)]
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16]


def _path(module: str, package: Path) -> Path | None:
    top, *rest = module.split(".")
    if top != package.name:
        return None
    path = package.joinpath(*rest)
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


@cache
def _read(source: str, package: str, name: str | None) -> tuple[str, list[str]]:
    """Hash of a source, and what it imports; `package` is where its relative imports start from."""
    tree = ast.parse(source)
    if name is not None:
        tree.body = _reached(tree.body, _entries(tree, name))
    return hashlib.sha256(repr(_canonical(tree)).encode()).hexdigest(), list(_imported(tree, package))


def _entries(tree: ast.Module, name: str) -> set[str]:
    """The functions that an experiment names: `run`, and its artefacts' builders; else the one of that name."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    named = [call for call in calls if ast.unparse(call.args[0]) == repr(name)]
    given = [part for call in named for part in call.args[4:5] + call.args[6:7]]
    given += [keyword.value for call in named for keyword in call.keywords if keyword.arg in ("run", "artefacts")]
    return {node.id for part in given for node in ast.walk(part) if isinstance(node, ast.Name)} or {name}


def _reached(body: list[ast.stmt], entries: set[str]) -> list[ast.stmt]:
    """The statements of a module that these definitions need; all of them if it does not define one of these.

    A definition is needed if a needed one names it; whatever else the module does when it is imported is needed too.
    """
    defined = [(statement, _names(statement)) for statement in body]
    if not entries <= set().union(*(names or () for _, names in defined)):
        return body
    needed = set(entries)
    kept: list[ast.stmt] = []
    while new := [s for s, names in defined if s not in kept and (names is None or names & needed)]:
        kept += new
        needed |= {node.id for s in new for node in ast.walk(s) if isinstance(node, ast.Name)}
    return [statement for statement in body if statement in kept]


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


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _canonical(node: Any) -> Any:
    """The tree as nested tuples, without docstrings; empty fields are dropped, as they differ between Pythons."""
    if isinstance(node, list):
        return tuple(_canonical(item) for item in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ):
        fields["body"] = fields["body"][1:]
    kept = (
        (name, _canonical(value))
        for name, value in sorted(fields.items())
        if value not in (None, []) or name == "value"
    )
    return (type(node).__name__, *kept)
