"""How a conversation becomes tokens: the model's chat template if it has one, else the plain format.

The plain format is ``User: …\\n\\nAssistant: …<eos>`` with ``System: …\\n\\n`` before it when there is a system turn.

Prompt and response are always tokenised apart, so the prompt's tokens in training are exactly those that generation
starts from. Special tokens come from the template alone (a second BOS is the most common silent bug of this field).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainers.contract import BadInput

Messages = list[dict[str, str]]
Frame = tuple[str, str]
"""Text that a template puts before and after a message."""

SPECIAL_TEXT = re.compile(r"^$|^\s|\s$|[<\[{/]")
"""Texts that a template may treat in its own way: blanks it strips, and marks such as </think> that it cuts at."""

FRAME_PROBES = ("x7q", "two words", 'It\'s 5 > 4, "so" & so:\n\n  - yes')


@dataclass(frozen=True)
class ChatFormat:
    tokenizer: Any
    stop_ids: frozenset[int]
    """Tokens that end a response."""

    @property
    def end_id(self) -> int:
        """The token put at the end of a response that the template leaves open."""
        return int(self.tokenizer.eos_token_id)

    def prompt(self, messages: Messages) -> list[int]:
        """Ids up to where the assistant starts to speak."""
        frame = self._prompt_frame if [m["role"] for m in messages] == ["user"] else None
        text = _framed(frame, messages[0]["content"]) if messages else None
        return self._encode(self._render(messages, generation=True) if text is None else text, first=True)

    def response(self, text: str) -> list[int]:
        """Ids of a response, up to and including the token that ends it.

        The text is taken from behind the rendered prompt, so whatever the template puts around it is kept.
        """
        framed = _framed(self._response_frame, text)
        return self._ended(self._encode(self._rendered_response(text) if framed is None else framed))

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation and whether each is learned: the assistant's turns with their end tokens."""
        ids: list[int] = []
        scored: list[bool] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], generation=True)
            after = self._render(messages[: i + 1], generation=False)
            context = self._encode(_suffix(done, before), first=not ids)
            turn = self._encode(_suffix(before, after))
            learned = self._ended(turn)
            tail = turn[len(learned) :]
            ids += context + learned + tail
            scored += [False] * len(context) + [True] * len(learned) + [False] * len(tail)
            done = after
        return ids, scored

    def text(self, ids: list[int]) -> str:
        """A response's text, without its end token."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _ended(self, ids: list[int]) -> list[int]:
        """Cut after the first end token, or add one: a response without it would never learn to stop."""
        for i, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: i + 1]
        return [*ids, self.end_id]

    @cached_property
    def _prompt_frame(self) -> Frame | None:
        return _frame(lambda text: self._render([{"role": "user", "content": text}], generation=True))

    @cached_property
    def _response_frame(self) -> Frame | None:
        return _frame(self._rendered_response)

    def _rendered_response(self, text: str) -> str:
        probe = [{"role": "user", "content": "x"}]
        before = self._render(probe, generation=True)
        return _suffix(before, self._render([*probe, {"role": "assistant", "content": text}], generation=False))

    def _render(self, messages: Messages, generation: bool) -> str:
        if self.tokenizer.chat_template is None:
            return _plain(messages, generation)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    def _encode(self, text: str, first: bool = False) -> list[int]:
        """Ids of a piece of text; in the plain format the first piece gets the tokenizer's BOS, if it uses one."""
        ids = self._tokenize(text)
        if first and self._plain_bos is not None:
            ids.insert(0, self._plain_bos)
        return ids

    @cached_property
    def _plain_bos(self) -> int | None:
        plain = self.tokenizer.chat_template is None
        return int(self.tokenizer.bos_token_id) if plain and _adds_bos(self.tokenizer) else None

    @cached_property
    def _tokenize(self) -> Callable[[str], list[int]]:
        """The tokenizer without transformers' wrapping, which costs three times what a short text's tokens cost."""
        self.tokenizer("", truncation=False, padding=False)  # clears what a tokenizer.json may ask for
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return lambda text: list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)


def chat_format(tokenizer: Any, model: Any = None) -> ChatFormat:
    """The format of a tokenizer; end tokens come from the model's generation settings too, if a model is given.

    A classifier has no such settings; its config may name several end tokens.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no end-of-sequence token, so no response could end")
    stop = {int(tokenizer.eos_token_id)}
    settings = getattr(model, "generation_config", None) or getattr(model, "config", None)
    more = getattr(settings, "eos_token_id", None)
    if more is not None:
        stop |= set(more if isinstance(more, list) else [more])
    return ChatFormat(tokenizer, frozenset(stop))


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _frame(render: Callable[[str], str]) -> Frame | None:
    """What ``render`` puts around a text, or None if it does not insert texts as they are."""
    left, found, right = render(FRAME_PROBES[0]).partition(FRAME_PROBES[0])
    verbatim = all(render(probe) == left + probe + right for probe in FRAME_PROBES)
    return (left, right) if found and verbatim else None


def _framed(frame: Frame | None, text: str) -> str | None:
    """The rendered text without rendering, or None where only rendering is sure to be right.

    Rendering a template takes longer than encoding a short text, and a preference pair needs five of them.
    """
    return None if frame is None or SPECIAL_TEXT.search(text) else frame[0] + text + frame[1]


def _plain(messages: Messages, generation: bool) -> str:
    parts = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n\n".join([*parts, "Assistant: "] if generation else parts)


def _suffix(before: str, after: str) -> str:
    if not after.startswith(before):
        raise BadInput(
            "the chat template changes earlier text when a turn is added, so what to learn cannot be told apart; "
            "use a template that only appends"
        )
    return after[len(before) :]
