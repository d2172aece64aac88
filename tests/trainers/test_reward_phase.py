"""Reward modelling as a user runs it, and the scores that other phases read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from finished import difference, lines, weights
from one_rank import OneRank
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trainers.core.reward_models import load_reward_model, new_reward_model
from trainers.core.rewards import response_rewards
from trainers.spec import ModelRef, Parallel, RewardModelRef
from trainers.synthetic import generate

PAIRS = {"synthetic": {"task": "letters", "split": "preferences", "count": 48}}
PLAIN = {"lr": 1e-3, "schedule": "constant", "warmupRatio": 0.0}
CPU = torch.device("cpu")


def spec_for(model: Path, **changes):
    base = {
        "model": {"source": str(model)},
        "data": {"train": [PAIRS], "maxLength": 64},
        "batchSize": 16,
        "duration": {"maxSteps": 6},
        "optim": {"lr": 1e-3},
    }
    return {**base, **changes}


def context(seed: int = 0):
    """As much of a phase's context as loading a model takes."""
    spec = SimpleNamespace(parallel=Parallel(), export_dtype="auto")
    return SimpleNamespace(
        workers=OneRank(), seed=seed, spec=spec, base_dir=Path("."), model_location=lambda ref: ref.source
    )


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def messages(row: dict, side: str | None = None) -> list[dict]:
    prompt = [{"role": "user", "content": row["prompt"]}]
    return prompt if side is None else [*prompt, {"role": "assistant", "content": row[side]}]


