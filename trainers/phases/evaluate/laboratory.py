"""What all models of an evaluation share: rows, cells, the reward model and the reference."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from trainers.contract import BadInput, DataRecord, Diverged, canonical_json, sha256_text
from trainers.core import row_cache
from trainers.core.checked_rows import CheckedRows
from trainers.core.classifiers import RewardModel
from trainers.core.context import PhaseContext
from trainers.core.models import LoadedModel, load_causal_lm, positions
from trainers.core.reward_models import load_reward_model
from trainers.core.weights import read_config
from trainers.phases.evaluate.cells import Cells, not_finite
from trainers.phases.evaluate.settings import BenchmarkRows, SampledSpec
from trainers.phases.evaluate.spec import EntryBase, EvaluateSpec
from trainers.spec import ModelRef, NamedModel, RewardModelRef, find_models, identifying


def check_room(label: str, positions: int, new_tokens: int) -> int:
    """Positions left for a prompt. Raises BadInput if there are none."""
    if positions <= new_tokens:
        raise BadInput(
            f"model {label!r}: sampling.maxNewTokens {new_tokens} leaves its {positions} positions no prompt"
        )
    return positions - new_tokens


class Laboratory:
    def __init__(self, ctx: PhaseContext, spec: EvaluateSpec, reference: ModelRef | None) -> None:
        self.ctx, self.spec = ctx, spec
        self.cells = Cells(ctx.dir.root, ctx.fetch_cell, ctx.keep)
        self.reference_ref = reference
        self._rows: dict[tuple[str, str], CheckedRows] = {}
        self._shortened: dict[int, np.ndarray] = {}
        self._reward_model: RewardModel | None = None
        self._reference: LoadedModel | None = None
        self._digests: dict[str, str] = {}

    def check_rows(self, entry: EntryBase) -> None:
        """Read a benchmark's rows, so that what is wrong with them is not found out after hours.

        Raises BadInput if there is nothing to say about them, or nothing that a gate asks for.
        """
        data = entry.settings.data or self.spec.data
        assert data is not None
        rows, place = self.rows(data, entry.benchmark.schema), f"benchmark {entry.name!r} ({entry.benchmark.name})"
        problem = entry.benchmark.problem(rows)
        if problem is not None:
            raise BadInput(f"{place}: {problem}")
        missing = entry.benchmark.missing(rows)
        for i, gate in enumerate(self.spec.gates):
            _, _, metric = gate.metric.partition("/")
            if (reason := missing.get(metric.removeprefix(f"{entry.name}/"))) and metric.startswith(f"{entry.name}/"):
                raise BadInput(f"gates[{i}].metric: {gate.metric!r} can have no value, {place}: {reason}")

    def check_models(self, models: Mapping[str, NamedModel]) -> None:
        """Look at the models' configs before any is loaded. Raises BadInput for one that cannot answer so long."""
        sampled = [e.settings for e in self.spec.benchmarks if isinstance(e.settings, SampledSpec)]
        longest = max(((s.sampling or self.spec.sampling).max_new_tokens for s in sampled), default=0)
        for label, ref in models.items():
            if ref.scratch is None:
                config = read_config(self.ctx.model_location(ref), ref.trust_remote_code)
                check_room(label, positions(config), longest)

    def rows(self, data: BenchmarkRows, schema: str) -> CheckedRows:
        where = f"{next(path for path, other in find_models(self.spec, BenchmarkRows) if other is data)}.rows"
        if (where, schema) not in self._rows:
            root = row_cache.cache_root(self.ctx)
            found = CheckedRows(data.rows, schema, self.ctx.base_dir, data, where, root)
            self._rows[where, schema], self._shortened[id(found)] = found, np.zeros(len(found), dtype=bool)
        return self._rows[where, schema]

    def shortened(self, rows: CheckedRows, first: int, found: Iterable[bool]) -> None:
        """Note of rows from ``first`` on whether some model has not seen the whole prompt."""
        flags = np.array(list(found), dtype=bool)
        self._shortened[id(rows)][first : first + len(flags)] |= flags

    def records(self) -> list[DataRecord]:
        """What was read of each source."""
        found: dict[str, DataRecord] = {}
        for rows in self._rows.values():
            flags, first = self._shortened[id(rows)], 0
            for record in rows.records:
                shortened = int(flags[first : first + record.rows].sum())
                found[record.source] = record.model_copy(update={"shortened": shortened})
                first += record.rows
        return list(found.values())

    @property
    def reward_model(self) -> RewardModel:
        if self._reward_model is None:
            assert self.spec.reward_model is not None
            self._reward_model = load_reward_model(self.ctx, self.spec.reward_model)
        return self._reward_model

    @property
    def reference(self) -> LoadedModel:
        if self._reference is None:
            assert self.reference_ref is not None
            self._reference = load_causal_lm(self.ctx, self.reference_ref, frozen=True)
        return self._reference

    def digest(self, ref: ModelRef | RewardModelRef) -> str:
        """Identity of a model: what it is, and how it is read (its type of weights, its template, …)."""
        name = canonical_json(ref.document(exclude={"name"}))
        if name not in self._digests:
            reading = identifying(ref).document(exclude={"name", "phase", "source"})
            self._digests[name] = sha256_text(canonical_json([self._content(ref), reading]))
        return self._digests[name]

    def _content(self, ref: ModelRef | RewardModelRef) -> dict[str, str]:
        """Its phase's artifact, or what was found of it before the start (a folder's files, a hub's commit), or a seed."""
        path = next((path for path, other in find_models(self.spec, type(ref)) if other is ref), None)
        content = self.ctx.origins.content
        found = {key.removeprefix(f"{path}."): mark for key, mark in content.items() if key.startswith(f"{path}.")}
        made = self.ctx.file.inputs[ref.phase].digest if ref.phase is not None else content.get(path or "")
        return {**found, "": made or ref.source or f"seed {self.ctx.seed}"}

    def cell(self, model: str, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """A measurement of a model from its cell, or made now. All processes get the same.

        Raises Diverged when what was measured is not finite.
        """
        made_by = {"image": self.ctx.file.image, "program": self.ctx.origins.program}
        key = {**key, **made_by, "precision": "bf16" if self.ctx.workers.bf16 else "fp32"}
        value = self.ctx.workers.from_main(lambda: self.cells.get(key))
        if value is None:
            self.ctx.stop_if_asked()
            value = measure()
            if (wrong := not_finite(value)) is not None:
                raise Diverged(f"model {model!r}: its {key['kind']} hold {wrong}, which is no number")
            if self.ctx.workers.is_main:
                self.cells.put(key, value)
        return value
