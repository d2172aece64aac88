"""Responses of coming steps, sampled beside the updates before them by copies of the weights, or by a server that has them.

With staleness s the responses of step t come from the weights as they were before step t - s, and of the first s steps from
those at the start: a function of seed and step, not of who was faster. A checkpoint holds the responses that are on
their way then, which are far smaller than the weights that they came from.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from trainers.contract import BadInput
from trainers.core.classifiers import RewardModel
from trainers.core.context import PhaseContext
from trainers.core.engines.engine import Fill
from trainers.core.generate import Response
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.rollouts import Prompt, Sample, own_responses, respond, rewarded, said
from trainers.core.served.following import Follower, following
from trainers.core.served.model import ServedModel
from trainers.core.served.server import awaited
from trainers.core.sharding import is_split
from trainers.core.shares import in_order
from trainers.spec import OnPolicySpec, Sampling

PromptsOf = Callable[[int], List[Prompt]]
"""A step's prompts, none for a step that samples nothing."""


class RolloutsAhead:
    """Samples of a training's steps, asked for one step after the other by all ranks."""

    def __init__(
        self,
        ctx: PhaseContext,
        spec: OnPolicySpec,
        policy: LoadedModel,
        prompts_of: PromptsOf,
        total_steps: int,
        reward_model: RewardModel | None = None,
    ) -> None:
        """Raises BadInput for weights that cannot be copied."""
        self.ctx, self.spec, self.policy, self.reward_model = ctx, spec, policy, reward_model
        self.prompts_of, self.total_steps = prompts_of, total_steps
        served = spec.sampling.engine == "vllm"
        self._copies = [] if served else [Copy(ctx, policy) for _ in range(spec.staleness)]
        self._askers = _askers(ctx.workers) if served and spec.staleness else list(range(ctx.workers.world))
        """Ranks that ask for coming steps' responses: of a server those alone that know when it has which weights."""
        self._follower: Follower | None = None
        self._all_threads = torch.get_num_threads()
        theirs = max(1, self._all_threads // 2)
        if self._copies and ctx.workers.device.type == "cpu":
            # More threads than cores wait for each other: a step took nearly twice as long (docs/benchmarks.md).
            torch.set_num_threads(max(1, self._all_threads - theirs))
        # torch counts threads for each thread that calls it.
        self._thread = ThreadPoolExecutor(1, "rollouts", torch.set_num_threads, (theirs,))
        self._begun: dict[int, Future[list[Response]]] = {}
        """This rank's share of coming steps' responses."""
        self._whole: dict[int, list[Response]] = {}
        """All ranks' responses, where they are known before their step."""

    @property
    def models(self) -> list[Any]:
        """What is held beside the policy."""
        return [copied.loaded.model for copied in self._copies]

    def start(self, first: int) -> None:
        """Have the server up before the first of the steps that are left, if one of them samples: it takes minutes, which
        are no step's.
        """
        steps = (step for step in range(first, self.total_steps) if step not in self._whole)
        if self.spec.sampling.engine == "vllm" and any(map(self.prompts_of, steps)):
            server = following(self.ctx, self.policy, self.spec.sampling, self.spec.server, first)
            self._follower = self.ctx.closing.enter_context(server)

    def samples(self, step: int) -> list[Sample]:
        """A step's, the same on all ranks; those of the step ``staleness`` later are begun with the weights as they are now."""
        prompts, tokens = self.prompts_of(step), self.spec.parallel.micro_batch_tokens
        if not self.spec.staleness:
            if not prompts:
                return []
            keys = self._keys(step, len(prompts))
            return respond(
                self.ctx.workers, self._speaker(step), prompts, self.spec.sampling, keys, self.reward_model, tokens
            )
        if step == 0:
            for early in range(self.spec.staleness):
                self._begin(early, step)
        samples = said(self.policy.chat, prompts, self._finished(step))
        self._begin(step + self.spec.staleness, step)
        if self.reward_model is None or not samples:
            return samples
        return rewarded(self.ctx.workers, self.reward_model, samples, tokens)

    def _speaker(self, step: int) -> LoadedModel | ServedModel:
        """Who responds: the policy, or a server that is given its weights as they are now, before this step."""
        return self.policy if self._follower is None else self._follower.current(step)

    def saved(self, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        """After so many finished steps, what the next ones will ask for: tensors, whole, the same on all ranks."""
        for ahead in range(self.spec.staleness):
            responses = self._finished(step + ahead)
            if responses:
                self._whole[step + ahead] = responses
                yield from ((f"{ahead}/{name}", tensor) for name, tensor in _packed(responses).items())

    def restore(self, step: int, fill: Fill, shapes: Mapping[str, torch.Size]) -> None:
        for ahead in range(self.spec.staleness):
            wanted = {
                f"{ahead}/{name}": torch.empty(shapes[f"{ahead}/{name}"], dtype=dtype)
                for name, dtype in PACKED.items()
                if f"{ahead}/{name}" in shapes
            }
            if wanted:
                fill(wanted)
                self._whole[step + ahead] = _unpacked(*wanted.values())

    def _look(self) -> None:
        """Raises Interrupted where this rank waits for a server that does not answer in the time that a stop leaves."""
        if self._follower is not None:
            self._follower.server.look()

    def close(self) -> None:
        if self._follower is not None:
            self._follower.server.let_go()  # what it was asked ahead nobody needs now, and it may hang
        self._thread.shutdown(cancel_futures=True)
        torch.set_num_threads(self._all_threads)

    def _begin(self, step: int, now: int) -> None:
        """With the weights as they are now, before step ``now``."""
        prompts = self.prompts_of(step) if step < self.total_steps else []
        if not prompts:
            return
        mine, keys = self._mine(len(prompts)), self._keys(step, len(prompts))
        asked, of_mine = [prompts[i].ids for i in mine], [keys[i] for i in mine]
        if self._follower is not None:
            sample = self._follower.sampling(now, asked, self._wider(), of_mine)
            self._begun[step] = self._thread.submit(sample if self._asks else _nothing)
            return
        sampler = self._copies[step % len(self._copies)]  # that of the step which has just been taken
        self._begun[step] = self._thread.submit(sampler.sampling(asked, self.spec, of_mine))

    @property
    def _asks(self) -> bool:
        return self.ctx.workers.rank in self._askers

    def _mine(self, count: int) -> List[int]:
        """What this rank asks for of a step's responses."""
        return range(count)[self._askers.index(self.ctx.workers.rank) :: len(self._askers)] if self._asks else range(0)

    def _wider(self) -> Sampling:
        """As many requests open as all ranks that one asks for would have."""
        width = self.spec.sampling.batch_size * (self.ctx.workers.world // len(self._askers))
        return self.spec.sampling.model_copy(update={"batch_size": width})

    def _finished(self, step: int) -> list[Response]:
        """All ranks' responses to a step's prompts, once they are there. Raises what sampling raised."""
        if step in self._whole:
            return self._whole.pop(step)
        if step not in self._begun:
            return []
        own = awaited([self._begun.pop(step)], self._look)[0]
        return in_order(self.ctx.workers, self._mine(len(self.prompts_of(step))), own)

    def _keys(self, step: int, count: int) -> list[tuple[int, ...]]:
        return [(self.ctx.seed, step, i) for i in range(count)]


def _askers(workers: Workers) -> list[int]:
    """The first process of each machine."""
    return [rank for rank, local in enumerate(workers.gather_objects([workers.local_rank])) if local == 0]


def _nothing() -> list[Response]:
    return []


class Copy:
    """A model that shares with another what is not trained of it, and samples by what the rest was at some moment."""

    def __init__(self, ctx: PhaseContext, policy: LoadedModel) -> None:
        self.workers, device = ctx.workers, ctx.workers.device
        if ctx.workers.zero is not None or is_split(policy.model):
            raise BadInput(
                f"staleness {ctx.spec.staleness} copies whole weights, which this strategy splits over processes: "
                "use ddp, sampling.engine: vllm, or staleness: 0"
            )
        self.theirs = [weight for weight in policy.model.parameters() if weight.requires_grad]
        shared = {id(weight): weight for weight in policy.model.parameters() if not weight.requires_grad}
        self.loaded = replace(policy, model=copy.deepcopy(policy.model, memo=shared))
        self.own = [weight for weight in self.loaded.model.parameters() if weight.requires_grad]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def sampling(
        self, prompts: list[list[int]], spec: OnPolicySpec, keys: list[tuple[int, ...]]
    ) -> Callable[[], list[Response]]:
        """Take the weights over as they are now. Returns what samples by them, in whatever thread."""
        with torch.no_grad():
            torch._foreach_copy_(self.own, self.theirs)
        copied = torch.cuda.current_stream().record_event() if self.stream is not None else None

        def responses() -> list[Response]:
            with self._beside(copied):
                return own_responses(
                    self.workers, self.loaded, prompts, spec.sampling, keys, tempered=True, alone=False
                )

        return responses

    def _beside(self, copied: Any) -> AbstractContextManager[Any]:
        if self.stream is None:
            return nullcontext()
        self.stream.wait_event(copied)
        return torch.cuda.stream(self.stream)


PACKED = {"ids": torch.int64, "logprobs": torch.float32, "ended": torch.int64}


def _packed(responses: List[Response]) -> dict[str, torch.Tensor]:
    """As tensors, in the order of :data:`PACKED`; behind the end of a response its ids are -1."""
    width = max(len(response.ids) for response in responses)
    ids = [response.ids + [-1] * (width - len(response.ids)) for response in responses]
    logprobs = [response.logprobs + [0.0] * (width - len(response.ids)) for response in responses]
    columns = (ids, logprobs, [response.ended for response in responses])
    return {
        name: torch.tensor(column, dtype=dtype) for (name, dtype), column in zip(PACKED.items(), columns, strict=True)
    }


def _unpacked(ids: torch.Tensor, logprobs: torch.Tensor, ended: torch.Tensor) -> list[Response]:
    lengths = (ids >= 0).sum(1).tolist()
    rows = zip(ids.tolist(), logprobs.tolist(), ended.tolist(), lengths, strict=True)
    return [Response(i[:length], bool(end), told[:length]) for i, told, end, length in rows]
