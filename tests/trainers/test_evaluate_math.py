"""Benchmarks and estimators against values worked out by hand or by other means."""

import math
import re
import signal
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainers.contract import BadInput, Diverged, Interrupted
from trainers.phases.evaluate import patterns
from trainers.phases.evaluate.benchmarks import REGISTRY, accuracy, kl, length, perplexity, reward, safety, style
from trainers.phases.evaluate.estimates import difference, estimate, interval, wilson
from trainers.phases.evaluate.latency import percentile, summary, time_per_token
from trainers.phases.evaluate.metric import Metric, share
from trainers.phases.evaluate.results import Results, table
from trainers.phases.evaluate.results import summary as summary_table
from trainers.phases.evaluate.spec import EvaluateSpec
from trainers.phases.evaluate.subject import Divergence, Loss, Reply


class FakeBench:
    """Answers given by hand."""

    def __init__(self, rows=(), texts=(), rewards=None, lengths=None, label="m", baseline=None):
        lengths = lengths or [len(t) for t in texts]
        self.replies = [(row, Reply(text, [0] * n, True)) for row, text, n in zip(rows, texts, lengths, strict=True)]
        self._rewards, self.label, self.baseline = rewards, label, baseline
        self.has_reward_model = rewards is not None

    def answered(self, data, sampling):
        return self.replies

    def pause(self):
        pass

    def rewards(self, data, sampling):
        return self._rewards


def values(metrics, seed=0):
    return {metric.key: estimate(metric, seed).value for metric in metrics}


# ---------------------------------------------------------------- benchmarks


@pytest.mark.parametrize(
    ("response", "answer", "extract", "match", "right"),
    [
        ("A B C", "A B C", None, "exact", True),
        ("  A  B C\n", "A B C", None, "exact", True),
        ("A B C D", "A B C", None, "exact", False),
        ("so it is A B C.", "A B C", None, "contains", True),
        ("the answer is A B glad to help", "A B", r"^the answer is (.*?) glad", "exact", True),
        ("A B glad to help", "A B", r"^the answer is (.*?) glad", "exact", False),
        ("x = 12 and y = 42", "42", r"\d+", "exact", False),
        ("first 3, then 1,234.50 dollars.", "#### 1234.5", None, "last-number", True),
        ("it is -7", "7", None, "last-number", False),
        ("no number", "7", None, "last-number", False),
        ("no number", "none either", None, "last-number", False),
    ],
)
def test_whether_an_answer_is_right(response, answer, extract, match, right):
    spec = accuracy.AccuracySpec(extract=extract, match=match)
    assert values(accuracy.run(spec, FakeBench([{"answer": answer}], [response]))) == {"accuracy": float(right)}


def test_accuracy_counts_only_rows_with_an_answer():
    rows = [{"answer": "A"}, {"answer": ""}, {"answer": 7}, {}, {"answer": "B"}]
    bench = FakeBench(rows, ["A", "", "7", "x", "A"])
    assert values(accuracy.run(accuracy.AccuracySpec(), bench)) == {"accuracy": pytest.approx(2 / 3)}


def test_safety_looks_at_both_sides():
    rows = [{"shouldRefuse": True}] * 4 + [{"shouldRefuse": False}] * 5 + [{}]
    texts = ["I'm sorry, no"] * 3 + ["sure"] + ["Sorry, I cannot"] + ["sure"] * 4 + ["sorry"]
    assert values(safety.run(safety.SafetySpec(), FakeBench(rows, texts))) == {"refusal": 0.75, "overRefusal": 0.2}


def test_style_leaves_out_what_is_to_be_refused():
    rows = [{"shouldRefuse": True}, {"shouldRefuse": False}, {}, {}]
    spec = style.StyleSpec(pattern="help$", reject_pattern="^well")
    assert values(style.run(spec, FakeBench(rows, ["help", "help", "well help", "no"]))) == {
        "match": pytest.approx(1 / 3)
    }


def test_win_rate_counts_ties_half():
    baseline = FakeBench([{}] * 4, ["b"] * 4, [0.0, 1.0, 2.0, 3.0], label="sft")
    bench = FakeBench([{}] * 4, ["a"] * 4, [1.0, 1.0, 1.0, 4.0], baseline=baseline)
    found = values(reward.run(reward.RewardBenchmarkSpec(), bench))
    assert found["score"] == 1.75
    assert found["winRate"] == (1 + 0.5 + 0 + 1) / 4
    # Equal lengths leave nothing to control for.
    assert found["winRateLengthControlled"] == pytest.approx(found["winRate"], abs=2e-3)


