"""Stored log-probabilities of a teacher: buckets by their definitions, shards as they were written, phases end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.contract import BadInput
from trainers.core import top_k
from trainers.phases.distill.loss import generalized_jsd, top_k_divergence
from trainers.phases.distill.spec import DistillSpec
from trainers.phases.rollout.parts import Parts

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6)
BETAS = [0.0, 0.3, 1.0]
EVERYTHING = slice(None)
CPU = torch.device("cpu")


def f64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def stored(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities as a shard gives them, but unrounded."""
    ids = teacher.topk(k).indices
    return ids, top_k.bucket_logits(teacher, ids).log_softmax(-1)


def divergence(student, teacher, k, beta):
    return top_k_divergence(*stored(teacher, k), teacher.shape[-1], beta)(student, EVERYTHING)


# ---------------------------------------------------------------- the loss


def test_a_token_and_the_rest_by_hand():
    p, q = f64([0.7, 0.2, 0.1]), f64([0.5, 0.3, 0.2])
    loss, kl, student_mass, teacher_mass = divergence(q.log(), p.log(), 1, 1.0)[0].tolist()
    assert kl == pytest.approx(0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5))
    assert loss == pytest.approx(0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3))
    assert (student_mass, teacher_mass) == pytest.approx((0.5, 0.7))


@given(LOGITS, LOGITS, st.sampled_from(BETAS))
def test_more_tokens_come_closer_to_the_whole_vocabulary_and_all_of_them_are_it(student, teacher, beta):
    student, teacher = f64(student), f64(teacher)
    whole = generalized_jsd(student, teacher, beta)
    by_k = torch.cat([divergence(student, teacher, k, beta)[:, 0] for k in range(1, 7)])
    assert (by_k.diff() >= -1e-9).all()
    assert_close(by_k[-1:], whole, atol=1e-9, rtol=1e-9)
    # Five tokens and the rest, which is one, are all six.
    assert_close(by_k[-2:-1], whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_gradient_is_the_differences(k, beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, k, beta)[:, 0], student)


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(beta):
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = divergence(logits, logits.detach(), 2, beta)[:, 0]
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_a_student_cannot_please_by_giving_all_kept_tokens_less():
    """Without the rest's bucket a reverse divergence of two kept tokens does not see that they have lost their mass."""
    teacher, student = f64([0.45, 0.45, 0.1]).log(), f64([0.05, 0.05, 0.9]).log()
    assert divergence(student, teacher, 2, 1.0)[0, 0] > 1.0


def test_a_small_rest_is_not_lost_in_rounding():
    """1 minus the sum of the others is 0 in fp32 where the rest has 1e-9."""
    logits = torch.tensor([[40.0, 1.0, 0.0, 19.0]])
    found = top_k.likeliest(1, None)(logits, EVERYTHING)
    exact = logits.double()
    assert found[0, 0] == 0
    assert found[0, 2].item() == pytest.approx(float(exact[0, 1:].logsumexp(0) - exact[0].logsumexp(0)), abs=1e-4)


def test_ids_that_only_round_the_head_are_no_part_of_it():
    logits = torch.tensor([[1.0, 2.0, 9.0]])
    found = top_k.likeliest(2, 2)(logits, EVERYTHING)
    assert found[0, :2].tolist() == [1, 0]
    assert_close(found[0, 2:4].exp(), torch.tensor([2.0, 1.0]).softmax(0))
    assert found[0, 4] == -math.inf


# ---------------------------------------------------------------- shards


class Words:
    def __init__(self, count: int) -> None:
        self.count = count

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(self.count)}


def some_scores(k: int, known: int, lengths=(3, 1, 5)) -> list[top_k.Scored]:
    drawn = np.random.default_rng(0)
    found = []
    for n in lengths:
        ids = np.stack([drawn.permutation(known)[:k] for _ in range(n)])
        log_probs = -drawn.exponential(3.0, (n, k + 1))
        tokens, prompt = drawn.integers(0, known, n).tolist(), drawn.integers(0, known, 2 + n).tolist()
        found.append(top_k.Scored(prompt, tokens, np.concatenate([ids, log_probs], axis=1).astype(np.float32)))
    return found


def rows_of(path: Path, count: int) -> list[dict]:
    return [{"prompt": f"p{i}", top_k.KEY: {"file": path.name, "row": i}} for i in range(count)]


def test_the_same_responses_are_the_same_file(tmp_path):
    """Traces name it by its content, and what is trained on them goes by theirs."""
    assert len({top_k.write_shard(tmp_path, 0, some_scores(4, 50), 50, "x").name for _ in range(20)}) == 1


