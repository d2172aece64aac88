"""PPO as a user runs it: experience by hand, resuming, splitting a round, processes, and that it learns."""

import json

import pytest
import torch
import yaml
from finished import assert_same, lines, weights
from foreign_models import save_encoder
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trainers.core.rewards import response_rewards
from trainers.phase_dir import PhaseDir

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 20}}], "maxPromptLength": 32}


@pytest.fixture(scope="module")
def spec_for(tiny_model_dir, tiny_reward_dir):
    def make(**changes):
        return {
            "policy": {"source": str(tiny_model_dir)},
            "rewardModel": {"source": str(tiny_reward_dir)},
            "data": PROMPTS,
            "iterations": 3,
            "batchSize": 8,
            "miniBatchSize": 4,
            "ppoEpochs": 2,
            "sampling": {"maxNewTokens": 6, "batchSize": 8},
            "optim": {"lr": 1e-3, "eps": 1e-5},
            "criticOptim": {"lr": 1e-3, "eps": 1e-5},
            "kl": {"coef": 0.1, "target": 1.0, "horizon": 50},
            "missingEosPenalty": 0.5,
        } | changes

    return make


@pytest.fixture(scope="module")
def reference(run_phase, spec_for, tmp_path_factory):
    output = tmp_path_factory.mktemp("ppo") / "run" / "ppo"
    code, result = run_phase("ppo", spec_for(), None, output)
    assert code == 0
    return output, result


def test_metrics(reference):
    output, result = reference
    first, *_, last = lines(output)
    assert first["kl"] == 0 and first["kl_coef"] == 0.1, "the policy is its own reference at the start"
    assert first["updates"] == 4
    assert last["kl"] != 0 and last["kl_coef"] != 0.1
    assert result.metrics["rewardFirst"] == first["reward"] and result.metrics["rewardLast"] == last["reward"]
    assert result.metrics["klLast"] == last["kl"]


def test_a_rounds_first_ratio_is_exactly_one_and_the_samplers_is_nearly(run_phase, spec_for, tmp_path, monkeypatch):
    """Responses are scored by what the updates compute (docs/adr/0024); the sampler has seen the same but for rounding."""
    from trainers.phases.ppo.experience import assess

    rounds = []

    def assessed(*given):
        rounds.append(assess(*given))
        return rounds[-1]

    monkeypatch.setattr("trainers.phases.ppo.train.assess", assessed)
    spec = spec_for(iterations=2, ppoEpochs=1, miniBatchSize=8, parallel={"precision": "fp32"})
    assert run_phase("ppo", spec, None, tmp_path / "run" / "ppo")[0] == 0
    assert [line["approx_kl"] for line in lines(tmp_path / "run" / "ppo")] == [0, 0]
    for experience in rounds:
        told = torch.cat([torch.tensor(sample.logprobs) for sample in experience.samples])
        torch.testing.assert_close(told, experience.logprobs[experience.mask], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def models(tiny_model_dir, tiny_reward_dir):
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    return policy, reference, AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)


@pytest.fixture(scope="module")
def samples(tiny_model_dir):
    from trainers.core.rollouts import Prompt, Sample

    end = AutoTokenizer.from_pretrained(tiny_model_dir).eos_token_id
    raw = [([5, 6, 7], [8, 9, end], 1.5), ([6, 7], [9, 10, 11, 12], -0.5), ([10, 11, 12, 13], [end], 0.25)]
    return [Sample(Prompt({"prompt": ""}, p), r, "", r[-1] == end, reward) for p, r, reward in raw]


