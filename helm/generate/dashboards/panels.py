"""Panels as Grafana's dashboard JSON has them, one function per kind."""

from collections.abc import Iterable, Sequence
from typing import Any

from generate.dashboards.query import DATASOURCE, Object

AT_END, OVER_PROGRESS = 200, 2000
"""Points within the time range that a query may look at, where Grafana's default, one per pixel, is not right."""
GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "#5794f2", "text"


def stat(
    title: str, description: str, *targets: Object, width: int = 3, overrides: Sequence[Object] = (), **field: object
) -> Object:
    """One large number per series."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "auto",
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "center",
        "textMode": "auto",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
    }
    panel = _panel("stat", title, description, targets, options, _defaults(field), width, height=4, points=AT_END)
    panel["fieldConfig"]["overrides"] = list(overrides)
    return panel


BY_NAME = {"mode": "palette-classic-by-name"}
"""For a few runs, each of one colour in all panels; of many names several would come to the same colour."""


def lines(
    title: str,
    description: str,
    *targets: Object,
    width: int = 8,
    calcs: Sequence[str] = (),
    stacked: bool = False,
    bars: bool = False,
    logarithmic: bool = False,
    points: int | None = None,
    overrides: Sequence[Object] = (),
    **field: object,
) -> Object:
    """Values over time. With ``calcs`` the legend is a table at the right, for wide panels."""
    custom = {
        "drawStyle": "bars" if bars else "line",
        "lineWidth": 1 if stacked or bars else 2,
        "fillOpacity": 80 if bars else 25 if stacked else 0,
        "showPoints": "never" if bars else "auto",
        "pointSize": 4,
        # A phase that is over leaves no line behind; a missed scrape is bridged.
        "spanNulls": 60_000,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "axisSoftMin": 0 if bars or stacked else None,
        "scaleDistribution": {"type": "log", "log": 10} if logarithmic else {"type": "linear"},
    }
    defaults = _defaults({"color": {"mode": "palette-classic"}, **field})
    defaults["custom"] = {key: value for key, value in custom.items() if value is not None}
    panel = _panel("timeseries", title, description, targets, _xy_options(calcs), defaults, width, points=points)
    panel["fieldConfig"]["overrides"] = list(overrides)
    return panel


def trend(title: str, description: str, target: Object, x: str, width: int = 8, **field: object) -> Object:
    """Lines over a number: ``target`` is a table of ``run``, ``x`` and a value."""
    defaults = _defaults({"color": BY_NAME, **field})
    defaults["custom"] = {"lineWidth": 2, "showPoints": "auto", "pointSize": 4, "spanNulls": True}
    corner = f"{x}\\run"
    options = {**_xy_options(()), "xField": x}
    panel = _panel("trend", title, description, [target], options, defaults, width, points=OVER_PROGRESS)
    panel["transformations"] = [
        transform("groupingToMatrix", columnField="run", rowField=x, valueField="Value", emptyValue="null"),
        transform("convertFieldType", conversions=[{"targetField": corner, "destinationType": "number"}], fields={}),
        transform("sortBy", fields={}, sort=[{"field": corner}]),
        transform("organize", renameByName={corner: x}, excludeByName={}, indexByName={}),
    ]
    panel["fieldConfig"]["overrides"] = [override(x, unit="percent")]
    return panel


def bars(title: str, description: str, *targets: Object, width: int = 8, height: int = 8, **field: object) -> Object:
    """A horizontal bar per series, the end's value."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal",
        "displayMode": "basic",
        "valueMode": "color",
        "namePlacement": "left",
        "showUnfilled": True,
        "sizing": "auto",
        "minVizWidth": 8,
        "minVizHeight": 16,
        "maxVizHeight": 40,
        "legend": {"showLegend": False, "displayMode": "hidden", "placement": "bottom", "calcs": []},
    }
    return _panel("bargauge", title, description, targets, options, _defaults(field), width, height, AT_END)


def timeline(title: str, description: str, target: Object, mappings: list[Object], height: int = 8) -> Object:
    """A row per series, a colour per state."""
    options = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "center",
        "rowHeight": 0.85,
        "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    defaults = _defaults({"mappings": mappings, "color": {"mode": "thresholds"}})
    defaults["custom"] = {"fillOpacity": 80, "lineWidth": 0}
    return _panel("state-timeline", title, description, [target], options, defaults, width=24, height=height)


