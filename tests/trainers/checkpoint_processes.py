"""Several processes that save and go on, for test_checkpoint_processes.py. They are forked, so that one more attempt is cheap."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families.architectures import family_model
from saving_context import saving_context
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core.adapters import with_adapters
from trainers.core.checkpoint import Checkpoints
from trainers.core.export import write_model
from trainers.core.flops import ModelFlops
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.saving import storage
from trainers.core.sharding import whole
from trainers.core.tensors import content_sum, write_tensors
from trainers.core.trainee import Trainee
from trainers.spec import Checkpoint, Fsdp, Lora, Optim, Parallel

FORK = multiprocessing.get_context("fork")
# 61 tokens split unevenly over two processes; norms of 16 numbers leave the last of them nothing at all.
CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    attn_implementation="eager",
)
STRATEGIES = {
    "single": Parallel(strategy="single"),
    "ddp": Parallel(strategy="ddp"),
    "fsdp": Parallel(strategy="fsdp"),
    "hybrid": Parallel(strategy="fsdp", fsdp=Fsdp(hybrid=True)),
}


class Attempt:
    """One process's training of a tiny model."""

    def __init__(self, folder: Path, strategy: str) -> None:
        self.workers = Workers(STRATEGIES[strategy])
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG)
        if self.workers.trained_sharding is not None:
            self.workers.trained_sharding.apply(model)
        self.trainee = Trainee(self.workers, model, Optim(lr=1e-2), 100, ModelFlops(0, 0, 1.0, 0))
        self.checkpoints = Checkpoints(
            saving_context(self.workers, folder), Checkpoint(every_steps=1, keep_last=2), {"model": self.trainee}
        )

    def train(self, step: int) -> None:
        ids = torch.arange(8)[None].mul(step + 3) % CONFIG.vocab_size
        with self.trainee.engine.exchange(last=True):
            loss = self.trainee.module(input_ids=ids, labels=ids, use_cache=False).loss
            self.trainee.engine.backward(loss / self.workers.world)
        self.trainee.update(step)

    def sums(self) -> dict[str, int]:
        """Of every tensor of training's state; all processes take part."""
        return {name: content_sum(whole(tensor).cpu()) for name, tensor in self.trainee.engine.saved()}


def start(world: int, work, *args) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=_rank, args=(rank, world, port, work, *args)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def _rank(rank: int, world: int, port: int, work, *args) -> None:
    node = max(1, world // 2) if work is hand_on and args[1] == "hybrid" else world
    places = {"RANK": rank, "LOCAL_RANK": rank % node, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": node}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    work(*args)


def finish(processes: list, seconds: float = 240) -> list[int]:
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, "does not end"
    return [process.exitcode for process in processes]


# ---------------------------------------------------------------- scenarios


def reshard(folder: Path) -> None:
    """A state is handed from strategy to strategy and stays, bit for bit, what it was."""
    chain = [("fsdp", 2), ("hybrid", 4), ("single", 1), ("fsdp", 3), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]
    for number, (strategy, world) in enumerate(chain):
        assert set(finish(start(world, hand_on, folder, strategy, number))) == {0}, (strategy, world)
        print(f"{strategy} x {world}: ok", flush=True)


def hand_on(folder: Path, strategy: str, number: int) -> None:
    attempt, kept = Attempt(folder, strategy), folder / "sums.json"
    found = attempt.checkpoints.restore()
    if number == 0:
        for step in range(3):
            attempt.train(step)
    else:
        assert found == 10 + number - 1, found
        assert attempt.sums() == json.loads(kept.read_text())
    attempt.workers.barrier()  # the others still read what the first is about to write anew
    sums = attempt.sums()
    if attempt.workers.is_main:
        kept.write_text(json.dumps(sums))
    attempt.workers.barrier()
    attempt.checkpoints.save(10 + number)
    attempt.checkpoints.wait()


STEPS, KILLS = 16, 5


def kills(folder: Path) -> None:
    """One process or all are killed at random moments, again and again; what is gone on from is what was there."""
    rng = random.Random(int(os.environ.get("SEED", "0")))
    assert set(finish(start(2, uninterrupted, folder / "whole"))) == {0}
    torn = attempts = 0
    while not (folder / "done").exists():
        attempts += 1
        ranks = start(2, again, folder)
        if attempts <= KILLS:
            wait_for_writing(folder / "checkpoints", rng, ranks)
            for process in rng.choice([ranks, ranks, ranks[:1], ranks[1:]]):
                process.kill()
        killed = time.monotonic()
        codes = finish(ranks, 30 if attempts <= KILLS else 240)
        torn += bool(list((folder / "checkpoints").glob(".step-*")))
        print(f"attempt {attempts}: {codes}, ended {time.monotonic() - killed:.1f} s after the kill", flush=True)
        assert set(codes) <= ({0, 1, -signal.SIGKILL} if attempts <= KILLS else {0})
    print(f"{torn} of {attempts} left a torn folder", flush=True)
    assert torn


def wait_for_writing(root: Path, rng: random.Random, ranks: list) -> None:
    """Until a new folder is being written, or one more, and a moment longer."""
    for _ in range(rng.randint(1, 2)):
        before = set(root.glob(".step-*"))
        while set(root.glob(".step-*")) <= before and all(process.is_alive() for process in ranks):
            time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.1))


