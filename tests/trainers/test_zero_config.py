"""DeepSpeed's JSON beneath a run's own settings."""

import json
import sys

import pytest

from trainers.contract import BadInput
from trainers.spec import DeepSpeed
from trainers.zero_config import zero_config


def settings(tmp_path, document, **changes):
    (tmp_path / "ds.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return DeepSpeed.model_validate({"config": "ds.json", "stage": 3, **changes})


def test_a_files_settings_are_used_with_the_runs_own(tmp_path):
    document = {
        "zero_optimization": {"stage": 3, "sub_group_size": 100, "offload_optimizer": {"pin_memory": True}},
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "auto", "params": "auto"},
    }
    found = zero_config(settings(tmp_path, document, offloadOptimizer=True), tmp_path)
    zero = found["zero_optimization"]
    assert zero["sub_group_size"] == 100 and zero["offload_optimizer"] == {"pin_memory": True, "device": "cpu"}
    assert found["train_micro_batch_size_per_gpu"] == found["gradient_accumulation_steps"] == 1
    assert not {"train_batch_size", "bf16", "optimizer"} & found.keys()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"train_batch_size": 8}, "train_batch_size is set by the run's batchSize"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is set by the run's optim.maxGradNorm"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer is set by the run's optim"),
        ({"fp16": {"enabled": True}}, "fp16 is set by the run's parallel.precision"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, parallel.deepspeed.stage is 3"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device is 'cpu', parallel.deepspeed.offloadOptimizer is false",
        ),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com is no setting"),
        ({"communication_data_type": "bf16"}, "communication_data_type is no setting"),
        ([1], "must be a JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_what_contradicts_the_run_or_changes_results_is_refused_by_name(tmp_path, document, said):
    with pytest.raises(BadInput, match=r"^parallel\.deepspeed\.config ds\.json") as error:
        zero_config(settings(tmp_path, document), tmp_path)
    assert said in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"parallel.deepspeed.config absent.json cannot be read: .*/absent.json"):
        zero_config(DeepSpeed(config="absent.json"), tmp_path)


def test_offloading_needs_no_section_in_a_file(tmp_path):
    both = zero_config(DeepSpeed(stage=3, offload_optimizer=True, offload_parameters=True), tmp_path)
    assert both["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
    }  # fmt: skip


def test_every_allowed_key_is_one_that_deepspeed_knows(monkeypatch):
    """DeepSpeed's own model of the section refuses others."""
    if sys.modules.get("deepspeed", True) is None:  # phases that do not use it keep it from being imported
        monkeypatch.delitem(sys.modules, "deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from trainers.zero_config import ALLOWED, ZERO

    own = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()}
    own |= set(DeepSpeedZeroConfig.model_fields)
    ours = {path.split(".")[1] for path in ALLOWED if path.startswith(f"{ZERO}.")}
    assert ours <= own, ours - own
