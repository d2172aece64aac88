"""What is measured of served teachers: on the page that Prometheus reads of a real phase, and in its own record."""

import json
import urllib.request

import pytest
from finished import lines
from prometheus_client.parser import text_string_to_metric_families
from served import serving

from trainers import meter
from trainers.metrics import ANSWER_BUCKETS, METRICS, PREFIX
from trainers.synthetic import generate

NAMES = ("maths", "chat")


@pytest.fixture(scope="module")
def servers(louder):
    with serving(louder(8), name="loud") as loud, serving(louder(3), name="quiet", delay=0.05) as quiet:
        yield loud, quiet


@pytest.fixture
def page(monkeypatch):
    """The newest page of the phase that runs, read at each of its steps."""
    found, log = {}, meter.Meter.log

    def and_look(self, step, **values):
        log(self, step, **values)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            found[step] = answer.read().decode()

    monkeypatch.setattr(meter.Meter, "log", and_look)
    return found


def spec_for(servers, student, folder, **changes):
    rows = [
        {"prompt": r["prompt"], "teacher_response": r["response"], "reward": 1.0, "teacher": NAMES[i % 4 == 0]}
        for i, r in enumerate(generate("letters", "demonstrations", 32, 0))
    ]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = [
        {"name": name, "url": server.url, "servedAs": server.name, "topK": 16, "weight": weight}
        for name, server, weight in zip(NAMES, servers, (1, 3), strict=True)
    ]
    return {
        "teachers": teachers,
        "student": {"source": str(student)},
        "traces": {"files": str(folder / "traces.jsonl")},
        "weighting": {"mode": "none"},
        "onPolicyFraction": 0,
        "maxLength": 48,
        "batchSize": 16,
        "duration": {"maxSteps": 2},
        "tracking": {"logEvery": 1},
    } | changes


def series(text: str, name: str) -> dict[tuple[str, ...], float]:
    """By teacher, and by bucket where there are some."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == PREFIX + name:
                found[tuple(sample.labels[key] for key in ("teacher", "le") if key in sample.labels)] = sample.value
    return found


def test_answers_retries_and_shares_of_the_loss_by_teacher(run_phase, servers, tiny_model_dir, tmp_path, page):
    asked = [len(server.asked) for server in servers]
    servers[1].failures += [503, 503]
    assert run_phase("distill", spec_for(servers, tiny_model_dir, tmp_path), None, tmp_path / "run" / "distill")[0] == 0
    last = page[2]
    answers = series(last, "teacher_answer_seconds_count")
    for name, server, before in zip(NAMES, servers, asked, strict=True):
        # Beside what was posted it was asked which models it has; what it refused is no answer.
        assert answers[name,] == len(server.asked) - before + 1 - (2 if name == "chat" else 0)
    retries = series(last, "teacher_retries_total")
    assert retries == {("maths",): 0, ("chat",): 2}
    assert series(last, "teacher_answer_seconds_sum")["chat",] >= 0.05 * answers["chat",], "its answers take that long"
    for line in lines(tmp_path / "run" / "distill"):
        shares = series(page[line["step"]], "teacher_loss_ratio")
        assert shares == {(name,): pytest.approx(line[f"loss_share_{name}"]) for name in NAMES}
        assert sum(shares.values()) == pytest.approx(1)
        assert not [key for key in line if key.startswith("loss_of_")]


def test_the_share_is_that_of_the_teachers_rows(run_phase, servers, tiny_model_dir, tmp_path):
    """A teacher with all the weight has nearly all the loss; alone its loss is the step's."""
    spec = spec_for(servers, tiny_model_dir, tmp_path)
    spec["teachers"][1]["weight"] = 1e6
    assert run_phase("distill", spec, None, tmp_path / "run" / "distill")[0] == 0
    assert lines(tmp_path / "run" / "distill")[0]["loss_share_chat"] == pytest.approx(1, abs=1e-4)


def test_one_teacher_has_no_share(run_phase, servers, tiny_model_dir, tmp_path, page):
    spec = spec_for(servers, tiny_model_dir, tmp_path)
    del spec["teachers"]
    spec["teacher"] = {"url": servers[0].url, "servedAs": "loud", "topK": 16}
    assert run_phase("distill", spec, None, tmp_path / "run" / "distill")[0] == 0
    assert series(page[2], "teacher_loss_ratio") == {}
    assert series(page[2], "teacher_answer_seconds_count")["teacher",] > 16
    assert not [key for key in lines(tmp_path / "run" / "distill")[0] if key.startswith("loss_share")]


def test_a_phase_without_one_has_no_series_of_them(run_phase, tiny_model_dir, tmp_path, page):
    spec = {
        "model": {"source": str(tiny_model_dir)},
        "data": {"train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 8}}], "maxLength": 48},
        "duration": {"maxSteps": 1},
    }
    assert run_phase("sft", spec, None, tmp_path / "run" / "sft")[0] == 0
    assert all(series(page[1], name) == {} for name in ("teacher_answer_seconds_count", "teacher_retries_total"))


def test_labels_have_few_values():
    """A phase has sixteen teachers at most, by its own schema, and each a bucket for each of these."""
    own = [metric for metric in METRICS if "teacher" in metric.labels]
    assert len(own) == 3
    assert len(ANSWER_BUCKETS) < 12
