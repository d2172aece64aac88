"""Data sets that are not held in memory: encoded as they are reached, kept on disk, the same to every step and process."""

import gzip
import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from functools import partial
from itertools import chain
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from trainers.contract import BadInput, Origins
from trainers.core import encoders, examples
from trainers.core.batch import Sequence
from trainers.core.chat import chat_format
from trainers.core.encode import Pair, preference_pairs, sft_sequences
from trainers.core.examples import Encoding, InOrder, open_examples
from trainers.core.records import packed, unpacked
from trainers.core.row_store import Fate, Record, RowStore
from trainers.core.rows import read_rows
from trainers.core.scratch import scratch_tokenizer
from trainers.phase_dir import PhaseDir
from trainers.spec import DataSource, MixedSource, RowPolicy, ScratchTokenizer

ROWS = 60


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch):
    """As if 8 rows were more than a process should hold."""
    for name in ("HELD_ROWS", "PLANNED"):
        monkeypatch.setattr(examples, name, 8)
    monkeypatch.setattr(encoders, "TASK_ROWS", 3)


@pytest.fixture
def chat(tmp_path):
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "a b c d e f g h " + " ".join(map(str, range(ROWS)))}))
    source = DataSource(files=str(tmp_path / "words.jsonl"))
    return chat_format(scratch_tokenizer(ScratchTokenizer(kind="word", train_on=(source,)), tmp_path))


class Workers:
    local_rank, rank, world, is_main = 0, 0, 1, True

    def from_main(self, make):
        return make()


def context(tmp_path, seed=0, workers=None):
    directory = PhaseDir(tmp_path / "run" / "sft")
    return SimpleNamespace(
        dir=directory,
        base_dir=tmp_path,
        seed=seed,
        workers=workers or Workers(),
        origins=Origins(program="1"),
        meter=SimpleNamespace(part=nullcontext),
    )


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def row(i, length=1):
    return {"prompt": str(i), "response": "a " * length}


def number(chat, sequence):
    return int(chat.tokenizer.decode(sequence.ids).split()[1])


def opened(ctx, chat, sources=None, length=16, **policy):
    encoding = Encoding("sft", partial(sft_sequences, chat, max_length=length, everything=False), Sequence)
    return open_examples(
        ctx, tuple(sources or [DataSource(files="d.jsonl")]), encoding, RowPolicy(**policy), "data.train"
    )


def flat(batches):
    return list(chain.from_iterable(batches))


def shown(chat, steps, of=None):
    return [[number(chat, s) for s in steps.batch(step)] for step in of or range(steps.total_steps)]


def test_steps_are_those_of_a_small_set_and_each_pass_has_every_row_once(tmp_path, chat, monkeypatch):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    large = shown(chat, opened(context(tmp_path), chat).steps(8, 2, None))
    assert [sorted(flat(large)[start : start + ROWS]) for start in (0, ROWS)] == [list(range(ROWS))] * 2
    monkeypatch.setattr(examples, "HELD_ROWS", ROWS)
    assert large == shown(chat, opened(context(tmp_path), chat).steps(8, 2, None))


def test_rows_that_cannot_be_used_leave_their_step_smaller_and_are_counted(tmp_path, chat):
    rows = [row(i) if i % 5 else row(i, 20) for i in range(ROWS)]
    rows[7] = "{"
    write(tmp_path / "d.jsonl", rows)
    steps = opened(context(tmp_path), chat, on_malformed="skip").steps(6, 1, None)
    found = shown(chat, steps)
    assert sorted(flat(found)) == [i for i in range(ROWS) if i % 5 and i != 7]
    assert len(found) == ROWS // 6 and min(map(len, found)) > 0
    (record,) = steps.records()
    assert (record.rows, record.dropped, record.skipped, record.unreached) == (47, 12, 1, 0)
    assert record.first_skipped.startswith(f"{tmp_path}/d.jsonl:8: not valid JSON")
    with pytest.raises(BadInput, match=r"d\.jsonl:8: not valid JSON"):
        shown(chat, opened(context(tmp_path), chat).steps(6, 1, None))


