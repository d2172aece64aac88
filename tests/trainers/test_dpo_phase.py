"""Direct preference optimization as a user runs it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from finished import difference, lines, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.phase_dir import HISTORY
from trainers.phases.dpo import reference as reference_module
from trainers.synthetic import generate

PAIRS = {"synthetic": {"task": "letters", "split": "preferences", "count": 48}}
HELD_OUT = {"synthetic": {"task": "letters", "split": "preference-test", "count": 24}}
PLAIN = {"lr": 1e-3, "schedule": "constant", "warmupRatio": 0.0}
ROUNDING = 2e-6


def spec_for(model: Path, **changes):
    base = {
        "policy": {"source": str(model)},
        "data": {"train": [PAIRS], "maxLength": 64},
        "batchSize": 16,
        "duration": {"maxSteps": 6},
        "optim": {"lr": 1e-3},
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def other_model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """Another random model with the same tokens."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_model_dir).config)
    directory = tmp_path_factory.mktemp("other-model")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed(run_phase, tiny_model_dir, tmp_path_factory):
    """One whole run, to compare others with."""
    output = tmp_path_factory.mktemp("undisturbed") / "run" / "dpo"
    spec = spec_for(tiny_model_dir, data={"train": [PAIRS], "eval": [PAIRS], "maxLength": 64})
    code, result = run_phase("dpo", spec, None, output)
    assert code == 0
    return output, result, spec


def test_training_prefers_the_chosen_responses(undisturbed):
    output, result, _ = undisturbed
    steps = lines(output, "loss")
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(steps[0]["reward"]) < 1e-5
    assert steps[-1]["loss"] < 0.69
    assert steps[-1]["reward"] == pytest.approx(steps[-1]["rewards/chosen"] - steps[-1]["rewards/rejected"], abs=1e-5)
    assert result.metrics["evalAccuracy"] > 0.7  # on pairs it has seen: six steps teach no more
    assert result.metrics["evalLoss"] < 0.6932
    assert result.metrics["evalMargin"] > 0
    assert {"grad_norm", "learning_rate", "log_ratio", "logps/chosen", "logps/rejected", "accuracy"} <= steps[0].keys()


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "ipo", "hinge"])
def test_three_steps_are_trls(run_phase, tiny_model_dir, other_model_dir, tmp_path, kind):
    """Losses and gradient norms of TRL's own DPOTrainer, with the same weights, batches and optimizer."""
    smoothing = {"labelSmoothing": 0.1} if kind == "robust" else {}
    spec = spec_for(
        tiny_model_dir,
        data={"train": [{"synthetic": PAIRS["synthetic"] | {"count": 16}}], "maxLength": 64},
        duration={"maxSteps": 3},
        optim=PLAIN,
        loss=kind,
        reference={"source": str(other_model_dir)},
        **smoothing,
    )
    assert run_phase("dpo", spec, None, tmp_path / "run" / "dpo")[0] == 0
    ours = [[line["loss"], line["grad_norm"], line["reward"]] for line in lines(tmp_path / "run" / "dpo", "loss")]
    theirs = trl_steps(tiny_model_dir, other_model_dir, tmp_path, kind, 0.1 if smoothing else 0.0)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-5, rtol=2e-5)


