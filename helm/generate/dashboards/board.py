"""A dashboard: its frame, variables, annotations, links, and where its panels lie."""

import json
from collections.abc import Iterator, Sequence

from generate.dashboards.query import DATASOURCE, Object

SCHEMA_VERSION = 41
"""Of Grafana 11.6 and 12; newer ones migrate it when they read it."""
TAG = "alignment"
COLUMNS = 24
FLEET, RUN, COMPARE = "alignment-fleet", "alignment-run", "alignment-compare"
ALL = {"text": ["All"], "value": ["$__all"]}


def dashboard(
    uid: str,
    title: str,
    description: str,
    *,
    variables: Sequence[Object],
    sections: Sequence[tuple[str, Sequence[Object]]],
    annotations: Sequence[Object],
    links: Sequence[Object],
    start: str,
) -> Object:
    """``sections``: titles and panels, which fill lines from the left."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": f"now-{start}", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [_datasource(), *variables]},
        "annotations": {"list": [_built_in(), *annotations]},
        "links": list(links),
        "panels": list(_laid_out(sections)),
    }


def as_json(board: Object) -> str:
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


def variable(
    name: str, label: str, query: str, *, many: bool = False, every: bool = False, regex: str = "", hint: str = ""
) -> Object:
    """Values found in Prometheus within the time range. ``many`` may be chosen; ``every``: all of them at first."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "description": hint,
        "datasource": DATASOURCE,
        "query": {"qryType": 1, "query": query, "refId": f"variable-{name}"},
        "regex": regex,
        "refresh": 2,
        "sort": 1,
        "multi": many,
        "includeAll": every,
        **({"allValue": ".*", "current": ALL} if every else {}),
        "options": [],
        "hide": 0,
    }


def text_box(name: str, label: str, hint: str) -> Object:
    return {"type": "textbox", "name": name, "label": label, "description": hint, "query": "", "hide": 0}


def choice(name: str, label: str, values: Sequence[str], hint: str) -> Object:
    """Some of ``values``, all at first."""
    options = [{"text": value, "value": value, "selected": False} for value in values]
    return {
        "type": "custom", "name": name, "label": label, "description": hint, "query": ",".join(values), "multi": True,
        "includeAll": True, "allValue": ".*", "current": ALL, "options": options, "hide": 0,
    }  # fmt: skip


def annotation(name: str, expr: str, text: str, color: str, *, at_value: bool = False) -> Object:
    """A mark wherever ``expr`` has a value; ``at_value``: at the time, in milliseconds, that the value is."""
    return {
        "name": name,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "datasource": DATASOURCE,
        "expr": expr,
        "titleFormat": text,
        "step": "30s",
        "useValueForTime": at_value,
        "target": {"refId": name, "expr": expr, "interval": "30s"},
    }


def link_to(uid: str, title: str, variables: str = "") -> Object:
    """Another of the dashboards, with the same time range; ``variables`` as they stand in an address."""
    return {
        "type": "link", "title": title, "url": address(uid, variables), "icon": "dashboard", "tooltip": "", "tags": [],
        "keepTime": True, "includeVars": False, "asDropdown": False, "targetBlank": False,
    }  # fmt: skip


def address(uid: str, variables: str) -> str:
    return f"/d/{uid}?${{datasource:queryparam}}" + (f"&{variables}" if variables else "")


def _datasource() -> Object:
    return {
        "type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "regex": "",
        "refresh": 1, "options": [], "hide": 0, "multi": False, "includeAll": False,
    }  # fmt: skip


def _built_in() -> Object:
    """Annotations that people make in Grafana itself."""
    return {
        "name": "Annotations & Alerts", "builtIn": 1, "type": "dashboard", "enable": True, "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)", "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    }  # fmt: skip


def _laid_out(sections: Sequence[tuple[str, Sequence[Object]]]) -> Iterator[Object]:
    number, top = 1, 0
    for title, panels in sections:
        yield _heading(title, number, top)
        number, top = number + 1, top + 1
        left = height = 0
        for panel in panels:
            size = panel["gridPos"]
            if left + size["w"] > COLUMNS:
                left, top, height = 0, top + height, 0
            yield {**panel, "id": number, "gridPos": {**size, "x": left, "y": top}}
            number, left, height = number + 1, left + size["w"], max(height, size["h"])
        top += height


def _heading(title: str, number: int, top: int) -> Object:
    position = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
    return {"type": "row", "id": number, "title": title, "collapsed": False, "panels": [], "gridPos": position}
