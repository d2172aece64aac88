"""A vLLM server that follows weights in training: those of now, or of some steps ago, while training goes on."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from trainers.contract import BadInput
from trainers.core.context import PhaseContext
from trainers.core.export import write_model
from trainers.core.generate import Response
from trainers.core.models import LoadedModel
from trainers.core.served.check import check_vocabulary
from trainers.core.served.model import ServedModel, precision
from trainers.core.served.server import TRAINING_SECONDS
from trainers.core.served.started import StartedServer, started
from trainers.core.served.wire import connected
from trainers.core.sharding import whole_shape
from trainers.spec import OwnServer, Sampling

DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""vLLM has what changes weights under this name; nobody else can reach its socket."""


class Follower:
    """Weights go to it as files, and from there into the places of the old ones, which every build of vLLM can do."""

    def __init__(self, ctx: PhaseContext, loaded: LoadedModel, server: StartedServer, folder: Path, step: int) -> None:
        """``step``: the server has been started with the weights as they were before it."""
        self.ctx, self.loaded, self.server, self.folder = ctx, loaded, server, folder
        rows = int(whole_shape(loaded.model.get_output_embeddings().weight)[0])
        known = rows if loaded.num_known is None else loaded.num_known
        wire = connected(server, None)
        check_vocabulary(wire, max(rows, max(loaded.tokenizer.get_vocab().values()) + 1))
        self.served = ServedModel(wire, loaded.tokenizer, loaded.chat, known, loaded.positions, rows)
        self._step = step
        self._numbers = count()

    def current(self, step: int) -> ServedModel:
        """The server's model with the weights as they are now, before this step; all processes call it together."""
        folder = self._taken(step)
        if folder is not None and self.ctx.workers.local_rank == 0:
            self._read(folder)
        self.ctx.workers.barrier()
        return self.served

    def sampling(
        self, step: int, prompts: list[list[int]], sampling: Sampling, keys: List[tuple[int, ...]]
    ) -> Callable[[], list[Response]]:
        """Take the weights over as they are now, before this step, all processes together. Returns what samples by them, in
        whatever thread of a machine's first process, once what was taken over before has sampled.
        """
        folder = self._taken(step)

        def responses() -> list[Response]:
            if folder is not None:
                self._read(folder)
            return self.served.responses(prompts, sampling, keys)

        return responses

    def _taken(self, step: int) -> Path | None:
        """Files of the weights as they are now; None if the server has them, or will have once it has read all files so far."""
        if step == self._step:
            return None
        self._step = step
        folder = self.folder / str(next(self._numbers))
        write(self.ctx, self.loaded, folder)
        return folder

    def _read(self, folder: Path) -> None:
        """Have the server read weights, which nobody needs as files then."""
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.server.post("/collective_rpc", order)
        # What it remembers of prompts is of the old weights.
        said = self.server.post("/reset_prefix_cache", {})
        if not isinstance(said, dict) or said.get("success") is not True:
            raise BadInput(f"{self.server.field}: {self.server.url} keeps prompts of earlier weights")
        shutil.rmtree(folder)


@contextmanager
def following(
    ctx: PhaseContext, loaded: LoadedModel, sampling: Sampling, settings: OwnServer | None, step: int
) -> Iterator[Follower]:
    """A server of a model as it is before a step of its training, which ends with the block.

    It tells log-probabilities at the sampling's temperature.
    """
    ctx.meter.stage("starting vLLM")
    flags = ["--dtype", precision(ctx.workers), "--served-model-name", "policy"]
    flags += ["--logprobs-mode", "processed_logprobs"] if sampling.temperature not in (0, 1) else []
    with tempfile.TemporaryDirectory(prefix="weights-") as name:
        folder = Path(name) / "model"
        write(ctx, loaded, folder)
        own = settings or OwnServer()
        with started(ctx, "sampling", own, str(folder), flags, DEVELOPMENT, [Path(name)]) as server:
            ctx.meter.stage("")
            server.finishing = TRAINING_SECONDS
            for file in folder.glob("*.safetensors"):  # it has them now, and memory may be what the files are in
                file.unlink()
            yield Follower(ctx, loaded, server, Path(name), step)


def write(ctx: PhaseContext, loaded: LoadedModel, folder: Path) -> None:
    """The model as it is, for a server on each machine. Raises Diverged if a weight is not finite."""
    write_model(loaded, folder, writes=ctx.workers.local_rank == 0)
