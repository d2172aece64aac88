"""What a workspace holds, for terminals and as a page: read from folders that anybody may have written."""

import json
import math
import os
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller import runs_folder
from controller.api.problems import InvalidRun
from controller.commands.history import PAGE, history_command, page
from controller.commands.runs import bytes_text, phase_rows, run_row, runs_command
from controller.holdings import LARGEST, Folder, HeldRun, holdings
from controller.plan.verdict import LONGEST, duration
from trainers.contract import Artifact, Identity, Progress, Result
from trainers.remote.store import Store

HOSTILE = "<img src=x onerror=alert(1)>\"'&\u202e\x1b[2J]]><!--"
"""Not a slash: no folder has one in its name."""


def result(phase: str, digest: str = "d" * 64, when: str = "2026-01-02T03:04:05+00:00", **more: object) -> Result:
    made = {"model": Artifact(kind="model", path="model", digest="a", size=2_500_000)}
    known = {"run": "r", "phase": phase, "type": "sft", "digest": digest, "artifact_digest": "a" * 64, "steps": 40}
    return Result.model_validate({**known, "artifacts": made, "seconds": 65.0, "finished_at": when, **more})


def leave(root: Path, folder: str, thing: Result | Identity | Progress, name: str = "result.json") -> Path:
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(thing.document()))
    return path.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One run of which something was run anew and something has not finished, and an older one."""
    leave(tmp_path, "helpful/sft", result("sft", "b" * 64, "2026-01-03T00:00:00+00:00"))
    leave(tmp_path, f"helpful/.history/sft-{'d' * 16}", result("sft"))
    leave(tmp_path, f"helpful/.history/sft-{'d' * 16}.1767225600000000000", result("sft"))
    leave(tmp_path, "helpful/dpo", Identity(digest="e" * 64), "identity.json")
    leave(tmp_path, "helpful/dpo", Progress(step=3, total_steps=9), "progress.json")
    leave(tmp_path, "older/sft", result("sft", metrics={"evalLoss": 1.25}, inputs={"base": "x"}))
    leave(tmp_path, "older/.sft.adopt", result("sft"))
    leave(tmp_path, ".index/x", result("x"))
    (tmp_path / "helpful/dpo/model").mkdir()
    return tmp_path


def held(root: Path) -> tuple[HeldRun, ...]:
    return holdings(Folder(root))


def test_runs_and_phases_are_known_by_what_they_have_left(root: Path) -> None:
    helpful, older = held(root)
    assert (helpful.name, older.name) == ("helpful", "older"), "the last one first"
    assert [(p.name, p.step, bool(p.result)) for p in helpful.phases] == [("sft", 0, True), ("dpo", 3, False)]
    assert [p.name for p in helpful.aside] == ["sft", "sft"]
    assert (helpful.seconds, helpful.size, helpful.last) == (65.0, 7_500_000, "2026-01-03 00:00")
    assert [p.name for p in older.phases] == ["sft"]


def test_the_list(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs_command(str(root), None) == 0
    assert capsys.readouterr().out == (
        "run      phases  unfinished  set aside  last result       work   size\n"
        "helpful  1       1           2          2026-01-03 00:00  1m05s  7.5 MB\n"
        "older    1       -           -          2026-01-02 03:04  1m05s  2.5 MB\n"
    )
    assert runs_command(str(root), "helpful") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "sft",
        "sft",
        "finished",
        "2026-01-03",
        "00:00",
        "40",
        "1m05s",
        "2.5",
        "MB",
        "helpful/sft",
    ]
    assert "unfinished, step 3 of 9" in lines[2]
    assert [line.split("  ")[-1] for line in lines[3:]] == [
        f"helpful/.history/sft-{'d' * 16}",
        f"helpful/.history/sft-{'d' * 16}.1767225600000000000",
    ]
    with pytest.raises(InvalidRun, match="did you mean helpful"):
        runs_command(str(root), "helpfull")


def test_a_run_of_this_machine_says_what_failed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phase = {"name": "eval", "type": "evaluate", "state": "Failed", "failure": "BadInput", "message": "no such column"}
    (root / "helpful/status.json").write_text(json.dumps({"phases": [phase]}))
    runs_command(str(root), "helpful")
    assert "eval   evaluate  failed: BadInput: no such column" in capsys.readouterr().out


def test_an_object_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("memory://holdings/place")
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in files:
        store.write(path.relative_to(root).as_posix(), path.read_bytes())
    runs_command(str(root), None)
    told = capsys.readouterr().out
    runs_command("memory://holdings/place", None)
    assert capsys.readouterr().out == told
    history_command("memory://holdings/place")
    assert b"helpful" in (store.read(PAGE) or b"")


def test_what_is_no_workspace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for root in (str(tmp_path / "none"), "nonsense://bucket"):
        with pytest.raises(runs_folder.Unusable, match=r"--workspace") as error:
            runs_command(root, None)
        assert "\n" not in str(error.value)
    assert runs_command(str(tmp_path), None) == 0
    assert capsys.readouterr().out == f"{tmp_path} holds nothing of any run\n"


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 B"), (999, "999 B"), (1000, "1.0 KB"), (3.2e12, "3.2 TB"), (1e19, "10000.0 PB")]
)
def test_sizes(size: float, text: str) -> None:
    assert bytes_text(size) == text


# ---------------------------------------------------------------- hostile workspaces


def test_nothing_is_followed_or_believed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    leave(outside, "secret", result("secret", versions={"key": "hunter2"}))
    for name, target in (("a", outside / "secret/result.json"), ("b", Path("/dev/zero"))):
        (root / "evil" / name).mkdir(parents=True)
        (root / "evil" / name / "result.json").symlink_to(target)
    for name, content in (("c", b"{"), ("d", b"\xff\xfe"), ("e", b"[" * 100_000), ("f", b" " * (LARGEST + 1))):
        (root / "evil" / name).mkdir()
        (root / "evil" / name / "result.json").write_bytes(content)
    (root / "evil/g/result.json").mkdir(parents=True)
    os.mkfifo(leave(root, "evil/h", Identity(digest="x"), "identity.json") / "result.json")
    evil = next(run for run in held(root) if run.name == "evil")
    assert sorted(p.name for p in evil.phases) == list("abcdefgh")
    assert not evil.finished


def test_figures_that_nobody_counted_break_no_list(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = result("x").document()
    sizes = {"model": {**whole["artifacts"]["model"], "size": 10**400}}
    for name, more in {
        "a": {"artifacts": sizes},
        "b": {"seconds": 1e308},
        "c": {"seconds": 1e308, "steps": -5},
    }.items():
        (root / "evil" / name).mkdir(parents=True)
        (root / "evil" / name / "result.json").write_text(json.dumps({**whole, **more}))
    leave(root, "evil/d", Identity(digest="x"), "identity.json")
    (root / "evil/d/progress.json").write_text(json.dumps({"step": 10**400, "totalSteps": 10**4000}))
    for name in (None, "evil"):
        assert runs_command(str(root), name) == 0
    assert "older    1       -" in capsys.readouterr().out
    assert history_command(str(root)) == 0


ANY = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5)
    | st.integers(-(10**400), 10**400) | st.sampled_from([10**400, 1e308, -1e308, 1e16, "\x1b[2J\u202e", 2**63]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
FIELDS = st.sampled_from(["steps", "seconds", "artifacts", "metrics", "finishedAt", "type", "seed", "size", "run"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(FIELDS, ANY, min_size=1, max_size=3), min_size=1, max_size=3))
def test_whatever_a_result_says_the_others_are_listed(documents: list[dict[str, object]]) -> None:
    whole = result("x").document()
    held: dict[str, bytes] = {"good/sft/result.json": json.dumps(whole).encode()}
    for i, given_ in enumerate(documents):
        sizes = {"model": {**whole["artifacts"]["model"], "size": given_.pop("size")}} if "size" in given_ else {}
        held[f"evil/p{i}/result.json"] = json.dumps(
            {**whole, **({"artifacts": sizes} if sizes else {}), **given_}
        ).encode()

    class Memory:
        def names(self, pattern: str) -> list[str]:
            return [name for name in held if pattern == "*/*/result.json"]

        def read(self, name: str) -> bytes | None:
            return held.get(name)

    runs = holdings(Memory())
    assert {run.name for run in runs} == {"good", "evil"}
    shown = [cell for run in runs for cell in run_row(run)] + [
        c for run in runs for row in phase_rows(run) for c in row
    ]
    assert all(isinstance(cell, str) for cell in shown)
    assert "helpful" not in page("w", runs, frozenset(), datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("seconds", "text"), [(math.nan, "-"), (-1e308, "0s"), (math.inf, duration(LONGEST)), (1e308, duration(LONGEST))]
)
def test_any_number_is_a_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Page(HTMLParser):
    """What a browser makes of it: elements that are closed as they should be, and texts."""

    VOID = ("meta", "link")
    ELEMENTS = frozenset(
        [
            "html",
            "head",
            "meta",
            "link",
            "title",
            "style",
            "body",
            "header",
            "h1",
            "h2",
            "p",
            "nav",
            "a",
            "main",
            "div",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "small",
            "code",
            "details",
            "summary",
            "footer",
        ]
    )
    ATTRIBUTES = frozenset(
        "lang charset name content http-equiv rel href id class scope tabindex role aria-label".split()  # noqa: SIM905
    )

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.ELEMENTS, tag
        assert {name for name, _ in attrs} <= self.ATTRIBUTES
        found = dict(attrs)
        self.links += [found["href"] or ""] if tag == "a" else []
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def handle_comment(self, data: str) -> None:
        raise AssertionError("no comments")

    def handle_pi(self, data: str) -> None:
        raise AssertionError("no instructions")


def written(root: Path) -> Page:
    history_command(str(root))
    return Page((root / PAGE).read_text())


def test_the_page_has_every_run_and_leads_to_reports(root: Path) -> None:
    (leave(root, "older/package", result("package")) / "report.html").write_text("<p>")
    page = written(root)
    assert {"helpful", "older", "unfinished, step 3 of 9", "evalLoss 1.250", "base"} <= set(page.texts)
    assert "2 set aside: of other settings, or of before a phase was run anew" in page.texts
    anchors = [link.removeprefix("#") for link in page.links if link.startswith("#")]
    assert (anchors, "./older/package/report.html" in page.links) == (page.ids, True)
    for link in page.links:
        assert link.startswith("#") or (root / unquote(link)).is_file()
    again = written(root)
    assert again.texts == page.texts


NAMES = [
    HOSTILE,
    "javascript:alert(1)",
    "<\u2215table><script>alert(1)<",
    "{{ 7 * 7 }}{% include 'report.css' %}",
    "x..%2f..%2fetc",
    "a#b?c=d&e",
]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_text(root: Path, name: str) -> None:
    more = {"metrics": {name: 1.0}, "inputs": {name: "x"}, "type": name, "digest": name, "finished_at": name}
    folder = leave(root, f"{name}/{name}", result(name, **more))
    (folder / "report.html").write_text("<p>")
    phase = {"name": name, "type": name, "state": "Failed", "failure": "BadInput", "message": name}
    (root / name / "status.json").write_text(json.dumps({"phases": [{**phase, "name": "x"}, phase]}))
    page = written(root)
    assert "49" not in page.texts
    assert not any("\u202e" in text or "\x1b" in text for text in page.texts)
    (link,) = [link for link in page.links if not link.startswith("#")]
    parts = urlsplit(link)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
    assert (root / unquote(parts.path)).resolve() == (folder / "report.html").resolve()


def test_a_page_that_leads_elsewhere_is_replaced_and_not_followed(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    victim = tmp_path_factory.mktemp("outside") / "file"
    victim.write_text("mine")
    (root / PAGE).symlink_to(victim)
    written(root)
    assert victim.read_text() == "mine"


def test_the_list_on_a_terminal_says_nothing_to_the_terminal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(root, f"{HOSTILE}/{HOSTILE}", result(HOSTILE, type=HOSTILE))
    runs_command(str(root), None)
    runs_command(str(root), HOSTILE)
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\u202e" not in told
