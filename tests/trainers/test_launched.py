"""What ``accelerate launch`` asks for, beside what the run says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainers.contract import BadInput
from trainers.launched import as_launched
from trainers.spec import DeepSpeed, Parallel

SAYS = (
    "import json, os, sys; from trainers.launched import as_launched; from trainers.spec import Parallel; "
    "print(as_launched(Parallel.model_validate(json.loads(sys.argv[1])), os.environ).model_dump_json())"
)


def launcher(**variables: str) -> dict[str, str]:
    return {"ACCELERATE_MIXED_PRECISION": "no", "RANK": "0", "MASTER_ADDR": "127.0.0.1", **variables}


def test_without_the_launcher_the_run_decides():
    parallel = Parallel(strategy="fsdp")
    assert as_launched(parallel, {"RANK": "1", "MASTER_ADDR": "a"}) is parallel


def test_the_launchers_own_file_gives_the_strategy(tmp_path: Path):
    """Through accelerate itself: the file as its questionnaire writes it, read by its launcher."""
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "mixed_precision": "no", "use_cpu": False,
        "num_machines": 1, "num_processes": 1, "machine_rank": 0, "main_process_port": 0,
        "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none",
                             "gradient_accumulation_steps": 1},
    }  # fmt: skip
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "says.py").write_text(SAYS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    done = subprocess.run(
        [*command, str(tmp_path / "says.py"), "{}"],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["strategy"] == "deepspeed"
    assert found["deepspeed"] == {"stage": 3, "offload_optimizer": True, "offload_parameters": False, "config": None}


def test_accelerates_variables_are_taken_out_so_that_it_does_not_wrap_too():
    environment = launcher(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_OFFLOAD_PARAMS="true")
    found = as_launched(Parallel(), environment)
    assert found.strategy == "fsdp" and found.fsdp is not None and found.fsdp.cpu_offload
    assert "ACCELERATE_USE_FSDP" not in environment


def test_a_deepspeed_file_of_the_launcher_is_the_runs(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    environment = launcher(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    assert as_launched(Parallel(), environment).deepspeed == DeepSpeed(stage=1, config=str(file))


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("parallel", "variables", "said"),
    [
        ({"strategy": "ddp"}, DEEPSPEED, "asks for deepspeed, parallel.strategy is ddp"),
        ({"strategy": "deepspeed", "deepspeed": {"stage": 2}}, DEEPSPEED, "stage 3, parallel.deepspeed says 2"),
        ({"compile": True}, DEEPSPEED, "with which parallel.compile cannot be had"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "add --fsdp_version 2"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm is not available"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16 is not available"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "contradicts parallel.precision auto"),
        ({}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps 4"),
        ({}, {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "optim.maxGradNorm decides"),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend"),
        ({}, DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offloading to nvme"),
    ],
)
def test_what_contradicts_the_run_is_refused(parallel: dict, variables: dict[str, str], said: str):
    with pytest.raises(BadInput, match=r"^accelerate launch") as error:
        as_launched(Parallel.model_validate(parallel), launcher(**variables))
    assert said in str(error.value)


def test_one_process_where_several_were_asked_for_is_an_error():
    """Through accelerate itself, which says nothing of it."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    done = subprocess.run(
        [*command, "--no_python", sys.executable, "-c", SAYS, "{}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode != 0
    assert "told to start several processes and started one" in done.stderr
