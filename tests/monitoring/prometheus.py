"""A real Prometheus with its own port and data folder, which ends with the process that started it."""

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster import requirements
from cluster.processes import Children, free_ports

Labels = dict[str, str]
PROGRAMS = ("prometheus", "promtool")
EMPTY: Mapping[str, Any] = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}}


class QueryFailed(Exception):
    """The message is Prometheus' own, after the query."""


class Sample(NamedTuple):
    """One series at one time. A scalar has no labels."""

    labels: Labels
    value: float


class Line(NamedTuple):
    """One series over time, as (Unix time, value)."""

    labels: Labels
    points: list[tuple[float, float]]


class Prometheus:
    """``folder`` gets ``prometheus.yaml``, ``data`` and the log; times are Unix seconds, None is now."""

    def __init__(self, folder: Path, config: Mapping[str, Any] = EMPTY):
        require()
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.data = folder / "prometheus.yaml", folder / "data"
        self._write(config)
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.url = f"http://{self.address}"
        self._children = Children(folder)
        command = [
            "prometheus", f"--config.file={self.config}", f"--storage.tsdb.path={self.data}",
            f"--web.listen-address={self.address}", "--web.enable-lifecycle", "--query.lookback-delta=5m",
        ]  # fmt: skip
        self._children.start("prometheus", command)
        self._children.wait_for(self._is_ready, 60, "Prometheus is ready")

    def query(self, promql: str, time: float | None = None) -> list[Sample]:
        data = self.get("query", query=promql, time=time)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(one["metric"], float(one["value"][1])) for one in data["result"]]

    def query_range(self, promql: str, start: float, end: float, step: float = 1) -> list[Line]:
        data = self.get("query_range", query=promql, start=start, end=end, step=step)
        return [Line(one["metric"], [(at, float(value)) for at, value in one["values"]]) for one in data["result"]]

    def series(self, *matchers: str, start: float | None = None, end: float | None = None) -> list[Labels]:
        """The labels of every series that fits one of ``matchers``, without a time: of all that is stored."""
        return self.get("series", **{"match[]": matchers}, start=start, end=end)

    def metadata(self) -> dict[str, dict[str, str]]:
        """``{name: {"type", "help", "unit"}}`` as the targets that are up now declare it."""
        return {name: entries[0] for name, entries in self.get("metadata").items()}

    def targets(self) -> list[dict[str, Any]]:
        """Those that are scraped now: ``labels``, ``discoveredLabels``, ``health``, ``lastError``, ``scrapePool``, ..."""
        return self.get("targets", state="active")["activeTargets"]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def reload(self, config: Mapping[str, Any] | None = None) -> None:
        """With the configuration in the file, or a new one."""
        if config is not None:
            self._write(config)
        self._fetch("/-/reload", method="POST")

    def get(self, path: str, **parameters: Any) -> Any:
        """``data`` of /api/v1/PATH. Raises QueryFailed."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return json.loads(self._fetch(f"/api/v1/{path}?{urllib.parse.urlencode(given, doseq=True)}"))["data"]

    def stop(self) -> None:
        self._children.kill("prometheus")

    def _write(self, config: Mapping[str, Any]) -> None:
        self.config.write_text(json.dumps(config))  # JSON is YAML
        promtool("check", "config", str(self.config))

    def _fetch(self, path: str, method: str = "GET") -> str:
        try:
            request = urllib.request.Request(self.url + path, method=method)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            raise QueryFailed(f"{urllib.parse.unquote_plus(path)}: {error.read().decode()}") from None

    def _is_ready(self) -> bool:
        try:
            return bool(self._fetch("/-/ready"))
        except (OSError, QueryFailed):
            return False


def promtool(*arguments: str, text: str | None = None, cwd: Path | None = None) -> str:
    """Its output, complaints included. Raises AssertionError with it when promtool is not content."""
    require()
    done = subprocess.run(
        ["promtool", *arguments], input=text, cwd=cwd, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"promtool {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def version() -> str:
    """Of the installed Prometheus, as an image's tag has it."""
    return f"v{promtool('--version').split()[2].partition('+')[0]}"


def require(programs: Sequence[str] = PROGRAMS) -> None:
    """Skips the test where Prometheus is not installed; with CI=true it fails."""
    if not all(shutil.which(program) for program in programs):
        requirements.not_here("prometheus and promtool are missing; apt-get install prometheus")