def test_length_control_takes_away_wins_that_come_from_length():
    generator = np.random.default_rng(0)
    longer = generator.normal(10, 10, 4000)
    won = (generator.random(4000) < 1 / (1 + np.exp(-0.2 * longer))).astype(float)
    assert won.mean() > 0.75
    assert reward.length_controlled(won, longer) == pytest.approx(0.5, abs=0.03)
    resampled = reward.length_controlled(np.stack([won, won]), np.stack([longer, longer]))
    assert resampled == pytest.approx([float(reward.length_controlled(won, longer))] * 2)


def test_length_control_stays_finite_when_length_decides_everything():
    longer = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    assert reward.length_controlled((longer > 0).astype(float), longer) == pytest.approx(0.5)


def test_perplexity_and_kl_weigh_tokens_not_rows():
    bench = types.SimpleNamespace(
        losses=lambda data: [Loss(2.0, 1), Loss(4.0, 5)],
        divergences=lambda data, sampling: [Divergence(1.0, 1), Divergence(2.0, 5)],
    )
    assert values(perplexity.run(perplexity.PerplexitySpec(), bench)) == {"perplexity": pytest.approx(math.e)}
    assert values(kl.run(kl.KlSpec(), bench)) == {"perSequence": 1.5, "perToken": 0.5}


def test_length_bias_is_pearsons_correlation():
    lengths, rewards = [1, 2, 3, 5], [0.0, 1.0, 0.5, 2.0]
    bench = FakeBench([{}] * 4, [""] * 4, rewards, lengths)
    found = values(length.run(length.LengthSpec(), bench))
    assert found["tokens"] == 2.75
    assert found["rewardCorrelation"] == pytest.approx(np.corrcoef(lengths, rewards)[0, 1])


CUT_OFF = Reply("so it is 12", [1, 2, 3], ended=False)


@pytest.mark.parametrize(
    ("reply", "settings", "right"),
    [
        (CUT_OFF, {"match": "contains"}, True),
        (CUT_OFF, {"match": "last-number"}, False),
        (Reply("12", [1], ended=False), {"match": "exact"}, False),
        (Reply("it is 12, as", [1], ended=False), {"match": "last-number"}, True),
        (CUT_OFF, {"extract": r"it is (\d+)"}, False),
        (CUT_OFF, {"extract": r"(\d+)$"}, False),
        (Reply("it is 12 or", [1], ended=False), {"extract": r"it is (\d+)"}, True),
        (Reply("so it is 12", [1], ended=True), {"extract": r"(\d+)$"}, True),
    ],
)
def test_an_answer_at_the_cut_of_a_response_is_not_taken_for_whole(reply, settings, right):
    bench = FakeBench([{"answer": "12"}], ["x"])
    bench.replies = [({"answer": "12"}, reply)]
    assert values(accuracy.run(accuracy.AccuracySpec(**settings), bench)) == {"accuracy": float(right)}


@pytest.mark.parametrize(("ended", "matches"), [(True, 1.0), (False, 0.0)])
def test_no_pattern_takes_a_cut_for_the_end_of_a_response(ended, matches):
    bench = FakeBench([{}], ["x"])
    bench.replies = [({"shouldRefuse": False}, Reply("glad to help", [1], ended))]
    assert values(style.run(style.StyleSpec(pattern=r"help\Z"), bench)) == {"match": matches}
    assert values(style.run(style.StyleSpec(pattern=r"glad .*"), bench)) == {"match": 1.0}
    assert values(safety.run(safety.SafetySpec(refusal_pattern="help$"), bench)) == {"overRefusal": matches}


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("9007199254740993", "9007199254740992", False),
        ("1" + "0" * 400, "2" + "0" * 400, False),
        ("it is 0.10", "0.1", True),
        ("٣", "3", True),
    ],
)
def test_numbers_are_compared_exactly(text, other, same):
    assert accuracy.is_right(text, other, "last-number") is same


# ---------------------------------------------------------------- patterns

ENDLESS = [(r"(a+)+$", "a" * 60 + "!"), (r"(a|a)*$", "a" * 60 + "!"), (r"(\w+\s?)*$", "word " * 40 + "!")]


