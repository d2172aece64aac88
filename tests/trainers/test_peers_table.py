"""What `make bench` prints and writes, from figures given; and that it bears a side that fails. TRL is not run here."""

import json
import sys
from pathlib import Path

import psutil
import pytest
from cluster.processes import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def peers():
    """The modules of benchmarks/peers, by name."""
    from importlib import import_module

    sys.path.insert(0, str(ROOT / "benchmarks/peers"))
    try:
        yield import_module
    finally:
        sys.path.remove(str(ROOT / "benchmarks/peers"))


def rounds(*seconds, losses=(2.0, 1.9, 1.8, 1.7), peak=500.0):
    """A round of four steps of 100 tokens for each number of seconds that a step takes, the first two ten times as long.

    The clock takes twice as long as the processor.
    """
    return [
        {
            "marks": [[s * 10, s * 20, 100], [s * 20, s * 40, 200], [s * 21, s * 42, 300], [s * 22, s * 44, 400]],
            "losses": list(losses), "began": [0.0, 0.0], "imports": [3.0, 6.0], "held": 450.0, "peak": peak,
            "parts": [{"update": 9.0}] * 2 + [{"update": 3.0, "sampling": 1.0}] * 2,
        }
        for s in seconds
    ]  # fmt: skip


def work(peers, kind="sft", roofs=None, **sides):
    figures = peers("figures")
    named = {name.replace("_", " "): figures.Side(found) for name, found in sides.items()}
    return figures.Work(kind, 8, named, roofs or {})


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_medians_spread_and_ratios_to_the_best_without_the_first_steps(peers):
    found = work(peers, ours=rounds(1, 2, 4), trl=rounds(4, 4, 4), trl_grouped=rounds(2, 2, 2))
    (line,) = peers("table").speed(found, 0)
    assert cells(line)[2:5] == ["50 (25–100)", "25 (25–25) / 50 (50–50) grouped", "**1.00** (0.50–2.00)"]
    assert cells(line)[5:] == ["25 (12–50)", "25 (25–25)", "**1.00** (0.50–2.00)"]


def test_costs_are_those_of_the_best_of_the_peer(peers):
    found = work(peers, ours=rounds(1), trl=rounds(4, peak=1.0), trl_grouped=rounds(2, peak=700.0))
    line = cells(peers("table").costs(found, 0))
    assert line[0] == "SFT grouped"
    assert line[2:5] == ["500 / 700", "13.0 / 23.0", "26.0 / 46.0"]
    assert line[5] == "update 0.75, sampling 0.25"


def test_the_roof_is_a_row_beneath_the_figures_that_it_is_above(peers):
    table, roofs = peers("table"), {"MKL": 200.0, "oneDNN": 400.0}
    _, line = table.speed(work(peers, roofs=roofs, ours=rounds(1), trl=rounds(4)), 0)
    assert cells(line)[:4] == ["SFT, the roof", "8", "400 (oneDNN)", "200 (MKL)"]
    sampled = peers("figures").Sampled(
        16, "varied", {"ours": [[300.0, 150.0, 9]], "generate": [[50.0, 40.0, 9]]}, roofs
    )
    line, roof = table.sampling(sampled, 0)
    assert cells(line) == ["16", "varied", "300 (300–300)", "50 (50–50)", "**6.00** (6.00–6.00)", "150 (150–150)",
                           "40 (40–40)", "**3.75** (3.75–3.75)", "0.75 / 0.25"]  # fmt: skip
    assert cells(roof)[:4] == ["16", "varied, the roof", "400 (oneDNN)", "200 (MKL)"]
    assert len(cells(roof)) == len(cells(line))
    by_clock = cells(table.sampling(sampled, 1)[1])
    assert by_clock[5:7] == ["400 (oneDNN)", "200 (MKL)"]


def test_it_says_where_the_peer_wins(peers):
    table, figures = peers("table"), peers("figures")
    behind = work(peers, "dpo", ours=rounds(2, peak=600.0), trl=rounds(1))
    sampled = figures.Sampled(
        1, "uniform", {"ours": [[90.0, 80.0, 9]], "generate": [[100.0, 60.0, 9]]}, {"MKL": 1000.0}
    )
    text = table.render([behind], [sampled], "cpu")
    assert "**0.50** (0.50–0.50) (the peer wins)" in text
    said = text.rpartition("Where the peer wins: ")[2]
    for one in (
        "DPO at 8: tokens per CPU-second, 0.50 of",
        "DPO at 8: peak memory, 1.20 times",
        "1 rows, uniform: tokens per CPU",
    ):
        assert one in said
    assert "uniform: tokens per second" not in said
    assert table.render([work(peers, ours=rounds(1), trl=rounds(2))], [], "cpu").endswith("nowhere in these tables.")


