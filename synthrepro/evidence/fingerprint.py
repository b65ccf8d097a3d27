"""Fingerprint of code: it changes when what is computed may change, and not when a comment does."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# They carry evidence, they do not compute it.
LEFT_OUT = {"evidence", "cli", "paths", "errors"}


def fingerprint(module: str, package: Path) -> str:
    """Hash of the syntax trees of `module` and of all modules of the package that it imports, at any depth.

    Comments, layout and docstrings do not count. An import counts wherever it stands, inside functions too; a module
    named only in a string (`importlib.import_module(name)`) is not seen. Reads the sources, imports nothing.

    Args:
        module: dotted name, such as `synthrepro.methods.learn2synth`.
        package: folder of the top package, such as `.../synthrepro`.

    Raises:
        FileNotFoundError: the package has no such module.
    """
    if _path(module, package) is None:
        raise FileNotFoundError(f"{package} holds no module {module}")
    digests: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _path(name, package)
        if path is None or name in digests or LEFT_OUT.intersection(name.split(".")[1:2]):
            continue
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        digests[name], imported = _read(path.read_text(encoding="utf-8"), inside)
        waiting += imported
        # Importing a.b.c runs a/__init__.py and a/b/__init__.py first.
        waiting += [name.rsplit(".", level)[0] for level in range(1, name.count(".") + 1)]
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16]


def _path(module: str, package: Path) -> Path | None:
    top, *rest = module.split(".")
    if top != package.name:
        return None
    path = package.joinpath(*rest)
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


@cache
def _read(source: str, package: str) -> tuple[str, list[str]]:
    """Hash of a source, and what it imports; `package` is where its relative imports start from."""
    tree = ast.parse(source)
    return hashlib.sha256(repr(_canonical(tree)).encode()).hexdigest(), list(_imported(tree, package))


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
