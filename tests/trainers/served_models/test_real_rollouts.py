"""Rollouts by a real vLLM: its tokens are the own engine's where nothing is drawn, and its numbers transformers'."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_environment import vllm_python

from trainers.core.served import model as served
from trainers.core.served.server import Server
from trainers.core.served.wire import connected
from trainers.spec import Sampling, Served

pytestmark = pytest.mark.vllm

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 24}}], "maxPromptLength": 32}


def spec_for(folder: Path, url: str | None, **changes):
    served = {} if url is None else {"url": url, "keyVariable": "VLLM_KEY"}
    engine = {} if url is None else {"engine": "vllm"}
    sampling = {"maxNewTokens": 12, "batchSize": 16, **changes.pop("sampling", {}), **engine}
    return {"policy": {"source": str(folder), **served}, "data": PROMPTS, "sampling": sampling, "seed": 5, **changes}


def traces(output: Path):
    return [json.loads(line) for line in (output / "traces.jsonl").read_text().splitlines()]


@pytest.fixture
def few_barred(monkeypatch):
    """Fewer than the head's ten rows that are no tokens, as where there are more than vLLM takes."""
    monkeypatch.setattr(served, "MOST_BARRED", 4)


def test_no_request_bars_more_than_vllms_newer_runner_takes():
    [runner] = vllm_python().parent.parent.glob("lib/python*/site-packages/vllm/v1/worker/gpu/sample/logit_bias.py")
    assert f"MAX_NUM_LOGIT_BIAS_TOKENS = {served.MOST_BARRED}\n" in runner.read_text()


def test_greedy_responses_are_those_of_the_own_engine(run_phase, vllm, policy_dir, few_barred, tmp_path):
    """Although the model's own files ask for penalties, and its head has rows that are no tokens."""
    for name, url in (("ours", None), ("theirs", vllm.url)):
        spec = spec_for(policy_dir, url, sampling={"temperature": 0})
        assert run_phase("rollout", spec, None, tmp_path / name / "rollout")[0] == 0
    ours, theirs = (traces(tmp_path / name / "rollout") for name in ("ours", "theirs"))
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 23, "but for a tie in rounding"


def test_samples_are_a_function_of_their_seeds_and_scores_are_transformers_own(run_phase, vllm, policy_dir, tmp_path):
    spec = spec_for(policy_dir, vllm.url, samplesPerPrompt=2, teacherTopK=48)
    for name, size in (("a", 16), ("b", 5)):
        spec["sampling"]["batchSize"] = size
        code, result = run_phase("rollout", spec, None, tmp_path / name / "rollout")
        assert code == 0
        assert 0 < result.metrics["endedShare"] < 1
    left = [[row["teacher_response"] for row in traces(tmp_path / name / "rollout")] for name in "ab"]
    assert sum(a == b for a, b in zip(*left, strict=True)) >= 46, "but for rounding in another batch"
    assert len(set(left[0])) > 40
    _check_scores(tmp_path / "a" / "rollout", policy_dir)


def _check_scores(output: Path, folder: Path) -> None:
    from trainers.core.top_k import Shards, vocabulary_digest

    shards, model = Shards([output / "top-k"]), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in traces(output)[:8]:
        prompt, tokens, place = shards.read(row, vocabulary_digest(tokenizer), len(tokenizer))
        ids, log_probs, known = shards.scores([(place, len(tokens))], torch.device("cpu"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)
        assert known == len(tokenizer)
        kept = log_probs[:, :-1] > -torch.inf
        assert (ids < known).all()
        torch.testing.assert_close(log_probs[:, :-1][kept], wanted.gather(-1, ids)[kept], atol=2e-2, rtol=2e-3)
        whole = log_probs.exp().sum(-1)
        torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-2, rtol=0)


def test_draws_have_the_models_probabilities(vllm, policy_dir, few_barred):
    """First tokens of 600 draws against the softmax of transformers' logits over the tokens that there are."""
    wire = connected(Server("policy", Served(url=vllm.url, key_variable="VLLM_KEY")), None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy_dir), AutoTokenizer.from_pretrained(policy_dir)
    sampling = Sampling(engine="vllm", max_new_tokens=1, batch_size=16)
    speaker = served.ServedModel(
        wire, tokenizer, SimpleNamespace(stop_ids={1}), len(tokenizer), 128, model.config.vocab_size
    )
    answers = speaker.responses([[5, 6, 7]] * 600, sampling, [(seed,) for seed in range(600)])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    drawn = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=len(logits))
    assert drawn[len(tokenizer) :].sum() == 0
    wanted = 600 * logits[: len(tokenizer)].softmax(-1)
    often = wanted > 5
    pearson = ((drawn[: len(tokenizer)][often] - wanted[often]) ** 2 / wanted[often]).sum()
    assert pearson < 3 * often.sum(), "chi-square: its mean is the number of tokens"
    raw = logits.log_softmax(-1)
    for answer in answers[:50]:
        assert answer.logprobs[0] == pytest.approx(float(raw[answer.ids[0]]), abs=1e-3), "at temperature 1, uncut"


def test_another_model_is_noticed(run_phase, vllm, other_dir, tmp_path, capsys):
    assert run_phase("rollout", spec_for(other_dir, vllm.url), None, tmp_path / "run" / "rollout")[0] == 2
    assert "serves another model as 'policy': log-probabilities" in capsys.readouterr().err


def test_what_the_server_refuses_is_told_in_its_words(run_phase, vllm, policy_dir, tmp_path, capsys, monkeypatch):
    spec = spec_for(policy_dir, vllm.url, sampling={"maxNewTokens": 120})
    assert run_phase("rollout", spec, None, tmp_path / "long" / "rollout")[0] == 2
    assert "positions" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_KEY", "wrong")
    assert run_phase("rollout", spec_for(policy_dir, vllm.url), None, tmp_path / "key" / "rollout")[0] == 2
    assert "refuses the key (401): it is not the one in VLLM_KEY" in capsys.readouterr().err
