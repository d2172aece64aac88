"""What a bucket of a real S3 server holds, as `alignctl runs` and `alignctl history` tell it."""

import json
import sys

import pytest
import remote_store
from remote_store import Bucket

from controller.cli import main
from controller.commands.history import PAGE, history_command
from controller.commands.runs import runs_command
from trainers.contract import Artifact, Result

server, bucket = remote_store.server, remote_store.bucket


def test_runs_of_a_bucket(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    """As the same files in a folder; a run that has left something, one that has it set aside, and what is no run's."""
    made = {"model": Artifact(kind="model", path="model", digest="a", size=2_500_000)}
    result = Result(
        run="helpful", phase="sft", type="sft", digest="d" * 64, artifact_digest="a" * 64, steps=40, seconds=65.0,
        artifacts=made, finished_at="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    for folder in ("helpful/sft", f"older/.history/sft-{'d' * 16}", "older/sft"):
        (bucket.path / folder).mkdir(parents=True)
        (bucket.path / folder / "result.json").write_text(json.dumps(result.document()))
    (bucket.path / "notes.txt").write_text("nobody's")
    runs_command(str(bucket.path), None)
    told = capsys.readouterr().out
    assert "helpful" in told
    assert "older" in told
    runs_command(bucket.uri, None)
    assert capsys.readouterr().out == told
    history_command(bucket.uri)
    assert "helpful" in (bucket.path / PAGE).read_text()


NOWHERE = "s3://no-such-bucket"
REFUSED = {
    ("runs", "--workspace", NOWHERE): f"--workspace {NOWHERE}: The specified bucket does not exist.",
    (
        "runs",
        "--workspace",
        f"{NOWHERE}/a/prefix",
    ): f"--workspace {NOWHERE}/a/prefix: The specified bucket does not exist.",
    ("history", "--workspace", NOWHERE): f"--workspace {NOWHERE}: The specified bucket does not exist.",
    ("runs", NOWHERE): f"RUN {NOWHERE}: is no run's name; for what is there say --workspace {NOWHERE}",
}


def test_a_bucket_that_is_not_there_is_no_empty_one(
    bucket: Bucket, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_command(bucket.uri, None)
    assert capsys.readouterr().out == f"{bucket.uri} holds nothing of any run\n"
    for arguments, said in REFUSED.items():
        monkeypatch.setattr(sys, "argv", ["alignctl", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}")