class TestExperience:
    """Everything that a round's updates read, worked out again one response at a time with transformers' own models."""

    TEMPERATURE, COEF, PENALTY, GAMMA, LAMBDA = 0.7, 0.3, 2.0, 0.9, 0.8

    @pytest.mark.parametrize("packing", [True, False])
    def test_every_number(self, models, samples, packing):
        from trainers.core.parallel import Workers
        from trainers.core.scoring import Scorer
        from trainers.core.token_scores import logprobs_of
        from trainers.phases.ppo.experience import Critic, assess
        from trainers.phases.ppo.spec import PpoSpec

        policy, reference, critic = models
        spec = PpoSpec.model_validate(
            {
                "policy": {"source": "p"}, "rewardModel": {"source": "r"}, "data": PROMPTS,
                "missingEosPenalty": self.PENALTY, "gamma": self.GAMMA, "gaeLambda": self.LAMBDA,
                "packing": packing, "parallel": {"microBatchTokens": 12},
            }
        )  # fmt: skip
        scorers = [logprobs_of(Scorer(m), self.TEMPERATURE) for m in (policy, reference)]
        found = assess(spec, Workers(spec.parallel), samples, self.COEF, *scorers, Critic(critic), packing)
        advantages = []
        for i, sample in enumerate(samples):
            logprobs, kl, values, own = self.by_hand(models, sample)
            count = len(sample.ids)
            assert found.mask[i].tolist() == [True] * count + [False] * (4 - count)
            assert_close(found.logprobs[i, :count], logprobs)
            assert_close(found.logprobs[i, :count] - found.reference_logprobs[i, :count], kl)
            assert_close(found.values[i, :count], values)
            assert_close(found.returns[i, :count], own + values)
            assert not found.returns[i, count:].any()
            advantages.append(own)
        real = torch.cat(advantages)
        assert_close(found.advantages[found.mask], (real - real.mean()) / real.std(), atol=1e-4, rtol=1e-4)

    def by_hand(self, models, sample):
        """Log-probabilities, KL, values and advantages of one response, by the formulas' plain loops."""
        policy, reference, critic = models
        ids = torch.tensor([sample.prompt.ids + sample.ids])
        where = slice(len(sample.prompt.ids) - 1, -1)
        chosen = torch.tensor(sample.ids)[:, None]
        with torch.no_grad():
            logprobs, theirs = (
                (m(ids).logits[0, where] / self.TEMPERATURE).log_softmax(-1).gather(1, chosen)[:, 0]
                for m in (policy, reference)
            )
            # The classifier's score of the sequence cut just before token t.
            cuts = range(len(sample.prompt.ids), ids.shape[1])
            values = torch.tensor([critic(input_ids=ids[:, :cut]).logits.item() for cut in cuts])
        kl = logprobs - theirs
        rewards = -self.COEF * kl
        rewards[-1] += sample.reward - (0 if sample.ended else self.PENALTY)
        count = len(sample.ids)
        deltas = [rewards[t] + (self.GAMMA * values[t + 1] if t + 1 < count else 0) - values[t] for t in range(count)]
        advantages = torch.stack(
            [sum((self.GAMMA * self.LAMBDA) ** (u - t) * deltas[u] for u in range(t, count)) for t in range(count)]
        )
        return logprobs, kl, values, advantages


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_run_continues_to_the_same_weights(run_phase, stop_after, reference, spec_for, tmp_path, stop):
    output = tmp_path / "run" / "ppo"
    with stop_after(stop):
        assert run_phase("ppo", spec_for(), None, output) == (143, None)
    code, result = run_phase("ppo", spec_for(), None, output)
    assert code == 0
    assert_same(weights(output), weights(reference[0]))
    assert result.artifact_digest == reference[1].artifact_digest
    assert result.metrics == reference[1].metrics
    timeless = [{k: v for k, v in line.items() if "time" not in k and "seconds" not in k} for line in lines(output)]
    assert timeless == [{k: v for k, v in line.items() if k in timeless[0]} for line in lines(reference[0])]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"microBatchTokens": 24}},
        {"packing": False},
        {"parallel": {"gradientCheckpointing": True}},
        {"sampling": {"maxNewTokens": 6, "batchSize": 3}},
    ],
    ids=["micro-batches", "padded", "gradient-checkpointing", "smaller-rollouts"],
)
def test_how_a_round_is_computed_does_not_change_the_result(run_phase, reference, spec_for, tmp_path, changes):
    code, _ = run_phase("ppo", spec_for(**changes), None, tmp_path / "run" / "ppo")
    assert code == 0
    assert_same(weights(tmp_path / "run" / "ppo"), weights(reference[0]), tolerance=2e-5)


@pytest.mark.slow
def test_two_processes_give_the_same_weights(reference, spec_for, on_two_processes, tmp_path):
    output, file = tmp_path / "run" / "ppo", tmp_path / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(output), "spec": spec_for()}))
    on_two_processes("ppo", file)
    assert_same(weights(output), weights(reference[0]), tolerance=1e-5)
    assert PhaseDir(output).read_result().metrics == pytest.approx(reference[1].metrics, rel=1e-3, abs=1e-5)