def table(
    title: str,
    description: str,
    *targets: Object,
    transformations: Sequence[Object],
    overrides: Sequence[Object] = (),
    width: int = 24,
    height: int = 8,
    sort: tuple[str, bool] | None = None,
    **field: object,
) -> Object:
    """``sort``: a column, and whether the largest comes first."""
    options = {
        "showHeader": True,
        "cellHeight": "sm",
        "frameIndex": 0,
        "sortBy": [{"displayName": sort[0], "desc": sort[1]}] if sort else [],
    }
    defaults = _defaults(field)
    defaults["custom"] = {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True}
    panel = _panel("table", title, description, targets, options, defaults, width, height, AT_END)
    panel["transformations"] = list(transformations)
    panel["fieldConfig"]["overrides"] = [*_EMPTY_CELLS, *overrides]
    return panel


def matrix(title: str, description: str, target: Object, *, column: str, row: str, **more: Any) -> Object:
    """``target`` is a table with labels ``column`` and ``row`` and one value; the last column holds rows' names."""
    corner = f"{row}\\{column}"
    transformations = [
        transform("groupingToMatrix", columnField=column, rowField=row, valueField="Value", emptyValue="null"),
        transform("organize", renameByName={corner: row}, excludeByName={}, indexByName={}),
    ]
    overrides = [override(row, **{"custom.width": 230})]
    return table(
        title,
        description,
        target,
        transformations=transformations,
        overrides=overrides,
        sort=(row, False),
        **more,
    )


_EMPTY_CELLS = [
    {"matcher": {"id": "byType", "options": kind}, "properties": [{"id": "noValue", "value": "–"}]}
    for kind in ("number", "string")
]
"""The panel's own text for no value is for a table without rows."""


# -- parts


def transform(kind: str, **options: object) -> Object:
    return {"id": kind, "options": options}


def columns(names: Iterable[tuple[str, str]], also: Iterable[str] = ()) -> list[Object]:
    """Join tables by what they have in common and keep ``names``, (field, title), in this order.

    ``also``: fields that are there and not shown.
    """
    kept = list(names)
    order = {field: i for i, (field, _) in enumerate(kept)}
    hidden = dict.fromkeys(("Time", *also), True)
    titles = {field: title for field, title in kept if field != title}
    return [
        transform("merge"),
        transform("organize", indexByName=order, renameByName=titles, excludeByName=hidden),
    ]


def override(field: str, **properties: object) -> Object:
    """Settings of one field. A property with a dot in its name is passed in a dict."""
    listed = [{"id": key, "value": value} for key, value in properties.items()]
    return {"matcher": {"id": "byName", "options": field}, "properties": listed}


def steps(*colors: tuple[float | None, str]) -> Object:
    """Colours from a value on; the first begins at None."""
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in colors]}


def link(title: str, url: str) -> Object:
    return {"title": title, "url": url, "targetBlank": False}


def _xy_options(calcs: Sequence[str]) -> Object:
    shape = {"displayMode": "table", "placement": "right"} if calcs else {"displayMode": "list", "placement": "bottom"}
    return {
        "legend": {"showLegend": True, "calcs": list(calcs), **shape},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _defaults(field: Object) -> Object:
    """Field settings that every panel has, then its own."""
    plain = {"color": {"mode": "thresholds"}, "thresholds": steps((None, GREY)), "mappings": [], "unit": "short"}
    return {**plain, "noValue": "No data", **field}


def _panel(
    kind: str,
    title: str,
    description: str,
    targets: Sequence[Object],
    options: Object,
    defaults: Object,
    width: int,
    height: int = 8,
    points: int | None = None,
) -> Object:
    """Where it lies is the dashboard's business: of the position it knows its size only."""
    named = [{"refId": chr(ord("A") + i), "datasource": DATASOURCE, **target} for i, target in enumerate(targets)]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": named,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "gridPos": {"w": width, "h": height},
        **({"maxDataPoints": points} if points else {}),
    }