def uninterrupted(folder: Path) -> None:
    attempt = Attempt(folder, "fsdp")
    for step in range(STEPS):
        attempt.train(step)
        sums = attempt.sums()
        if attempt.workers.is_main:
            folder.mkdir(exist_ok=True)
            (folder / f"{step + 1}.json").write_text(json.dumps(sums))


def again(folder: Path) -> None:
    attempt = Attempt(folder, "fsdp")

    def slowly(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        time.sleep(0.02)
        sums = write_tensors(path, tensors)
        time.sleep(0.02)
        return sums

    storage.write_tensors = slowly
    first = attempt.checkpoints.restore()
    if first:
        assert attempt.sums() == json.loads((folder / "whole" / f"{first}.json").read_text()), first
    for step in range(first, STEPS):
        attempt.train(step)
        attempt.checkpoints.after_step(step + 1, STEPS)
    assert attempt.sums() == json.loads((folder / "whole" / f"{STEPS}.json").read_text())
    (folder / "done").touch()


def reasons(folder: Path) -> None:
    """What one process's writer fails with is raised in all of them, as it was."""
    codes = finish(start(2, cannot_write, folder))
    assert codes == [0, 0], codes
    assert not list((folder / "checkpoints").glob("step-2")) and list((folder / "checkpoints").glob("step-1"))


def cannot_write(folder: Path) -> None:
    attempt = Attempt(folder, "fsdp")
    attempt.train(0)
    attempt.checkpoints.after_step(1, 9)
    attempt.checkpoints.wait()
    if attempt.workers.rank == 1:
        storage.write_tensors = full
    attempt.train(1)
    attempt.checkpoints.after_step(2, 9)
    with pytest.raises(OSError, match="No space left on device") as raised:
        for step in range(2, 9):
            attempt.train(step)
            attempt.checkpoints.after_step(step + 1, 9)
    assert Path(raised.value.filename).name == "shard-00001.safetensors"


def full(path: Path, tensors: object) -> None:
    raise OSError(28, "No space left on device", str(path))


def damage(folder: Path) -> None:
    """A shard that one process alone finds damaged sends all of them to the older checkpoint."""
    assert set(finish(start(2, three_steps, folder))) == {0}
    shard = folder / "checkpoints" / "step-3" / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-64] + bytes(64))
    assert set(finish(start(2, finds, folder, 2))) == {0}
    (folder / "checkpoints" / "step-2" / "shard-00000.safetensors").unlink()
    assert set(finish(start(2, finds, folder, 0))) == {0}


def three_steps(folder: Path) -> None:
    attempt = Attempt(folder, "fsdp")
    for step in range(3):
        attempt.train(step)
        attempt.checkpoints.after_step(step + 1, 3)


def finds(folder: Path, step: int) -> None:
    attempt = Attempt(folder, "fsdp")
    before = attempt.sums()
    assert attempt.checkpoints.restore() == step
    assert (attempt.sums() == before) == (step == 0), "nothing is half loaded"


def best(folder: Path) -> None:
    """The best weights are shards too, and come back in another strategy."""
    assert set(finish(start(2, keeps_best, folder))) == {0}
    names = {path.name for path in (folder / "checkpoints" / "best-1").iterdir()}
    assert names == {"shard-00000.safetensors", "shard-00001.safetensors", "index.json", "state.json"}
    assert set(finish(start(1, loads_best, folder))) == {0}


def keeps_best(folder: Path) -> None:
    attempt = Attempt(folder, "fsdp")
    for step, score in enumerate((0.5, 0.7)):
        attempt.train(step)
        attempt.checkpoints.keep_best("model", score, higher_is_better=False)
        if step == 0:
            sums = attempt.sums()
            if attempt.workers.is_main:
                (folder / "sums.json").write_text(json.dumps(sums))
        attempt.checkpoints.after_step(step + 1, 2)


def loads_best(folder: Path) -> None:
    attempt = Attempt(folder, "single")
    assert attempt.checkpoints.restore() == 2
    attempt.checkpoints.load_best("model")
    wanted = json.loads((folder / "sums.json").read_text())
    found = attempt.sums()
    assert all(found[name] == wanted[name] for name in wanted if name.startswith("weights/"))


def export(folder: Path) -> None:
    """Split models leave the files that whole ones leave: stacked experts, one weight for both ends, adapters."""
    for kind, rank in (("qwen3", 0), ("mixtral", 0), ("llama", 2)):
        whole_one, split = folder / f"{kind}-whole", folder / f"{kind}-split"
        assert set(finish(start(1, exports, "single", kind, rank, whole_one))) == {0}
        assert set(finish(start(2, exports, "fsdp", kind, rank, split))) == {0}
        files = sorted(path.relative_to(split) for path in split.rglob("*") if path.is_file())
        assert len([file for file in files if file.suffix == ".safetensors"]) == (2 if rank else 1)
        for file in files:
            assert (split / file).read_bytes() == (whole_one / file).read_bytes(), file


def exports(strategy: str, kind: str, rank: int, folder: Path) -> None:
    workers = Workers(STRATEGIES[strategy])
    model = family_model(kind)
    if workers.trained_sharding is not None:
        workers.trained_sharding.apply(model)
    adapters = None
    if rank:
        adapters = with_adapters(model, Lora(rank=rank), 0)
        generator = torch.Generator().manual_seed(0)
        for name, weight in adapters.named_parameters():
            if "lora_B" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=generator))
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None, pad_token_id=0)
    loaded = LoadedModel(model, tokenizer, SimpleNamespace(stop_ids={2}), adapters)
    write_model(loaded, folder, workers.is_main)
    workers.barrier()