def test_a_round_ends_early_when_the_policy_has_moved(run_phase, spec_for, tmp_path):
    run_phase("ppo", spec_for(maxKlPerUpdate=1e-6), None, tmp_path / "run" / "ppo")
    assert [line["updates"] for line in lines(tmp_path / "run" / "ppo")] == [1, 1, 1]


def test_a_round_never_ends_before_its_first_update(run_phase, spec_for, tmp_path):
    """What seems to have moved by then is rounding: other rows beside a response."""
    spec = spec_for(maxKlPerUpdate=1e-30, parallel={"precision": "bf16", "microBatchTokens": 24})
    assert run_phase("ppo", spec, None, tmp_path / "run" / "ppo")[0] == 0
    assert [line["updates"] for line in lines(tmp_path / "run" / "ppo")] == [1, 1, 1]


class TestLora:
    LORA = {"rank": 4, "targetModules": ["q_proj", "down_proj"]}

    def test_the_reference_is_the_base_without_adapters(self, run_phase, spec_for, tiny_model_dir, tmp_path):
        """As with a copy of the base as reference, to the bit."""
        spec = spec_for(lora=self.LORA)
        assert run_phase("ppo", spec, None, tmp_path / "a" / "ppo")[0] == 0
        copy = spec_for(lora=self.LORA, reference={"source": str(tiny_model_dir)})
        assert run_phase("ppo", copy, None, tmp_path / "b" / "ppo")[0] == 0
        assert_same(weights(tmp_path / "a" / "ppo"), weights(tmp_path / "b" / "ppo"))
        first, *_, last = lines(tmp_path / "a" / "ppo")
        assert first["kl"] == 0 and last["kl"] > 0

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_adapters_are_trained_and_merged(
        self, run_phase, stop_after, spec_for, tiny_model_dir, tmp_path, precision
    ):
        spec = spec_for(lora=self.LORA, parallel={"precision": precision}, optim={"lr": 1e-2, "eps": 1e-5})
        output, stopped = tmp_path / "a" / "ppo", tmp_path / "b" / "ppo"
        assert run_phase("ppo", spec, None, output)[0] == 0
        held = torch.bfloat16 if precision == "bf16" else torch.float32  # as the base is beneath its adapters
        before, after = load_file(tiny_model_dir / "model.safetensors"), weights(output)
        changed = {name for name in before if not torch.equal(before[name].to(held).to(after[name]), after[name])}
        assert changed and all("q_proj" in name or "down_proj" in name for name in changed)
        with stop_after(2):
            run_phase("ppo", spec, None, stopped)
        assert run_phase("ppo", spec, None, stopped)[0] == 0
        assert_same(weights(stopped), after)

    def test_dropout_is_refused(self, run_phase, spec_for, tmp_path, capsys):
        spec = spec_for(lora={**self.LORA, "dropout": 0.1})
        assert run_phase("ppo", spec, None, tmp_path / "run" / "ppo")[0] == 2
        assert "lora.dropout 0.1" in capsys.readouterr().err


def test_it_learns_what_is_rewarded(run_phase, spec_for, tmp_path):
    """A penalty for not ending, and nothing else worth having: responses learn to end."""
    spec = spec_for(
        iterations=12, batchSize=32, miniBatchSize=32, ppoEpochs=4, missingEosPenalty=3.0, kl={"coef": 0.0},
        optim={"lr": 5e-3, "schedule": "constant", "eps": 1e-8}, criticOptim={"lr": 5e-3, "eps": 1e-8}, whitenRewards=True,
        sampling={"maxNewTokens": 6, "batchSize": 32},
    )  # fmt: skip
    _, result = run_phase("ppo", spec, None, tmp_path / "run" / "ppo")
    first = lines(tmp_path / "run" / "ppo")[0]["ended_share"]
    assert first < 0.3
    assert result.metrics["endedShareLast"] > 0.9


def test_a_strong_penalty_holds_the_policy_back(run_phase, spec_for, tmp_path):
    def kl(coef):
        changes = {"batchSize": 32, "miniBatchSize": 32, "sampling": {"maxNewTokens": 6, "batchSize": 32}}
        spec = spec_for(iterations=12, kl={"coef": coef}, missingEosPenalty=1.0, optim={"lr": 3e-3}, **changes)
        return run_phase("ppo", spec, None, tmp_path / "run" / f"ppo-{coef}")[1].metrics["klLast"]

    assert kl(3.0) < 0.3 * kl(0.0)


