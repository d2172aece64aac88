"""Responses that a server generates: the tokens, the ends and the scores of the own engine, and whose fault a failure is."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from served import VllmLike, serving, started, swapped, with_words
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.contract import BadInput, Infrastructure
from trainers.core.served import server as calls
from trainers.core.served.answers import Part, scored
from trainers.core.served.model import MOST_BARRED, ServedModel
from trainers.core.served.server import Server, side_by_side
from trainers.core.served.wire import LEAST_REST, _likeliest, connected
from trainers.core.top_k import Shards
from trainers.spec import Sampling, Served

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 12}}], "maxPromptLength": 32}


@pytest.fixture(scope="module")
def vllm(louder):
    with serving(louder(4)) as found:
        yield found


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE_SECONDS", 2.0)


def spec_for(vllm: VllmLike, served: bool = True, temperature: float = 1.0, **changes):
    base = {
        "policy": {"source": str(vllm.folder)},
        "data": PROMPTS,
        "sampling": {"maxNewTokens": 8, "batchSize": 8, "temperature": temperature},
        "seed": 5,
    }
    if served:
        base["policy"] |= {"url": vllm.url}
        base["sampling"] |= {"engine": "vllm"}
    return base | changes


def traces(output: Path):
    return [json.loads(line) for line in (output / "traces.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(run_phase, vllm, tmp_path_factory):
    output = tmp_path_factory.mktemp("served") / "run" / "rollout"
    code, result = run_phase("rollout", spec_for(vllm, samplesPerPrompt=2, teacherTopK=8), None, output)
    assert code == 0
    return output, result


def test_greedy_responses_are_those_of_the_own_engine(run_phase, vllm, tmp_path):
    """The server's stop tokens, length limit and template are the phase's, whatever its own are."""
    for name, served in (("ours", False), ("theirs", True)):
        code, _ = run_phase("rollout", spec_for(vllm, served, temperature=0), None, tmp_path / name / "rollout")
        assert code == 0
    assert traces(tmp_path / "ours" / "rollout") == traces(tmp_path / "theirs" / "rollout")


@pytest.fixture(scope="module")
def many_spare_rows(louder, tmp_path_factory):
    """A model with more rows that are no tokens than a request can bar, and as likely as tokens are."""
    folder, source = tmp_path_factory.mktemp("spare"), louder(4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer) + MOST_BARRED + 10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serving(folder, max_logprobs=4) as found:
        yield found


def test_greedy_responses_have_no_spare_ids_however_many_there_are(run_phase, many_spare_rows, tmp_path):
    for name, served in (("ours", False), ("theirs", True)):
        spec = spec_for(many_spare_rows, served, temperature=0)
        assert run_phase("rollout", spec, None, tmp_path / name / "rollout")[0] == 0
    assert traces(tmp_path / "ours" / "rollout") == traces(tmp_path / "theirs" / "rollout")
    barred = [list(map(int, body["logit_bias"])) for body in many_spare_rows.asked if "seed" in body]
    assert max(map(len, barred)) == MOST_BARRED, "what vLLM takes"


def test_draws_have_the_probabilities_of_a_model_whose_spare_ids_are_all_barred(many_spare_rows):
    """Tokens of 200 draws, against the softmax over tokens that there are: chi-square."""
    vllm = many_spare_rows
    known = len(vllm.tokenizer)
    vllm.asked.clear()
    wire = connected(Server("policy", Served(url=vllm.url)), None)
    served = ServedModel(wire, vllm.tokenizer, SimpleNamespace(stop_ids={1}), known, 512, vllm.rows)
    asked = Sampling(engine="vllm", max_new_tokens=1, batch_size=1)
    found = served.responses([[5, 6, 7]] * 200, asked, [(3, i) for i in range(200)])
    assert len(vllm.asked) > 210, "some were asked for again"
    assert found[:20] == served.responses([[5, 6, 7]] * 20, asked, [(3, i) for i in range(20)])
    log_probs = vllm.log_probs([5, 6, 7])[-1]
    drawn = torch.bincount(torch.tensor([response.ids[0] for response in found]), minlength=len(log_probs))
    wanted = 200 * log_probs[:known].softmax(-1)
    assert drawn[known:].sum() == 0
    often = wanted > 5
    assert ((drawn[:known][often] - wanted[often]) ** 2 / wanted[often]).sum() < 3 * often.sum()
    for response in found[:20]:
        assert response.logprobs[0] == pytest.approx(float(log_probs[response.ids[0]]), abs=1e-4)


def test_a_model_that_says_nothing_but_spare_ids_is_bad_input(many_spare_rows, monkeypatch):
    monkeypatch.setattr("trainers.core.served.model.MOST_BARRED", 2)
    wire = connected(Server("policy", Served(url=many_spare_rows.url)), None)
    served = ServedModel(wire, many_spare_rows.tokenizer, SimpleNamespace(stop_ids={1}), 3, 512, many_spare_rows.rows)
    with pytest.raises(BadInput, match=r"policy: .* draws ids from 3 on again and again, which are no tokens"):
        served.responses([[5, 6, 7]], Sampling(engine="vllm", max_new_tokens=8), [(0,)])


def test_responses_end_where_the_model_ends_them(sampled):
    output, result = sampled
    rows = traces(output)
    assert len(rows) == 24
    assert 0 < result.metrics["endedShare"] == sum(row["ended"] for row in rows) / 24 < 1
    assert rows[0]["teacher_response"] != rows[1]["teacher_response"], "two answers to one prompt"


@pytest.mark.parametrize("batch_size", [1, 64])
def test_what_is_asked_for_at_once_changes_nothing(run_phase, vllm, sampled, tmp_path, batch_size):
    spec = spec_for(vllm, samplesPerPrompt=2)
    spec["sampling"]["batchSize"] = batch_size
    vllm.most_at_once = 0
    run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
    theirs = [{key: row[key] for key in row if key != "top_k"} for row in traces(sampled[0])]
    assert traces(tmp_path / "run" / "rollout") == theirs
    assert vllm.most_at_once <= batch_size


def test_kept_scores_are_transformers_own(sampled, vllm):
    output, _ = sampled
    rows, shards = traces(output), Shards([output / "top-k"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(vllm.folder), AutoTokenizer.from_pretrained(vllm.folder)
    from trainers.core.top_k import vocabulary_digest

    for row in rows[:6]:
        prompt, tokens, place = shards.read(row, vocabulary_digest(tokenizer), len(tokenizer))
        ids, log_probs, _ = shards.scores([(place, len(tokens))], torch.device("cpu"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)
        top = wanted.topk(8)
        torch.testing.assert_close(log_probs[:, :-1], top.values, atol=5e-3, rtol=1e-3)
        assert (ids == top.indices).float().mean() > 0.95, "but for ties"
        rest = 1 - top.values.exp().sum(-1)
        torch.testing.assert_close(log_probs[:, -1].exp(), rest, atol=2e-3, rtol=1e-2)


def test_a_server_elsewhere_is_the_same_phase(run_phase, vllm, sampled, tmp_path):
    """The address is no part of what a result is: with the server gone there is nothing to do, and nothing done."""
    output, result = sampled
    spec = spec_for(vllm, samplesPerPrompt=2, teacherTopK=8)
    spec["policy"]["url"] = "http://127.0.0.1:9"
    spec["policy"]["checkWeights"] = False
    code, again = run_phase("rollout", spec, None, output)
    assert code == 0
    assert again == result


class TestWhoseFault:
    def test_another_model(self, run_phase, vllm, louder, tmp_path, capsys):
        spec = spec_for(vllm)
        spec["policy"]["source"] = str(louder(3))
        code, _ = run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
        assert code == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("BadInput: policy: ") and "serves another model as 'tiny': log-probabilities" in said

    def test_another_vocabulary(self, run_phase, vllm, tmp_path, capsys):
        model = AutoModelForCausalLM.from_pretrained(vllm.folder)
        model.resize_token_embeddings(model.config.vocab_size + 3)
        model.save_pretrained(tmp_path / "wider")
        AutoTokenizer.from_pretrained(vllm.folder).save_pretrained(tmp_path / "wider")
        spec = spec_for(vllm)
        spec["policy"] |= {"source": str(tmp_path / "wider"), "checkWeights": False}
        code, _ = run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
        assert code == 2
        assert "serves another model as 'tiny': it lacks a token" in capsys.readouterr().err

    def test_another_tokenizer(self, run_phase, vllm, tmp_path, capsys):
        """Of weights that are not compared."""
        with serving(with_words(vllm.folder, swapped, tmp_path / "other")) as other:
            spec = spec_for(vllm)
            spec["policy"] |= {"url": other.url, "checkWeights": False}
            code, _ = run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
        assert code == 2
        assert "serves another model as 'tiny': from token" in capsys.readouterr().err

    def test_a_name_that_it_does_not_have(self, run_phase, vllm, tmp_path, capsys):
        spec = spec_for(vllm)
        spec["policy"]["servedAs"] = "big"
        code, _ = run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
        assert code == 2
        assert "policy.servedAs" in capsys.readouterr().err

    def test_a_server_that_takes_less(self, run_phase, vllm, tmp_path, capsys):
        with serving(vllm.folder, max_model_len=16) as small:
            spec = spec_for(small)
            spec["policy"]["checkWeights"] = False
            code, _ = run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
        assert code == 2
        assert "start it with --max-model-len" in capsys.readouterr().err

    def test_scores_are_of_whole_responses_and_a_token_more(self, run_phase, vllm, sampled, tmp_path, capsys):
        longest = max(len(body["prompt"]) for body in vllm.asked if body.get("seed") and body["max_tokens"] == 8)
        for extra, status in ((0, 2), (1, 0)):
            with serving(vllm.folder, max_model_len=longest + 8 + extra) as small:
                spec = spec_for(small, teacherTopK=8)
                spec["policy"]["checkWeights"] = False
                assert run_phase("rollout", spec, None, tmp_path / str(extra) / "rollout")[0] == status
        assert f"start it with --max-model-len {longest + 9}, or lower" in capsys.readouterr().err

    def test_a_key_is_asked_for_and_never_said(self, run_phase, vllm, tmp_path, capsys, monkeypatch):
        with serving(vllm.folder, key="sesame-of-the-team") as locked:
            assert run_phase("rollout", spec_for(locked), None, tmp_path / "a" / "rollout")[0] == 2
            assert "set keyVariable" in capsys.readouterr().err
            spec = spec_for(locked)
            spec["policy"]["keyVariable"] = "TEAM_KEY"
            assert run_phase("rollout", spec, None, tmp_path / "b" / "rollout")[0] == 2
            assert "the environment has no TEAM_KEY" in capsys.readouterr().err
            monkeypatch.setenv("TEAM_KEY", "sesame-of-the-team\n")
            assert run_phase("rollout", spec, None, tmp_path / "c" / "rollout")[0] == 0
        said = "".join(capsys.readouterr())
        written = "".join(p.read_text(errors="replace") for p in (tmp_path / "c").rglob("*") if p.is_file())
        assert "sesame" not in said + written

    def test_a_server_that_goes_away_is_infrastructure_and_the_phase_goes_on(
        self, run_phase, vllm, sampled, tmp_path, capsys
    ):
        output = tmp_path / "run" / "rollout"
        own = VllmLike(vllm.folder)
        with started(own):
            port = int(own.url.rsplit(":", 1)[1])
            spec = spec_for(own, samplesPerPrompt=2, teacherTopK=8)
            answer = own.answer

            def once_gone(path, body):
                if len(list((output / "checkpoints").glob("part-*"))) >= 1 and path == "/v1/completions":
                    own.failures = [0] * 10_000
                return answer(path, body)

            own.answer = once_gone
            code, _ = run_phase("rollout", spec, None, output)
        assert code == 75
        assert "does not answer" in capsys.readouterr().err.strip().splitlines()[-1]
        own.failures, own.answer = [], answer
        before = len(own.asked)
        with started(own, port):
            code, _ = run_phase("rollout", spec, None, output)
        assert code == 0
        assert traces(output) == traces(sampled[0])
        assert len([a for a in own.asked[before:] if "seed" in a]) < 24, "the finished batch is not asked for again"

    def test_a_busy_server_is_asked_again(self, vllm):
        vllm.failures = [503, 429, 0, 500]
        asked = len(vllm.asked)
        server = Server("policy", Served(url=vllm.url), patience=30)
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 1, "temperature": 0}
        assert server.post("/v1/completions", body)["choices"]
        assert len(vllm.asked) == asked + 5

    def test_one_call_that_gives_up_ends_the_others(self):
        server = Server("teacher", Served(url="http://127.0.0.1:9"), patience=1)
        with pytest.raises(Infrastructure, match=r"^teacher: http://127\.0\.0\.1:9 does not answer"):
            side_by_side(server.get, ["/v1/models"] * 40, 4)

    def test_a_redirect_gets_no_key(self, vllm, monkeypatch):
        monkeypatch.setenv("TEAM_KEY", "sesame")
        monkeypatch.setattr(vllm, "answer", lambda path, body: (307, {}))
        with pytest.raises(BadInput, match="sends to another place"):
            Server("policy", Served(url=vllm.url, key_variable="TEAM_KEY")).get("/v1/models")


class TestLikeliest:
    """Of one position's answer, against probabilities by hand."""

    POSITION = {
        "7": {"logprob": float(np.log(0.1)), "rank": 3},
        "2": {"logprob": float(np.log(0.6)), "rank": 1},
        "9": {"logprob": float(np.log(0.2)), "rank": 2},
    }

    def likeliest(self, position, k, known):
        return _likeliest(scored(Part("policy", "", [None, position]), 2, 1, k, min(k, known)), k, known)[0]

    def test_the_token_that_stands_there_may_be_none_of_them(self):
        assert self.likeliest(self.POSITION, 2, 100) == pytest.approx([2, 9, np.log(0.6), np.log(0.2), np.log(0.2)])

    def test_ids_that_are_not_known_are_among_the_rest(self):
        found = self.likeliest(self.POSITION, 3, 9)
        assert found == pytest.approx([2, 7, 2, np.log(0.6), np.log(0.1), -np.inf, np.log(0.3)])

    def test_all_tokens_leave_no_rest_and_rounding_leaves_little(self):
        both = {"0": {"logprob": float(np.log(0.5)), "rank": 1}, "1": {"logprob": float(np.log(0.5)), "rank": 1}}
        assert self.likeliest(both, 2, 2)[-1] == -np.inf
        assert self.likeliest(both, 2, 3)[-1] == LEAST_REST


def test_the_wire_says_everything_that_a_server_has_defaults_for(sampled, vllm):
    """A model's generation_config.json would set the sampling of requests that leave it out."""
    asked = next(body for body in vllm.asked if "seed" in body)
    assert {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "max_tokens", "stop_token_ids", "ignore_eos",
    } <= set(asked)  # fmt: skip
    assert all(isinstance(token, int) for token in asked["prompt"])