def transformers_scores(folder: Path, rows: list[dict]) -> torch.Tensor:
    """Scores of chosen and rejected by transformers alone, in one right-padded batch: (P, 2)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [
        tokenizer.apply_chat_template(messages(r, s), tokenize=False) for r in rows for s in ("chosen", "rejected")
    ]
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[:, 0]
        alone = torch.cat(
            [model(tokenizer(t, add_special_tokens=False, return_tensors="pt")["input_ids"]).logits[0] for t in texts]
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    return alone.view(-1, 2)


def our_scores(folder: Path, rows: list[dict], ended: bool = True) -> torch.Tensor:
    ctx = context()
    loaded = load_reward_model(ctx, RewardModelRef(source=str(folder)))
    sides = [(row, side) for row in rows for side in ("chosen", "rejected")]
    prompts, responses = [messages(row) for row, _ in sides], [row[side] for row, side in sides]
    flags = None if ended else [False] * len(sides)
    scores = response_rewards(ctx.workers, loaded, prompts, responses, flags, max_length=64, micro_batch_tokens=200)
    return torch.tensor(scores).view(-1, 2)


@pytest.fixture(scope="module")
def undisturbed(run_phase, tiny_model_dir, tmp_path_factory):
    """One whole run, to compare others with."""
    output = tmp_path_factory.mktemp("undisturbed") / "run" / "reward"
    spec = spec_for(tiny_model_dir, data={"train": [PAIRS], "eval": [PAIRS], "maxLength": 64}, centering=0.01)
    code, result = run_phase("reward", spec, None, output)
    assert code == 0
    return output, result, spec


def test_training_ranks_the_pairs(undisturbed):
    output, result, _ = undisturbed
    steps = lines(output, "loss")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {"accuracy", "reward", "grad_norm", "learning_rate"} <= steps[0].keys()
    assert result.metrics["evalAccuracy"] > 0.6  # on pairs it has seen: six steps teach no more
    assert result.metrics["evalLoss"] < 0.6932


def test_final_metrics_are_those_of_transformers_own_scores(undisturbed):
    output, result, _ = undisturbed
    rows = list(generate("letters", "preferences", 48, 0))
    scores = transformers_scores(output / "model", rows)
    gap = scores[:, 0] - scores[:, 1]
    lengths = torch.tensor([[len(row[side].split()) + 1 for side in ("chosen", "rejected")] for row in rows])
    longer = (lengths[:, 0] > lengths[:, 1]).float() + 0.5 * (lengths[:, 0] == lengths[:, 1]).float()
    expected = {
        "evalAccuracy": (gap > 0).float().mean(),
        "evalLoss": torch.nn.functional.softplus(-gap).mean(),
        "evalMargin": gap.mean(),
        "rewardMean": scores.mean(),
        "rewardStd": scores.std(correction=0),
        "lengthBaselineAccuracy": longer.mean(),
        "lengthCorrelation": torch.corrcoef(torch.stack([scores.flatten(), lengths.flatten().float()]))[0, 1],
    }
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value.item(), abs=1e-5), name
    assert 0 <= result.metrics["evalCalibrationError"] <= 1


def test_responses_are_scored_as_in_training(undisturbed):
    rows = list(generate("letters", "preferences", 12, 0))
    ours = our_scores(undisturbed[0] / "model", rows)
    torch.testing.assert_close(ours, transformers_scores(undisturbed[0] / "model", rows), atol=1e-5, rtol=1e-5)


def test_a_response_that_did_not_end_is_scored_without_end_token(undisturbed):
    folder = undisturbed[0] / "model"
    rows = list(generate("letters", "preferences", 4, 0))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [
        tokenizer.apply_chat_template(messages(r, s), tokenize=False) for r in rows for s in ("chosen", "rejected")
    ]
    open_ended = [tokenizer(t.removesuffix("<eos>"), return_tensors="pt")["input_ids"] for t in texts]
    expected = torch.cat([model(ids).logits[0] for ids in open_ended]).view(-1, 2)
    torch.testing.assert_close(our_scores(folder, rows, ended=False), expected, atol=1e-5, rtol=1e-5)


def test_a_response_longer_than_the_limit_is_cut_and_scored(undisturbed):
    ctx = context()
    loaded = load_reward_model(ctx, RewardModelRef(source=str(undisturbed[0] / "model")))
    long = " ".join(["A"] * 100)
    scores = response_rewards(ctx.workers, loaded, [messages({"prompt": "open hat"})] * 2, [long, ""], None, 16)
    assert torch.tensor(scores).isfinite().all()
    assert response_rewards(ctx.workers, loaded, [], [], None, 16) == []


@pytest.mark.parametrize("settings", [{}, {"centering": 0.01}, {"useMargin": True}])
def test_three_steps_are_trls(run_phase, tiny_model_dir, tmp_path, settings):
    """Losses, margins and gradient norms of TRL's own RewardTrainer: same weights, batches and optimizer."""
    rows = [row | {"margin": 0.1 * i} for i, row in enumerate(generate("letters", "preferences", 16, 0))]
    write(tmp_path / "d.jsonl", rows)
    data = {"train": [{"files": "d.jsonl"}], "maxLength": 64}
    spec = spec_for(tiny_model_dir, data=data, duration={"maxSteps": 3}, optim=PLAIN, **settings)
    output = tmp_path / "run" / "reward"
    assert run_phase("reward", spec, None, output, baseDir=str(tmp_path))[0] == 0
    ours = [[line["loss"], line["grad_norm"], line["reward"]] for line in lines(output, "loss")]
    theirs = trl_steps(tiny_model_dir, tmp_path, rows, settings)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-5, rtol=2e-5)


