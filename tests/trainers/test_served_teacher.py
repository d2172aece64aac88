"""A teacher behind a server: the local teacher's loss within what top-k leaves out, asked ahead; whose fault a failure is."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finished import assert_same, lines, weights
from served import VllmLike, moved, serving, started, swapped, with_words

from trainers.core.batch import Sequence
from trainers.core.scratch import scratch_model
from trainers.core.served import server as calls
from trainers.core.served.server import Server
from trainers.core.served.teacher import ServedTeacher, known_to
from trainers.core.served.tokens import other_tokens, vocabulary_texts
from trainers.core.served.wire import connected
from trainers.core.top_k import bucket_logits
from trainers.phases.distill.ahead import Ahead
from trainers.phases.distill.loss import generalized_jsd, top_k_divergence
from trainers.phases.distill.streams import Streams
from trainers.spec import ScratchModel, Served

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 20}}], "maxPromptLength": 32}


@pytest.fixture(scope="module")
def vllm(louder):
    with serving(louder(8)) as found:
        yield found


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE_SECONDS", 2.0)


@pytest.fixture(scope="module")
def traces_file(tmp_path_factory) -> Path:
    from trainers.synthetic import generate

    rows = generate("letters", "demonstrations", 24, 0)
    found = [
        {"prompt": r["prompt"], "teacher_response": r["response"], "reward": float(i % 5)} for i, r in enumerate(rows)
    ]
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture(scope="module")
def spec_for(vllm, tiny_model_dir, traces_file):
    def make(teacher, **changes):
        return {
            "teacher": teacher,
            "student": {"source": str(tiny_model_dir)},
            "traces": {"files": str(traces_file)},
            "prompts": PROMPTS,
            "sampling": {"maxNewTokens": 6, "batchSize": 8},
            "maxLength": 48,
            "batchSize": 8,
            "duration": {"maxSteps": 6},
            "optim": {"lr": 1e-3},
        } | changes

    return make


def served(vllm: VllmLike, **changes):
    return {"url": vllm.url, "servedAs": vllm.name, "topK": 16, **changes}


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_tokens_of_a_served_teacher_are_the_local_teacher(run_phase, spec_for, vllm, tmp_path, beta):
    """Every step's loss, on traces and on own samples, and so the student that comes of it."""
    every = len(vllm.tokenizer)
    teachers = {"local": {"source": str(vllm.folder)}, "served": served(vllm, topK=every)}
    for name, teacher in teachers.items():
        spec = spec_for(teacher, divergenceBeta=beta)
        assert run_phase("distill", spec, None, tmp_path / name / "distill")[0] == 0
    ours, theirs = (lines(tmp_path / name / "distill") for name in teachers)
    for a, b in zip(ours, theirs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-5)
        assert b["kl"] == pytest.approx(a["kl"], rel=1e-3, abs=1e-5)
        assert b["teacher_mass"] == pytest.approx(1, abs=1e-5)
    assert [line["on_policy"] for line in theirs] == [0, 1, 0, 1, 0, 1]
    assert all(line["teacher_wait"] >= 0 for line in theirs)


def test_what_top_k_leaves_out_is_the_divergence_within_the_rest(vllm):
    """In closed form: KL = KL of the buckets + (rest of p) KL(p within the rest || q within the rest)."""
    wire = connected(Server("teacher", Served(url=vllm.url)), "tiny")
    ids = [5, 9, 7, 30, 12, 8]
    teacher = ServedTeacher(wire, 8, vllm.rows, ThreadPoolExecutor(4))
    top, logs, known = teacher.scores(
        [Sequence(np.array(ids), np.array([False, False, True, True, True, True]))], torch.device("cpu")
    )
    log_p = vllm.log_probs(ids)[1:-1].double()
    torch.manual_seed(0)
    student = torch.randn(4, vllm.rows, dtype=torch.float64)
    kept = top_k_divergence(top, logs.double(), known, 0.0)(student, slice(None))[:, 0]
    rest = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, top, False)
    p, q = (x.masked_fill(~rest, -torch.inf) for x in (log_p, student.log_softmax(-1)))
    within = generalized_jsd(q, p, 0.0)
    whole = generalized_jsd(student, log_p, 0.0)
    torch.testing.assert_close(kept + p.logsumexp(-1).exp() * within, whole, atol=1e-5, rtol=1e-5)
    assert (kept <= whole + 1e-6).all()
    teacher.close()