def trl_steps(policy: Path, reference: Path, tmp_path: Path, kind: str, smoothing: float) -> list[list[float]]:
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": f"<user> {row['prompt']} <assistant> ", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in generate("letters", "preferences", 16, 0)
    ]
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=16,
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        loss_type=[kind],
        label_smoothing=smoothing,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [[entry["loss"], entry["grad_norm"], entry["rewards/margins"]] for entry in history]


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_stored_scores_are_live_scores(run_phase, tiny_model_dir, other_model_dir, tmp_path, explicit, lora):
    for mode in ("precompute", "on-the-fly"):
        changes = {"referenceScores": mode, "duration": {"maxSteps": 3}}
        changes |= {"reference": {"source": str(other_model_dir)}} if explicit else {}
        changes |= {"lora": lora} if lora else {}
        code, _ = run_phase("dpo", spec_for(tiny_model_dir, **changes), None, tmp_path / mode / "run" / "dpo")
        assert code == 0
    stored, live = (tmp_path / mode / "run" / "dpo" for mode in ("precompute", "on-the-fly"))
    assert (stored / "reference").exists()
    assert not (live / "reference").exists()
    assert difference(weights(stored), weights(live)) < 5e-5
    for ours, theirs in zip(lines(stored, "loss"), lines(live, "loss"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_a_reference_that_lacks_tokens_is_refused(run_phase, tiny_model_dir, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["surprise"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "surprise", "rejected": "b"}) + "\n")
    data = {"train": [{"files": str(tmp_path / "d.jsonl")}], "maxLength": 64}
    for mode in ("precompute", "on-the-fly"):
        spec = spec_for(tmp_path / "other", reference={"source": str(tiny_model_dir)}, data=data, referenceScores=mode)
        assert run_phase("dpo", spec, None, tmp_path / "run" / "dpo") == (2, None)
        said = capsys.readouterr().err
        assert "reference: its tokens are not" in said or "data.train: the reference does not know the token" in said


def test_changed_data_are_scored_again(run_phase, tiny_model_dir, tmp_path, stop_after):
    spec = spec_for(tiny_model_dir, data={"train": [{"files": "d.jsonl"}], "maxLength": 64})
    output = tmp_path / "run" / "dpo"
    for count, steps in ((20, 1), (24, 6)):
        rows = generate("letters", "preferences", count, 0)
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with stop_after(steps):
            run_phase("dpo", spec, None, output, baseDir=str(tmp_path))
    (aside,) = (output.parent / HISTORY).iterdir()
    for place, count in ((output, 24), (aside, 20)):
        (path,) = (place / "reference").iterdir()
        assert len(load_file(path)["logprobs"]) == count


def test_damaged_scores_are_made_again(run_phase, tiny_model_dir, tmp_path, stop_after, capsys):
    spec, whole, output = (
        spec_for(tiny_model_dir),
        tmp_path / "whole" / "run" / "dpo",
        tmp_path / "other" / "run" / "dpo",
    )
    run_phase("dpo", spec, None, whole)
    with stop_after(2):
        run_phase("dpo", spec, None, output)
    (stored,) = (output / "reference").iterdir()
    content = stored.read_bytes()
    stored.write_bytes(content[:-8] + bytes(8))
    assert run_phase("dpo", spec, None, output)[0] == 0
    assert "its pairs are scored again" in capsys.readouterr().err
    assert stored.read_bytes() == content
    assert difference(weights(whole), weights(output)) == 0.0


def test_sigterm_is_answered_while_the_reference_scores(run_phase, tiny_model_dir, tmp_path, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return all_scores(*args)

    all_scores = reference_module._all_scores
    monkeypatch.setattr(reference_module, "_all_scores", interrupted)
    assert run_phase("dpo", spec_for(tiny_model_dir), None, tmp_path / "run" / "dpo") == (143, None)


# ---------------------------------------------------------------- what must not change the result


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_run_that_was_stopped_ends_the_same(run_phase, undisturbed, tmp_path, stop_after, monkeypatch, k):
    whole, result, spec = undisturbed
    output = tmp_path / "run" / "dpo"
    with stop_after(k):
        assert run_phase("dpo", spec, None, output) == (143, None)
    monkeypatch.setattr(reference_module, "_all_scores", None)  # what is stored is not computed again
    code, resumed = run_phase("dpo", spec, None, output)
    assert code == 0
    assert difference(weights(whole), weights(output)) == 0.0
    assert resumed.metrics == result.metrics
    assert [line["loss"] for line in lines(output, "loss")] == [line["loss"] for line in lines(whole, "loss")]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_micro_batches_and_layout_do_not_change_a_step(run_phase, tiny_model_dir, tmp_path, lora):
    found = []
    for packing, tokens in ((True, 8192), (True, 64), (False, 100), (False, 8)):
        changes = {"lora": lora} if lora else {}
        spec = spec_for(
            tiny_model_dir,
            data={"train": [PAIRS], "maxLength": 64, "packing": packing},
            parallel={"microBatchTokens": tokens},
            duration={"maxSteps": 2},
            nllWeight=0.5,
            **changes,
        )
        output = tmp_path / f"{packing}-{tokens}" / "run" / "dpo"
        assert run_phase("dpo", spec, None, output)[0] == 0
        found.append([[line["loss"], line["grad_norm"], line["nll"]] for line in lines(output, "loss")])
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), atol=ROUNDING, rtol=1e-5)


