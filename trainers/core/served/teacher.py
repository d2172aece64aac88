"""A teacher behind a server: what it says of sequences, asked while the student does something else.

Names: K scored positions of several sequences, k likeliest next tokens.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as List
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from trainers.contract import BadInput
from trainers.core.batch import Sequence
from trainers.core.chat import ChatFormat
from trainers.core.context import PhaseContext
from trainers.core.served.server import TRAINING_SECONDS, Server, address, awaited
from trainers.core.served.tokens import other_tokens, row_texts, vocabulary_texts
from trainers.core.served.wire import Wire, connected
from trainers.core.templates import Messages
from trainers.core.top_k import Stored
from trainers.core.vocabulary import PROBES
from trainers.meter import TeacherMeter
from trainers.spec import Teaching

SCORE_SECONDS = 180.0
"""How long one answer may take. One that takes longer is asked for again."""


class ServedTeacher:
    """Answers are asked for ahead of when they are needed, a bounded number at a time."""

    def __init__(
        self, wire: Wire, k: int, known: int, pool: ThreadPoolExecutor, meter: TeacherMeter | None = None
    ) -> None:
        """``known``: ids below this are what both models can say. ``pool``: of those who ask the server."""
        self.wire, self.k, self.known, self.meter = wire, k, known, meter
        self._pool = pool
        self._asked: dict[bytes, deque[Future[np.ndarray]]] = defaultdict(deque)
        self._waited = 0.0

    def ask(self, sequences: Iterable[Sequence]) -> None:
        """Have sequences scored, each for one later :meth:`scores`."""
        for sequence in sequences:
            self._asked[_key(sequence)].append(self._pool.submit(self._scored, sequence))

    def scores(self, sequences: List[Sequence], device: torch.device) -> Stored:
        """Of the sequences' scored positions, one behind the other, as stored scores are. Waits for what is not there yet."""
        if not sequences:
            return torch.zeros(0, 1, dtype=torch.int64, device=device), torch.zeros(0, 2, device=device), self.known
        began = time.perf_counter()
        found = np.concatenate([self._answer(sequence) for sequence in sequences])
        self._waited += time.perf_counter() - began
        ids, log_probs = found[:, : self.k].astype(np.int64), found[:, self.k :].astype(np.float32)
        return torch.from_numpy(ids).to(device), torch.from_numpy(log_probs).to(device), self.known

    def waited(self) -> float:
        """Seconds that :meth:`scores` has taken since this was asked last."""
        found, self._waited = self._waited, 0.0
        return found

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, sequence: Sequence) -> np.ndarray:
        asked = self._asked[_key(sequence)]
        if not asked:
            self.ask([sequence])
        answer = asked.popleft()
        if not asked:
            del self._asked[_key(sequence)]
        return awaited([answer], self.wire.server.look)[0]

    def _scored(self, sequence: Sequence) -> np.ndarray:
        scored = np.array(sequence.scored)
        scored[0] = False
        first = int(scored.argmax())
        return self.wire.likeliest(sequence.ids.tolist(), first, self.k, self.known)[scored[first:]]


class Teachers:
    """Served teachers by the names that rows have for them."""

    def __init__(self, by_name: Mapping[str, ServedTeacher]) -> None:
        self.by_name = by_name
        self.known = min(teacher.known for teacher in by_name.values())
        for teacher in by_name.values():
            teacher.known = self.known  # what only some can say is among the rest

    def check_rows(self, tokenizer: Any, rows: List[List[int]]) -> None:
        """Raise BadInput if the text of the student's rows is other tokens to a teacher."""
        texts = row_texts(tokenizer, rows)
        for teacher in self.by_name.values():
            _check_texts(teacher.wire, tokenizer, texts)

    def ask(self, taught: Iterable[tuple[str, Sequence]]) -> None:
        """Have sequences scored, each by its teacher and for one later :meth:`scores`."""
        for name, sequence in taught:
            self.by_name[name].ask([sequence])

    def scores(self, taught: List[tuple[str, Sequence]], device: torch.device) -> Stored:
        """See :meth:`ServedTeacher.scores`."""
        found = [self.by_name[name].scores([sequence], device) for name, sequence in taught]
        if not found:
            return next(iter(self.by_name.values())).scores([], device)
        return torch.cat([ids for ids, _, _ in found]), torch.cat([logs for _, logs, _ in found]), self.known

    def shares_of_loss(self, parts: Mapping[str, float]) -> dict[str, float]:
        """What share of a step's loss is each one's, of its parts by name; measured, and for the phase's own record."""
        total = sum(parts.values())
        shares = {name: part / total if total else 0.0 for name, part in parts.items()}
        for name, share in shares.items():
            if (meter := self.by_name[name].meter) is not None:
                meter.share_of_loss(share)
        return {f"loss_share_{name}": share for name, share in shares.items()}

    def waited(self) -> float:
        """Seconds that answers were waited for since this was asked last."""
        return sum(teacher.waited() for teacher in self.by_name.values())

    def close(self) -> None:
        for teacher in self.by_name.values():
            teacher.close()


