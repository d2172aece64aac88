"""A step of TRL's trainers, in the environment of its own. Knows nothing of this project: it is given tokens."""

import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from split import OTHER, Split
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

transformers.logging.set_verbosity_error()
Job = dict[str, Any]
IGNORED = -100


def ready(job: Job) -> None:
    for module in MODULES[job["kind"]]:
        importlib.import_module(module)


def run(job: Job) -> dict[str, Any]:
    split, losses = Split(job["device"]), Losses()
    trainer = KINDS[job["kind"]](job)
    clock = Clock(job, split)
    trainer.add_callback(clock)
    _count_tokens(trainer, clock)
    _watch(trainer, job["kind"], split, losses)
    trainer.train()
    return {"marks": clock.marks, "losses": losses.all(), "parts": clock.parts}


class Clock(TrainerCallback):
    """Seconds of the processor and of the clock, tokens so far, and where the time went, at the end of each step."""

    def __init__(self, job: Job, split: Split) -> None:
        self.batches: list[int] = []
        """Tokens of each batch that was collated, which is one ahead of the steps."""
        self.marks: list[list[float]] = []
        self.parts: list[dict[str, float]] = []
        self.split = split
        self.made = job["batch"] * job["tokens"] if job["kind"] in ("samples", "ppo") else 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        steps = len(self.marks) + 1
        tokens = self.made * steps if self.made else sum(self.batches[:steps])
        self.marks.append([time.process_time(), time.perf_counter(), tokens])
        self.parts.append(self.split.taken())
        self.split.turn(OTHER)


