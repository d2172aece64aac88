"""Adapters on a base in 4 bits: what is held, what is trained, and what is left, beside the same base in whole weights."""

import json
import sys
from pathlib import Path

import bitsandbytes  # noqa: F401 - before any phase: those that have no use for it keep it from being imported
import pytest
import torch
from families.architectures import family_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_export import IDS, adapted, logits, tiny
from test_lora import spec_for
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trainers.contract import BadInput
from trainers.core.export import write_model
from trainers.core.flops import model_flops
from trainers.core.memory import _size
from trainers.core.models import LoadedModel
from trainers.core.quantization import FourBit, dequantized, is_packed, scales
from trainers.core.weights import read_model
from trainers.phases import phase_type
from trainers.phases.sft.spec import SftSpec
from trainers.sizing.memory import Place, Trained, held_trained
from trainers.sizing.shapes import shape_of
from trainers.spec import Lora, Parallel

PACKED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"rank": 4, "targetModules": ["q_proj", "down_proj"]}
KINDS = ("sft", "reward", "dpo", "ppo", "distill")


def packed_model(folder: Path, compute: torch.dtype = torch.float32):
    found, _ = read_model(AutoModelForCausalLM, folder, compute, False, None, FourBit(compute, torch.device("cpu")))
    return found


def whole_model(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def nf4() -> torch.Tensor:
    """The 16 numbers: quantiles of a normal distribution, of which both signs have a zero and end at 1 (appendix E)."""
    normal, end = torch.distributions.Normal(0.0, 1.0), 0.9677083
    positive = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    numbers = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return (numbers / numbers.max()).float()


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """A random Llama whose rows are whole blocks."""
    return wider(AutoModelForCausalLM, tiny_model_dir, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reward_dir(tiny_model_dir, tmp_path_factory) -> Path:
    return wider(AutoModelForSequenceClassification, tiny_model_dir, tmp_path_factory.mktemp("reward"))


def wider(auto, like: Path, folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 16}
    tokenizer = AutoTokenizer.from_pretrained(like)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(like, num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole_dir(model_dir, tmp_path_factory) -> Path:
    """``model_dir`` with the weights that its packed layers compute with, written out."""
    return written_out(model_dir, tmp_path_factory.mktemp("whole"), torch.float32)


def written_out(folder: Path, target: Path, compute: torch.dtype) -> Path:
    weights = load_file(folder / "model.safetensors")
    for name, weight in packed_model(folder, compute).named_parameters():
        if is_packed(weight):
            weights[name] = dequantized(weight).float()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def spec_of(kind: str, model: Path, teacher: Path, reward: Path, quantization: str | None) -> dict:
    spec = spec_for(kind, model, reward)
    if kind == "distill":
        spec |= {"student": {"source": str(model)}, "teacher": {"source": str(teacher)}}
    return spec | {"lora": LORA | {"quantization": quantization}, "parallel": {"precision": "fp32"}}


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_weights_are_the_nearest_of_the_papers_numbers(model_dir):
    before = load_file(model_dir / "model.safetensors")
    numbers, found = nf4(), {name: w for name, w in packed_model(model_dir).named_parameters() if is_packed(w)}
    assert len(found) == len(PACKED) and all(name.split(".")[-2] in PACKED for name in found)
    for name, weight in found.items():
        blocks = before[name].view(-1, 64)
        largest = blocks.abs().amax(1)
        nearest = numbers[(blocks / largest[:, None]).unsqueeze(-1).sub(numbers).abs().argmin(-1)]
        torch.testing.assert_close(
            dequantized(weight).view(-1, 64), nearest * scales(weight)[:, None], rtol=0, atol=1e-6
        )
        torch.testing.assert_close(scales(weight), largest, rtol=0, atol=0.02 * float(largest.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_adapters_on_the_same_whole_weights(
    run_phase, model_dir, whole_dir, reward_dir, tmp_path, kind
):
    found = {}
    for model, quantization in ((model_dir, "nf4"), (whole_dir, None)):
        output = found[quantization] = tmp_path / str(quantization) / kind
        assert run_phase(kind, spec_of(kind, model, model_dir, reward_dir, quantization), None, output)[0] == 0
    packed, whole = map(lines, found.values())
    for name in {"loss", "grad_norm", "policy_loss", "kl"} & packed[0].keys():
        assert [line[name] for line in packed] == pytest.approx([line[name] for line in whole], rel=1e-5, abs=1e-8)
    ours, theirs = (load_file(output / "model" / "model.safetensors") for output in found.values())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
    assert "quantization_config" not in json.loads((found["nf4"] / "model" / "config.json").read_text())


def test_a_stopped_run_goes_on_to_the_same_weights(run_phase, stop_after, model_dir, reward_dir, tmp_path):
    spec = spec_of("sft", model_dir, model_dir, reward_dir, "nf4")
    whole, stopped = tmp_path / "whole" / "run" / "sft", tmp_path / "stopped" / "run" / "sft"
    assert run_phase("sft", spec, None, whole)[0] == 0
    with stop_after(1):
        assert run_phase("sft", spec, None, stopped)[0] == 143
    assert run_phase("sft", spec, None, stopped)[0] == 0
    assert lines(stopped)[-1]["loss"] == lines(whole)[-1]["loss"]
    files = [output / "model" / "model.safetensors" for output in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_in_bf16_it_computes_as_bf16_weights_do(model_dir, tmp_path):
    """And in eval mode between two steps, where bitsandbytes would pack its weights anew."""
    folder = written_out(model_dir, tmp_path, torch.bfloat16)
    found = []
    for model in (packed_model(model_dir, torch.bfloat16), whole_model(folder, torch.bfloat16)):
        adapters = adapted(model, AutoTokenizer.from_pretrained(folder), Lora(rank=4)).adapters
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                sampled = logits(model.eval())
            trained = model.train()(input_ids=IDS).logits
        trained.float().square().mean().backward()
        gradients = [p.grad for p in adapters.parameters() if p.requires_grad]
        found.append((sampled, trained.detach(), *gradients))
    assert len(found[0]) == 2 + 2 * len(PACKED)
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_saved_is_what_computed(tiny_model_dir, tmp_path, kind):
    """GPT-2's files hold the matrices of its layers the other way round."""
    base, tokenizer = tmp_path / "base", AutoTokenizer.from_pretrained(tiny_model_dir)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"intermediate_size": 128} if kind == "llama" else {}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    loaded = adapted(packed_model(base), tokenizer, Lora(rank=4))
    trained = logits(loaded.model)
    write_model(loaded, tmp_path / "model")
    torch.testing.assert_close(logits(whole_model(tmp_path / "model")), trained)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert {name: weight.shape for name, weight in after.items()} == {name: w.shape for name, w in before.items()}


def test_packed_weights_count_as_what_they_stand_for(model_dir):
    packed, whole = packed_model(model_dir), whole_model(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    shape, lora = shape_of(config), Lora(rank=4, quantization="nf4")
    assert LoadedModel(packed, None, None).num_parameters == whole.num_parameters() == shape.parameters
    assert model_flops(packed.requires_grad_(False)) == model_flops(whole.requires_grad_(False))
    held = sum(map(_size, packed.parameters()))
    tables = sum(4 * (16 + 256 + 1) for p in packed.parameters() if is_packed(p))  # of each layer, whatever its size
    linear = sum(
        whole.get_submodule(n.removesuffix(".weight")).weight.numel()
        for n, p in packed.named_parameters()
        if is_packed(p)
    )
    assert held - tables == pytest.approx(4 * (shape.parameters - linear) + 4.127 / 8 * linear, rel=2e-3)
    planned = held_trained(Place(Parallel()), Trained(shape, lora)).weights - 4 * shape.adapters(lora)
    assert planned == pytest.approx(held - tables, rel=2e-3)


BASE = {"model": {"source": "m"}, "data": {"train": [{"files": "x.jsonl"}]}, "lora": {"quantization": "nf4"}}
SCRATCH = {"hiddenSize": 64, "numLayers": 1, "tokenizer": {"trainOn": [{"files": "x.jsonl"}]}}


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("sft", {"parallel": {"strategy": "fsdp"}}, "cannot be split by parallel.strategy fsdp: set ddp"),
        ("reward", {"parallel": {"strategy": "deepspeed"}}, "cannot be split by parallel.strategy deepspeed"),
        ("sft", {"model": {"scratch": SCRATCH}}, "model.scratch has none; set model.source"),
        (
            "distill",
            {"model": None, "data": None, "teacher": {"source": "m"}, "student": {"teacherLayers": [0]},
             "traces": {"files": "x.jsonl"}, "onPolicyFraction": 0},
            "student.teacherLayers has none",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_told_by_validate(kind, changes, said):
    spec = {name: value for name, value in (BASE | changes).items() if value is not None}
    with pytest.raises(ValidationError, match=said):
        phase_type(kind).spec.model_validate(spec)


def test_models_that_cannot_be_packed_are_told_before_weights_are_read(tiny_model_dir, tmp_path, monkeypatch):
    four_bit = FourBit(torch.float32, torch.device("cpu"))
    with pytest.raises(BadInput, match=r"q_proj has 32 inputs; on a CPU they must be a multiple of 64"):
        four_bit.loading(tiny())
    with pytest.raises(BadInput, match="mixtral hold their experts as stacked weights"):
        four_bit.loading(family_model("mixtral"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInput, match=r"needs the package bitsandbytes: .*pip install '\.\[qlora\]'"):
        four_bit.loading(tiny())


def test_a_start_without_packed_weights_imports_no_bitsandbytes(tiny_model_dir, tmp_path):
    """peft imports it where it finds it, which takes seconds."""
    from trainers.launch import _leave_out_unused

    for quantization, left_out in ((None, True), ("nf4", False)):
        spec = SftSpec.model_validate(BASE | {"lora": {"quantization": quantization}})
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "bitsandbytes")
            _leave_out_unused(spec)
            assert ("bitsandbytes" in sys.modules) == left_out
            sys.modules.pop("bitsandbytes", None)
