"""The templates and what they may call. HTML is escaped by default: models' responses are untrusted text."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

DIGITS = 3


def number(value: float | None) -> str:
    """Three decimals, fewer for large numbers, a dash for none."""
    if value is None:
        return "–"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if abs(value) < 100 else f"{value:+,.0f}".replace("-", "−")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def indented(text: str) -> str:
    """A Markdown code block, in which nothing has a meaning."""
    return "\n".join(f"    {line}" for line in str(text).splitlines() or [""])


def cell(text: object) -> str:
    """Text in a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


ENVIRONMENT = Environment(
    loader=PackageLoader("trainers.phases.package"),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "number": number,
    "signed": signed,
    "duration": duration,
    "indented": indented,
    "cell": cell,
}


def render(template: str, **values: Any) -> str:
    return ENVIRONMENT.get_template(template).render(**values)
