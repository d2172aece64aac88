"""What a phase's process serves under /metrics."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from trainers import __version__
from trainers.core.device import GpuSensors, sensors
from trainers.meter import Meter
from trainers.metrics import COMMON_LABELS, GAUGES_FROM_LOG, METRICS, PREFIX
from trainers.phase_dir import PhaseDir
from trainers.phases import REGISTRY
from trainers.spec import Tracking

LABELS = {"run": "r", "phase": "p", "type": "sft", "rank": "0"}


def meter(directory: Path, **labels: str) -> Meter:
    return Meter(PhaseDir(directory), LABELS | labels, 0, Tracking())


def families(measured: Meter) -> dict[str, Any]:
    page = urllib.request.urlopen(f"http://127.0.0.1:{measured.port}/metrics").read().decode()
    return {family.name: family for family in text_string_to_metric_families(page)}


def values(measured: Meter) -> dict[str, float]:
    """By name without its prefix, and the values of further labels."""
    return {
        "/".join(
            [s.name.removeprefix(PREFIX), *(v for k, v in sorted(s.labels.items()) if k not in COMMON_LABELS)]
        ): s.value
        for family in families(measured).values()
        for s in family.samples
    }


class Nvml:
    """Stands in for NVML's binding: there is no GPU here. Units as in NVML's own reference: percent, bytes, milliwatts."""

    class NVMLError(Exception):
        pass

    def __init__(self, *untold: str) -> None:
        self.untold = untold

    def __getattr__(self, name: str) -> Any:
        if name in self.untold:
            raise_it = self.NVMLError(name)

            def refuse(handle: str) -> None:
                raise raise_it

            return refuse
        rates = type("rates", (), {"gpu": 87})
        memory = type("memory", (), {"used": 60 * 2**30, "total": 80 * 2**30})
        return lambda handle: {
            "nvmlDeviceGetUtilizationRates": rates, "nvmlDeviceGetMemoryInfo": memory, "nvmlDeviceGetPowerUsage": 412_500,
        }[name]  # fmt: skip


@pytest.fixture
def used(tmp_path: Path) -> Meter:
    """Every figure has been touched once."""
    made = meter(tmp_path)
    made.describe("NVIDIA H100", 4, 989e12, GpuSensors(Nvml(), "handle", LABELS))
    made.will_checkpoint(0)
    made.begin(0, 10)
    with made.part("data"):
        made.count(100, 2, 1e6)
    made.log(1, **dict.fromkeys(GAUGES_FROM_LOG, 0.5))
    teacher = made.teacher("maths")
    teacher.answered(0.2)
    teacher.asked_again()
    teacher.share_of_loss(0.25)
    made.checkpointed(1)
    made.labels["type"] = "dpo"  # whose reward is a margin
    made.record(1, reward=0.25)
    return made


def test_the_table_is_what_is_served(used):
    found = families(used)
    assert {m.name.removesuffix("_total"): m.kind for m in METRICS} == {name: f.type for name, f in found.items()}
    for metric in METRICS:
        family = found[metric.name.removesuffix("_total")]
        assert family.documentation == metric.help
        names = {name for s in family.samples for name in s.labels} - {"le"}
        assert names == {*COMMON_LABELS, *metric.labels}, metric.name


def test_figures(used):
    found = values(used)
    assert found[f"info/NVIDIA H100/4/{__version__}"] == 1
    assert (found["tokens_total"], found["samples_total"], found["model_flops_total"]) == (100, 2, 1e6)
    assert (found["step"], found["total_steps"], found["progress_ratio"]) == (1, 10, 0.1)
    assert (found["checkpoint_step"], found["checkpoints_total"]) == (1, 1)
    assert found["last_checkpoint_timestamp_seconds"] == pytest.approx(found["last_step_timestamp_seconds"], abs=5)
    assert (found["reward"], found["reward_margin"]) == (0.5, 0.25)
    assert found["step_seconds_count"] == 1
    assert (found["teacher_answer_seconds_count/maths"], found["teacher_answer_seconds_sum/maths"]) == (1, 0.2)
    assert (found["teacher_retries_total/maths"], found["teacher_loss_ratio/maths"]) == (1, 0.25)
    assert found["step_seconds_sum"] == pytest.approx(100 / found["tokens_per_second"], rel=1e-6)
    resident = psutil.Process().memory_info().rss
    assert found["memory_bytes/resident"] == pytest.approx(resident, rel=0.2)
    assert (found["gpu_utilization_ratio"], found["gpu_power_watts"]) == (0.87, 412.5)
    assert found["gpu_memory_used_bytes"] / found["gpu_memory_total_bytes"] == 0.75


def test_progress_tells_of_all_processes(used):
    used.stage("saving")  # written at once; steps are written twice a second at most
    document = json.loads(used.directory.progress.read_text())
    assert document["tokensPerSecond"] == pytest.approx(4 * values(used)["tokens_per_second"])


def test_what_a_phase_does_not_measure_has_no_series(tmp_path):
    """A gauge that nobody sets would be 0, and alerts on it would fire or never fire."""
    made = meter(tmp_path)
    made.begin(0, 10)
    made.log(1, loss=1.0)
    found = values(made)
    unset = {"reward", "kl_nats", "checkpoint_step", "last_checkpoint_timestamp_seconds", "peak_flops_per_second"}
    assert not unset & found.keys()


def test_what_a_gpu_does_not_tell_has_no_series(tmp_path):
    made = meter(tmp_path)
    made.describe("slice of a GPU", 1, None, GpuSensors(Nvml("nvmlDeviceGetUtilizationRates"), "handle", LABELS))
    found = values(made)
    assert "gpu_utilization_ratio" not in found
    assert "gpu_power_watts" in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_nothing_is_said_of_gpus():
    """The binding is there, its library is not."""
    import pynvml

    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlInit()
    assert sensors(torch.device("cuda"), LABELS) is None


@pytest.mark.parametrize("kind", [entry.name for entry in REGISTRY])
def test_every_type_of_phase_is_a_type(kind, tmp_path):
    made = meter(tmp_path, type=kind)
    made.begin(0, 1)
    made.log(1, reward=1.0)
    assert ("reward_margin" in values(made)) == (kind in ("reward", "dpo"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_leaves_progress_and_lines_readable(wrong, tmp_path):
    measured = meter(tmp_path)
    measured.begin(0, 1)
    measured.log(1, loss=wrong, reward=2.0)
    measured.stage("done")
    measured.close()

    def refused(constant):
        raise AssertionError(constant)

    progress = json.loads((tmp_path / "progress.json").read_text(), parse_constant=refused)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refused)
    assert (progress["step"], progress.get("loss")) == (1, None)
    assert (line["loss"], line["reward"]) == (None, 2.0)