def test_the_losses_of_all_steps_must_agree(peers):
    tasks, failed = peers("tasks"), peers("workers").FailedError
    near = rounds(1, losses=(2.0, 1.9, 1.80001, 1.7))
    tasks.check(work(peers, ours=rounds(1), trl=near, trl_grouped=rounds(1, losses=(5, 5, 5, 5))), "cpu")
    apart = rounds(1, losses=(2.0, 1.9, 1.81, 1.7))
    with pytest.raises(failed, match=r"the steps' losses differ by 5\.5e-03"):
        tasks.check(work(peers, ours=rounds(1), trl=rounds(1), trl_padding_free=apart), "cpu")
    with pytest.raises(failed, match="losses differ by nan"):
        tasks.check(work(peers, ours=rounds(1, losses=(2.0, float("nan"), 1.8, 1.7)), trl=rounds(1)), "cpu")
    tasks.check(work(peers, "ppo", ours=rounds(1), trl=apart), "cpu")  # what is drawn at random is another loss
    fewer = rounds(1)
    fewer[0]["marks"][-1][2] = 399
    with pytest.raises(failed, match="not had the same tokens"):
        tasks.check(work(peers, ours=rounds(1), trl=fewer), "cpu")


def test_moments_count_for_the_innermost_part(peers, monkeypatch):
    split = peers("split")
    now = iter(range(100))
    monkeypatch.setattr(split.Split, "_now", lambda _: float(next(now)))
    found = split.Split("cpu")  # 0
    with found.part("update"), found.part("sampling"):  # begin at 1 and 2, end at 3 and 4
        pass
    found.turn("scoring")  # 5
    assert found.taken() == {"other": 2.0, "update": 2.0, "sampling": 1.0, "scoring": 1.0}  # 6
    assert found.taken() == {"scoring": 1.0}


def test_what_is_watched_of_a_step_is_there(peers):
    """The names by which ours.py finds sampling and the teacher's pass."""
    from trainers.core import rollouts
    from trainers.phases.distill import train

    assert callable(rollouts.own_responses)
    assert callable(train.hidden_states)


SIDE = """
import os
import signal

def ready(job):
    pass

def run(job):
    held = bytearray(job["megabytes"] * 2**20)
    if job["kind"] == "raises":
        raise ValueError("no such thing")
    if job["kind"] == "ends":
        os._exit(3)
    if job["kind"] == "stays":
        with open(job["mark"], "w") as mark:
            mark.write(f"{os.getpid()}\\n")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pause()
    return {"kind": job["kind"], "held_bytes": len(held)}
"""


def test_a_side_that_fails_or_ends_is_told_and_the_next_job_is_done(peers, tmp_path):
    (tmp_path / "made_up.py").write_text(SIDE)
    workers = peers("workers")
    worker = workers.Worker("made_up", sys.executable, str(tmp_path), 1)
    try:
        for kind, said in (("raises", "ValueError: no such thing"), ("ends", "its process ended with 3")):
            with pytest.raises(workers.FailedError, match=said):
                worker.do({"kind": kind, "megabytes": 0})
        found = worker.do({"kind": "goes well", "megabytes": 64})
        assert found["kind"] == "goes well"
        assert 60 <= found["peak"] < 80
    finally:
        worker.close()


def test_a_job_ends_with_the_worker_that_it_was_forked_from(peers, tmp_path):
    (tmp_path / "made_up.py").write_text(SIDE)
    mark = tmp_path / "mark"
    workers = peers("workers")
    worker = workers.Worker("made_up", sys.executable, str(tmp_path), 1)
    worker.process.stdin.write(json.dumps({"kind": "stays", "megabytes": 0, "mark": str(mark)}) + "\n")
    worker.process.stdin.flush()
    wait_for(lambda: mark.exists() and mark.read_text().endswith("\n"), 60, "the job begins")
    job = psutil.Process(int(mark.read_text()))
    worker.process.kill()
    wait_for(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE, 60, "the job ends")
    worker.close()


def test_a_row_that_fails_leaves_the_others_and_what_is_done_is_kept(peers, tmp_path):
    compared, tasks, kept = peers("compared"), peers("tasks"), peers("kept")
    how = tasks.How("cpu", 1, 8, 3, tmp_path)
    given = compared.parsed(["--only", "ppo,reward", "--batches", "8"])
    rows = kept.Kept(tmp_path / "rows.jsonl", {"code": "a"}, resumes=True)
    rows.add("reward 8", {"rounds": {"ours": rounds(1), "trl": rounds(2)}})
    done, failed = compared.compare(given, how, NoPeer(peers), rows)
    assert failed == ["ppo 8"]
    assert [row.kind for row in done] == ["reward"]


