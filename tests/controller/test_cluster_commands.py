"""Commands against a cluster, without one: where they look, how they get in, and what they say of errors."""

import sys
from pathlib import Path
from typing import Any

import pytest

from controller import cli, runs_folder
from controller.api.problems import InvalidRun
from controller.commands import where
from controller.commands.cluster import patience
from controller.commands.cluster.errors import ClusterError, refused, unreachable
from controller.commands.where import Place

# ---------------------------------------------------------------- where to look

PLACES: dict[str, tuple[str, dict[str, Any], object]] = {
    "the workspace unless told": ("alignctl", {}, runs_folder.DEFAULT),
    "another workspace": ("alignctl", {"root": Path("x")}, Path("x")),
    "a context is a cluster": ("alignctl", {"context": "a"}, Place("a")),
    "a namespace is one of the current context's cluster": ("alignctl", {"namespace": "n"}, Place(namespace="n")),
    "a kubeconfig is a cluster": ("alignctl", {"kubeconfig": Path("k")}, Place(kubeconfig=Path("k"))),
    "as a plugin of kubectl, its cluster": ("/usr/bin/kubectl-align", {}, Place()),
    "as a plugin, a workspace if it is named": ("kubectl-align", {"root": Path("x")}, Path("x")),
}


@pytest.mark.parametrize("sentence", PLACES)
def test_place(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, options, expected = PLACES[sentence]
    monkeypatch.setattr(sys, "argv", [program])
    given = {"root": None, "context": None, "namespace": None, "kubeconfig": None, **options}
    assert where.choose(**given) == expected


@pytest.mark.parametrize("option", ["context", "namespace", "kubeconfig"])
def test_a_workspace_is_not_in_a_cluster(option: str) -> None:
    given: dict[str, Any] = {"root": Path("x"), "context": None, "namespace": None, "kubeconfig": None, option: "c"}
    with pytest.raises(InvalidRun, match=f"--workspace: is a folder on this machine and --{option} means a cluster"):
        where.choose(**given)


def test_commands_to_type_name_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["alignctl"])
    assert Place("a b", "n").command("resume", "r") == "alignctl resume --context 'a b' -n n --run r"
    monkeypatch.setattr(sys, "argv", ["kubectl-align"])
    assert Place().command("status --watch", "r") == "kubectl align status --watch --run r"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["logs", "--pod", "3"], "--pod: is for runs in a cluster"),
        (["stop", "--run", "x"], "--run: is for runs in a cluster"),
        (["resume"], "a run in a workspace continues with: alignctl run FILE --workspace runs"),
        (["retry", "x"], "a run in a workspace tries again with: alignctl run FILE --workspace runs"),
        (["retry", "x", "--from", "a"], "tries again with: alignctl run FILE --anew a --workspace runs"),
        (["rerun", "x"], "tries again with: alignctl run FILE --anew '*' --workspace runs"),
    ],
)
def test_what_a_workspace_has_not(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["alignctl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert line in capsys.readouterr().err


def test_without_the_package_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.setitem(sys.modules, "kubernetes.client", None)
    monkeypatch.setattr(sys, "argv", ["kubectl-align", "status"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "pip install 'distributed-llm-alignment[cluster]'" in capsys.readouterr().err


# ---------------------------------------------------------------- kubeconfigs


def kubeconfig(folder: Path, **document: Any) -> Path:
    import json

    default = {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
            {"name": "two", "context": {"cluster": "c", "user": "u"}},
        ],
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps({**default, **document}))
    return path


def connect(**place: Any) -> tuple[Any, str]:
    pytest.importorskip("kubernetes")
    from controller.commands.cluster.kubeconfig import connect

    return connect(Place(**place))


def test_the_namespace_is_the_options_else_the_contexts_else_default(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path)
    assert connect(kubeconfig=path, context="one")[1] == "team"
    assert connect(kubeconfig=path, context="two")[1] == "default"
    assert connect(kubeconfig=path, context="one", namespace="n")[1] == "n"
    assert connect(kubeconfig=kubeconfig(tmp_path, **{"current-context": "one"}))[1] == "team"


PLUGIN = {"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never"}


def test_credentials_come_from_a_program(tmp_path: Path) -> None:
    answer = '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "made"}}'
    user = {"exec": {**PLUGIN, "command": "echo", "args": [answer]}}
    api, _ = connect(kubeconfig=kubeconfig(tmp_path, users=[{"name": "u", "user": user}]), context="one")
    assert api.configuration.api_key["BearerToken"] == "Bearer made"


def test_a_program_that_gives_no_credentials_is_named(tmp_path: Path) -> None:
    user = {"exec": {**PLUGIN, "command": "sh", "args": ["-c", "echo log in first >&2; exit 3"]}}
    with pytest.raises(ClusterError, match=r"no credentials for context one: exec: process returned 3\. log in first"):
        connect(kubeconfig=kubeconfig(tmp_path, users=[{"name": "u", "user": user}]), context="one")


def test_bad_kubeconfigs_get_one_line(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path)
    with pytest.raises(InvalidRun, match=r"no context \"on\" in .*; contexts are: one, two \(did you mean one\?\)"):
        connect(kubeconfig=path, context="on")
    with pytest.raises(InvalidRun, match="has no current context: name one with --context; contexts are: one, two"):
        connect(kubeconfig=path)
    with pytest.raises(InvalidRun, match="no such kubeconfig"):
        connect(kubeconfig=tmp_path / "none")
    for garbage in ("", "[]", "a: [", "just words", '{"contexts": [1]}'):
        path.write_text(garbage)
        with pytest.raises(InvalidRun) as found:
            connect(kubeconfig=path, context="one")
        assert str(path) in str(found.value)


# ---------------------------------------------------------------- errors

NOT_FOUND = '{"kind": "Status", "message": "alignmentruns.alignment.dev \\"x\\" not found"}'
REFUSALS = {
    "credentials": ((401, "Unauthorized", "{}"), "S does not accept your credentials", False),
    "rights": ((403, "Forbidden", '{"message": "User \\"u\\" cannot\\n list"}'), 'not allowed: User "u" cannot list', False),
    "no CRD": ((404, "Not Found", "404 page not found\n"), "S knows no AlignmentRuns: install the operator", False),
    "no such object": ((404, "Not Found", NOT_FOUND), 'S: alignmentruns.alignment.dev "x" not found', False),
    "a proxy's words": ((502, "Bad Gateway", "<html>"), "S: Bad Gateway", True),
    "too many": ((429, "Too Many Requests", '{"message": "storage is (re)initializing"}'), "S: storage is", True),
    "TLS": (
        (0, "SSLError\n[SSL: X] certificate verify failed: self-signed certificate (_ssl.c:1)", None),
        "cannot reach S: self-signed certificate", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    (code, reason, body), text, passing = REFUSALS[name]
    error = refused("S", code, reason, body)
    assert str(error).startswith(text)
    assert "\n" not in str(error)
    assert error.passing == passing


def test_nobody_answers() -> None:
    error = unreachable("S", "HTTPSConnection(host='h', port=1): Failed to establish: [Errno 111] Connection refused")
    assert (str(error), error.passing) == ("cannot reach S: Connection refused", True)
    assert str(unreachable("S", "")) == "cannot reach S: no answer"


class Away:
    """A cluster that fails some times, then answers."""

    def __init__(self, *errors: ClusterError) -> None:
        self.errors = list(errors)
        self.renewals = 0

    def renew(self) -> None:
        self.renewals += 1

    def ask(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_patience(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def ask(away: Away, known: bool = True) -> str:
        return patience.patiently(away, away.ask, known, lambda: now[0])  # type: ignore[arg-type]

    down, expired = unreachable("S", "refused"), refused("S", 401, "", None)
    assert ask(Away(down)) == "answer"
    assert capsys.readouterr().err == ""
    assert ask(Away(refused("S", 503, "away", None), down, down)) == "answer"
    assert capsys.readouterr().err == "cannot reach S: refused; trying again\n"
    renewed = Away(expired)
    assert (ask(renewed), renewed.renewals) == ("answer", 1)
    for hopeless, known in (
        (Away(expired, expired), True),
        (Away(refused("S", 403, "", None)), True),
        (Away(down), False),
    ):
        with pytest.raises(ClusterError):
            ask(hopeless, known)
    with pytest.raises(ClusterError):
        ask(Away(*[down] * 1000))
    assert now[0] == pytest.approx(patience.PATIENCE_SECONDS, abs=10)