@pytest.mark.parametrize("usable", [0, 2])
def test_too_few_usable_rows_end_the_phase_before_its_first_step(tmp_path, chat, usable):
    """Of the first eight rows, which a small set of the same order would be."""
    rows = [row(i, 20) for i in range(ROWS)]
    for i in flat(shown(chat, opened_elsewhere(tmp_path, chat, list(map(row, range(ROWS)))).steps(8, 1, 1)))[:usable]:
        rows[i] = row(i)
    write(tmp_path / "d.jsonl", rows)
    said = f"only {usable} of 8 rows can be used, less than minRows 0.5" if usable else "no usable rows"
    with pytest.raises(
        BadInput, match=rf"data.train: {said}: data.train\[0\]: {usable} of 8 rows used, {8 - usable} drop"
    ):
        opened(context(tmp_path), chat).steps(8, 1, None).batch(0)
    assert opened(context(tmp_path), chat, min_rows=0.1).steps(8, 1, 1).batch(0) if usable else True


def test_nothing_is_encoded_that_no_step_reaches(tmp_path, chat):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    ctx = context(tmp_path)
    steps = opened(ctx, chat).steps(5, 1, 4)
    reached = flat(shown(chat, steps))
    (record,) = steps.records()
    assert (record.rows, record.unreached) == (20, ROWS - 20)
    assert str(record).endswith("20 of 20 rows used; 40 more were not reached")
    (table,) = (tmp_path / "run").parent.rglob("table")
    assert sorted(np.flatnonzero(np.fromfile(table, np.uint64))) == sorted(reached)


def test_a_row_is_encoded_once_whatever_starts_again(tmp_path, chat, monkeypatch):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    before = shown(chat, opened(context(tmp_path), chat).steps(8, 1, None))

    def never(self, rows):
        raise AssertionError("it is known already")

    monkeypatch.setattr(encoders.Encoder, "run", never)
    steps = opened(context(tmp_path), chat).steps(8, 1, None)
    assert shown(chat, steps, range(4, 8)) == before[4:]
    assert steps.records()[0].rows == ROWS


def test_a_resumed_run_without_the_cache_sees_the_same_rows_and_counts_all(tmp_path, chat):
    write(tmp_path / "d.jsonl", [row(i) if i % 7 else row(i, 20) for i in range(ROWS)])
    steps = opened(context(tmp_path), chat).steps(8, 2, None)
    before, counted = shown(chat, steps), steps.records()
    for first in (3, 9, steps.total_steps - 1):
        shutil.rmtree(tmp_path / ".rows")
        again = opened(context(tmp_path), chat).steps(8, 2, None)
        assert shown(chat, again, range(first, again.total_steps)) == before[first:]
        assert again.records() == counted


def test_edited_data_and_other_settings_are_not_hidden_by_the_cache(tmp_path, chat):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    first = opened(context(tmp_path), chat).everything()
    write(tmp_path / "d.jsonl", [row(ROWS - 1 - i, 2) for i in range(ROWS)])
    second = opened(context(tmp_path), chat).everything()
    assert [number(chat, s) for s in second] == [number(chat, s) for s in first[::-1]]
    assert {s.num_scored for s in first} == {2} and {s.num_scored for s in second} == {3}
    assert {s.shortened for s in opened(context(tmp_path), chat, length=5).everything()} != {0}


@pytest.mark.parametrize("held", [False, True])
def test_all_in_order_from_any_on(tmp_path, chat, monkeypatch, held):
    """For what uses each row once: a row that cannot be used has its place, and nothing in it."""
    write(tmp_path / "a.jsonl", [row(i) for i in range(20)])
    write(tmp_path / "b.jsonl", [row(i) for i in range(20, 50)])
    write(tmp_path / "c.jsonl", [row(i) if held or i % 3 else row(i, 30) for i in range(50, ROWS)])
    if held:
        monkeypatch.setattr(examples, "HELD_ROWS", 100)
    sources = [DataSource(files=f"{name}.jsonl") for name in "abc"]
    data = opened(context(tmp_path), chat, sources)
    for first in (0, 21, ROWS - 1):
        found = InOrder(data, first)
        assert len(found) == ROWS
        wanted = [[i] if held or i < 50 or i % 3 else [] for i in range(ROWS)]
        assert [[number(chat, s) for s in found[i]] for i in range(first, ROWS)] == wanted[first:]
    assert sum(record.rows for record in data.all_records()) == sum(map(len, wanted))


def test_a_damaged_or_missing_segment_is_made_again(tmp_path, chat):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    before = shown(chat, opened(context(tmp_path), chat).steps(8, 1, None))
    segments = sorted((tmp_path / ".rows").rglob("segment-*"))
    segments[0].unlink()
    segments[1].write_bytes(segments[1].read_bytes()[:-3])
    damaged = bytearray(segments[2].read_bytes())
    damaged[20] ^= 1
    segments[2].write_bytes(damaged)
    assert shown(chat, opened(context(tmp_path), chat).steps(8, 1, None)) == before


