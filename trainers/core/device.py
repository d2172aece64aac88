"""What a process computes on: its name, its peak, and what NVML says of it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trainers.metrics import COMMON_LABELS, METRICS, PREFIX

PEAK_FLOPS = {
    # Dense bf16 (V100, T4: fp16) operations per second, without sparsity; from the vendors' data sheets.
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX A6000": 154.8e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(name: str) -> float | None:
    """By the first entry that the device's name holds; None for one that is not known, and for slices of one (MIG)."""
    if "MIG" in name:
        return None
    words = name.replace("-", " ")
    found = (peak for model, peak in PEAK_FLOPS.items() if all(word in words.split() for word in model.split()))
    return next(found, None)


def sensors(device: torch.device, labels: Mapping[str, str]) -> Collector | None:
    """None where NVML, or its driver, is not there."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return GpuSensors(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), labels)
    except (ImportError, AttributeError):
        return None
    except pynvml.NVMLError:
        return None


class GpuSensors(Collector):
    """Asks NVML when someone asks: costs nothing between scrapes. What a device does not tell has no series."""

    def __init__(self, nvml: Any, handle: Any, labels: Mapping[str, str]) -> None:
        self.nvml = nvml
        self.handle = handle
        self.labels = [labels[name] for name in COMMON_LABELS]
        self.helps = {metric.name: metric.help for metric in METRICS}

    def collect(self) -> Iterator[Metric]:
        nvml, handle = self.nvml, self.handle
        yield from self._gauge("gpu_utilization_ratio", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        yield from self._gauge("gpu_memory_used_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        yield from self._gauge("gpu_memory_total_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total)
        yield from self._gauge("gpu_power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)

    def _gauge(self, name: str, read: Callable[[], float]) -> Iterator[Metric]:
        try:
            value = read()
        except self.nvml.NVMLError:
            return
        family = GaugeMetricFamily(PREFIX + name, self.helps[PREFIX + name], labels=COMMON_LABELS)
        family.add_metric(self.labels, float(value))
        yield family
