"""Logs on standard error: one JSON object a line, or text for people."""

import logging
import sys
from typing import Literal, cast

import kopf

LEVELS = ("debug", "info", "warning", "error")


def configure(log_format: str, level: str) -> None:
    """Set up the process's logging. Raises SystemExit for a format or level that does not exist."""
    if log_format not in ("json", "text"):
        raise SystemExit(f"--log-format {log_format}: json or text")
    if level not in LEVELS:
        raise SystemExit(f"--log-level {level}: one of {', '.join(LEVELS)}")
    chosen = cast(Literal["json", "text"], log_format)
    kopf.configure(debug=level == "debug", log_format=kopf.LogFormat.JSON if chosen == "json" else kopf.LogFormat.FULL)
    # kopf's own words for levels are others: its "verbose" is debug, its "quiet" warning.
    logging.getLogger().setLevel(level.upper())
    # kopf tells of every event that it passes on.
    for name in ("kopf.objects", "kopf.activities", "kopf._core", "kopf._cogs", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    sys.stderr.flush()