@pytest.mark.parametrize("limits", [(20, None), (None, 20)])
def test_runs_of_different_limits_share_a_cache(tmp_path, chat, limits):
    """Each reads what the other has encoded, while both have it open."""
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    sets = [opened(context(tmp_path), chat, [DataSource(files="d.jsonl", limit=limit)]) for limit in limits]
    for examples_, limit in zip(sets, limits, strict=True):
        assert [number(chat, s) for s in examples_.everything()] == list(range(limit or ROWS))
    assert len(list((tmp_path / ".rows").rglob("table"))) == 1


def test_several_sources_are_mixed_by_weight_and_by_epochs(tmp_path, chat):
    write(tmp_path / "a.jsonl", [row(i) for i in range(40)])
    write(tmp_path / "b.jsonl", [row(i) for i in range(40, 50)])
    sources = [MixedSource(files="a.jsonl", weight=3), MixedSource(files="b.jsonl", weight=1, epochs=2)]
    steps = opened(context(tmp_path), chat, sources).steps(53, 3, None)
    passes = shown(chat, steps)
    assert [len(one) for one in passes] == [53] * 3
    assert [sum(i >= 40 for i in one) for one in passes] == [13] * 3
    seen = [sum(one.count(i) for one in passes) for i in range(50)]
    assert set(seen[:40]) == {3} and set(seen[40:]) == {3, 4}


def test_records_are_what_was_put_in(chat):
    (pair,) = preference_pairs(chat, {"prompt": "a b", "chosen": "c", "rejected": "d"}, 16)
    again = unpacked(Pair, packed(pair))
    for side in ("chosen", "rejected"):
        ours, theirs = getattr(again, side), getattr(pair, side)
        assert (ours.ids.dtype, ours.scored.dtype, ours.shortened) == (theirs.ids.dtype, theirs.scored.dtype, 0)
        assert ours.ids.tolist() == theirs.ids.tolist() and ours.scored.tolist() == theirs.scored.tolist()


def test_a_writer_that_dies_leaves_nothing_that_is_believed(tmp_path, monkeypatch):
    """Before the segment has its name, and between that and the table's entry."""
    store = RowStore(tmp_path, 4)
    store.write([2], [Record(Fate.USED, [b"whole"])])
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write([1], [Record(Fate.USED, [b"half"])])
    monkeypatch.undo()
    (tmp_path / "segment-0000001").write_bytes(b"of a writer that was killed behind its name")
    again = RowStore(tmp_path, 4)
    assert [again.read(i) for i in range(4)] == [None, None, Record(Fate.USED, [b"whole"]), None]
    again.write([1], [Record(Fate.DROPPED, [])])
    assert store.read(1) == Record(Fate.DROPPED, [])


def test_small_sets_are_as_read(tmp_path, chat):
    write(tmp_path / "d.jsonl", [row(i) for i in range(8)])
    held = opened(context(tmp_path), chat)
    assert not (tmp_path / ".rows").exists()
    rows = read_rows([DataSource(files="d.jsonl")], "sft", tmp_path, RowPolicy(), "d")
    assert [number(chat, s) for s in held.everything()] == [int(r["prompt"]) for r in rows.rows]


# ---------------------------------------------------------------- processes

FORK = get_context("fork")


def _write_batches(path, ctx, chat, steps):
    path.write_text(json.dumps(shown(chat, opened(ctx, chat).steps(8, 1, None), steps)))


class Second(Workers):
    """Another process of the same node."""

    local_rank, rank, world, is_main = 1, 1, 2, False


def test_the_other_processes_of_a_node_read_what_the_first_has_encoded(tmp_path, chat, monkeypatch):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    ctx = context(tmp_path, workers=Second())
    other = FORK.Process(target=_write_batches, args=(tmp_path / "other", ctx, chat, range(8)))
    monkeypatch.setattr(encoders.Encoder, "run", None)
    other.start()
    monkeypatch.undo()
    for name in ("HELD_ROWS", "PLANNED"):
        monkeypatch.setattr(examples, name, 8)
    first = shown(chat, opened(context(tmp_path), chat).steps(8, 1, None))
    other.join(60)
    assert json.loads((tmp_path / "other").read_text()) == first


