"""Which trained parameters gradients reach: what text alone does not use, such as a part that sees pictures, gets none."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from trainers.core.parallel import Workers


class Reach:
    """Watches a module's parameters from its first backward pass on, until it is asked."""

    def __init__(self, workers: Workers, named: Mapping[str, nn.Parameter]) -> None:
        self._workers = workers
        self._reached = dict.fromkeys(named, 0.0)
        self._hooks = [p.register_post_accumulate_grad_hook(partial(self._note, name)) for name, p in named.items()]

    def _note(self, name: str, _: torch.Tensor) -> None:
        self._reached[name] = 1.0

    def missed(self) -> list[str]:
        """Names of those that got a gradient in no process. The first time alone; all processes take part."""
        if not self._hooks:
            return []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        counts = self._workers.sum(torch.tensor(list(self._reached.values()))).tolist()
        return [name for name, count in zip(self._reached, counts, strict=True) if not count]


def listed(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more weights" if len(names) > 1 else "")