def test_the_nll_term_is_the_chosen_responses_loss_per_token(run_phase, tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, batchSize=48, duration={"maxSteps": 1}, nllWeight=0.5)
    run_phase("dpo", spec, None, tmp_path / "run" / "dpo")
    model, tokenizer = (auto.from_pretrained(tiny_model_dir) for auto in (AutoModelForCausalLM, AutoTokenizer))
    total = count = 0.0
    for row in generate("letters", "preferences", 48, 0):
        prompt = [{"role": "user", "content": row["prompt"]}]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        ids = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": row["chosen"]}], return_tensors="pt"
        )["input_ids"]
        labels = ids.clone()
        labels[:, :start] = -100
        count += (labels != -100).sum().item()
        total += model(input_ids=ids, labels=labels).loss.item() * (labels != -100).sum().item()
    first = lines(tmp_path / "run" / "dpo", "loss")[0]
    assert first["nll"] == pytest.approx(total / count, abs=1e-5)
    assert first["loss"] == pytest.approx(0.693147 + 0.5 * total / count, abs=1e-5)


def test_adapters_are_merged_into_what_is_saved(run_phase, tiny_model_dir, tmp_path):
    output = tmp_path / "run" / "dpo"
    spec = spec_for(tiny_model_dir, lora={"rank": 4}, optim={"lr": 1e-2})
    code, result = run_phase("dpo", spec, None, output)
    assert code == 0
    trained, start = weights(output), load_file(tiny_model_dir / "model.safetensors")
    assert trained.keys() == start.keys()
    assert result.metrics["parameters"] == sum(tensor.numel() for tensor in start.values())
    changed = {name.split(".")[-2] for name in start if not torch.equal(trained[name], start[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_best_weights_are_kept(run_phase, tiny_model_dir, tmp_path):
    output = tmp_path / "run" / "dpo"
    spec = spec_for(
        tiny_model_dir,
        data={"train": [PAIRS], "eval": [HELD_OUT], "maxLength": 64},
        optim={"lr": 0.05, "schedule": "constant"},  # so high that it gets worse
        duration={"maxSteps": 8},
        evaluation={"everySteps": 1, "keepBest": True},
    )
    code, result = run_phase("dpo", spec, None, output)
    assert code == 0
    losses = [line["eval_loss"] for line in lines(output, "eval_loss")]
    assert len(losses) == 8
    assert min(losses) < losses[-1]
    assert result.metrics["evalLoss"] == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(run_phase, on_two_processes, tiny_model_dir, tmp_path):
    """Uneven shares, too: three pairs on two processes, with eval and best weights."""
    spec = spec_for(
        tiny_model_dir,
        data={"train": [PAIRS], "eval": [HELD_OUT], "maxLength": 64},
        batchSize=3,
        parallel={"microBatchTokens": 64},
        evaluation={"everySteps": 2, "keepBest": True},
        nllWeight=0.1,
    )
    one, two = tmp_path / "one" / "run" / "dpo", tmp_path / "two" / "run" / "dpo"
    assert run_phase("dpo", spec, None, one)[0] == 0
    two.parent.mkdir(parents=True)
    (two.parent / "dpo.yaml").write_text(yaml.safe_dump({"output": str(two), "spec": spec}))
    on_two_processes("dpo", two.parent / "dpo.yaml")
    for ours, theirs in zip(lines(one, "loss"), lines(two, "loss"), strict=True):
        for name in ("loss", "grad_norm", "accuracy", "reward", "nll"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert difference(weights(one), weights(two)) < 1e-4