def served_teachers(
    ctx: PhaseContext, at: Mapping[str, tuple[str, Teaching]], chat: ChatFormat, rows: int, longest: int
) -> Teachers:
    """Teachers by the names that rows have for them, each with its field; see :func:`_teacher`."""
    pools = asking([teaching for _, teaching in at.values()])
    return Teachers(
        {
            name: _teacher(ctx, name, field, teaching, pools[address(str(teaching.url))], chat, rows, longest)
            for name, (field, teaching) in at.items()
        }
    )


def asking(teachings: Iterable[Teaching]) -> dict[str, ThreadPoolExecutor]:
    """Those who ask each server, by its address: no more than any of its teachers allows."""
    widths: dict[str, int] = {}
    for teaching in teachings:
        server = address(str(teaching.url))
        widths[server] = min(teaching.concurrency, widths.get(server, teaching.concurrency))
    return {server: ThreadPoolExecutor(width, thread_name_prefix="teacher") for server, width in widths.items()}


def _teacher(
    ctx: PhaseContext,
    name: str,
    field: str,
    at: Teaching,
    pool: ThreadPoolExecutor,
    chat: ChatFormat,
    rows: int,
    longest: int,
) -> ServedTeacher:
    """The teacher that rows call so, of a student that has so many rows of tokens and learns on ``longest`` tokens at most.

    Raises BadInput for a server that does not take what it would be asked, or reads text as other tokens.
    """
    ctx.meter.stage(f"asking {at.url}")
    meter = ctx.meter.teacher(name)
    server = Server(
        field, at, lambda: ctx.stop_signal is not None, timeout=SCORE_SECONDS, watcher=meter, finishing=TRAINING_SECONDS
    )
    wire = connected(server, at.served_as)
    wire.check_length(longest + 1, f"maxLength to {wire.positions - 1}")  # it adds a token to whatever it scores
    check_tokens(wire, chat)
    known = known_to(wire, rows)
    if at.top_k > known:
        raise BadInput(f"{field}.topK {at.top_k}: the teacher and the student share {known} tokens")
    wire.likeliest([0, 0], 1, at.top_k, known)
    ctx.meter.stage("")
    return ServedTeacher(wire, at.top_k, known, pool, meter)


def _key(sequence: Sequence) -> bytes:
    return sequence.ids.tobytes() + sequence.scored.tobytes()


def known_to(wire: Wire, rows: int) -> int:
    """How many of a student's ids the server's model takes, by asking."""
    low, high = 1, rows
    while low < high:
        middle = (low + high + 1) // 2 if high < rows else high
        low, high = (middle, high) if wire.takes(middle - 1) else (low, middle - 1)
    return low


def check_tokens(wire: Wire, chat: ChatFormat) -> None:
    """Raise BadInput if text is other tokens to the server's model than to the student. Templates that differ are told."""
    taken = [messages for messages in PROBES if _takes(chat, messages)]
    texts = [*map(chat.prompt_text, taken), *vocabulary_texts(chat.tokenizer)]
    if texts and wire.tokens(texts[0]) is None:
        print(
            f"{wire.server.field}: {wire.server.url} makes no tokens of text, so whether they are the student's is not known"
        )
        return
    _check_texts(wire, chat.tokenizer, texts)
    if any(wire.conversation_tokens(messages) not in (None, chat.prompt(messages)) for messages in taken):
        print(f"{wire.server.field}: its server's chat template is another than the student's, by which it is asked")


def _takes(chat: ChatFormat, messages: Messages) -> bool:
    try:
        chat.prompt(messages)
    except BadInput:  # a template without a system's turn, say
        return False
    return True


def _check_texts(wire: Wire, tokenizer: Any, texts: Iterable[str]) -> None:
    difference = other_tokens(wire, tokenizer, texts)
    if difference is not None:
        raise BadInput(
            f"{wire.server.field}: {wire.server.url} has another tokenizer than the student: {difference}; "
            "use models of one family"
        )
