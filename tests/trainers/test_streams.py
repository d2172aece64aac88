"""Datasets that are streamed: the rows of a download, each asked for once, in an order that no interruption changes."""

import itertools
import json
import os
import pickle
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, fake_hub
from pydantic import ValidationError

from trainers.contract import BadInput, Infrastructure
from trainers.core import hub as client
from trainers.core import streams
from trainers.core.order import BatchOrder
from trainers.core.sources import open_source, raw_rows
from trainers.core.streams import Streamed
from trainers.spec import DataSource, HubDataset, TrainData

SHARDS, ROWS = 6, 50
ALL = [
    {"prompt": f"{i}: what is it? \u2028", "response": str(i), "n": i / 7, "tags": ["a", None] if i % 3 else []}
    for i in range(SHARDS * ROWS)
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake hub in the place of the real one, for `datasets` too, whose blocks are small and which nobody waits for."""
    import datasets
    from huggingface_hub import constants

    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
        monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
        monkeypatch.setattr(streams, "BLOCK", 16)
        yield server


@pytest.fixture(params=["parquet", "jsonl"])
def dataset(request, hub: FakeHub, tmp_path: Path) -> HubDataset:
    folder = tmp_path / "repo"
    folder.mkdir()
    for i in range(SHARDS):
        rows = ALL[i * ROWS : (i + 1) * ROWS]
        if request.param == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"s{i}.parquet", row_group_size=20)
        else:
            (folder / f"s{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return HubDataset(
        name="org/rows", revision=hub.push("datasets/org/rows", folder), streaming=True, shuffle_buffer=40
    )


def read_shards(hub: FakeHub) -> list[str]:
    """Which shards were asked for, in order, each once in a row."""
    asked = [path.rsplit("/", 1)[1].split(".")[0] for path in hub.requests if "/s" in path and "/resolve/" in path]
    return [shard for shard, _ in itertools.groupby(asked)]


def test_rows_are_those_of_the_dataset_by_number_each_asked_for_once(dataset, hub, tmp_path):
    source = DataSource(hub=dataset, limit=len(ALL))
    rows = open_source(source, tmp_path, tmp_path / "cache-of-node")
    assert len(rows) == len(ALL)
    assert rows[3] == ("org/rows[train] row 4", ALL[3])
    assert set(read_shards(hub)) <= {"s0"} | ({"s1"} if "parquet" in hub.requests[-1] else set())
    some = [57, 3, 299, 120, 0]
    assert [rows[i][1] for i in some] == [ALL[i] for i in some]
    hub.failures = [503] * 100
    again = pickle.loads(pickle.dumps(rows))  # as a process beside the training gets it
    assert [again[i][1] for i in range(len(ALL))] == ALL
    assert [row for _, row in raw_rows_of(source, hub, tmp_path)] == ALL


def raw_rows_of(source, hub, tmp_path):
    hub.failures = []
    return list(raw_rows(source, tmp_path))


def test_another_process_goes_on_where_the_last_one_stood(dataset, hub, tmp_path):
    """Without a row lost or twice; it reads the shard that it stood in, or one more, and the first one's columns."""
    for last, passed_by in ((30, set()), (239, set()), (299, {"s1", "s2"})):
        hub.requests.clear()
        assert Streamed(dataset, len(ALL), tmp_path)[last][1] == ALL[last]
        assert not passed_by & set(read_shards(hub))
    rows = Streamed(dataset, len(ALL), tmp_path)
    assert [rows[i][1] for i in range(len(ALL))] == ALL
    assert len(list(tmp_path.rglob("rows-*.arrow"))) == -(-len(ALL) // 16)


def test_no_more_is_taken_than_is_shuffled_together_or_wanted(dataset, tmp_path):
    Streamed(dataset, len(ALL), tmp_path)[0]
    assert len(list(tmp_path.rglob("rows-*.arrow"))) == 3  # of 16, for the 40 of the buffer
    Streamed(dataset.model_copy(update={"shuffle_buffer": 10_000}), 64, tmp_path)[63]
    assert len(list(tmp_path.rglob("rows-*.arrow"))) == 4


def test_a_forked_process_has_a_stream_of_its_own(dataset, tmp_path, monkeypatch):
    """One that it shared would stand, for both, where either of them has read."""
    rows = Streamed(dataset, len(ALL), tmp_path)
    assert rows[20][1] == ALL[20]
    opened = []
    monkeypatch.setattr(streams.Stream, "_open", lambda self: opened.append(os.getpid()))
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            rows[100]
        os._exit(0 if opened else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_network_that_fails_is_tried_again_and_then_infrastructure(dataset, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's own client waits too
    rows = Streamed(dataset, len(ALL), tmp_path)
    assert rows[10][1] == ALL[10]
    hub.failures = [0, 503]
    assert rows[60][1] == ALL[60]
    hub.failures = [503] * 500
    with pytest.raises(Infrastructure, match=r"dataset org/rows\[train\]: the hub does not answer"):
        rows[299]
    hub.failures = []
    assert [rows[i][1] for i in range(len(ALL))] == ALL


@pytest.mark.parametrize("limit", [304, 340])
def test_a_stream_that_ends_before_its_limit_says_where(dataset, tmp_path, limit):
    rows = Streamed(dataset, limit, tmp_path)
    for _ in range(2):
        with pytest.raises(BadInput, match=rf"org/rows\[train\] ends after 300 rows, before its limit of {limit}"):
            rows[limit - 1]
    assert rows[299][1] == ALL[299]


def test_a_block_that_ends_with_the_stream_is_no_reason_to_look_again(dataset, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 50)
    rows = Streamed(dataset, 400, tmp_path)
    with pytest.raises(BadInput, match="ends after 300 rows"):
        rows[350]
    hub.failures = [503] * 100
    with pytest.raises(BadInput, match="ends after 300 rows"):
        Streamed(dataset, 400, tmp_path)[350]


def test_a_shard_that_is_damaged_is_bad_input(hub, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "s0.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    commit = hub.push("datasets/org/bad", tmp_path / "repo")
    with pytest.raises(BadInput, match=r"dataset org/bad\[train\]: "):
        Streamed(HubDataset(name="org/bad", revision=commit, streaming=True), 10, tmp_path)[0]


def test_a_pass_is_shuffled_within_its_windows_alone_and_each_in_another_way():
    order = BatchOrder(100, 7, 3, None, seed=5, window=32)
    found = np.concatenate([order.indices(step) for step in range(order.total_steps)])
    passes = found.reshape(3, 100)
    for one in passes:
        for first in range(0, 100, 32):
            window = one[first : first + 32]
            assert sorted(window) == list(range(first, min(first + 32, 100)))
            assert (np.diff(window) < 0).any()
    assert len({tuple(one) for one in passes}) == 3
    other = BatchOrder(100, 7, 3, None, seed=6, window=32)
    assert other.indices(0) != order.indices(0)
    assert BatchOrder(100, 7, 3, None, seed=5, window=32).indices(20) == order.indices(20)


@pytest.mark.parametrize(("source", "words"), [
    ({"hub": {"name": "a/b", "streaming": True}}, "limit is missing: how many rows a streamed dataset has"),
    ({"hub": {"name": "a/b", "streaming": True, "split": "train[:10]"}, "limit": 5}, "a stream cannot be cut before"),
    ({"hub": {"name": "a/b", "streaming": True, "split": "train+test"}, "limit": 5}, "a stream cannot be joined before"),
])  # fmt: skip
def test_what_a_stream_cannot_do_is_refused(source, words):
    with pytest.raises(ValidationError, match=words):
        DataSource.model_validate(source)


@pytest.mark.parametrize("more", [{"epochs": 2}, {"weight": 1}, None])
def test_a_stream_is_not_mixed(more):
    stream = {"hub": {"name": "a/b", "streaming": True}, "limit": 5}
    train = [stream, {"files": "d.jsonl"}] if more is None else [{**stream, **more}]
    with pytest.raises(ValidationError, match=r"train\[0\]: a streamed dataset is not mixed"):
        TrainData.model_validate({"train": train})


def test_training_on_a_stream_goes_on_as_if_it_had_never_stopped(dataset, hub, tmp_path, tiny_model_dir, run_phase):
    """Two runs of the same steps, one with a network that fails for good in the middle: the same losses."""
    data = {"train": [{"hub": dataset.document(), "limit": 160}], "maxLength": 64}
    spec = {"model": {"source": str(tiny_model_dir)}, "data": data, "duration": {"maxSteps": 12}, "batchSize": 8}
    spec["checkpoint"] = {"everySteps": 2}
    code, result = run_phase("sft", spec, {}, tmp_path / "1" / "a" / "sft", run="a")
    assert code == 0
    assert (result.data[0].rows, result.data[0].unreached) == (96, 64)
    hub.failures = []
    fail_after = SimpleNamespace(left=3)
    take = Streamed._take

    def failing(self, number):
        fail_after.left -= 1
        if not fail_after.left:
            raise Infrastructure("the network is gone")
        return take(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streamed, "_take", failing)
        assert run_phase("sft", spec, {}, tmp_path / "2" / "b" / "sft", run="b")[0] != 0
    assert run_phase("sft", spec, {}, tmp_path / "2" / "b" / "sft", run="b")[0] == 0
    lines = [
        [json.loads(line) for line in (tmp_path / run / "sft" / "metrics.jsonl").read_text().splitlines()]
        for run in ("1/a", "2/b")
    ]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