def test_the_loss_is_below_the_local_teachers_and_near_it(run_phase, spec_for, vllm, tmp_path):
    off = {"onPolicyFraction": 0, "duration": {"maxSteps": 1}}
    teachers = {"local": {"source": str(vllm.folder)}, "served": served(vllm)}
    for name, teacher in teachers.items():
        assert run_phase("distill", spec_for(teacher, **off), None, tmp_path / name / "distill")[0] == 0
    whole, kept = (lines(tmp_path / name / "distill")[0]["loss"] for name in teachers)
    assert 0.8 * whole < kept < whole


def test_places_without_a_token_have_no_part_in_the_loss():
    """A teacher whose head has rows that the student lacks names them among the likeliest."""
    teacher, student = torch.randn(3, 10).double(), torch.randn(3, 10).double()
    ids = teacher.topk(4).indices
    logs = bucket_logits(teacher, ids).log_softmax(-1)
    filled = torch.cat([ids, ids[:, :1]], -1)
    holes = torch.cat([logs[:, :4], torch.full((3, 1), -torch.inf), logs[:, 4:]], -1)
    for beta in (0.0, 0.5, 1.0):
        student.requires_grad_()
        wanted = top_k_divergence(ids, logs, 10, beta)(student, slice(None))
        found = top_k_divergence(filled, holes, 10, beta)(student, slice(None))
        torch.testing.assert_close(found, wanted)
        slopes = [torch.autograd.grad(loss[:, 0].sum(), student)[0] for loss in (wanted, found)]
        torch.testing.assert_close(*slopes)


def test_a_smaller_vocabulary_is_found_by_asking(vllm):
    wire = connected(Server("teacher", Served(url=vllm.url)), None)
    assert [known_to(wire, rows) for rows in (vllm.rows - 5, vllm.rows, vllm.rows + 1, vllm.rows + 90)] == [
        vllm.rows - 5, vllm.rows, vllm.rows, vllm.rows,
    ]  # fmt: skip


# ---------------------------------------------------------------- asking ahead


class Batches:
    def batch(self, index):
        return [index]


def test_the_next_traces_are_asked_about_while_this_step_is_learned_from():
    asked = []
    ahead = Ahead(Streams(0.5), Batches(), 5, asked.append)
    seen = []
    for step in range(5):
        if not Streams(0.5).on_policy(step):
            seen.append(ahead.batch(step))
        ahead.prepare(step + 1)
        assert len(asked) <= len(seen) + 1, "no more than one batch ahead"
        assert step > 3 or len(asked) == len(seen) + 1
    assert seen == [[0], [1], [2]] == asked, "each once, in order"


def test_no_more_requests_are_open_than_it_says_and_answers_come_while_the_student_works(vllm):
    wire = connected(Server("teacher", Served(url=vllm.url)), None)
    teacher = ServedTeacher(wire, 4, vllm.rows, ThreadPoolExecutor(3))
    sequences = [Sequence(np.array([5, 6, 7 + i]), np.array([False, True, True])) for i in range(9)]
    vllm.most_at_once, vllm.delay = 0, 0.02
    teacher.ask(sequences)
    asked = threading.Event()
    while not asked.is_set():  # the student works; nobody waits for an answer
        time.sleep(0.01)
        if all(future.done() for some in teacher._asked.values() for future in some):
            asked.set()
    vllm.delay = 0
    before = len(vllm.asked)
    ids, logs, _ = teacher.scores(sequences, torch.device("cpu"))
    assert ids.shape == (18, 4) and logs.shape == (18, 5)
    assert len(vllm.asked) == before and vllm.most_at_once <= 3
    assert not teacher._asked, "nothing is kept that has been used"
    teacher.close()


@pytest.mark.parametrize("concurrency", [1, 32])
def test_how_many_are_asked_at_a_time_changes_nothing(run_phase, spec_for, vllm, tmp_path, concurrency):
    for name, teacher in (("a", served(vllm)), ("b", served(vllm, concurrency=concurrency))):
        assert run_phase("distill", spec_for(teacher), None, tmp_path / name / "run" / "distill")[0] == 0
    assert_same(*(weights(tmp_path / name / "run" / "distill") for name in "ab"))


