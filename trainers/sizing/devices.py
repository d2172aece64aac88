"""Memory of GPUs, by the names that nodes are labelled with; and how much of a device's memory is there for a phase."""

import re

GIB = 2**30

GPU_RESERVE = GIB
"""CUDA's context, NCCL's and cuBLAS's workspaces: what is not there for tensors."""
CPU_RESERVE = 9 * GIB // 8
"""A process with torch and transformers before it has a model, and oneDNN's programs: 0.5 and at most 0.6 GiB were measured."""
FRAGMENTED = 0.05
"""Share of a GPU that the caching allocator cannot give out again in one piece."""

PRODUCT_LABEL = "nvidia.com/gpu.product"
"""The label that NVIDIA's GPU feature discovery puts on nodes."""

MEMORY = {
    # GiB that the driver reports, rounded down; products whose name says it are not here.
    "B200": 178,
    "GH200": 94,
    "H200": 139,
    "H100 NVL": 93,
    "H100": 79,
    "A100": 39,
    "A800": 79,
    "A10G": 22,
    "A10": 22,
    "A40": 44,
    "A30": 23,
    "L40S": 44,
    "L40": 44,
    "L20": 44,
    "L4": 22,
    "RTX 4090": 23,
    "RTX A6000": 47,
    "V100": 15,
    "T4": 14,
}
"""By words of a product's name; the first entry that fits counts."""


def product_memory(product: str) -> int | None:
    """Bytes of a GPU of this product (`NVIDIA-A100-SXM4-80GB`, `NVIDIA-H200`, `NVIDIA-A100-SXM4-40GB-MIG-2g.10gb`).

    None for one that is not known. A number in the name counts, the last one: a slice (MIG) has its own.
    """
    if stated := re.findall(r"(\d+)gb", product.lower()):
        return int(stated[-1]) * GIB
    words = re.split(r"[-\s]", product)
    return next((size * GIB for name, size in MEMORY.items() if all(word in words for word in name.split())), None)


def usable(memory: int, gpu: bool) -> int:
    """Bytes of a device's memory, or of a process's share of a machine's, that are there for tensors."""
    return int(memory * (1 - FRAGMENTED)) - GPU_RESERVE if gpu else memory - CPU_RESERVE
