"""Responses sampled ahead by older weights: which weights, what they weigh, stopping with some on their way, processes."""

import json
import time

import pytest
import torch
import yaml
from distributed.acting import after_steps
from finished import assert_same, lines, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from trainers.phase_dir import PhaseDir

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 20}}], "maxPromptLength": 32}
SAMPLING = {"maxNewTokens": 6, "batchSize": 8}


@pytest.fixture(scope="module")
def ppo_spec(tiny_model_dir, tiny_reward_dir):
    def make(**changes):
        return {
            "policy": {"source": str(tiny_model_dir)}, "rewardModel": {"source": str(tiny_reward_dir)}, "data": PROMPTS,
            "iterations": 4, "batchSize": 8, "miniBatchSize": 4, "ppoEpochs": 2, "sampling": SAMPLING, "staleness": 1,
            "optim": {"lr": 1e-2, "eps": 1e-5}, "criticOptim": {"lr": 1e-3, "eps": 1e-5}, "missingEosPenalty": 0.5,
        } | changes  # fmt: skip

    return make


@pytest.fixture(scope="module")
def distill_spec(tiny_model_dir, tiny_reward_dir, louder, tmp_path_factory):
    from trainers.synthetic import generate

    traces = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    rows = generate("letters", "demonstrations", 24, 0)
    told = [{"prompt": r["prompt"], "teacher_response": r["response"], "reward": 1.0} for r in rows]
    traces.write_text("".join(json.dumps(row) + "\n" for row in told))

    def make(**changes):
        return {
            "teacher": {"source": str(louder(8))}, "student": {"source": str(tiny_model_dir)}, "traces": {"files": str(traces)},
            "rewardModel": {"source": str(tiny_reward_dir)}, "prompts": PROMPTS, "sampling": SAMPLING, "staleness": 1,
            "divergenceBeta": 0.5, "maxLength": 48, "batchSize": 8, "duration": {"maxSteps": 6},
            "optim": {"lr": 1e-2, "schedule": "constant", "warmupRatio": 0},
        } | changes  # fmt: skip

    return make


class KeptWeights:
    """What staleness means, step by step: weights of every step are kept, and put back to sample by them."""

    models = ()

    def __init__(self, ctx, spec, policy, prompts_of, total_steps, reward_model=None):
        self.ctx, self.spec, self.policy, self.prompts_of, self.reward_model = (
            ctx,
            spec,
            policy,
            prompts_of,
            reward_model,
        )
        self.history = []

    def start(self, first):
        """There is no server."""

    def samples(self, step):
        from trainers.core.rollouts import respond

        state = self.policy.model.state_dict()
        self.history.append({name: tensor.clone() for name, tensor in state.items()})
        prompts = self.prompts_of(step)
        if not prompts:
            return []
        keys = [(self.ctx.seed, step, i) for i in range(len(prompts))]
        self.policy.model.load_state_dict(self.history[max(0, step - self.spec.staleness)])
        found = respond(self.ctx.workers, self.policy, prompts, self.spec.sampling, keys, self.reward_model)
        self.policy.model.load_state_dict(self.history[-1])
        return found

    def saved(self, step):
        return iter(())

    def close(self):
        pass


@pytest.fixture
def kept_weights(monkeypatch):
    monkeypatch.setattr("trainers.phases.ppo.train.RolloutsAhead", KeptWeights)
    monkeypatch.setattr("trainers.phases.distill.train.RolloutsAhead", KeptWeights)


@pytest.fixture
def spied(monkeypatch):
    """What a function of a module returned, or was given, each time."""

    def spy(module, name, given=None):
        found, real = [], getattr(module, name)

        def spying(*args):
            made = real(*args)
            found.append(made if given is None else args[given])
            return made

        monkeypatch.setattr(module, name, spying)
        return found

    return spy


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ppo", {"staleness": 3}),
        ("ppo", {"lora": {"rank": 4, "targetModules": ["q_proj", "down_proj"]}}),
        ("distill", {"staleness": 2}),
    ],
)
def test_it_is_what_kept_weights_would_have_sampled(run_phase, request, tmp_path, kind, changes):
    spec = request.getfixturevalue(f"{kind}_spec")(**changes)
    assert run_phase(kind, spec, None, tmp_path / "ahead" / "run" / kind)[0] == 0
    request.getfixturevalue("kept_weights")
    assert run_phase(kind, spec, None, tmp_path / "kept" / "run" / kind)[0] == 0
    assert_same(weights(tmp_path / "ahead" / "run" / kind), weights(tmp_path / "kept" / "run" / kind))
    own = [line for line in lines(tmp_path / "ahead" / "run" / kind) if line.get("on_policy", 1)]
    apart = [line["mismatch"] for line in own]
    assert [line["staleness"] for line in own] == [min(line["step"] - 1, spec["staleness"]) for line in own]
    assert all((m > 1e-7) == (line["staleness"] > 0) for m, line in zip(apart, own, strict=True))