@pytest.mark.slow
def test_two_processes_ask_once_for_each_sequence(run_phase, on_two_processes, spec_for, vllm, tmp_path):
    one, two, file = tmp_path / "one" / "run" / "distill", tmp_path / "two" / "run" / "distill", tmp_path / "phase.yaml"
    before = len(vllm.asked)
    assert run_phase("distill", spec_for(served(vllm)), None, one)[0] == 0
    alone = len(vllm.asked) - before
    file.write_text(yaml.safe_dump({"output": str(two), "spec": spec_for(served(vllm))}))
    on_two_processes("distill", file)
    assert_same(weights(one), weights(two), tolerance=1e-5)
    sequences = 6 * 8
    assert len(vllm.asked) - before - alone - sequences == 2 * (alone - sequences), (
        "but for what each asks at its start"
    )


# ---------------------------------------------------------------- whose fault


def test_a_teacher_that_goes_away_is_infrastructure_and_the_phase_goes_on(run_phase, spec_for, vllm, tmp_path, capsys):
    whole, cut = (tmp_path / name / "run" / "distill" for name in ("whole", "cut"))
    spec = spec_for(served(vllm), checkpoint={"everySteps": 1})
    assert run_phase("distill", spec, None, whole)[0] == 0
    own = VllmLike(vllm.folder)
    answer = own.answer

    def gone_after_two_checkpoints(path, body):
        if list((cut / "checkpoints").glob("step-*2")):
            own.failures = [0] * 100_000
        return answer(path, body)

    own.answer = gone_after_two_checkpoints
    with started(own):
        port = int(own.url.rsplit(":", 1)[1])
        spec = spec_for(served(own), checkpoint={"everySteps": 1})
        code, _ = run_phase("distill", spec, None, cut)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 75
    assert said.startswith("Infrastructure: teacher: http://127.0.0.1:") and "does not answer" in said
    own.failures, own.answer = [], answer
    with started(own, port):
        assert run_phase("distill", spec, None, cut)[0] == 0
    assert_same(weights(whole), weights(cut))


@pytest.mark.parametrize("change", [swapped, moved])
def test_another_tokenizer(run_phase, spec_for, vllm, tmp_path, capsys, change):
    """To words that neither has, as a fixed text may be, both say the same."""
    with serving(with_words(vllm.folder, change, tmp_path / "other")) as other:
        code, _ = run_phase("distill", spec_for(served(other)), None, tmp_path / "run" / "distill")
    assert code == 2
    assert "has another tokenizer than the student: from token" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", [0, 1])
def test_another_tokenizer_by_the_runs_own_rows(run_phase, spec_for, vllm, tmp_path, capsys, monkeypatch, fraction):
    """Of a vocabulary some words are asked about, here none."""
    monkeypatch.setattr("trainers.core.served.teacher.vocabulary_texts", lambda tokenizer: [])
    with serving(with_words(vllm.folder, moved, tmp_path / "other")) as other:
        spec = spec_for(served(other), onPolicyFraction=fraction)
        code, _ = run_phase("distill", spec, None, tmp_path / "run" / "distill")
    assert code == 2
    assert "has another tokenizer than the student: from token" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["word", "bytes"])
def test_words_from_all_over_a_vocabulary_are_the_same_to_the_same_tokenizer(kind, tmp_path):
    """Also where pieces are bytes, which are no text by themselves, and are other tokens once they are joined."""
    of = {"synthetic": {"task": "letters", "split": "demonstrations", "count": 64}}
    spec = {
        "hiddenSize": 32,
        "numLayers": 1,
        "numHeads": 4,
        "tokenizer": {"kind": kind, "trainOn": [of], "vocabSize": 320},
    }
    model, tokenizer = scratch_model(ScratchModel.model_validate(spec), 0, Path("."))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = vocabulary_texts(tokenizer)
    assert 0 < len(texts) <= 8 and "\ufffd" not in "".join(texts)
    assert len({i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]}) > 20
    with serving(tmp_path) as same:
        assert other_tokens(connected(Server("teacher", Served(url=same.url)), None), tokenizer, texts) is None


def test_more_tokens_than_the_server_tells(run_phase, spec_for, vllm, tmp_path, capsys):
    with serving(vllm.folder, max_logprobs=8) as few:
        code, _ = run_phase("distill", spec_for(served(few)), None, tmp_path / "run" / "distill")
    assert code == 2
    assert "start it with --max-logprobs 16" in capsys.readouterr().err


def test_sequences_that_are_longer_than_the_server_takes(run_phase, spec_for, vllm, tmp_path, capsys):
    with serving(vllm.folder, max_model_len=32) as short:
        code, _ = run_phase("distill", spec_for(served(short)), None, tmp_path / "run" / "distill")
    assert code == 2
    said = capsys.readouterr().err
    assert "takes 32 tokens" in said and "start it with --max-model-len 49, or lower maxLength to 31" in said
