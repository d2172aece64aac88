"""A model's weights in safetensors files of bounded size, as transformers names them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainers.files import room_for

LARGEST = 5 * 10**9
"""Bytes of weights in a file. Hubs and file systems take it, and a machine that loads one has that much memory to spare."""


class WeightFiles:
    """Takes weights as they come; whoever fills it holds one file's at a time."""

    def __init__(self, folder: Path, largest: int = LARGEST) -> None:
        self.folder, self.largest = folder, largest
        self._open: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._size = self._total = self._numbers = 0

    def add(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if self._open and self._size + weight.nbytes > self.largest:
                self._write()
            self._open[name] = weight.contiguous().cpu()
            self._size += weight.nbytes
            self._numbers += weight.numel()

    def close(self) -> None:
        """Write what is left, and which weight is where if there are several files."""
        self._write()
        count = len(self._files)
        if count == 1:
            (self.folder / _part(1)).rename(self.folder / "model.safetensors")
            return
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        for number, name in enumerate(names, 1):
            (self.folder / _part(number)).rename(self.folder / name)
        places = {weight: file for file, weights in zip(names, self._files, strict=True) for weight in weights}
        sizes = {"total_parameters": self._numbers, "total_size": self._total}
        index = json.dumps({"metadata": sizes, "weight_map": places}, indent=2, sort_keys=True)
        (self.folder / "model.safetensors.index.json").write_text(f"{index}\n")

    def _write(self) -> None:
        self._files.append(list(self._open))
        with room_for(self._size):
            save_file(self._open, self.folder / _part(len(self._files)), {"format": "pt"})
        self._total += self._size
        self._open, self._size = {}, 0


def _part(number: int) -> str:
    """Until it is known how many there are."""
    return f"part-{number}.safetensors"
