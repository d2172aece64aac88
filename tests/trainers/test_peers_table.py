"""What `make bench` prints and writes, from figures given; it is not run here."""

import sys
from pathlib import Path

import pytest

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


def rounds(*seconds, loss=2.0):
    """A round of four steps of 100 tokens for each number of seconds that a step takes, the first two ten times as long."""
    return [
        {
            "marks": [[s * 10, s * 20, 100], [s * 20, s * 40, 200], [s * 21, s * 42, 300], [s * 22, s * 44, 400]],
            "loss": loss, "began": [0.0, 0.0], "imports": [3.0, 3.0], "peak": 500.0,
            "parts": [{"forward_backward": 9.0}] * 2 + [{"forward_backward": 3.0, "optimizer": 1.0}] * 2,
        }
        for s in seconds
    ]  # fmt: skip


def test_a_line_has_medians_spread_ratio_and_split_without_the_first_steps(peers):
    table = peers("table")
    sides = {
        "ours": table.Side(rounds(1, 2, 4)),
        "trl": table.Side(rounds(4, 4, 4)),
        "trl grouped": table.Side(rounds(2, 2, 2)),
    }
    cells = table.Work("sft", 8, "cpu", sides).line().split(" | ")
    assert cells[:4] == ["| SFT", "8", "50 (25–100)", "25 (25–25) / 50 (50–50)"]
    assert cells[4:6] == ["**1.00**", "1.00"]
    assert cells[7] == "23.0 / 23.0"
    assert cells[8] == "forward_backward 0.75, optimizer 0.25 |"


def test_it_says_where_the_peer_wins_and_a_gpu_is_measured_by_the_clock(peers):
    table = peers("table")
    work = table.Work("dpo", 8, "cuda", {"ours": table.Side(rounds(2)), "trl": table.Side(rounds(1))})
    assert "25 (25–25) | 50 (50–50) | **0.50** (the peer wins)" in work.line()
    assert "tokens per second" in table.render([work], "cuda")
    assert "tokens per CPU-second" in table.render([work], "cpu")


def test_first_losses_must_agree(peers):
    main, table = peers("compared"), peers("table")
    same = {"ours": table.Side(rounds(1, loss=9.05308)), "trl": table.Side(rounds(1, loss=9.05309))}
    main._check(table.Work("sft", 8, "cpu", same), "cpu")
    other = same | {"trl": table.Side(rounds(1, loss=9.06))}
    with pytest.raises(SystemExit, match="first step's losses differ"):
        main._check(table.Work("sft", 8, "cpu", other), "cpu")
    main._check(table.Work("ppo", 8, "cpu", other), "cpu")  # what is drawn at random is another loss


def test_arguments_say_what_there_is(peers, capsys):
    main = peers("compared")
    assert main.parsed(["--only", "sft,ppo", "--batches", "8"]).only == ["sft", "ppo"]
    assert main.parsed([]).batches == [8, 32]
    with pytest.raises(SystemExit):
        main.parsed(["--only", "grpo"])
    assert "grpo: there are sft, reward, dpo, traces, samples, ppo" in capsys.readouterr().err


def test_the_page_has_the_place_that_is_written_into_and_a_table_in_it(peers):
    table = peers("table")
    page = (ROOT / "docs/benchmarks.md").read_text()
    begin = table.BEGIN.format("bench")
    assert page.count(begin) == page.count(table.END) == 1
    made = page.partition(begin)[2].partition(table.END)[0]
    assert table.HEAD[0] in made and "python benchmarks/peers" in made
    assert table.spliced(page, "bench", made) == page
    with pytest.raises(ValueError, match="has no lines"):
        table.spliced(page, "bench-other", made)
