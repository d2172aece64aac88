"""What the settings of phases promise, whatever the phase."""

import pytest
from pydantic import ValidationError

from trainers.phases import REGISTRY
from trainers.spec import Optim, Parallel, Sampling

FIELDS = [
    (kind.spec, name)
    for kind in REGISTRY
    for name, field in kind.spec.model_fields.items()
    if isinstance(field.default, Optim)
]


@pytest.mark.parametrize(("spec", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_setting_one_thing_of_an_optimizer_keeps_the_phases_other_defaults(spec, name):
    """A default of the field alone is lost with the first thing that is set: PPO then trained at 2e-5."""
    field = spec.model_fields[name]
    assert field.annotation.model_validate({"schedule": "linear"}) == field.default.model_copy(
        update={"schedule": "linear"}
    )


def test_learning_rates_are_the_fields():
    """For all weights: TRL's for sft and DPO, Huang et al. 2024 for PPO (docs of TRL 1.16 and before)."""
    found = {f"{spec.__name__}.{name}": spec.model_fields[name].default.lr for spec, name in FIELDS}
    assert found == {
        "SftSpec.optim": 2e-5,
        "RewardSpec.optim": 2e-5,
        "DpoSpec.optim": 1e-6,
        "PpoSpec.optim": 3e-6,
        "PpoSpec.critic_optim": 6e-6,
        "DistillSpec.optim": 2e-5,
    }


@pytest.mark.parametrize("temperature", [1e-40, 1e-9])
def test_a_temperature_that_makes_logits_overflow_is_refused(temperature):
    with pytest.raises(ValidationError, match="set 0, which is greedy"):
        Sampling(temperature=temperature)


def test_the_lowest_temperature_still_samples():
    import torch

    from trainers.core.sampling import sample

    logits = torch.tensor([[200.0, 199.0, -200.0], [3.0, 3.0, 3.0]])
    found, _ = sample(logits, Sampling(temperature=0.001), torch.tensor([0.99, 0.99]))
    assert found.tolist() == [0, 2]


def test_the_smallest_eps_divides_where_there_was_no_gradient():
    """Below fp32's smallest number it would be 0 / 0 for every token that a step does not see."""
    import torch

    smallest = Optim(eps=1e-20)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 0.0])
    torch.optim.AdamW([weight], lr=0.1, eps=smallest.eps).step()
    assert weight.isfinite().all()
    with pytest.raises(ValidationError):
        Optim(eps=1e-50)


@pytest.mark.parametrize("settings", [{"lr": 1e38}, {"lr": 0}, {"weight_decay": 1e300}])
def test_settings_that_overflow_in_the_first_step_are_refused(settings):
    with pytest.raises(ValidationError):
        Optim(**settings)


def test_layers_whose_weights_are_gathered_within_cannot_be_compiled():
    """Over seventy programs, broken at every linear layer, before the first step of two layers was done."""
    deepspeed = {"strategy": "deepspeed", "compile": True}
    with pytest.raises(ValidationError, match=r"compile is set, and deepspeed.stage 3 .* set strategy fsdp"):
        Parallel.model_validate(deepspeed | {"deepspeed": {"stage": 3}})
    assert Parallel.model_validate(deepspeed | {"deepspeed": {"stage": 2}}).compile