def fresh_logprobs(model, prompt, response, temperature=1.0):
    """transformers' own, of one sequence alone."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def test_a_rounds_first_loss_by_hand(run_phase, spied, ppo_spec, tiny_model_dir, tmp_path):
    """Both models' probabilities by transformers, at the temperature of the sampling; with ratios of 1 the loss is -mean(w A)."""
    from trainers.phases.ppo import train

    spec = ppo_spec(
        iterations=2, ppoEpochs=1, miniBatchSize=8, importanceCap=1.1, sampling={**SAMPLING, "temperature": 0.7},
        optim={"lr": 1e-2, "schedule": "constant", "warmupRatio": 0},
    )  # fmt: skip
    assert run_phase("ppo", {**spec, "iterations": 1}, None, tmp_path / "one" / "run" / "ppo")[0] == 0
    rounds = spied(train, "optimise", given=4)
    assert run_phase("ppo", spec, None, tmp_path / "two" / "run" / "ppo")[0] == 0
    sampler = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "run" / "ppo" / "model")
    first, second = rounds
    assert_close(first.importance, first.mask.float(), atol=1e-4, rtol=0)
    ratios, total = [], 0.0
    for i, sample in enumerate(second.samples):
        then, now = (fresh_logprobs(model, sample.prompt.ids, sample.ids, 0.7) for model in (sampler, policy))
        ratios.append((now - then).exp())
        wanted = ratios[-1].clamp(max=1.1)
        assert_close(second.importance[i, : len(sample.ids)], wanted, atol=1e-4, rtol=1e-4)
        total -= float((wanted * second.advantages[i, : len(sample.ids)]).sum())
    ratios, line = torch.cat(ratios), lines(tmp_path / "two" / "run" / "ppo")[1]
    assert line["policy_loss"] == pytest.approx(total / len(ratios), abs=1e-4)
    assert line["mismatch"] == pytest.approx(float((ratios - 1 - ratios.log()).mean()), rel=1e-3)
    assert line["importance_truncated"] == pytest.approx(float((ratios > 1.1).float().mean()))
    assert line["importance_weight"] == pytest.approx(float(ratios.clamp(max=1.1).mean()), rel=1e-4)


def test_a_distillations_loss_by_hand(run_phase, spied, distill_spec, louder, tiny_model_dir, tmp_path):
    """Of its second step: TRL's divergence, weighed by what the student says of the tokens before over what it said of them."""
    from trl.experimental.gkd import GKDTrainer

    from trainers.core.rollouts_ahead import RolloutsAhead

    spec = distill_spec(onPolicyFraction=1, duration={"maxSteps": 2}, importanceCap=1.2)
    del spec["traces"], spec["rewardModel"]
    assert (
        run_phase("distill", {**spec, "duration": {"maxSteps": 1}}, None, tmp_path / "one" / "run" / "distill")[0] == 0
    )
    steps = spied(RolloutsAhead, "samples")
    assert run_phase("distill", spec, None, tmp_path / "two" / "run" / "distill")[0] == 0
    teacher = AutoModelForCausalLM.from_pretrained(spec["teacher"]["source"])
    sampler = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "run" / "distill" / "model")
    above = below = 0.0
    for sample in steps[1]:
        prompt, ids = sample.prompt.ids, sample.ids
        then, now = (fresh_logprobs(model, prompt, ids) for model in (sampler, student))
        for t in range(len(ids)):
            weight = min(float((now - then)[:t].sum().exp()), 1.2)
            with torch.no_grad():
                q, p = (m(torch.tensor([prompt + ids])).logits[:, len(prompt) - 1 + t] for m in (student, teacher))
            above += weight * GKDTrainer.generalized_jsd_loss(q, p, None, 0.5, 1.0, "sum").item()
            below += weight
    line = lines(tmp_path / "two" / "run" / "distill")[1]
    assert line["importance_truncated"] > 0
    assert line["loss"] == pytest.approx(above / below, rel=1e-4)