@pytest.mark.parametrize("known", [300, 2**16 + 5000])
def test_a_shard_gives_back_what_was_written(tmp_path, known):
    written = some_scores(7, known)
    path = top_k.write_shard(tmp_path, 0, written, known, top_k.vocabulary_digest(Words(known)))
    shards, rows = top_k.Shards([tmp_path]), rows_of(path, 3)
    places = []
    for row, scored in zip(rows, written, strict=True):
        prompt, tokens, place = shards.read(row, top_k.vocabulary_digest(Words(known)), known)
        assert (prompt, tokens) == (scored.prompt, scored.tokens)
        places.append((place, len(tokens)))
    ids, log_probs, found = shards.scores(places[::-1], CPU)
    assert found == known
    whole = np.concatenate([scored.found for scored in written[::-1]])
    assert ids.tolist() == whole[:, :7].astype(int).tolist()
    assert_close(log_probs, torch.from_numpy(whole[:, 7:]), atol=0, rtol=2**-11)


def test_a_token_takes_about_three_hundred_bytes(tmp_path):
    known = 151_669
    path = top_k.write_shard(tmp_path, 0, some_scores(64, known, (400,)), known, "x")
    assert path.stat().st_size / 400 < 340


def test_damaged_missing_and_foreign_shards_are_refused(tmp_path):
    digest = top_k.vocabulary_digest(Words(50))
    path = top_k.write_shard(tmp_path, 0, some_scores(4, 50), 50, digest)
    row = rows_of(path, 1)[0]
    shards = top_k.Shards([tmp_path])
    with pytest.raises(BadInput, match="another tokenizer than the student's"):
        shards.read(row, top_k.vocabulary_digest(Words(51)), 0)
    with pytest.raises(BadInput, match="the teacher knows 50 tokens, the student embeds 40"):
        shards.read(row, digest, 40)
    with pytest.raises(BadInput, match=r"there is no 0.*safetensors in"):
        top_k.Shards([tmp_path / "other"]).read(row, digest, 50)
    other = top_k.write_shard(tmp_path, 3, some_scores(5, 50), 50, digest)
    with pytest.raises(BadInput, match="some keep 4 of 50 and 5 of 50 tokens"):
        shards.scores([(top_k.Place(name.name, 0), 1) for name in (path, other)], CPU)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match="is damaged"):
        top_k.Shards([tmp_path]).read(row, digest, 50)


@pytest.mark.parametrize("reference", [None, {}, {"file": "../x", "row": 0}, {"file": "x", "row": -1}, {"file": "x"}])
def test_rows_without_scores_say_what_to_do(tmp_path, reference):
    with pytest.raises(BadInput, match="teacherTopK, or set teacher"):
        top_k.Shards([tmp_path]).read({"prompt": "p", top_k.KEY: reference}, "", 5)


def test_a_part_whose_shard_is_lost_is_made_again(tmp_path, capsys):
    folder = tmp_path / top_k.FOLDER
    shards = [top_k.write_shard(folder, first, some_scores(4, 50), 50, "x") for first in (0, 3)]
    parts = Parts(tmp_path, lambda rows: top_k.check_shards(folder, rows))
    for first, shard in zip((0, 3), shards, strict=True):
        parts.write(first, first + 3, rows_of(shard, 3))
    assert parts.done() == 6
    shards[1].unlink()
    assert parts.done() == 3
    assert "made again" in capsys.readouterr().out


def test_what_a_killed_attempt_left_is_dropped(tmp_path):
    shards = [top_k.write_shard(tmp_path, first, some_scores(4, 50), 50, "x") for first in (0, 3)]
    top_k.drop_others(tmp_path, rows_of(shards[1], 3))
    assert list(tmp_path.iterdir()) == [shards[1]]
    top_k.drop_others(tmp_path / "nowhere", [])


# ---------------------------------------------------------------- what a user asks for


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"onPolicyFraction": 0.5, "prompts": {"prompts": [{"files": "x"}]}}, "onPolicyFraction 0.5 needs a teacher"),
        ({"temperature": 2.0}, "temperature 2 needs a teacher"),
        ({"student": {"teacherLayers": [0]}}, "student.teacherLayers needs a teacher"),
    ],
)
def test_what_stored_scores_cannot_answer_needs_a_teacher(changes, said):
    plain = {"student": {"source": "s"}, "traces": {"files": "x"}, "onPolicyFraction": 0, "seed": 0}
    DistillSpec.model_validate(plain)
    with pytest.raises(ValueError, match=said):
        DistillSpec.model_validate(plain | changes)


@pytest.fixture(scope="module")
def teacher_dir(louder) -> Path:
    return louder(4)


PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 16}}], "maxPromptLength": 32}


@pytest.fixture(scope="module")
def traces(run_phase, teacher_dir, tmp_path_factory):
    """Traces with all of the vocabulary, and with four tokens of it."""
    size = len(AutoTokenizer.from_pretrained(teacher_dir).get_vocab())
    found = {}
    for k in (size, 4):
        output = tmp_path_factory.mktemp("traces") / "run" / "rollout"
        spec = {
            "policy": {"source": str(teacher_dir)},
            "data": PROMPTS,
            "sampling": {"maxNewTokens": 6, "batchSize": 8, "temperature": 0.7},
            "teacherTopK": k,
            "seed": 5,
        }
        code, _ = run_phase("rollout", spec, None, output)
        assert code == 0
        found["all" if k == size else k] = output / "traces.jsonl"
    return found


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_again(path: Path, tokenizer) -> Path:
    """The traces whose text is tokenised as it was sampled: a random model also says tokens that no text has."""
    shards, kept = top_k.Shards([path.parent / "top-k"]), []
    for row in rows_in(path):
        _, tokens, _ = shards.read(row, top_k.vocabulary_digest(tokenizer), 0)
        again = tokenizer(row["teacher_response"])["input_ids"] + [tokenizer.eos_token_id] * row["ended"]
        kept += [row] if again == tokens else []
    found = path.with_name("again.jsonl")
    found.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert len(kept) >= 8
    return found


def distilled(run_phase, output: Path, traces_file: Path, student: Path, **changes):
    spec = {
        "student": {"source": str(student)},
        "traces": {"files": str(traces_file)},
        "onPolicyFraction": 0,
        "maxLength": 48,
        "batchSize": 8,
        "duration": {"maxSteps": 2},
        "optim": {"lr": 1e-3},
        "divergenceBeta": 0.5,
    } | changes
    code, result = run_phase("distill", spec, None, output)
    assert code == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], result


def test_traces_of_the_whole_vocabulary_stand_for_the_teacher(run_phase, traces, teacher_dir, tiny_model_dir, tmp_path):
    teacher, tokenizer = {"teacher": {"source": str(teacher_dir)}}, AutoTokenizer.from_pretrained(teacher_dir)
    whole, part = (read_again(traces[k], tokenizer) for k in ("all", 4))
    beside, known = distilled(run_phase, tmp_path / "a/d", whole, tiny_model_dir, **teacher)
    alone, result = distilled(run_phase, tmp_path / "b/d", whole, tiny_model_dir)
    fewer, _ = distilled(run_phase, tmp_path / "c/d", part, tiny_model_dir)
    assert "teacherParameters" in known.metrics
    assert "teacherParameters" not in result.metrics
    for ours, theirs, few in zip(alone, beside, fewer, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)
        assert ours["teacher_mass"] == pytest.approx(1, abs=1e-3) == ours["student_mass"]
        assert 0 < few["kl"] < ours["kl"]
        assert 0 < few["student_mass"] < few["teacher_mass"] < 1


def test_the_digest_of_traces_covers_their_shards(traces):
    rows = rows_in(traces[4])
    names = {row["top_k"]["file"] for row in rows}
    assert names == {path.name for path in (traces[4].parent / "top-k").iterdir()}
    top_k.check_shards(traces[4].parent / "top-k", rows)


def test_stored_scores_are_transformers_own(traces, teacher_dir):
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    shards = top_k.Shards([traces[4].parent / "top-k"])
    rows = rows_in(traces[4])
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    for row in rows[::5]:
        prompt, tokens, place = shards.read(row, top_k.vocabulary_digest(tokenizer), 0)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == row["teacher_response"].strip()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        ids, log_probs, _ = shards.scores([(place, len(tokens))], CPU)
        exact = logits.log_softmax(-1)
        assert_close(log_probs[:, :4], exact.gather(-1, ids), atol=2e-3, rtol=2e-3)
        assert_close(log_probs[:, :4].exp(), exact.exp().topk(4).values, atol=2e-3, rtol=0)


def test_traces_without_scores_stop_the_phase(run_phase, traces, tiny_model_dir, tmp_path, capsys):
    plain = tmp_path / "plain.jsonl"
    rows = rows_in(traces[4])
    plain.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "top_k"}) + "\n" for row in rows))
    spec = {"student": {"source": str(tiny_model_dir)}, "traces": {"files": str(plain)}, "onPolicyFraction": 0}
    code, _ = run_phase("distill", spec, None, tmp_path / "run" / "d")
    assert code != 0
    assert "no log-probabilities of the teacher" in capsys.readouterr().err