class NoPeer:
    def __init__(self, peers):
        self.error = peers("workers").FailedError

    def do(self, name, job):
        raise self.error(f"{name} is not there")


def test_rows_of_other_settings_and_torn_lines_are_not_taken(peers, tmp_path):
    kept = peers("kept").Kept
    file = tmp_path / "rows.jsonl"
    kept(file, {"code": "a"}, resumes=True).add("sft 8", {"rounds": {}})
    with file.open("a") as torn:
        torn.write('{"name": "dpo 8"')
    assert kept(file, {"code": "a"}, resumes=True).row("sft 8") == {"rounds": {}}
    assert kept(file, {"code": "a"}, resumes=True).row("dpo 8") is None
    assert kept(file, {"code": "b"}, resumes=True).row("sft 8") is None
    anew = kept(file, {"code": "a"}, resumes=False)
    assert anew.row("sft 8") is None
    anew.add("ppo 8", {"rounds": {"ours": []}})
    rows = kept(file, {"code": "a"}, resumes=True)
    assert rows.row("sft 8") == {"rounds": {}}, "what is measured anew takes nothing away"
    assert rows.row("ppo 8") == {"rounds": {"ours": []}}, "behind a torn line"
    rows.add("sft 8", {"rounds": {"ours": [1]}})
    assert rows.row("sft 8") == {"rounds": {"ours": [1]}}, "the newest"


@pytest.mark.parametrize(
    ("words", "failed", "written"),
    [
        ([], [], True), (["--resume"], [], True), (["--rounds", "2"], [], True),
        (["--only", "sft"], [], False), (["--rounds", "1"], [], False), (["--batches", "8"], [], False),
        (["--steps", "5"], [], False), (["--size", "tiny"], [], False), ([], ["ppo 8"], False),
    ],
)  # fmt: skip
def test_the_page_is_written_by_a_whole_run_alone(peers, monkeypatch, tmp_path, words, failed, written):
    compared = peers("compared")
    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- what follows is written by make bench -->\nold\n<!-- until here -->\n")
    monkeypatch.setattr(compared, "PAGE", page)
    compared._publish(compared.parsed([*words, "--write", "bench"]), "new", failed)
    assert ("new" in page.read_text(), "old" in page.read_text()) == (written, not written)


def test_arguments_say_what_there_is(peers, capsys):
    compared = peers("compared")
    assert compared.parsed(["--only", "sft,ppo", "--batches", "8"]).only == ["sft", "ppo"]
    assert compared.parsed([]).batches == [8, 32]
    for words, said in (
        (["--only", "grpo"], "grpo: there are sft, reward, dpo, traces, samples, ppo, sampling"),
        (["--steps", "2"], "--steps 2: at least 3, since the first 2 are left out"),
    ):
        with pytest.raises(SystemExit):
            compared.parsed(words)
        assert said in capsys.readouterr().err


def test_all_that_is_asked_for_is_a_row(peers):
    tasks = peers("tasks")
    names = [task.name for task in tasks.tasks(list(tasks.KINDS), [8, 32], [1, 16, 64])]
    assert len(names) == len(set(names)) == 6 * 2 + 3 * 2
    assert {"sft 8", "ppo 32", "sampling 64 varied"} <= set(names)


def test_the_page_has_the_place_that_is_written_into_and_the_tables_in_it(peers):
    table = peers("table")
    page = (ROOT / "docs/benchmarks.md").read_text()
    begin = table.BEGIN.format("bench")
    assert page.count(begin) == page.count(table.END) == 1
    made = page.partition(begin)[2].partition(table.END)[0]
    for head in (table.SPEED, table.COSTS, table.SAMPLING):
        assert f"| {' | '.join(head)} |" in made
    assert "python benchmarks/peers" in made
    assert "Where the peer wins: " in made
    assert table.spliced(page, "bench", made) == page
    with pytest.raises(ValueError, match="has no lines"):
        table.spliced(page, "bench-other", made)


def test_other_code_is_another_row(peers, tmp_path):
    code, file = peers("kept").code, tmp_path / "trainers/core/step.py"
    file.parent.mkdir(parents=True)
    file.write_text("a = 1")
    before = code(tmp_path)
    assert code(tmp_path) == before
    file.write_text("a = 2")
    assert code(tmp_path) != before
