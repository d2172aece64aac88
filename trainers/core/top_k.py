"""What a teacher says of every token of its responses, on disk: its k likeliest next tokens and one bucket for the rest.

Buckets, and not the k alone: a student can lower a reverse divergence of k tokens by giving all of them less. The rest's
log-probability is summed over its logits, since 1 minus the others' sum is lost in rounding where it is small. Of 64 tokens
and a vocabulary above 65,536 a position takes 326 bytes: ids in two and one, log-probabilities in two.

A shard is a safetensors file that holds the tokens as they were scored, prompts too, so nothing is tokenised again. Its
name has the digest of its content, and rows of traces name it, so a digest of the traces covers their shards.

Names: n responses, T their tokens, P their prompts' tokens, K scored positions, k kept of V known tokens.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trainers.contract import BadInput
from trainers.core.head_losses import LogitsFn
from trainers.files import discard, write_atomic

FOLDER = "top-k"
"""Beside ``traces.jsonl``."""

KEY = "top_k"
"""In a row of traces: ``{"file": name of the shard, "row": which of its responses}``."""


ABOUT = "about"
"""Key of a shard's metadata: how many tokens were chosen from, and the digest of the vocabulary."""


def bucket_logits(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits of k tokens and of all others together: (K, V) and (K, k) to (K, k + 1), softmax for softmax the same."""
    top = logits.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return torch.cat([top, top.new_full((*top.shape[:-1], 1), -torch.inf)], -1)
    return torch.cat([top, logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)], -1)


def likeliest(k: int, known: int | None) -> LogitsFn:
    """Ids of the k likeliest of the known tokens, and log-probabilities of these and the rest: (K, 2 k + 1).

    Ids are exact in fp32 up to 2^24.
    """

    def fn(logits: torch.Tensor, _: slice) -> torch.Tensor:
        logits = logits[:, :known]
        ids = logits.topk(k, dim=-1).indices
        return torch.cat([ids, bucket_logits(logits, ids).log_softmax(-1)], -1)

    return fn


@dataclass(frozen=True)
class Scored:
    """A response with what the teacher says of its tokens."""

    prompt: List[int]
    tokens: List[int]
    found: np.ndarray
    """(tokens, 2 k + 1), see :func:`likeliest`."""


def vocabulary_digest(tokenizer: Any) -> str:
    """Of all tokens with their ids: where it is the same, so are tokens."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def write_shard(folder: Path, first: int, scored: List[Scored], known: int, vocabulary: str) -> Path:
    """A file of these responses, whole or not at all; ``first``: number of the first, which sorts files by name."""
    k = scored[0].found.shape[1] // 2
    found = np.concatenate([response.found for response in scored])
    ids = found[:, :k].astype(np.uint32)
    tensors = {
        "tokens": np.concatenate([np.asarray(response.tokens, dtype=np.uint32) for response in scored]),
        "prompts": np.concatenate([np.asarray(response.prompt, dtype=np.uint32) for response in scored]),
        "token_ends": np.cumsum([len(response.tokens) for response in scored], dtype=np.int64),
        "prompt_ends": np.cumsum([len(response.prompt) for response in scored], dtype=np.int64),
        "ids": (ids & 0xFFFF).astype(np.uint16),
        "log_probs": found[:, k:].astype(np.float16),
    }
    if known > 2**16:
        tensors["ids_high"] = (ids >> 16).astype(np.uint8)
    # One entry: safetensors puts several in an order that is another each time, and the content names the file.
    content = save(tensors, {ABOUT: json.dumps({"known": known, "vocabulary": vocabulary})})
    path = folder / f"{first:09d}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    write_atomic(path, content)
    return path


def check_shards(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise BadInput unless all shards that rows name are there and whole."""
    for name in sorted({row[KEY]["file"] for row in rows if KEY in row}):
        _check(folder / name)


def drop_others(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Delete shards that no row names: what an attempt that was killed in between has left."""
    named = {row[KEY]["file"] for row in rows if KEY in row}
    for path in folder.glob("*.safetensors"):
        if path.name not in named:
            discard(path)


def _check(path: Path) -> None:
    if not path.is_file():
        raise BadInput(f"{path} is missing: it has the teacher's log-probabilities, and belongs beside the traces")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stem.rpartition("-")[2] != digest[:32]:
        raise BadInput(f"{path} is damaged: its content is not what its name says; have the rollout phase run again")


@dataclass(frozen=True)
class Place:
    """Where the scores of a response's tokens lie."""

    shard: str
    start: int


NOWHERE = Place("", 0)
"""Of a response without scores."""


Stored = tuple[torch.Tensor, torch.Tensor, int]
"""Ids, (K, k), log-probabilities with the rest's, (K, k + 1) in fp32, and V: ids below it were chosen from."""


@cache
def shards_in(folders: tuple[str, ...]) -> "Shards":
    """A process's reader of the shards in these folders."""
    return Shards([Path(folder) for folder in folders])


class Shards:
    """Reads shards position by position, in place: files of any size are mapped into memory and not held in it."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = list(folders)
        self._open: dict[str, Any] = {}
        self._ends: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, row: Mapping[str, Any], vocabulary: str, known: int) -> tuple[list[int], list[int], Place]:
        """Tokens of a row's prompt and response, and where the scores of the latter are.

        Raises BadInput if it has none, or by a teacher with another tokenizer than the student's, which has this digest
        and embeds ids below ``known`` (0: all).
        """
        name, index = _reference(row)
        file = self._file(name)
        settings = _about(file)
        if settings["vocabulary"] != vocabulary:
            raise BadInput(
                f"traces: {name} was scored with another tokenizer than the student's (digests "
                f"{settings['vocabulary'][:12]} and {vocabulary[:12]}): use a student with the teacher's tokenizer"
            )
        if known and settings["known"] > known:
            raise BadInput(f"traces: the teacher knows {settings['known']} tokens, the student embeds {known}")
        if name not in self._ends:
            self._ends[name] = (file.get_tensor("prompt_ends"), file.get_tensor("token_ends"))
        spans = [(int(ends[index - 1]) if index else 0, int(ends[index])) for ends in self._ends[name]]
        prompt, tokens = (
            file.get_slice(part)[start:stop].tolist()
            for part, (start, stop) in zip(("prompts", "tokens"), spans, strict=True)
        )
        return prompt, tokens, Place(name, spans[1][0])

    def scores(self, places: List[tuple[Place, int]], device: torch.device) -> Stored:
        """Of several responses, each with its number of tokens. Raises BadInput for shards of different kinds."""
        if not places:
            return torch.zeros(0, 1, dtype=torch.int64, device=device), torch.zeros(0, 2, device=device), 1
        ids, log_probs = zip(*(self._scores(place, count) for place, count in places), strict=True)
        kinds = {(_about(self._file(place.shard))["known"], ids[i].shape[1]) for i, (place, _) in enumerate(places)}
        if len(kinds) > 1:
            said = " and ".join(f"{k} of {known}" for known, k in sorted(kinds))
            raise BadInput(f"traces: some keep {said} tokens: use traces that were made with one teacherTopK")
        known, _ = kinds.pop()
        return _tensor(ids, device), _tensor(log_probs, device), known

    def _scores(self, place: Place, count: int) -> tuple[np.ndarray, np.ndarray]:
        file, at = self._file(place.shard), slice(place.start, place.start + count)
        ids = file.get_slice("ids")[at].astype(np.int64)
        if "ids_high" in file.keys():  # noqa: SIM118 - no mapping
            ids += file.get_slice("ids_high")[at].astype(np.int64) << 16
        return ids, file.get_slice("log_probs")[at].astype(np.float32)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = next((folder / name for folder in self.folders if (folder / name).is_file()), None)
            if path is None:
                raise BadInput(f"traces: there is no {name} in {' or '.join(map(str, self.folders))}")
            _check(path)
            try:
                self._open[name] = safe_open(path, "np")
            except SafetensorError as error:
                raise BadInput(f"traces: {path} cannot be read: {error}") from error
        return self._open[name]


def _about(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.metadata()[ABOUT])
    return found


def _tensor(parts: List[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _reference(row: Mapping[str, Any]) -> tuple[str, int]:
    found = row.get(KEY)
    name, index = (found.get("file"), found.get("row")) if isinstance(found, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(index, int) or Path(name).name != name or index < 0:
        raise BadInput(
            f"traces: the row of {row['prompt'][:60]!r} has no log-probabilities of the teacher: "
            "make traces by a rollout phase with teacherTopK, or set teacher"
        )
    return name, index