class Losses:
    """Of every step, read when all is done: a look at each would keep a GPU waiting."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def keeps(self, step: Any) -> Any:
        """A function that takes a step and returns its loss."""

        def kept(*given: Any, **named: Any) -> torch.Tensor:
            loss: torch.Tensor = step(*given, **named)
            self.kept.append(loss)
            return loss

        return kept

    def all(self) -> list[float]:
        return [float(loss) for loss in self.kept]


def _count_tokens(trainer: Any, clock: Clock) -> None:
    """Of all that comes out of the collator, padding left out. One that pads nothing gives no mask."""
    collate = trainer.data_collator

    def counting(items: list[Any]) -> Any:
        batch = collate(items)
        if not clock.made:
            mask = batch.get("attention_mask")
            clock.batches.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    trainer.data_collator = counting


def _watch(trainer: Any, kind: str, split: Split, losses: Losses) -> None:
    """What of a step is what. A trainer of PPO is one loop, so what follows a look into it is of one kind until the next."""
    if kind == "ppo":
        from trl.experimental.ppo import ppo_trainer

        split.spends(ppo_trainer, "batch_generation", "sampling")
        ppo_trainer.batch_generation = _then(ppo_trainer.batch_generation, split, "scoring")
        ppo_trainer.forward = _before_gradients(ppo_trainer.forward, split)
        return
    trainer.training_step = losses.keeps(trainer.training_step)
    split.spends(trainer, "training_step", "update")
    split.spends(trainer.accelerator, "clip_grad_norm_", "update")
    split.spends(AcceleratedOptimizer, "step", "update")
    if kind == "samples":
        split.spends(trainer, "_generate", "sampling")
    if kind in ("traces", "samples"):
        split.spends(trainer.accelerator.unwrap_model(trainer.teacher_model).base_model, "forward", "scoring")


def _then(function: Any, split: Split, name: str) -> Any:
    def found(*given: Any, **named: Any) -> Any:
        answer = function(*given, **named)
        split.turn(name)
        return answer

    return found


def _before_gradients(function: Any, split: Split) -> Any:
    """The first forward pass with gradients begins the updates."""

    def found(*given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            split.turn("update")
        return function(*given, **named)

    return found


def sft(job: Job) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": r["prompt"] + r["chosen"], "completion_mask": [0] * len(r["prompt"]) + [1] * len(r["chosen"])}
        for r in _rows(job)
    ]
    config = SFTConfig(
        **_settings(job), max_length=None, completion_only_loss=True, shuffle_dataset=False,
        padding_free=job["how"] == "padding-free",
    )  # fmt: skip
    return _in_order(SFTTrainer, job)(
        _model(job), config, train_dataset=Dataset.from_list(rows), processing_class=_words(job)
    )


def reward(job: Job) -> Any:
    from trl import RewardConfig, RewardTrainer

    folder = Path(job["folder"])
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    head = model.score.weight
    with torch.no_grad():  # as ours begins: a normal of 1 / sqrt(H + 1)
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)) / (head.shape[1] + 1) ** 0.5)
    rows = [{f"{side}_ids": r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in _rows(job)]
    config = RewardConfig(**_settings(job), max_length=None)
    return _in_order(RewardTrainer, job)(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=_words(job)
    )


def dpo(job: Job) -> Any:
    """What prepares its rows makes tokens of texts; it is left out, since these are tokens."""
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    rows = [{f"{name}_ids": r[name] for name in ("prompt", "chosen", "rejected")} for r in _rows(job)]
    config = DPOConfig(**_settings(job), max_length=None, beta=0.1, precompute_ref_log_probs=True)
    return _in_order(Given, job)(
        _model(job), args=config, train_dataset=Dataset.from_list(rows), processing_class=_words(job)
    )


def traces(job: Job) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(**_settings(job), max_length=None, beta=0.5, lmbda=0.0, temperature=1.0)
    return _in_order(GKDTrainer, job)(
        model=_model(job), teacher_model=_model(job, "teacher"), args=config, data_collator=_padded,
        train_dataset=Dataset.from_list(_rows(job)), processing_class=_words(job),
    )  # fmt: skip


def samples(job: Job) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(
        **_settings(job), beta=0.5, temperature=1.0, max_completion_length=job["tokens"], shuffle_dataset=False
    )
    rows = Dataset.from_list([{"prompt": row["text"]} for row in _rows(job)])
    return DistillationTrainer(
        model=_endless(_model(job)), teacher_model=_model(job, "teacher"), args=config, train_dataset=rows,
        processing_class=_words(job),
    )  # fmt: skip


def ppo(job: Job) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    folder, count = Path(job["folder"]), job["batch"]
    score, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    config = PPOConfig(
        **_settings(job), num_ppo_epochs=4, num_mini_batches=1, response_length=job["tokens"], temperature=1.0,
        total_episodes=count * job["steps"], local_rollout_forward_batch_size=count, num_sample_generations=0,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row["prompt"]} for row in _rows(job)])
    return PPOTrainer(
        args=config, processing_class=_words(job), model=_endless(_model(job)), ref_model=_model(job), reward_model=score,
        value_model=value, train_dataset=rows,
    )  # fmt: skip


MODULES = {
    "sft": ["trl.trainer.sft_trainer"],
    "reward": ["trl.trainer.reward_trainer"],
    "dpo": ["trl.trainer.dpo_trainer"],
    "traces": ["trl.experimental.gkd"],
    "samples": ["trl.trainer.distillation_trainer"],
    "ppo": ["trl.experimental.ppo.ppo_trainer"],
}
"""What a kind of work imports."""

KINDS = {"sft": sft, "reward": reward, "dpo": dpo, "traces": traces, "samples": samples, "ppo": ppo}


# ---------------------------------------------------------------- what they have in common


def _settings(job: Job) -> dict[str, Any]:
    """Those that serve it best where they change no result: no checkpointing of activations, no log."""
    cuda = job["device"] == "cuda"
    found = {
        "output_dir": job["out"], "per_device_train_batch_size": job["batch"], "max_steps": job["steps"], "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "use_cpu": not cuda, "bf16": cuda, "gradient_checkpointing": False,
        "logging_steps": 10_000, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "seed": 0, "max_grad_norm": 1.0,
    }  # fmt: skip
    return found | ({"train_sampling_strategy": "group_by_length"} if job["how"] == "grouped" else {})


def _in_order(kind: Any, job: Job) -> Any:
    """A trainer that takes rows as they come, which is the order of ours; unless lengths are to be grouped."""
    if job["how"] == "grouped":
        return kind

    class InOrder(kind):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return InOrder


def _rows(job: Job) -> list[Job]:
    rows = [json.loads(line) for line in (Path(job["folder"]) / "tokens.jsonl").read_text().splitlines()]
    return [rows[i] for i in job["order"]]


def _model(job: Job, name: str = "model") -> Any:
    return AutoModelForCausalLM.from_pretrained(Path(job["folder"]) / name, dtype=torch.float32)


def _endless(model: Any) -> Any:
    """One whose responses all have the same length: a random model hardly ever ends one, and ours is not let."""
    model.generation_config.eos_token_id = None
    return model


def _words(job: Job) -> Any:
    return AutoTokenizer.from_pretrained(Path(job["folder"]) / "model", padding_side="left")


def _padded(items: list[Job]) -> dict[str, torch.Tensor]:
    """What GKD takes, of tokens."""
    whole = [item["prompt"] + item["chosen"] for item in items]
    width = max(map(len, whole))
    labels = [
        [IGNORED] * len(i["prompt"]) + i["chosen"] + [IGNORED] * (width - len(w))
        for i, w in zip(items, whole, strict=True)
    ]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in whole])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor(labels),
        "prompts": ids,
        "prompt_attention_mask": mask,
    }