@pytest.mark.parametrize("writes", [0, 1, 5])
def test_a_killed_writer_and_its_helpers_leave_a_cache_to_go_on_from(tmp_path, chat, monkeypatch, writes):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])
    wanted = shown(
        chat, opened(context(tmp_path / "apart"), chat, [DataSource(files=str(tmp_path / "d.jsonl"))]).steps(8, 1, None)
    )
    left = FORK.Value("i", writes)
    link = os.link

    def killing(*names):
        with left.get_lock():
            left.value -= 1
            over = left.value < 0
        if over:
            os.kill(os.getpid(), signal.SIGKILL)
        link(*names)

    monkeypatch.setattr("os.link", killing)
    dying = FORK.Process(target=_write_batches, args=(tmp_path / "never", context(tmp_path), chat, range(8)))
    dying.start()
    dying.join(60)
    monkeypatch.setattr("os.link", link)
    assert dying.exitcode == -signal.SIGKILL and not (tmp_path / "never").exists()
    assert shown(chat, opened(context(tmp_path), chat).steps(8, 1, None)) == wanted


def test_two_runs_at_once_fill_one_cache(tmp_path, chat, monkeypatch):
    """In orders of their own, so that each comes to rows that the other has and has not encoded."""
    write(tmp_path / "d.jsonl", [row(i) if i % 7 else "{" for i in range(ROWS)])

    def steps(root, seed):
        source = DataSource(files=str(tmp_path / "d.jsonl"))
        return opened(context(root, seed), chat, [source], on_malformed="skip").steps(8, 1, None)

    def run(seed):
        (tmp_path / f"{seed}.json").write_text(json.dumps(shown(chat, steps(tmp_path, seed))))

    runs = [FORK.Process(target=run, args=(seed,)) for seed in (1, 2)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(60)
    assert [process.exitcode for process in runs] == [0, 0], "they end, and so do the processes that encode for them"
    found = [json.loads((tmp_path / f"{seed}.json").read_text()) for seed in (1, 2)]
    assert found == [shown(chat, steps(tmp_path / "apart", seed)) for seed in (1, 2)]
    monkeypatch.setattr(encoders.Encoder, "run", None)
    assert shown(chat, steps(tmp_path, 2)) == found[1], "all is known"


def test_helpers_end_with_the_process_that_they_help(tmp_path, chat):
    write(tmp_path / "d.jsonl", [row(i) for i in range(ROWS)])

    def begin(pids):
        steps = opened(context(tmp_path), chat).steps(8, 1, None)
        steps.batch(0)
        for child in psutil.Process().children():
            pids.put(child.pid)
        pids.put(None)
        pids.close()
        pids.join_thread()
        os.kill(os.getpid(), signal.SIGKILL)

    pids = FORK.Queue()
    process = FORK.Process(target=begin, args=(pids,))
    process.start()
    helpers = list(iter(lambda: pids.get(timeout=600), None))
    process.join(60)
    assert helpers
    gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in helpers if psutil.pid_exists(pid)], timeout=10)
    assert not alive, gone


def test_a_bad_row_that_helpers_come_to_ends_the_phase_before_its_step(tmp_path, chat, monkeypatch):
    rows = [row(i) for i in range(ROWS)]
    last = shown(chat, opened_elsewhere(tmp_path, chat, rows).steps(8, 1, None))[-1][-1]
    rows[last] = "{"
    write(tmp_path / "d.jsonl", rows)
    steps = opened(context(tmp_path), chat).steps(8, 1, None)
    with pytest.raises(BadInput, match=rf"d\.jsonl:{last + 1}: not valid JSON"):
        for _ in range(50):
            steps.batch(0)
            time.sleep(0.1)


def opened_elsewhere(tmp_path, chat, rows):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write(folder / "d.jsonl", rows)
    return opened(context(folder), chat)


def test_a_file_that_cannot_be_read_to_its_end_is_told_before_the_first_step(tmp_path, chat):
    """It was told if a step happened to draw the row at which it breaks off."""
    write(tmp_path / "d.jsonl", [row(i) for i in range(20 * ROWS)])
    whole = gzip.compress((tmp_path / "d.jsonl").read_bytes())
    (tmp_path / "d.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    torn = DataSource(files="d.jsonl.gz")
    with pytest.raises(BadInput, match=r"d\.jsonl\.gz:\d+: cannot be read"):
        opened(context(tmp_path), chat, [torn])
    opened(context(tmp_path), chat, [torn.model_copy(update={"limit": ROWS})])  # does not reach so far
    opened(context(tmp_path), chat, [torn], on_malformed="skip")
