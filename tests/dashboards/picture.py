"""Pictures of the dashboards: panels rendered with Grafana's published components from what a real Prometheus answers.

    python -m dashboards.picture http://127.0.0.1:9090 out --start TIME --end TIME \
        --namespace NAMESPACE --run RUN [--run RUN ...] --phase PHASE
"""

import argparse
import json
import math
import shutil
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboards.boards import BOARDS, Query, Scope, Value, panels

RENDER = Path(__file__).with_name("render")
WIDTH = 1600
PAGE = """<!doctype html><meta charset="utf-8"><style>{css}</style><div id="board"></div>
<script>window.INPUT={data}</script><script>{code}</script>"""
Object = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A Prometheus anywhere."""

    url: str

    def ask(self, query: Query, scope: Scope) -> list[Object]:
        """Series as labels and points."""
        expr = scope.fill(query)
        if query.kind == "instant":
            found = self._get("query", query=expr, time=scope.end)
            return [{"labels": _labels(one), "points": [_point(one["value"])]} for one in found]
        found = self._get("query_range", query=expr, start=scope.start, end=scope.end, step=scope.interval(query))
        return [{"labels": _labels(one), "points": [_point(p) for p in one["values"]]} for one in found]

    def _get(self, path: str, **parameters: object) -> list[Object]:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            return json.load(answer)["data"]["result"]


def draw(name: str, server: Server, scope: Scope, out: Path) -> None:
    page = _page(name, server, scope)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "board.html"
        path.write_text(page)
        _photograph(path, out)
    _lighten(out)


def _page(name: str, server: Server, scope: Scope) -> str:
    answers = {
        panel["id"]: [_answer(panel, target, server, scope) for target in panel["targets"]]
        for panel in panels(BOARDS[name])
    }
    values = {key: _shown(value) for key, value in scope.values.items()}
    data = {"board": BOARDS[name], "answers": answers, "values": values, "start": scope.start, "end": scope.end}
    built = RENDER / "out"
    code = (built / "board.js").read_text().replace("</script", r"<\/script")
    return PAGE.format(css=(built / "board.css").read_text(), data=json.dumps(data), code=code)


def _answer(panel: Object, target: Object, server: Server, scope: Scope) -> Object:
    points = panel.get("maxDataPoints", WIDTH * panel["gridPos"]["w"] / 24)
    query = Query(panel["title"], target["expr"], "instant" if target["instant"] else "range", points)
    series = server.ask(query, scope)
    return {
        "refId": target["refId"], "format": target["format"], "legend": target["legendFormat"],
        "step": scope.interval(query), "series": series,
    }  # fmt: skip


def _photograph(page_file: Path, out: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_function("document.title.length > 0", timeout=120_000)
        assert page.title() == "drawn", (page.title(), problems)
        page.screenshot(path=str(out), full_page=True)
        browser.close()


def _lighten(out: Path) -> None:
    """A palette is enough for a dashboard, and a quarter of the bytes."""
    from PIL import Image

    with Image.open(out) as picture:
        small = picture.convert("RGB").quantize(colors=256, dither=Image.Dither.NONE)
    small.save(out, optimize=True)


def _labels(found: Object) -> Object:
    return {name: value for name, value in found["metric"].items() if name != "__name__"}


def _point(pair: list[Any]) -> list[float | None]:
    value = float(pair[1])
    return [pair[0], value if math.isfinite(value) else None]


def _shown(value: Value) -> str:
    return "All" if value == "$__all" else value if isinstance(value, str) else ", ".join(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prometheus")
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=float, required=True)
    parser.add_argument("--end", type=float, required=True)
    parser.add_argument("--scrape", type=float, default=15)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--run", action="append", required=True)
    parser.add_argument("--phase", required=True)
    given = parser.parse_args()
    values: dict[str, dict[str, Value]] = {
        "fleet": {"namespace": "$__all", "state": "$__all", "search": ""},
        "run": {"namespace": given.namespace, "run": given.run[0], "phase": "$__all"},
        "compare": {"namespace": given.namespace, "run": given.run, "phase": given.phase, "model": "$__all"},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in values.items():
        scope = Scope(chosen, given.start, given.end, given.scrape)
        draw(name, Server(given.prometheus), scope, given.out / f"{name}.png")


if __name__ == "__main__":
    main()