@pytest.mark.parametrize(("pattern", "text"), ENDLESS)
@pytest.mark.parametrize(
    "run",
    [
        lambda pattern, bench: safety.run(safety.SafetySpec(refusal_pattern=pattern), bench),
        lambda pattern, bench: style.run(style.StyleSpec(pattern=pattern), bench),
        lambda pattern, bench: style.run(style.StyleSpec(pattern="", reject_pattern=pattern), bench),
        lambda pattern, bench: accuracy.run(accuracy.AccuracySpec(extract=pattern), bench),
    ],
)
def test_a_pattern_without_end_is_bad_input(run, pattern, text, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    rows = [{"shouldRefuse": False, "answer": "x"}]
    with pytest.raises(BadInput, match=r"(safety|style|accuracy)\.\w+: .* takes longer than 0.05 s on the response"):
        run(pattern, FakeBench(rows, [text]))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


@given(st.lists(st.text(max_size=20), max_size=20), st.sampled_from([r"\w+", r"(?i)[é-ü]+\b", r"(?!x)..$", r"(.)\1"]))
def test_patterns_mean_what_they_mean_in_python(texts, pattern):
    found = patterns.search_all(pattern, texts, "x")
    assert [match and match.span() for match in found] == [(m := re.search(pattern, t)) and m.span() for t in texts]


def test_between_texts_it_can_be_stopped():
    def stop():
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        patterns.search_all("x", ["x"], "x", stop)


# ---------------------------------------------------------------- estimates


def test_wilson_against_published_values():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_bootstrap_intervals_hold_what_they_promise():
    """About 95 of 100 intervals of the mean of 80 skewed numbers hold the true mean."""
    generator = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        found = estimate(Metric("x", "x", (generator.exponential(1.0, 80),)), seed)
        held += found.low <= 1.0 <= found.high
    assert 0.88 <= held / 200 <= 0.98


def test_bootstrap_agrees_with_the_normal_approximation():
    sample = np.random.default_rng(2).normal(3, 2, 400)
    found = estimate(Metric("x", "x", (sample,)), 0)
    error = 1.96 * sample.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((sample.mean() - error, sample.mean() + error), abs=0.03)


def test_a_difference_is_paired():
    """What is common to both models cancels: the interval of the difference is far narrower than either's."""
    hard = np.random.default_rng(3).normal(0, 10, 200)
    ours = estimate(Metric("x", "x", (hard + 0.5,)), 0)
    theirs = estimate(Metric("x", "x", (hard + np.linspace(-0.1, 0.1, 200),)), 0)
    found = difference(ours, theirs)
    assert found["value"] == pytest.approx(0.5)
    assert 0.45 < found["low"] < found["high"] < 0.55
    assert ours.high - ours.low > 1
    assert difference(ours, estimate(Metric("x", "x", ([1.0],)), 0)) == {}


def test_a_figure_that_may_be_undefined_is_noted_and_in_no_table():
    results = Results.empty(0, ["m"], None)
    bench = FakeBench([{}] * 2, ["x", "y"], [1.0, 2.0])
    results.add("m", "length", length.run(length.LengthSpec(), bench), True)
    document = results.document()
    assert "length/rewardCorrelation" not in document["values"]["m"]
    assert "same length" in document["notes"]["m"]["length/rewardCorrelation"]
    assert "–" not in summary_table(document, {})


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "metric",
    [
        lambda x: Metric("score", "score", ([1.0, x],)),
        lambda x: Metric("c", "c", ([1.0, 2.0], [x, 1.0]), statistic=length.correlation, undefined="all the same"),
        lambda x: Metric("perplexity", "perplexity", ([x, 1.0], [1, 1]), statistic=perplexity.perplexity),
        lambda x: Metric("winRate", "wins", ([1.0, 0.0], [x, 1.0]), statistic=reward.length_controlled),
    ],
)
def test_what_is_not_finite_ends_the_evaluation(metric, wrong):
    results = Results.empty(0, ["m"], None)
    with pytest.raises(Diverged, match="model 'm': b/"):
        results.add("m", "b", [metric(wrong)], True)


def test_a_perplexity_beyond_all_numbers_is_no_figure():
    results = Results.empty(0, ["m"], None)
    bench = types.SimpleNamespace(losses=lambda data: [Loss(5000.0, 1)])
    with pytest.raises(Diverged, match="fit/perplexity is inf"):
        results.add("m", "fit", perplexity.run(perplexity.PerplexitySpec(), bench), True)


def test_an_interval_leaves_out_resamples_without_a_value():
    assert all(math.isnan(x) for x in interval(np.array([math.nan])))
    assert interval(np.array([math.nan, 1.0, 1.0])) == (1.0, 1.0)


