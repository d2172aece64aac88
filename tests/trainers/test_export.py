"""What is saved is what was trained: merged and lone adapters, tied heads, stop tokens, the type of the weights."""

import json
from pathlib import Path

import pytest
import torch
from families.architectures import FAMILIES, family_model
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MixtralConfig,
)

from trainers.contract import BadInput, Diverged
from trainers.core.adapters import with_adapters
from trainers.core.chat import chat_format
from trainers.core.export import write_model
from trainers.core.models import LoadedModel
from trainers.core.weight_files import WeightFiles
from trainers.spec import Lora

LETTERS = {"synthetic": {"task": "letters", "split": "preferences", "count": 16}}
IDS = torch.arange(1, 13)[None]


def tiny(kind: str = "llama", **changes):
    """A small random model of an architecture."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"llama": {"intermediate_size": 64}, "gpt_neox": {"intermediate_size": 64}, "phi3": {"pad_token_id": 0}}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more.get(kind, {}), **changes)).eval()


def adapted(model, tokenizer, lora: Lora, seed: int = 0) -> LoadedModel:
    """With adapters as if they had been trained: every weight of them random."""
    adapters = with_adapters(model, lora, seed)
    torch.manual_seed(seed)
    for parameter in adapters.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    plain = adapters.base_model.model
    return LoadedModel(plain.eval(), tokenizer, chat_format(tokenizer, plain), adapters)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path):
    found = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert len(found) <= 64
    return found


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("targets", [(), ("lm_head",), ("embed_tokens",), ("q_proj", "lm_head", "embed_tokens")])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_has_the_logits_that_were_trained(tokenizer, tmp_path: Path, tied: bool, targets: tuple):
    model = tiny(tie_word_embeddings=tied)
    before = logits(model)
    loaded = adapted(model, tokenizer, Lora(rank=4, target_modules=targets))
    trained = logits(loaded.model)
    assert (trained - before).abs().max() > 0.1
    write_model(loaded, tmp_path / "model")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), trained)


def test_the_saved_adapters_alone_give_the_same_on_their_base(tokenizer, tmp_path: Path):
    tiny().save_pretrained(tmp_path / "base")
    loaded = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer, Lora(rank=4))
    trained = logits(loaded.model)
    write_model(loaded, tmp_path / "model")
    lone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model" / "adapter").eval()
    torch.testing.assert_close(logits(lone), trained)
    config = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])  # a set's order would change the digest


def test_a_reward_models_adapters_carry_its_head(run_phase, tiny_model_dir: Path, tmp_path: Path):
    spec = {
        "model": {"source": str(tiny_model_dir)},
        "data": {"train": [LETTERS], "maxLength": 64},
        "batchSize": 8,
        "duration": {"maxSteps": 2},
        "lora": {"rank": 2},
        "optim": {"lr": 1e-2},
    }
    output = tmp_path / "run" / "reward"
    assert run_phase("reward", spec, None, output)[0] == 0
    merged = AutoModelForSequenceClassification.from_pretrained(output / "model").eval()
    lone = AutoPeftModelForSequenceClassification.from_pretrained(output / "model" / "adapter", num_labels=1).eval()
    lone.config.pad_token_id = merged.config.pad_token_id
    torch.testing.assert_close(logits(lone), logits(merged), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_without_names_every_linear_layer_but_the_head_gets_an_adapter(tokenizer, tmp_path: Path, kind: str):
    loaded = adapted(tiny(kind), tokenizer, Lora(rank=2))
    layers = {n.split(".lora_A")[0] for n, _ in loaded.model.named_parameters() if ".lora_A" in n}
    assert len(layers) >= 2 * 4  # attention and feed-forward of both decoder layers
    head = loaded.model.get_output_embeddings()
    assert not any("lora" in name for name, _ in head.named_parameters())
    trained = logits(loaded.model)
    write_model(loaded, tmp_path / "model")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", [("q_proj", "k_porj"), ("proj",), ("score",)])
def test_a_name_that_no_layer_has_is_said_even_beside_one_that_matches(names: tuple):
    with pytest.raises(BadInput, match=f"targetModules '{names[-1]}': no layer is called that; there are .*'q_proj'"):
        with_adapters(tiny(), Lora(target_modules=names), 0)


def test_experts_that_get_no_adapters_are_named(capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=2, **sizes)
    with_adapters(AutoModelForCausalLM.from_config(config), Lora(), 0)
    assert (
        "experts' stacked weights get no adapters and stay as they are (down_proj, gate_up_proj)"
        in capsys.readouterr().out
    )
    with pytest.raises(
        BadInput, match=r"no layer is called that; .*experts' stacked weights \(down_proj, gate_up_proj\)"
    ):
        with_adapters(AutoModelForCausalLM.from_config(config), Lora(target_modules=("down_proj",)), 0)


def test_a_layer_that_can_have_no_adapter_is_bad_input():
    with pytest.raises(BadInput, match=r"lora.targetModules \['self_attn'\]"):
        with_adapters(tiny(), Lora(target_modules=("self_attn",)), 0)


def test_adapters_on_a_bf16_base_are_merged_in_the_type_that_is_saved(tokenizer, tmp_path: Path):
    loaded = adapted(tiny().to(torch.bfloat16), tokenizer, Lora(rank=4))
    layer = loaded.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    loaded.export_dtype = torch.float32
    write_model(loaded, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(saved, exact.detach(), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- what is written


def test_plain_generate_stops_where_responses_were_taught_to_end(tokenizer, tmp_path: Path):
    """The tokenizer ends turns with one token, the model's own settings name another."""
    model = tiny()
    other = 40
    model.generation_config.eos_token_id = other
    write_model(LoadedModel(model, tokenizer, chat_format(tokenizer, model)), tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for end in (tokenizer.eos_token_id, other):
        torch.nn.init.zeros_(saved.lm_head.weight)
        bias = torch.zeros(64)
        bias[end] = 1.0
        saved.lm_head.bias = torch.nn.Parameter(bias)  # says nothing but that token
        made = saved.generate(IDS, max_new_tokens=5, do_sample=False)[0, IDS.shape[1] :]
        assert made.tolist() == [end]


def test_published_settings_that_transformers_refuses_to_write_are_mended(tokenizer, tmp_path: Path):
    model = tiny()
    model.generation_config.temperature = 0.6
    model.generation_config.top_p = 0.9
    model.generation_config.do_sample = False
    write_model(LoadedModel(model, tokenizer, chat_format(tokenizer, model)), tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"]) == (0.6, 0.9)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_export_in_bf16(run_phase, tiny_model_dir: Path, tmp_path: Path, lora: dict | None):
    saved = {}
    for dtype in ("fp32", "bf16"):
        spec = {
            "model": {"source": str(tiny_model_dir)},
            "data": {"train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 8}}]},
            "batchSize": 8,
            "duration": {"maxSteps": 1},
            "exportDtype": dtype,
            **({"lora": lora} if lora else {}),
        }
        output = tmp_path / dtype / "run" / "sft"
        code, _ = run_phase("sft", spec, None, output)
        assert code == 0
        saved[dtype] = load_file(output / "model" / "model.safetensors")
        assert (
            AutoConfig.from_pretrained(output / "model").dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        )
    for name, weight in saved["fp32"].items():
        assert torch.equal(weight.to(torch.bfloat16), saved["bf16"][name]), name


def test_what_could_not_be_written_whole_does_not_stay(tokenizer, tmp_path: Path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    model = tiny()
    loaded = LoadedModel(model, tokenizer, chat_format(tokenizer, model))
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(loaded, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- layer by layer


@pytest.mark.parametrize("kind", FAMILIES)
def test_files_are_those_that_transformers_writes(tokenizer, tmp_path: Path, kind: str):
    """Which names and stacks weights layer by layer as it does all at once, in every family."""
    model = family_model(kind, 64)
    model.save_pretrained(tmp_path / "theirs")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    for name, found in (("made here", model), ("read", reread)):
        write_model(LoadedModel(found, tokenizer, chat_format(tokenizer, found)), tmp_path / name)
        ours, theirs = (tmp_path / place / "model.safetensors" for place in (name, "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("read", "theirs"))
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [(), ("embed_tokens", "q_proj", "lm_head")])
def test_adapters_are_merged_as_peft_merges_them(tokenizer, tmp_path: Path, dtype, held, targets: tuple):
    """Bit for bit, where the base is turned into fp32 before merging if that is what is saved."""
    loaded = adapted(tiny().to(held), tokenizer, Lora(rank=4, target_modules=targets))
    loaded.export_dtype = dtype
    write_model(loaded, tmp_path / "ours")
    if dtype == torch.float32:
        loaded.model.float()
    merged = loaded.adapters.merge_and_unload().to(dtype)
    merged.save_pretrained(tmp_path / "theirs")
    files = [tmp_path / place / "model.safetensors" for place in ("ours", "theirs")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_file_is_larger_than_allowed(tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(WeightFiles.__init__, "__defaults__", (20_000,))
    model = tiny()
    write_model(LoadedModel(model, tokenizer, chat_format(tokenizer, model)), tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files[0].name == f"model-00001-of-{count:05}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert {f.name for f in files} == set(index["weight_map"].values())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(saved), logits(model))


def test_a_weight_that_is_not_finite_is_named(tokenizer, tmp_path: Path):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(Diverged, match=r"model.layers.1.mlp.up_proj.weight is not finite"):
        write_model(LoadedModel(model, tokenizer, chat_format(tokenizer, model)), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