@pytest.mark.parametrize(("kind", "stop"), [("ppo", 3), ("distill", 2)])
def test_a_run_stopped_with_responses_on_their_way_continues_to_the_same_weights(
    run_phase, stop_after, request, tmp_path, kind, stop
):
    spec = request.getfixturevalue(f"{kind}_spec")(staleness=2, checkpoint={"everySteps": 1})
    whole, output = tmp_path / "whole" / "run" / kind, tmp_path / "stopped" / "run" / kind
    _, wanted = run_phase(kind, spec, None, whole)

    def killed(step, *_):
        if step == stop:
            while not (output / "checkpoints" / f"step-{stop - 1}").is_dir():
                time.sleep(0.01)
            raise KilledError

    with after_steps(killed), pytest.raises(KilledError):
        run_phase(kind, spec, None, output)
    assert "on-its-way/" in (output / "checkpoints" / f"step-{stop - 1}" / "index.json").read_text()
    with stop_after(stop):
        assert run_phase(kind, spec, None, output) == (143, None)
    code, result = run_phase(kind, spec, None, output)
    assert code == 0
    assert_same(weights(output), weights(whole))
    assert result.metrics == wanted.metrics


class KilledError(BaseException):
    """What nothing answers."""


def test_the_two_sides_share_a_processors_threads(run_phase, monkeypatch, distill_spec, tmp_path):
    from trainers.core import rollouts_ahead

    real, training, sampling = rollouts_ahead.own_responses, set(), set()

    def counted(*args, **kwargs):
        sampling.add(torch.get_num_threads())
        return real(*args, **kwargs)

    monkeypatch.setattr(rollouts_ahead, "own_responses", counted)
    torch.set_num_threads(3)
    with after_steps(lambda *_: training.add(torch.get_num_threads())):
        assert run_phase("distill", distill_spec(duration={"maxSteps": 3}), None, tmp_path / "run" / "distill")[0] == 0
    assert (training, sampling, torch.get_num_threads()) == ({2}, {1}, 3)


@pytest.mark.slow
def test_two_processes_give_the_same_weights(run_phase, on_two_processes, distill_spec, tmp_path):
    spec, one, two = distill_spec(), tmp_path / "one" / "run" / "distill", tmp_path / "two" / "run" / "distill"
    assert run_phase("distill", spec, None, one)[0] == 0
    file = tmp_path / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(two), "spec": spec}))
    on_two_processes("distill", file)
    assert_same(weights(two), weights(one), tolerance=1e-5)
    assert PhaseDir(two).read_result().metrics == pytest.approx(PhaseDir(one).read_result().metrics, rel=1e-4)


def test_it_learns_what_is_rewarded_as_fast(run_phase, ppo_spec, tmp_path):
    """A penalty for not ending, and nothing else worth having, as in test_ppo_phase.py, by samples of the round before."""
    spec = ppo_spec(
        iterations=12, batchSize=32, miniBatchSize=32, ppoEpochs=4, missingEosPenalty=3.0, kl={"coef": 0.0}, whitenRewards=True,
        optim={"lr": 5e-3, "schedule": "constant", "eps": 1e-8}, criticOptim={"lr": 5e-3, "eps": 1e-8},
        sampling={"maxNewTokens": 6, "batchSize": 32},
    )  # fmt: skip
    _, result = run_phase("ppo", spec, None, tmp_path / "run" / "ppo")
    assert lines(tmp_path / "run" / "ppo")[0]["ended_share"] < 0.3
    assert result.metrics["endedShareLast"] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"strategy": "fsdp"}}, "staleness 1 copies whole weights, which parallel.strategy fsdp splits"),
        ({"parallel": {"strategy": "deepspeed"}}, "which parallel.strategy deepspeed splits: set ddp or single"),
        ({"parallel": {"compile": True}}, "set parallel.compile: false, sampling.engine: vllm, or staleness: 0"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature 0 has none"),
        ({"importanceCap": 0.5}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_stale_is_refused_before_anything_starts(distill_spec, changes, message):
    from trainers.phases.distill.spec import DistillSpec

    with pytest.raises(ValueError, match=message):
        DistillSpec.model_validate(distill_spec(**changes))
