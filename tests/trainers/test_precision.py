"""What is held and computed in which precision, through whole phases. bf16 works on any CPU, if slowly."""

from pathlib import Path

import pytest
import torch
from finished import lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainers.core.scratch import scratch_model
from trainers.core.trainee import Trainee
from trainers.spec import ScratchModel

DEMONSTRATIONS = {"synthetic": {"task": "letters", "split": "demonstrations", "count": 32}}
PREFERENCES = {"synthetic": {"task": "letters", "split": "preferences", "count": 24}}
PROMPTS = {"synthetic": {"task": "letters", "split": "prompts", "count": 8}}


@pytest.fixture(scope="module")
def sharp_model(tmp_path_factory) -> Path:
    """A random model with weights so large that rounding shows in every score."""
    tokenizer = {"kind": "word", "trainOn": [{"synthetic": {**PREFERENCES["synthetic"], "count": 64}}]}
    spec = ScratchModel.model_validate({"hiddenSize": 32, "numLayers": 2, "tokenizer": tokenizer})
    model, words = scratch_model(spec, 0, Path("."))
    for weight in model.parameters():
        weight.data *= 4
    folder = tmp_path_factory.mktemp("sharp")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sft(model: Path, dtype: str = "bf16", **changes):
    return {
        "model": {"source": str(model), "dtype": dtype},
        "data": {"train": [DEMONSTRATIONS], "maxLength": 64},
        "batchSize": 8,
        "duration": {"maxSteps": 4},
        "optim": {"lr": 1e-2},
        "parallel": {"precision": "bf16"},
        **changes,
    }


def dpo(model: Path, precision: str, dtype: str, packing: bool, **changes):
    return {
        "policy": {"source": str(model), "dtype": dtype},
        "data": {"train": [PREFERENCES], "maxLength": 64, "packing": packing},
        "batchSize": 8,
        "duration": {"maxSteps": 1},
        "parallel": {"precision": precision},
        **changes,
    }


