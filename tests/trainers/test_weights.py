"""A model's folder is read whole, or refused with one line: nothing is filled in with random numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trainers.contract import BadInput, FailureClass, exit_status
from trainers.core.sharding import Sharding
from trainers.core.weights import check_trainable, read_model

WEIGHTS = "model.safetensors"


def edit(**changes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def without(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        kept = {name: weight for name, weight in load_file(folder / WEIGHTS).items() if name not in names}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


DAMAGES = {
    "cut off": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]),
        "safetensors: cut off: [0-9,]+ of its bytes",
    ),
    "garbage": (write(WEIGHTS, b"x" * 1000), "safetensors: its header would have"),
    "empty": (write(WEIGHTS, b""), "safetensors: its header would have"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "half a tokenizer": (write("tokenizer.json", b"{"), "tokenizer.json: not valid JSON .Expecting"),
    "another file as tokenizer": (write("tokenizer.json", b"{}"), "KeyError"),
    "half a config": (write("config.json", b"{"), "config.json: not valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "model_type"),
    "another type": (edit(model_type="nosuch"), "nosuch"),
    "heads that do not fit": (edit(num_attention_heads=5, num_key_value_heads=5), "not a multiple"),
    "text for a number": (edit(vocab_size="many"), 'config.json: vocab_size: "many" is not a whole number'),
    "another width": (edit(intermediate_size=48), r"has the shape \[\d+, \d+\], its config asks for \[\d+, \d+\]"),
    "more layers": (edit(num_hidden_layers=3), r"holds? no model.layers.2.* and 8 more weights"),
    "a missing weight": (without("model.layers.1.mlp.up_proj.weight"), "hold no model.layers.1.mlp.up_proj.weight$"),
    "a missing head": (without("lm_head.weight"), "hold no lm_head.weight$"),
    "a quantizer that is not there": (edit(quantization_config={"quant_method": "gptq", "bits": 4}), "ImportError"),
}


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_folder_is_bad_input_that_names_it(folder: Path, damage: str):
    harm, words = DAMAGES[damage]
    harm(folder)
    with pytest.raises(BadInput, match=words) as caught:
        read_model(AutoModelForCausalLM, folder, torch.float32, trust_remote_code=False)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_whole_folder_is_read(folder: Path):
    model, tokenizer = read_model(AutoModelForCausalLM, folder, torch.bfloat16, trust_remote_code=False)
    for name, weight in load_file(folder / WEIGHTS).items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name
    assert tokenizer.eos_token == "<eos>"


def test_tied_weights_are_not_missed(folder: Path):
    edit(tie_word_embeddings=True)(folder)
    without("lm_head.weight")(folder)
    model, _ = read_model(AutoModelForCausalLM, folder, torch.float32, trust_remote_code=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_weight_that_is_no_number_is_named(folder: Path, name: str, number: float, dtype: torch.dtype):
    """One element is enough, also in a row that no data would use."""
    weights = load_file(folder / WEIGHTS)
    weights[name].view(-1)[-1] = number
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"{name} holds {number}") as caught:
        read_model(AutoModelForCausalLM, folder, dtype, trust_remote_code=False)
    assert str(folder) in str(caught.value)


def test_a_reward_model_whose_head_is_no_number_is_refused(tiny_reward_dir: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_reward_dir, tmp_path / "model"))
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"score.weight": weights["score.weight"] * torch.nan}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(BadInput, match=r"score.weight holds nan"):
        read_model(AutoModelForSequenceClassification, folder, torch.float32, trust_remote_code=False)


def test_a_language_model_is_no_reward_model(folder: Path):
    """Its scores would come from a random head."""
    with pytest.raises(BadInput, match=r"is no whole LlamaForSequenceClassification: its files hold no score.weight"):
        read_model(AutoModelForSequenceClassification, folder, torch.float32, trust_remote_code=False)


def test_a_language_model_for_a_reward_model_is_refused_by_the_phase(run_phase, tiny_model_dir, tmp_path, capsys):
    spec = {
        "policy": {"source": str(tiny_model_dir)},
        "rewardModel": {"source": str(tiny_model_dir)},
        "data": {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 4}}]},
    }
    code, _ = run_phase("ppo", spec, None, tmp_path / "run" / "ppo")
    assert code == exit_status(FailureClass.BAD_INPUT)
    assert "hold no score.weight" in capsys.readouterr().err


def test_memory_and_disk_are_not_the_models_fault(folder: Path, monkeypatch):
    def raising(error: Exception):
        def load(*args: object, **kwargs: object) -> None:
            raise error

        return load

    for error in (RuntimeError("CUDA error: out of memory"), MemoryError(), OSError(5, "Input/output error")):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raising(error))
        with pytest.raises(type(error)):
            read_model(AutoModelForCausalLM, folder, torch.float32, trust_remote_code=False)


def test_code_that_comes_with_a_model_is_not_run(folder: Path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    (folder / "code.py").write_text("raise SystemExit('ran')\n")
    edit(model_type="custom", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})(folder)
    with pytest.raises(BadInput, match="custom code"):
        read_model(AutoModelForCausalLM, folder, torch.float32, trust_remote_code=False)


def test_weights_of_few_bits_cannot_be_trained(folder: Path):
    model, _ = read_model(AutoModelForCausalLM, folder, torch.float32, trust_remote_code=False)
    check_trainable(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(BadInput, match=r"up_proj.weight is quantized"):
        check_trainable(model)


@pytest.fixture
def sharding():
    """Of the second of two processes, which exchange nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield Sharding(init_device_mesh("cpu", (2,)))
    torch.distributed.destroy_process_group()


def test_embeddings_that_are_the_head_are_split_once(folder: Path, sharding):
    """Split twice, an odd number of words had a copy in each, and the optimizer updated one: it trained another model."""
    without("lm_head.weight")(folder)
    edit(tie_word_embeddings=True)(folder)
    model, _ = read_model(AutoModelForCausalLM, folder, torch.float32, False, sharding)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    assert not any(isinstance(end, FSDPModule) for end in ends), "they belong to the whole model"
    assert isinstance(model, FSDPModule)


def test_a_head_of_its_own_beside_a_config_without_one_is_not_split(folder: Path, sharding):
    edit(tie_word_embeddings=True)(folder)
    with pytest.raises(BadInput, match=r"lm_head.weight is the embeddings, and its files hold another: set tie_word"):
        read_model(AutoModelForCausalLM, folder, torch.float32, False, sharding)