def test_dropout_is_taken_out(run_phase, spec_for, tiny_model_dir, tmp_path):
    """With it the first update's ratios would already be noise."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attention_dropout=0.5)
    model.save_pretrained(tmp_path / "dropout")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "dropout")
    spec = spec_for(policy={"source": str(tmp_path / "dropout")}, iterations=1, ppoEpochs=1, miniBatchSize=8)
    run_phase("ppo", spec, None, tmp_path / "run" / "ppo")
    assert lines(tmp_path / "run" / "ppo")[0]["approx_kl"] == pytest.approx(0, abs=1e-9)


@pytest.fixture
def other_reward_dir(tiny_reward_dir, tmp_path):
    """A reward model whose tokens have other ids than the policy's, and whose template is another."""
    from tokenizers import Tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    names = [token for token in core["model"]["vocab"] if not token.startswith("<")]
    ids = [core["model"]["vocab"][name] for name in names]
    core["model"]["vocab"] |= dict(zip(names, reversed(ids), strict=True))
    other = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    other.chat_template = "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
    AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir).save_pretrained(tmp_path / "rm")
    other.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def test_a_reward_model_with_other_tokens_scores_text(run_phase, spec_for, other_reward_dir, tmp_path, capsys):
    """Its rewards are those it gives the responses' text; the critic is the policy with a fresh head."""
    assert_scores_text(run_phase, spec_for, other_reward_dir, tmp_path)
    said = capsys.readouterr().out
    assert "the critic starts from the policy with a fresh head: the reward model reads other tokens" in said


def test_an_encoder_is_a_reward_model_too(run_phase, spec_for, tmp_path, capsys):
    assert_scores_text(run_phase, spec_for, save_encoder("bert", tmp_path / "rm"), tmp_path)
    assert "reward models of type bert score a text as a whole" in capsys.readouterr().out


def assert_scores_text(run_phase, spec_for, folder, tmp_path):
    scored = []

    def spy(workers, model, prompts, responses, *args, **kwargs):
        found = response_rewards(workers, model, prompts, responses, *args, **kwargs)
        scored.append((model, prompts, responses, found))
        return found

    output = tmp_path / "run" / "ppo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.core.rollouts.response_rewards", spy)
        code, result = run_phase("ppo", spec_for(rewardModel={"source": str(folder)}, iterations=2), None, output)
    assert code == 0
    assert all(text.split() for _, _, responses, _ in scored for text in responses)  # no tokens, no empty texts
    mean = sum(scored[-1][3]) / len(scored[-1][3])
    assert result.metrics["rewardLast"] == pytest.approx(mean, abs=1e-5)
    assert len(set(scored[-1][3])) > 1
    trained = load_file(output / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in trained.values())


def test_the_critic_can_have_a_start_of_its_own(
    run_phase, spec_for, tiny_reward_dir, other_reward_dir, tmp_path, capsys
):
    spec = spec_for(
        rewardModel={"source": str(other_reward_dir)}, critic={"source": str(tiny_reward_dir)}, iterations=1
    )
    assert run_phase("ppo", spec, None, tmp_path / "a" / "ppo")[0] == 0
    assert "fresh head" not in capsys.readouterr().out
    refused = {**spec, "critic": {"source": str(other_reward_dir)}}
    assert run_phase("ppo", refused, None, tmp_path / "b" / "ppo")[0] == 2
    assert "critic: it cannot read the policy's tokens: " in capsys.readouterr().err


def test_the_policy_says_nothing_that_the_critic_cannot_embed(run_phase, spec_for, tiny_model_dir, tmp_path):
    """It has a token more, as likely as any other."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["extra"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    spec = spec_for(
        policy={"source": str(tmp_path / "more")}, sampling={"maxNewTokens": 32, "batchSize": 8}, iterations=1
    )
    assert run_phase("ppo", spec, None, tmp_path / "run" / "ppo")[0] == 0


def test_a_fresh_critic_goes_on_from_its_checkpoint(run_phase, spec_for, other_reward_dir, tmp_path, stop_after):
    spec = spec_for(rewardModel={"source": str(other_reward_dir)}, iterations=3)
    whole, output = tmp_path / "a" / "run" / "ppo", tmp_path / "b" / "run" / "ppo"
    assert run_phase("ppo", spec, None, whole)[0] == 0
    with stop_after(2):
        assert run_phase("ppo", spec, None, output)[0] == 143
    assert run_phase("ppo", spec, None, output)[0] == 0
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (whole, output))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
