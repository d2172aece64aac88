"""The state of training where DeepSpeed holds it: flat parts of many parameters, by process."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from trainers.core.adamw import MOMENTS, fresh_state
from trainers.core.engines.engine import STEP, WEIGHTS, Fill
from trainers.core.parallel import Workers


class ZeroState:
    """Half an engine: see :class:`trainers.core.engines.engine.Engine` for what its methods promise."""

    def __init__(
        self,
        workers: Workers,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        named: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        self.workers = workers
        self.optimizer = optimizer
        self.named = dict(named)
        self.shapes = dict(shapes)
        self.stage = int(engine.zero_optimization_stage())
        inner = engine.optimizer
        parts = inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups
        for part in parts:
            optimizer.state[part] = fresh_state(optimizer, part)
        if self.stage < 3:
            # DeepSpeed does this after the first group's first step, when the other groups have no moments yet.
            inner._lazy_init_hp_params_optimizer_state()

    def saved(self, moments: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights are the fp32 ones that are updated. All parameters have taken the same number of steps."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.named.items():
            yield f"{WEIGHTS}/{name}", safe_get_full_fp32_param(parameter)
            if moments:
                for moment in MOMENTS:
                    yield f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment)
                yield f"{STEP}/{name}", torch.tensor(float(self._steps()[0]))

    def restore(self, fill: Fill, names: Collection[str]) -> None:
        for name, parameter in self.named.items():
            has_moments = f"{STEP}/{name}" in names
            kinds = [WEIGHTS, *(MOMENTS if has_moments else ())]
            empty = {f"{kind}/{name}": torch.empty(self.shapes[name], device=self.workers.device) for kind in kinds}
            steps = {f"{STEP}/{name}": torch.tensor(0.0)} if has_moments else {}
            fill(empty | steps)
            for kind in kinds:
                self._write(parameter, kind, empty[f"{kind}/{name}"])
            for held, read in ((held, read) for held in self._steps() for read in steps.values()):
                held.fill_(float(read))

    def _steps(self) -> list[torch.Tensor]:
        return [state["step"] for state in self.optimizer.state.values()]

    def _write(self, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == WEIGHTS:
            with torch.no_grad(), self._whole(parameter):
                parameter.copy_(value)
        if self.stage == 3:
            self._write_part(parameter, kind, value)
        elif kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _write_part(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        """This process's part; DeepSpeed's own way fails for sizes that their number does not divide."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.workers.world - value.numel()))
        mine = padded[size * self.workers.rank :][:size]
        if kind == WEIGHTS:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, kind)

    def _whole(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter], modifier_rank=0)