HELD = [("fp32", "auto"), ("bf16", "auto"), ("bf16", "bf16")]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.parametrize("how", ["precompute", "on-the-fly"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("precision", "dtype"), HELD)
def test_the_reference_is_the_policy_at_step_0_bit_for_bit(
    run_phase, sharp_model, tmp_path, precision, dtype, packing, how, lora
):
    """Of three steps, so that what is stored is not scored in one go; a small forward pass, so that a step is several."""
    changes = {"referenceScores": how, "duration": {"maxSteps": 3}} | ({"lora": lora} if lora else {})
    changes["parallel"] = {"precision": precision, "microBatchTokens": 200}
    output = tmp_path / "run" / "dpo"
    code, _ = run_phase("dpo", dpo(sharp_model, precision, dtype, packing, **changes), None, output)
    assert code == 0
    first = lines(output)[0]
    assert first["log_ratio"] == 0.0
    assert (first["reward"], first["accuracy"]) == (0.0, 0.5)
    assert first["logps/chosen"] != pytest.approx(first["logps/rejected"]), "there is something to see"


@pytest.mark.parametrize(("precision", "dtype"), HELD)
def test_ppo_starts_at_a_kl_of_exactly_0(run_phase, sharp_model, tiny_reward_dir, tmp_path, precision, dtype):
    spec = {
        "policy": {"source": str(sharp_model), "dtype": dtype},
        "rewardModel": {"source": str(tiny_reward_dir)},
        "data": {"prompts": [PROMPTS], "maxPromptLength": 64},
        "iterations": 1,
        "batchSize": 4,
        "ppoEpochs": 1,
        "sampling": {"maxNewTokens": 6},
        "parallel": {"precision": precision},
    }
    code, _ = run_phase("ppo", spec, None, tmp_path / "run" / "ppo")
    assert code == 0
    (first,) = lines(tmp_path / "run" / "ppo")
    assert (first["kl"], first["kl_sequence"]) == (0.0, 0.0)


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_bf16_weights_learn_and_leave_a_bf16_model(run_phase, sharp_model, tmp_path, state):
    spec = sft(sharp_model, optim={"lr": 1e-2, "stateDtype": state}, duration={"maxSteps": 8})
    code, _ = run_phase("sft", spec, None, tmp_path / "run" / "sft")
    assert code == 0
    losses = [line["loss"] for line in lines(tmp_path / "run" / "sft")]
    assert losses[-1] < losses[0] - 0.5
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "sft" / "model", dtype="auto")
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "state", "lora"),
    [("auto", "fp32", None), ("auto", "bf16", None), ("bf16", "fp32", None), ("auto", "fp32", {"rank": 4})],
)
def test_in_bf16_going_on_is_exact(run_phase, stop_after, sharp_model, tmp_path, dtype, state, lora):
    spec = sft(sharp_model, dtype, optim={"lr": 1e-2, "stateDtype": state}) | ({"lora": lora} if lora else {})
    whole, stopped = (tmp_path / name / "run" / "sft" for name in ("whole", "stopped"))
    run_phase("sft", spec, None, whole)
    with stop_after(2):
        assert run_phase("sft", spec, None, stopped)[0] == 143
    assert run_phase("sft", spec, None, stopped)[0] == 0
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_bases_of_adapters_are_held_in_the_arithmetics_type(run_phase, sharp_model, tmp_path, monkeypatch):
    import trainers.phases.sft.train as phase

    seen = {}
    load = phase.load_causal_lm

    def looking(*args, **kwargs):
        loaded = load(*args, **kwargs)
        seen.update({name: p.dtype for name, p in loaded.model.named_parameters()})
        return loaded

    monkeypatch.setattr(phase, "load_causal_lm", looking)
    code, _ = run_phase("sft", sft(sharp_model, "auto", lora={"rank": 4}), None, tmp_path / "run" / "sft")
    assert code == 0
    assert {dtype for name, dtype in seen.items() if "lora_" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in seen.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_bf16_weights_in_fp32_arithmetic_are_refused(run_phase, sharp_model, tmp_path, capsys, monkeypatch, precision):
    """`auto` is fp32 where there is no GPU; that is known once the phase runs, the other before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = sft(sharp_model, parallel={"precision": precision})
    assert run_phase("sft", spec, None, tmp_path / "run" / "sft")[0] == 2
    assert "dtype bf16" in (said := capsys.readouterr().err) and "precision" in said


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_weights_that_the_last_step_sends_to_infinity_are_no_model(
    run_phase, sharp_model, tmp_path, capsys, monkeypatch, lora
):
    update = Trainee.update

    def overflowing(self, step):
        found = update(self, step)
        if step == 3:
            self.engine.parameters[-1].data.view(-1)[0] = torch.inf
        return found

    monkeypatch.setattr(Trainee, "update", overflowing)
    spec = sft(sharp_model, "auto") | ({"lora": lora} if lora else {})
    code, result = run_phase("sft", spec, None, tmp_path / "run" / "sft")
    assert (code, result) == (4, None)
    assert "is not finite after the last step" in capsys.readouterr().err


def test_small_updates_of_adapters_are_in_the_model_that_is_saved(run_phase, sharp_model, tmp_path):
    """Merged into bf16 weights they would be gone: 1e-5 is less than half the distance to a weight's neighbour."""
    spec = sft(sharp_model, "auto", lora={"rank": 4}, optim={"lr": 1e-4}, duration={"maxSteps": 2})
    assert run_phase("sft", spec, None, tmp_path / "run" / "sft")[0] == 0
    before = load_file(sharp_model / "model.safetensors")
    after = load_file(tmp_path / "run" / "sft" / "model" / "model.safetensors")
    updates = load_file(tmp_path / "run" / "sft" / "model" / "adapter" / "adapter_model.safetensors")
    name = next(key for key in updates if "lora_A" in key)
    update = updates[name.replace("lora_A", "lora_B")] @ updates[name] * (32 / 4)
    weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
    torch.testing.assert_close(after[weight] - before[weight].bfloat16().float(), update, atol=1e-7, rtol=1e-3)
    assert update.abs().max() > 0
