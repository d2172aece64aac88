"""A phase as people start it by hand: torchrun, and ``accelerate launch`` with the files that its questionnaire writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cells import STEPS, rows
from distributed.conftest import write

pytestmark = pytest.mark.distributed

ONE_MACHINE = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "machine_rank": 0, "main_training_function": "main",
    "mixed_precision": "no", "num_machines": 1, "num_processes": 1, "rdzv_backend": "static", "same_network": True,
    "use_cpu": False,
}  # fmt: skip
FSDP = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": False, "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_activation_checkpointing": False,
        "fsdp_cpu_ram_efficient_loading": True,
    },
}  # fmt: skip
ZERO = {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {
        "zero_stage": 3, "gradient_accumulation_steps": 1, "zero3_init_flag": False, "zero3_save_16bit_model": False,
        "offload_optimizer_device": "none", "offload_param_device": "none",
    },
}  # fmt: skip
ZERO_FILE = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch"]

Losses = dict[int, float]


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return losses_of(tmp_path_factory.mktemp("alone"), tiny_model_dir, [], {"strategy": "single"})


def losses_of(folder: Path, model: Path, launcher: list[str], parallel: dict[str, Any]) -> Losses:
    """Of each step of a small phase that ``launcher`` starts in ``folder``."""
    spec = {"model": {"source": str(model)}, "data": rows("demonstrations"), "parallel": parallel, **STEPS}
    output = folder / "run" / "sft"
    file = write(folder / "sft.yaml", output, spec)
    environment = os.environ | {"ALIGNMENT_METRICS_PORT": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *launcher, "-m", "trainers", "sft", "--spec", str(file)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert (output / "result.json").exists()
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "deepspeed"])
def test_torchrun(strategy: str, tiny_model_dir: Path, alone: Losses, tmp_path: Path):
    assert losses_of(tmp_path, tiny_model_dir, TORCHRUN, {"strategy": strategy}) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("asked", [FSDP, ZERO, ZERO_FILE], ids=["fsdp", "zero", "zero's own file"])
def test_accelerate_with_a_file(asked: dict[str, Any], tiny_model_dir: Path, alone: Losses, tmp_path: Path):
    """One process: on CPUs accelerate starts no more."""
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(ONE_MACHINE | asked))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}))
    launcher = [*ACCELERATE, "--config_file", "accelerate.yaml"]
    assert losses_of(tmp_path, tiny_model_dir, launcher, {"strategy": "auto"}) == pytest.approx(alone, rel=1e-5)
