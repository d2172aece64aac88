"""The dashboards by Grafana's published TypeScript types (npm `@grafana/schema`), checked by the TypeScript compiler."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import requirements
from cluster.locks import exclusive

from dashboards.boards import BOARDS

TYPES = Path(__file__).with_name("types")
OPTIONS = {
    "strict": True, "noEmit": True, "target": "es2022", "module": "nodenext", "moduleResolution": "nodenext",
    "skipLibCheck": True, "types": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> Path:
    """tsc, with the types beside it."""
    if not shutil.which("npm"):
        requirements.not_here("npm is missing: the dashboards' types are not checked (apt-get install npm)")
    installed = TYPES / "node_modules" / ".package-lock.json"
    lock = TYPES / "package-lock.json"
    with exclusive(TYPES / ".lock", "another process is installing Grafana's types; waiting for it"):
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=TYPES, check=True
            )
            installed.touch()
    return TYPES / "node_modules" / ".bin" / "tsc"


def complaints(compiler: Path, folder: Path, boards: dict[str, Any]) -> dict[str, str]:
    """What the compiler says of each, by name."""
    for name, board in boards.items():
        head = f"import type {{ Dashboard }} from '{TYPES / 'dashboard.js'}';"
        (folder / f"{name}.ts").write_text(f"{head}\nexport const board: Dashboard = {json.dumps(board)};\n")
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": OPTIONS, "include": ["*.ts"]}))
    done = subprocess.run(
        [compiler, "-p", folder], cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert all(line.split("(")[0].removesuffix(".ts") in boards for line in lines), done.stdout
    return {name: "\n".join(line for line in lines if line.startswith(f"{name}.ts(")) for name in boards}


def first(board: Any, kind: str) -> Any:
    return next(panel for panel in board["panels"] if panel["type"] == kind)


def unknown_option(board: Any) -> None:
    first(board, "table")["options"]["showHeaders"] = True


def unknown_setting(board: Any) -> None:
    first(board, "timeseries")["fieldConfig"]["defaults"]["custom"]["lineWidht"] = 2


def wrong_word(board: Any) -> None:
    first(board, "timeseries")["options"]["tooltip"]["mode"] = "every"


def wrong_kind(board: Any) -> None:
    first(board, "stat")["type"] = "singlestat"


def word_for_a_number(board: Any) -> None:
    first(board, "bargauge")["gridPos"]["w"] = "12"


def without_a_name(board: Any) -> None:
    del board["templating"]["list"][0]["name"]


def wrong_refresh(board: Any) -> None:
    board["refresh"] = 30


def wrong_mapping(board: Any) -> None:
    first(board, "state-timeline")["fieldConfig"]["defaults"]["mappings"][0]["type"] = "word"


BREAKS: list[Callable[[Any], None]] = [
    unknown_option, unknown_setting, wrong_word, wrong_kind, word_for_a_number, without_a_name, wrong_refresh, wrong_mapping,
]  # fmt: skip


def test_the_dashboards_are_of_the_published_types(compiler: Path, tmp_path: Path):
    assert complaints(compiler, tmp_path, BOARDS) == dict.fromkeys(BOARDS, "")


def test_what_is_broken_is_found(compiler: Path, tmp_path: Path):
    broken = {}
    for spoil in BREAKS:
        broken[spoil.__name__] = copy.deepcopy(BOARDS["fleet"])
        spoil(broken[spoil.__name__])
    found = complaints(compiler, tmp_path, broken)
    assert all("error TS" in text for text in found.values()), found
