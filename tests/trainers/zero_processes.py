"""Run on two processes: ZeRO's stages beside plain torch in one. Fails where they differ."""

import copy
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.contract import BadInput
from trainers.core.adapters import with_adapters
from trainers.core.batch import Sequence
from trainers.core.engines.zero_weights import hand_over
from trainers.core.export import write_model
from trainers.core.flops import model_flops
from trainers.core.gathering import gathered, in_step
from trainers.core.generate import generate
from trainers.core.layers import hold
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.sharding import sharding_for, whole
from trainers.core.step import Layout, accumulate
from trainers.core.trainee import Trainee, learning_rate
from trainers.spec import DeepSpeed, Lora, Optim, Parallel, Sampling
from trainers.zero_config import zero_config

# An odd width: parts of weights that two processes do not divide.
CONFIG = LlamaConfig(
    vocab_size=63, hidden_size=35, intermediate_size=65, num_hidden_layers=2, num_attention_heads=5, head_dim=8
)
BATCH = [Sequence(np.arange(1, 9 + i % 5), np.ones(8 + i % 5, dtype=bool)) for i in range(13)]
OPTIM = Optim(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
STEPS = 4
OFFLOADED = {"offload_optimizer": True, "offload_parameters": True}


def main(cases: list[str]) -> None:
    workers = Workers(Parallel(strategy="deepspeed", precision="fp32"))
    assert workers.world == 2
    check_handed_over(workers)
    check_one_type(workers)
    for case in cases:
        stage, offload, lora = int(case[0]), "o" in case, "l" in case
        settings = DeepSpeed(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)
        workers.zero = zero_config(settings, Path())
        check_trajectory(workers, lora, as_read="s" in case)
        check_unreached(workers)
    workers.zero = None
    check_unreached(workers)


def check_handed_over(workers: Workers) -> None:
    """Nothing is left of FSDP, in which the model has computed, and every weight is whole again when ZeRO gathers it."""
    config = copy.deepcopy(CONFIG)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model, plain = LlamaForCausalLM(config), LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    split(workers, model)
    model(input_ids=torch.arange(5)[None])
    hand_over(model, zero_config(DeepSpeed(stage=3), Path()) | {"train_micro_batch_size_per_gpu": 1})
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() ^ vars(theirs).keys() <= {"_weight_conversions"}, type(ours)
        hooks = [name for name in vars(ours) if name.endswith("_hooks")]
        assert all(len(vars(ours)[name]) == len(vars(theirs)[name]) for name in hooks), type(ours)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.numel() == 0 and torch.equal(whole(ours), theirs), name


def check_one_type(workers: Workers) -> None:
    """A score head that was made in fp32 beside weights in bf16 becomes as they are; what has to stay fp32 is named."""
    for stage in (2, 3):
        workers.zero = zero_config(DeepSpeed(stage=stage), Path())
        model = half(LlamaForCausalLM)
        trainee = Trainee(workers, model, OPTIM, STEPS, model_flops(model))
        held = {(p.ds_tensor if stage == 3 else p).dtype for p in trainee.engine.parameters}
        assert held == {torch.bfloat16}, held
    workers.zero = zero_config(DeepSpeed(stage=2), Path())
    model = half(KeepsHead)
    with pytest.raises(BadInput, match=r"keeps lm_head\.weight in fp32"):
        Trainee(workers, model, OPTIM, STEPS, model_flops(model))
    workers.zero = None


class KeepsHead(LlamaForCausalLM):
    _keep_in_fp32_modules_strict = ("lm_head",)


def half(kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    """In bf16 but for its head."""
    model = hold(kind(CONFIG), torch.bfloat16)
    model.lm_head.float()
    return model


def split(workers: Workers, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """As a model is that is read for ZeRO's third stage."""
    parallel = Parallel(strategy="deepspeed", deepspeed=DeepSpeed(stage=3))
    sharding_for(parallel, False, False, workers.device, workers.world).apply(model)
    return model


def check_trajectory(workers: Workers, lora: bool, as_read: bool) -> None:
    model = fresh(lora)
    losses, norms, weights = plainly(copy.deepcopy(model))
    if as_read:
        split(workers, model)
    trainee = Trainee(workers, Scorer(model), OPTIM, STEPS, model_flops(model))
    for step in range(STEPS):
        found = one_pass(workers, trainee, step)
        if step == 1:  # taken back and done again
            trainee.engine.discard_gradients()
            found = one_pass(workers, trainee, step)
        norm = trainee.update(step)["grad_norm"]
        assert close(found, losses[step], 1e-6) and close(norm, norms[step], 1e-4), (step, found, losses[step], norm)
    state = {name: tensor.clone() for name, tensor in trainee.engine.saved()}
    for name, weight in weights.items():
        error = (state[f"weights/{name}"] - weight).norm() / weight.norm().clamp(min=1e-12)
        assert error < 1e-5, f"stage {workers.zero['zero_optimization']}: {name} is off by {error}"
    for name, parameter in model.named_parameters():  # what is exported
        if parameter.requires_grad:
            assert torch.equal(whole(parameter), state[f"weights/model.{name}"]), name
    if not lora:
        check_exported(workers, model, state)
    check_restored(workers, trainee, state, lora)
    check_responses(workers, model, state)


def check_exported(workers: Workers, model: LlamaForCausalLM, state: dict[str, torch.Tensor]) -> None:
    """Every weight is in the files, whole, as it was trained."""
    with TemporaryDirectory() as folder:
        tokenizer = SimpleNamespace(save_pretrained=lambda folder: None, pad_token_id=0)
        loaded = LoadedModel(model, tokenizer, SimpleNamespace(stop_ids={2}), None)
        write_model(loaded, Path(folder) / "model", workers.is_main)
        if workers.is_main:
            saved = load_file(Path(folder) / "model" / "model.safetensors")
            wanted = {
                name.removeprefix("weights/model."): t for name, t in state.items() if name.startswith("weights/")
            }
            assert saved.keys() == wanted.keys()
            assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
        workers.barrier()


def check_unreached(workers: Workers) -> None:
    """Weights that get no gradient stay what they are, or are named."""
    for decay in (0.1, 0.0):
        model = fresh(lora=False)
        model.spare = nn.Linear(4, 3)
        before = model.spare.weight.detach().clone()
        trainee = Trainee(workers, Scorer(model), Optim(weight_decay=decay), STEPS, model_flops(model))
        one_pass(workers, trainee, 0)
        if decay or workers.zero is None:
            with pytest.raises(BadInput, match=r"model\.spare\.weight"):
                trainee.update(0)
        else:
            trainee.update(0)
            assert torch.equal(whole(model.spare.weight), before)


def fresh(lora: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if lora:
        with_adapters(model, Lora(rank=4), 0)
    return model.train()


def one_pass(workers: Workers, trainee: Trainee, step: int) -> float:
    """A step's gradients in several passes; the last of one process may be empty."""
    meter = SimpleNamespace(part=lambda _: nullcontext(), count=lambda *_: None)
    ctx = SimpleNamespace(workers=workers, meter=meter, seed=0)
    count = sum(sequence.num_scored for sequence in BATCH)

    def terms(_, micro):
        loss, _ = trainee.module(micro, target_logprobs(micro), lambda logprobs, _: -logprobs.sum() / count)
        return loss, {}

    return accumulate(ctx, trainee, Layout(lambda s: [s], 32, packing=True), step, BATCH, terms)["loss"]


def plainly(model: LlamaForCausalLM) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The whole batch at once with transformers' logits, torch's cross-entropy, clipping and AdamW."""
    named = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    matrices, others = ([p for p in named.values() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    losses, norms = [], []
    for step in range(STEPS):
        sums = [
            nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            for ids in (torch.from_numpy(sequence.ids) for sequence in BATCH)
        ]
        loss = torch.stack(sums).sum() / sum(len(sequence.ids) - 1 for sequence in BATCH)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(list(named.values()), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, OPTIM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms, {name: p.detach() for name, p in named.items()}


def check_restored(workers: Workers, trainee: Trainee, state: dict[str, torch.Tensor], lora: bool) -> None:
    """Another model takes the state on, and both go on with the same bits."""
    again = Trainee(workers, Scorer(fresh(lora)), OPTIM, STEPS, trainee.flops)

    def fill(targets: dict[str, torch.Tensor]) -> None:
        for name, tensor in targets.items():
            tensor.copy_(state[name])

    again.check_saved({name: tensor.shape for name, tensor in state.items()})
    again.engine.restore(fill, state.keys())
    for step in (STEPS - 2, STEPS - 1):
        assert one_pass(workers, trainee, step) == one_pass(workers, again, step)
        assert trainee.update(step) == again.update(step)
    ends = [dict(engine.saved()) for engine in (trainee.engine, again.engine)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def check_responses(workers: Workers, model: LlamaForCausalLM, state: dict[str, torch.Tensor]) -> None:
    """Processes generate as much as they like inside ``gathered``, what a whole model would; training can go on."""
    sampling = Sampling(max_new_tokens=4 + 3 * workers.rank, temperature=0)
    with in_step(model):  # layer by layer, where the whole does not fit
        layered = generate(model, [[1, 2, 3]], sampling, frozenset())[0].ids
    with gathered(model):
        found = generate(model, [[1, 2, 3]], sampling, frozenset())[0].ids
        assert found == layered
        plain = LlamaForCausalLM(CONFIG)
        if not any("lora" in name for name in state):
            plain.load_state_dict(model.state_dict())
            assert generate(plain, [[1, 2, 3]], sampling, frozenset())[0].ids == found
    assert len(found) == sampling.max_new_tokens


def close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b)
