"""What the settings of phases promise, whatever the phase."""

import pytest

from trainers.phases import REGISTRY
from trainers.spec import Optim

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
