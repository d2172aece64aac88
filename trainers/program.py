"""Identity of the program that makes a result: its version, and the sources that a phase type uses. Imports no torch.

Sources are compared as they are parsed, so a comment or a docstring that is edited changes nothing.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import trainers
from trainers import __version__

ROOT = Path(trainers.__file__).parent

CARRIERS = frozenset(
    {
        "trainers.contract", "trainers.failures", "trainers.files", "trainers.fingerprints", "trainers.lease",
        "trainers.meter", "trainers.metrics", "trainers.origins", "trainers.phase_file", "trainers.program", "trainers.remote",
        "trainers.tracker", "trainers.phase_dir", "trainers.core.flops",
    }
)  # fmt: skip
"""Modules that start, store and report a phase's work and have no part in it, nor has what only they import."""

APART = frozenset({"trainers.synthetic"})
"""A generator's sources are part of its data's fingerprint: only phases that read it depend on it."""


@cache
def program_identity(module: str) -> str:
    """Version and digest of everything below ``trainers`` that a phase's module imports, directly or not."""
    digest = hashlib.sha256()
    for path in _sources(module):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(_meaning(path))
    return f"{__version__}+{digest.hexdigest()[:16]}"


def _sources(module: str) -> list[Path]:
    """The modules' files, and what lies beside the first one that is no Python (templates)."""
    found: dict[str, Path] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        path = _file(name)
        if path is None or name in found or _is_apart(name):
            continue
        found[name] = path
        queue += _imports(path)
    folder = found[module].parent
    others = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    return sorted([*found.values(), *others])


def _is_apart(name: str) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in CARRIERS | APART)


def _file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if name.split(".", maxsplit=1)[0] == ROOT.name and file.is_file()), None)


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in it; ``from package import name`` may mean a module too."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _meaning(path: Path) -> bytes:
    return ast.dump(_tree(path)).encode() if path.suffix == ".py" else path.read_bytes()


@cache
def _tree(path: Path) -> ast.Module:
    tree: ast.Module = _Stripped().visit(ast.parse(path.read_bytes()))
    return tree


class _Stripped(ast.NodeTransformer):
    """Without texts that stand alone (docstrings), and what only a type checker reads."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node