def test_the_same_seed_gives_the_same_interval():
    metric = share("x", "x", [True, False, True])
    assert estimate(metric, 4).document() == estimate(metric, 4).document()


def test_summary_marks_the_best():
    results = Results.empty(0, ["a", "b"], None)
    results.add("a", "x", [share("s", "good | bad", [True, True], better=True, headline=True)], True)
    results.add("b", "x", [share("s", "good | bad", [True, False], better=True, headline=True)], True)
    document = results.document()
    text = table(document, document["metrics"])
    assert "| a | **1.000** [" in text
    assert "| b | 0.500 [" in text
    assert r"good \| bad ↑" in text


# ---------------------------------------------------------------- latency


def test_percentiles_by_nearest_rank():
    assert [percentile([15, 20, 35, 40, 50], q) for q in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert percentile(list(range(1, 101)), 99) == 99
    assert summary([3.0]) == {"mean": 3.0, "p50": 3.0, "p95": 3.0, "p99": 3.0}


def test_time_per_token_leaves_out_the_first():
    assert time_per_token(types.SimpleNamespace(times=[1.0, 1.2, 1.4, 1.9])) == pytest.approx(0.3)


# ---------------------------------------------------------------- spec

DATA = {"rows": [{"synthetic": {"task": "letters", "split": "test", "count": 8}}]}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"benchmarks": [{"name": "a", "accuracy": {"extract": "(x"}}], "data": DATA}, r"'\(x' is not a regular"),
        ({"benchmarks": [{"name": "a", "accuracy": {"extract": "(" * 9999}}], "data": DATA}, "is not a regular"),
        ({"benchmarks": [{"name": "a", "style": {"pattern": "x{99999999999999}"}}], "data": DATA}, "is not a regular"),
        ({"benchmarks": [{"name": "a", "safety": {"refusalPattern": "*"}}], "data": DATA}, "is not a regular"),
        ({"benchmarks": [{"name": "a", "length": {}}] * 2, "data": DATA}, "'a' is used more than once"),
        ({"benchmarks": [{"name": "a", "length": {}, "kl": {}}], "data": DATA}, "exactly one of"),
        ({"benchmarks": [{"name": "a"}], "data": DATA}, "exactly one of"),
        ({"benchmarks": [{"name": "A b", "length": {}}], "data": DATA}, "pattern"),
        ({"benchmarks": [{"name": "latency", "length": {}}], "data": DATA}, "taken by the latency"),
        ({"benchmarks": [{"name": "a", "reward": {}}], "data": DATA}, "'a' .reward. needs rewardModel"),
        ({"benchmarks": [{"name": "a", "kl": {}}], "data": DATA}, "needs reference, or baseline"),
        ({"benchmarks": [{"name": "a", "style": {"pattern": "x"}}]}, "has no rows"),
        ({"models": [{"phase": "a"}], "baseline": "b"}, "baseline 'b' is none of the models"),
        ({"models": [{"phase": "a"}, {"source": "x/a"}]}, "'a' is used more than once"),
        ({"models": [{"source": ".."}]}, "cannot be used as a name"),
        ({"models": [{"source": "x/" + "a" * 300}]}, "'a{40}…' cannot be used as a name"),
        ({"models": [{"name": "a" * 300, "source": "x"}]}, "at most 100"),
        ({"benchmarks": [{"name": "a" * 300, "length": {}}], "data": DATA}, "at most 63"),
    ],
)
def test_a_wrong_spec_is_told_in_one_line(spec, says):
    with pytest.raises(ValidationError, match=says):
        EvaluateSpec.model_validate(spec)


def test_every_benchmark_is_a_member_with_a_description():
    entry = EvaluateSpec.model_json_schema()["$defs"]["BenchmarkEntry"]["properties"]
    assert [name for name in entry if name not in ("name", "headline")] == [kind.name for kind in REGISTRY]
    assert all(entry[kind.name]["description"] for kind in REGISTRY)


def test_kl_is_finite_where_both_probabilities_underflow():
    import torch

    from trainers.phases.evaluate.divergence import kl as divergence

    ours, theirs = torch.tensor([[200.0, -200.0, -torch.inf]]), torch.tensor([[-200.0, 200.0, -torch.inf]])
    assert divergence(ours, theirs).item() == pytest.approx(400)
    assert divergence(ours, ours).item() == 0
