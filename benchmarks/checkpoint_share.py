"""What saving costs a training: ``python checkpoint_share.py [--every 50] [--saves 3]``, or under torchrun with ``--strategy``.

The model is the 7.4M Llama of the project's other measurements, in batches of eight rows of 81 tokens. Time that training
waits for a save and processor time of the thread that writes are set against the time of the steps in between.
"""

import argparse
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core.checkpoint import Checkpoints
from trainers.core.flops import ModelFlops
from trainers.core.parallel import Workers
from trainers.core.trainee import Trainee
from trainers.ending import exit_with
from trainers.files import tree_size
from trainers.spec import Checkpoint, Optim, Parallel

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--strategy", default="auto")
    args = parser.parse_args()
    workers = Workers(Parallel(strategy=args.strategy))
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if workers.trained_sharding is not None:
        workers.trained_sharding.apply(model)
    trainee = Trainee(workers, model, Optim(), 10_000, ModelFlops(0, 0, 1.0, 0))
    with TemporaryDirectory() as folder:
        root = Path(workers.from_main(lambda: folder))
        checkpoints = Checkpoints(_context(workers, root), Checkpoint(every_steps=args.every), {"model": trainee})
        _measure(workers, trainee, checkpoints, root, args.every, args.saves)
        workers.barrier()


def _measure(workers: Workers, trainee: Trainee, checkpoints: Checkpoints, root: Path, every: int, saves: int) -> None:
    waited = steps = 0.0
    cpu = time.process_time()
    for step in range(every * saves):
        begin = time.perf_counter()
        _step(trainee, workers, step)
        middle = time.perf_counter()
        checkpoints.after_step(step + 1, every * saves + 1)
        steps += middle - begin
        waited += time.perf_counter() - middle
    checkpoints.wait()
    cpu = time.process_time() - cpu
    written = _seconds_of("checkpoints")
    if workers.is_main:
        size = tree_size(max(root.glob("step-*"))) / 1e6
        print(f"{every * saves} steps of {steps / every / saves:.3f} s, {saves} checkpoints of {size:.0f} MB")
        print(
            f"training waited {waited / saves * 1e3:.1f} ms a checkpoint: {waited / (steps + waited):.2%} of the time"
        )
        print(f"writing took {written / saves * 1e3:.1f} ms of processor time: {written / cpu:.2%} of the process's")


def _seconds_of(threads: str) -> float:
    """Processor time of the threads of an executor, by its name."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith(threads)]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in found if thread.ident)


def _step(trainee: Trainee, workers: Workers, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(CONFIG.vocab_size, (8, 81), generator=generator).to(workers.device)
    with trainee.engine.exchange(last=True):
        loss = trainee.module(input_ids=ids, labels=ids, use_cache=False).loss
        trainee.engine.backward(loss / workers.world)
    trainee.update(step)


def _context(workers: Workers, root: Path) -> SimpleNamespace:
    meter = SimpleNamespace(part=lambda name: nullcontext(), seconds=lambda: 1.0, checkpointed=lambda step: None)
    return SimpleNamespace(
        workers=workers,
        meter=meter,
        dir=SimpleNamespace(checkpoints=root),
        file=SimpleNamespace(remote=None),
        stored=None,
        writes_for_others=workers.is_main,
        stop_signal=None,
        stop_asked=False,
    )


if __name__ == "__main__":
    exit_with(main)
