"""What is trained has the probabilities that it is compared with."""

import pytest
import torch
from families.architectures import FAMILIES, family_model

from trainers.core.dropout import take_out_dropout

LOUD = {
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "phi3": {"resid_pdrop": 0.5, "embd_pdrop": 0.5},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_without_dropout_training_is_evaluation(name):
    model = family_model(name, **LOUD.get(name, {"attention_dropout": 0.5}))
    ids = torch.arange(3, 23)[None]
    take_out_dropout(model.eval())
    torch.testing.assert_close(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_adapters_keep_theirs():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(family_model("llama"), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    take_out_dropout(model)
    found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {0.5}
