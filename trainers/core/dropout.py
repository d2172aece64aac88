"""Dropout taken out of models whose probabilities are compared with those of another state of theirs."""

from typing import Any

from torch import nn


def take_out_dropout(model: Any) -> None:
    """Set all of a model's dropout to 0 but the adapters', which is a setting of the user's.

    With it the ratio of new to old probability is noise even before the first update.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