def trl_steps(start: Path, tmp_path: Path, rows: list[dict], settings: dict) -> list[list[float]]:
    from trl import RewardConfig, RewardTrainer

    loaded, _ = new_reward_model(context(), ModelRef(source=str(start)), None)
    dataset = [
        {"chosen": f"<user> {row['prompt']} <assistant> {row['chosen']}"}
        | {"rejected": f"<user> {row['prompt']} <assistant> {row['rejected']}"}
        | ({"margin": row["margin"]} if "useMargin" in settings else {})
        for row in rows
    ]
    config = RewardConfig(
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
        center_rewards_coefficient=settings.get("centering"),
    )
    trainer = RewardTrainer(
        model=loaded.model, args=config, train_dataset=Dataset.from_list(dataset), processing_class=loaded.tokenizer
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [[entry["loss"], entry["grad_norm"], entry["margin"]] for entry in history]


# ---------------------------------------------------------------- what must not change the result


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_run_that_was_stopped_ends_the_same(run_phase, undisturbed, tmp_path, stop_after, k):
    whole, result, spec = undisturbed
    output = tmp_path / "run" / "reward"
    with stop_after(k):
        assert run_phase("reward", spec, None, output) == (143, None)
    code, resumed = run_phase("reward", spec, None, output)
    assert code == 0
    assert difference(weights(whole), weights(output)) == 0.0
    assert resumed.metrics == result.metrics
    assert [line["loss"] for line in lines(output, "loss")] == [line["loss"] for line in lines(whole, "loss")]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_micro_batches_and_layout_do_not_change_a_step(run_phase, tiny_model_dir, tmp_path, lora):
    found = []
    for packing, tokens in ((True, 8192), (True, 64), (False, 100), (False, 8)):
        spec = spec_for(
            tiny_model_dir,
            data={"train": [PAIRS], "maxLength": 64, "packing": packing},
            parallel={"microBatchTokens": tokens},
            duration={"maxSteps": 2},
            lmWeight=0.5,
            centering=0.01,
            **({"lora": lora} if lora else {}),
        )
        output = tmp_path / f"{packing}-{tokens}" / "run" / "reward"
        assert run_phase("reward", spec, None, output)[0] == 0
        found.append([[line["loss"], line["grad_norm"], line["reward"]] for line in lines(output, "loss")])
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_loss_trains_a_head_that_is_not_saved(run_phase, tiny_model_dir, tmp_path, stop_after, tied):
    start = tmp_path / "start"
    config = AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=tied)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(start)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(start)
    spec = spec_for(start, batchSize=48, duration={"maxSteps": 3})
    outputs = {weight: tmp_path / str(weight) / "run" / "reward" for weight in (0.0, 0.5)}
    for weight, output in outputs.items():
        with stop_after(2):
            assert run_phase("reward", {**spec, "lmWeight": weight}, None, output)[0] == 143
    added = lines(outputs[0.5], "loss")[0]["loss"] - lines(outputs[0.0], "loss")[0]["loss"]
    assert added == pytest.approx(0.5 * chosen_loss(model, start), abs=1e-5)
    saved = load_file(outputs[0.5] / "checkpoints" / "step-2" / "shard-00000.safetensors")
    heads = [name for name in saved if name.startswith("model/weights/") and "lm_head" in name]
    assert len(heads) == (0 if tied else 1)
    if not tied:
        assert not torch.equal(saved[heads[0]], model.lm_head.weight)
    assert run_phase("reward", {**spec, "lmWeight": 0.5}, None, outputs[0.5])[0] == 0
    exported = load_file(outputs[0.5] / "model" / "model.safetensors")
    assert "score.weight" in exported
    assert not any("lm_head" in name for name in exported)


def chosen_loss(model, folder: Path) -> float:
    """Mean negative log-likelihood of all chosen responses' tokens, by transformers' own loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = count = 0.0
    for row in generate("letters", "preferences", 48, 0):
        start = len(tokenizer.apply_chat_template(messages(row), add_generation_prompt=True)["input_ids"])
        ids = tokenizer.apply_chat_template(messages(row, "chosen"), return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, :start] = -100
        tokens = ids.shape[1] - start
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    return total / count


def test_adapters_and_head_are_merged_into_what_is_saved(run_phase, tiny_model_dir, tmp_path, stop_after):
    spec = spec_for(
        tiny_model_dir,
        data={"train": [PAIRS], "eval": [PAIRS], "maxLength": 64},
        lora={"rank": 4},
        optim={"lr": 1e-2},
        lmWeight=0.1,
    )
    output = tmp_path / "run" / "reward"
    with stop_after(3):
        run_phase("reward", spec, None, output)
    trained = load_file(output / "checkpoints" / "step-3" / "shard-00000.safetensors")
    assert all("lora_" in name or "score" in name for name in trained)
    code, result = run_phase("reward", spec, None, output)
    assert code == 0
    scores = transformers_scores(output / "model", list(generate("letters", "preferences", 48, 0)))
    assert result.metrics["rewardMean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert result.metrics["evalAccuracy"] > 0.6
    exported = load_file(output / "model" / "model.safetensors")
    assert result.metrics["parameters"] == sum(tensor.numel() for tensor in exported.values())


def test_a_pad_token_that_is_the_end_token_is_replaced(run_phase, tiny_model_dir, tmp_path):
    """transformers reads scores before the first pad token: with pad = end it would read the wrong one."""
    start = tmp_path / "start"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.unk_token = tokenizer.eos_token  # nothing left to take, as in GPT-2
    tokenizer.save_pretrained(start)
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(start)
    spec = spec_for(start, data={"train": [PAIRS], "eval": [PAIRS], "maxLength": 64}, duration={"maxSteps": 2})
    code, result = run_phase("reward", spec, None, tmp_path / "run" / "reward")
    assert code == 0
    rows = list(generate("letters", "preferences", 48, 0))
    scores = transformers_scores(tmp_path / "run" / "reward" / "model", rows)
    assert result.metrics["rewardMean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert result.metrics["rewardStd"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)


def test_several_end_tokens_survive_the_export(tiny_model_dir, tmp_path):
    """Generation settings may name more end tokens than the tokenizer; a classifier keeps them in its config."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = [1, 4]
    model.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "start")
    loaded, _ = new_reward_model(context(), ModelRef(source=str(tmp_path / "start")), None)
    assert loaded.chat.stop_ids == {1, 4}
    loaded.model.save_pretrained(tmp_path / "reward")
    loaded.tokenizer.save_pretrained(tmp_path / "reward")
    again = load_reward_model(context(), RewardModelRef(source=str(tmp_path / "reward")))
    assert again.chat.stop_ids == {1, 4}


