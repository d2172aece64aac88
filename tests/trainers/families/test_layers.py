"""Students made of some of a teacher's layers, in every family, and models whose tokenizer is too large for them."""

import pytest
import torch
from families import matrix
from families.architectures import FAMILIES, family_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.contract import BadInput
from trainers.core.layers import hold, keep_layers

BY_PLACE = {"bamba", "jamba"}
"""Their configs say by number which layers attend, so a layer is another one in another place."""


@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_are_the_model_and_one_is_a_model_that_loads(name, tmp_path):
    model = family_model(name).eval()
    ids = torch.arange(3, 23)[None]
    everything = tuple(range(model.config.num_hidden_layers))
    torch.testing.assert_close(keep_layers(model, everything).eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    if name in BY_PLACE:
        with pytest.raises(BadInput, match=f"models of type {name}"):
            keep_layers(model, (1,))
        return
    one = keep_layers(model, everything[:2] if name == "zamba2" else (1,)).eval()
    one.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, one(input_ids=ids).logits)
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in model.parameters())


def test_windows_go_with_the_layers_that_have_them():
    model = family_model("gemma2", num_hidden_layers=3)
    assert len(set(model.config.layer_types)) == 2
    assert keep_layers(model, (1, 2)).config.layer_types == model.config.layer_types[1:]


@pytest.mark.parametrize(("phase", "row"), [("sft", "response"), ("dpo", "chosen"), ("reward", "chosen")])
def test_a_token_without_an_embedding_is_bad_input(phase, row, tiny_model_dir, run_phase, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    family_model("llama", len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "model")
    known = {"prompt": "copy box : A B", "response": "A", "chosen": "A", "rejected": "B"}
    matrix.write(tmp_path / "rows.jsonl", [known, known | {row: "zebra"}])
    name = "policy" if phase == "dpo" else "model"
    spec = {name: {"source": str(tmp_path / "model")}, "data": {"train": [{"files": str(tmp_path / "rows.jsonl")}]}}
    code, _ = run_phase(phase, spec, None, tmp_path / "run" / phase)
    assert code == 2
    message = capsys.readouterr().err
    assert "rows.jsonl:2" in message and f"the token 'zebra' is number {len(tokenizer) - 1}" in message


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "mamba2"])
def test_weights_are_held_as_from_pretrained_loads_them(name, tmp_path):
    """A module's own ``to(bfloat16)`` rounds the tables of rotary angles as well."""
    family_model(name).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    held = hold(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), torch.bfloat16)
    types = [{key: weight.dtype for key, weight in model.named_parameters()} for model in (held, loaded)]
    assert types[0] == types[1]
    ids = torch.arange(40)[None]
    assert torch.equal(held(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_smaller_bf16_model_is_itself_once_it_is_loaded_again(name, tmp_path):
    family_model(name).save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    small = keep_layers(whole, tuple(range(1, whole.config.num_hidden_layers))).eval()
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto").eval()
    ids = torch.arange(40)[None]
    assert torch.equal(small(input_ids=ids).logits, again(input_ids=ids).logits)