def test_a_missing_margin_is_named_by_file_and_line(run_phase, tiny_model_dir, tmp_path, capsys):
    rows = list(generate("letters", "preferences", 4, 0))
    write(tmp_path / "d.jsonl", [rows[0] | {"margin": 1}, rows[1]])
    spec = spec_for(tiny_model_dir, data={"train": [{"files": "d.jsonl"}]}, useMargin=True)
    assert run_phase("reward", spec, None, tmp_path / "run" / "reward", baseDir=str(tmp_path)) == (2, None)
    assert "d.jsonl:2: key 'margin' is missing" in capsys.readouterr().err


def test_an_architecture_without_classifier_is_bad_input(run_phase, tiny_model_dir, tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("granite", vocab_size=100, num_key_value_heads=4, pad_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "start")
    assert run_phase("reward", spec_for(tmp_path / "start"), None, tmp_path / "run" / "reward") == (2, None)
    assert "models of type granite have no sequence-classification form" in capsys.readouterr().err


def test_a_phase_without_model_is_bad_input(run_phase, tiny_model_dir, tmp_path, capsys):
    spec = spec_for(tiny_model_dir)
    del spec["model"]
    assert run_phase("reward", spec, None, tmp_path / "run" / "reward") == (2, None)
    assert "model: name one" in capsys.readouterr().err


def test_the_best_weights_are_kept(run_phase, tiny_model_dir, tmp_path):
    output = tmp_path / "run" / "reward"
    held_out = {"synthetic": {"task": "letters", "split": "preference-test", "count": 24}}
    spec = spec_for(
        tiny_model_dir,
        data={"train": [PAIRS], "eval": [held_out], "maxLength": 64},
        optim={"lr": 0.05, "schedule": "constant"},  # so high that it gets worse
        duration={"maxSteps": 8},
        evaluation={"everySteps": 1, "keepBest": True},
    )
    code, result = run_phase("reward", spec, None, output)
    assert code == 0
    losses = [line["eval_loss"] for line in lines(output, "eval_loss")]
    assert len(losses) == 8
    assert min(losses) < losses[-1]
    assert result.metrics["evalLoss"] == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(run_phase, tiny_model_dir, tmp_path):
    """Uneven shares, too: three pairs on two processes, with eval and best weights."""
    spec = spec_for(
        tiny_model_dir,
        data={"train": [PAIRS], "eval": [PAIRS], "maxLength": 64},
        batchSize=3,
        parallel={"microBatchTokens": 64},
        evaluation={"everySteps": 2, "keepBest": True},
        lmWeight=0.1,
    )
    one, two = tmp_path / "one" / "run" / "reward", tmp_path / "two" / "run" / "reward"
    assert run_phase("reward", spec, None, one)[0] == 0
    two.parent.mkdir(parents=True)
    (two.parent / "reward.yaml").write_text(yaml.safe_dump({"output": str(two), "spec": spec}))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainers", "reward"]
    done = subprocess.run(
        [sys.executable, *command, "--spec", str(two.parent / "reward.yaml")],
        check=False,
        env={**os.environ, "ALIGNMENT_METRICS_PORT": "0", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for ours, theirs in zip(lines(one, "loss"), lines(two, "loss"), strict=True):
        for name in ("loss", "grad_norm", "accuracy", "reward"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert difference(weights(one), weights(two)) < 1e-4
