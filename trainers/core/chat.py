"""How a conversation becomes tokens: one way for training, prompting, rewards and traces.

What is trained is what is generated from: an answer's tokens follow the very tokens that :meth:`ChatFormat.prompt` gives
for what it answers. Text is never encoded in pieces: SentencePiece tokenizers put a blank mark before every piece, and
others join characters across the border. So the whole is encoded, and the answer is what follows the prompt's tokens.

Special tokens come from the template alone (a second BOS is the most common silent bug of this field).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from trainers.contract import BadInput
from trainers.core.templates import Messages, Render, renderer

QUESTION, ANSWER = "q7x", "a7x"
"""Texts that are looked for in what a template makes of them."""

MARK = re.compile(r"\s*(<[^>]*>|[^\s<]+)")
"""What opens a text: a mark such as ``<think>``, or a word."""

SPECIAL_TEXT = re.compile(r"^$|^\s|\s$|[<\[{/]")
"""Texts that a template may treat in its own way: blanks it strips, and marks such as </think> that it cuts at."""

PROBES = ("x7q", "two words", 'It\'s 5 > 4, "so" & so:\n\n  - yes')

THINK, THOUGHT = "<think>", "</think>"
ANCHORS = ("\n", "a", ".")
"""Texts to encode others behind."""


@dataclass(frozen=True)
class Frame:
    """What a template puts around an answer."""

    left: str
    """Between the prompt and the answer, such as an empty thought or the name of a channel."""
    right: str
    """From the answer to the end of its turn."""

    def opens(self, text: str) -> bool:
        """Whether a text brings what ``left`` opens, as the output of a model does."""
        mark, other = MARK.match(self.left), MARK.match(text)
        return mark is not None and other is not None and mark[1] == other[1]

    def put(self, text: str) -> str:
        """A text as it follows the prompt, without what comes after it."""
        if not self.opens(text):
            return self.left + text
        blank = len(self.left) - len(self.left.lstrip())
        return self.left[:blank] + text

    def strip(self, text: str) -> str:
        """The answer in a model's output."""
        return text.lstrip().removeprefix(self.left.lstrip()).strip()


@dataclass(frozen=True)
class ChatFormat:
    tokenizer: Any
    stop_ids: frozenset[int]
    """Tokens that end a response, the end of turn of the template among them."""
    num_embedded: int | None = None
    """Ids below this have an embedding; None where no model is spoken to."""

    @property
    def end_id(self) -> int:
        """The token put at the end of a response that the template leaves open."""
        return int(self.tokenizer.eos_token_id)

    def prompt(self, messages: Messages) -> list[int]:
        """Ids up to where the assistant starts to speak.

        Raises BadInput where the template refuses the messages, and for a token that the model has no embedding of.
        """
        return self._embedded(list(self._prompt(messages)[1]))

    def prompt_text(self, messages: Messages) -> str:
        """What :meth:`prompt` encodes."""
        return self._prompt(messages)[0]

    def answer(
        self, messages: Messages, reply: str | dict[str, Any], ended: bool = True
    ) -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids of the reply up to and including the token that ends it).

        ``reply`` is a text, or the assistant's message where it has more than text. One that did not end
        (``ended=False``) is text that was cut off: it gets no end token, nor anything else that the template puts last.
        Where tokens of the whole cross the border, the prompt keeps its own and the reply is encoded behind it.
        """
        before, prompt = self._prompt(messages)
        message = _answer(reply) if isinstance(reply, str) else reply
        turn = self._turn(messages, before, message) if ended else self._cut_off(before, message["content"])
        following = self._ended(self._following(before, prompt, turn), ended)
        return self._embedded(list(prompt)), self._embedded(following)

    def taught(
        self, messages: Messages, reply: str | dict[str, Any], ended: bool = True
    ) -> tuple[list[int], list[int]]:
        """:meth:`answer`, of data to learn. Raises BadInput if the reply says an end token before its own end.

        What follows that token would be lost, and what precedes it would teach to stop in the middle.
        """
        said = _said(_answer(reply) if isinstance(reply, str) else reply)
        for found in self._early_end.finditer(said):
            if not self.stop_ids.isdisjoint(self._tokenize(found[1])):
                raise BadInput(
                    f"a response holds the text of the end token {found[1]!r} before its end: it would be learned up to "
                    "there only; write that text otherwise, or leave the row out"
                )
        return self.answer(messages, reply, ended)

    def turns(self, messages: Messages) -> list[tuple[list[int], list[int]]]:
        """:meth:`taught` for every turn of the assistant's that answers something.

        One of `weight` 0, as OpenAI's files mark what is only to be read, is left to the prompts of those behind it.
        """
        asked = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > asked]
        places = [i for i in answers if messages[i].get("weight", 1) != 0]
        return [self.taught(messages[:i], messages[i]) for i in places]

    def text(self, ids: list[int]) -> str:
        """A response's text, without its end token and what the template puts around an answer by itself.

        Other marks of an answer's form stay: a thought, or the channels before the last. With them :meth:`answer` gives
        the tokens again. One that was cut off keeps all it has.
        """
        ended = bool(ids) and ids[-1] in self.stop_ids
        raw = self._decode(ids[:-1] if ended else ids, skip=False)
        formed = self._frame.opens(raw) or THINK in raw or THOUGHT in raw
        text = raw if formed else self._decode(ids, skip=True)
        return self._frame.strip(text) if ended else text

    # ---------------------------------------------------------------- text

    @cached_property
    def _early_end(self) -> re.Pattern[str]:
        """An end token's text (group 1) with more behind it than blanks and other end tokens."""
        stops = [token for token in sorted(self.stop_ids) if token >= 0]  # some models' settings have -1 for none
        texts = [self.tokenizer.decode([token], skip_special_tokens=False) for token in stops]
        ends = "|".join(re.escape(text) for text in texts if text)
        return re.compile(rf"({ends})(?:{ends}|\s)*+\S")

    @cached_property
    def _render(self) -> Render:
        return renderer(self.tokenizer)

    @cached_property
    def _frame(self) -> Frame:
        return answer_frame(self._render)

    @cached_property
    def _prompt_frame(self) -> Frame | None:
        """What stands around a lone question, or None if questions are not shown as they are."""
        left, _, right = self._render(_question(PROBES[0]), True).partition(PROBES[0])
        shown = all(self._render(_question(probe), True) == left + probe + right for probe in PROBES)
        return Frame(left, right) if shown else None

    @cached_property
    def _shows_answers(self) -> bool:
        """Whether answers to a lone question are shown as they are in their frame."""
        before, frame = self._render(_question(QUESTION), True), self._frame
        turns = [self._rendered_turn(_question(QUESTION), before, _answer(probe)) for probe in PROBES]
        return turns == [frame.left + probe + frame.right for probe in PROBES]

    def _turn(self, messages: Messages, before: str, message: dict[str, Any]) -> str:
        """A whole reply as it follows the rendered prompt.

        Rendering takes longer than encoding a short text, so it is spared where its outcome is sure.
        """
        ordinary = len(messages) == 1 and message.keys() == {"role", "content"} and _is_ordinary(message["content"])
        if ordinary and self._shows_answers:
            return self._frame.left + str(message["content"]) + self._frame.right
        return self._rendered_turn(messages, before, message)

    def _rendered_turn(self, messages: Messages, before: str, message: dict[str, Any]) -> str:
        text = message.get("content") or ""
        try:
            after = self._render([*messages, message], False)
        except BadInput:
            if not self._frame.opens(text):
                raise
            return self._frame.put(text) + self._frame.right
        turn = _behind(self._render, messages, before, after)
        spoken = THOUGHT in text and not message.get("tool_calls")
        if turn is None or (spoken and _thinks(before)):
            return _thought(before, after, text if spoken else "", self._frame.right)
        doubled = self._frame.opens(text) and turn.startswith(self._frame.left + text[:1])
        return self._frame.put(text) + self._frame.right if doubled else turn

    def _cut_off(self, before: str, text: str) -> str:
        """A reply as far as it came. A thought that the prompt has opened is what the text goes on with."""
        return text if _thinks(before) and not self._frame.opens(text) else self._frame.put(text)

    # ---------------------------------------------------------------- tokens

    @cached_property
    def _last(self) -> dict[str, Any]:
        """The prompt that was asked for last: both answers of a pair have the same."""
        return {}

    def _prompt(self, messages: Messages) -> tuple[str, list[int]]:
        if self._last.get("messages") != messages:
            text = self._prompted(messages)
            self._last.update(messages=[dict(m) for m in messages], text=text, ids=self._encode(text))
        return self._last["text"], self._last["ids"]

    def _prompted(self, messages: Messages) -> str:
        lone = [message.keys() for message in messages] == [{"role", "content"}] and messages[0]["role"] == "user"
        if lone and _is_ordinary(messages[0]["content"]) and (frame := self._prompt_frame) is not None:
            return frame.left + str(messages[0]["content"]) + frame.right
        return self._render(messages, True)

    def _following(self, before: str, prompt: list[int], turn: str) -> list[int]:
        """The turn's tokens behind the prompt's."""
        ids = self._encode(before + turn)
        return ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._inside(turn)

    def _inside(self, text: str) -> list[int]:
        """Tokens of a text that is not the beginning of anything."""
        for anchor in ANCHORS:
            start, ids = self._tokenize(anchor), self._tokenize(anchor + text)
            if ids[: len(start)] == start and len(ids) > len(start):
                return ids[len(start) :]
        return self._tokenize(text)

    def _ended(self, ids: list[int], ended: bool) -> list[int]:
        """Up to the first end token; with one added if there is none, as a response must teach to stop."""
        for i, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: i + 1] if ended else ids[:i]
        return [*ids, self.end_id] if ended else ids

    def _embedded(self, ids: list[int]) -> list[int]:
        largest = max(ids, default=-1)
        if self.num_embedded is not None and largest >= self.num_embedded:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise BadInput(
                f"the token {token!r} is number {largest}, and the model embeds {self.num_embedded}: its tokenizer is another "
                "model's, or has tokens that were added to it alone"
            )
        return ids

    def _decode(self, ids: list[int], skip: bool) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)).strip()

    def _encode(self, text: str) -> list[int]:
        """Ids of a whole text; in the plain format it begins with the tokenizer's BOS, if it uses one."""
        ids = self._tokenize(text)
        return ids if self._plain_bos is None else [self._plain_bos, *ids]

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

    A classifier has no such settings; its config may name several end tokens. Raises BadInput for a tokenizer without
    end token, and for a template that does not show what is said.
    """
    settings = getattr(model, "generation_config", None) or getattr(model, "config", None)
    embedded = model.get_input_embeddings().weight.shape[0] if model is not None else None
    return format_of(tokenizer, settings, embedded)


def format_of(tokenizer: Any, settings: Any, embedded: int | None) -> ChatFormat:
    """The same of a model whose weights are not here. ``settings`` may name end tokens; ``embedded``: how many ids it knows."""
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no end-of-sequence token, so no response could end")
    stop = {int(tokenizer.eos_token_id)}
    more = getattr(settings, "eos_token_id", None)
    if more is not None:
        stop |= set(more if isinstance(more, list) else [more])
    chat = ChatFormat(tokenizer, frozenset(stop), embedded)
    end = _end_of_turn(chat)
    return chat if end is None else replace(chat, stop_ids=chat.stop_ids | {end})


def answer_frame(render: Render) -> Frame:
    """What a template puts around an answer. Raises BadInput if it shows no texts, or answers otherwise than it asks."""
    question = _question(QUESTION)
    before = render(question, True)
    after = render([*question, _answer(ANSWER)], False)
    if QUESTION not in before.lower() or ANSWER not in after.lower():
        raise BadInput("the chat template leaves out the text of messages, as those for images do: give another")
    at = after.lower().rindex(ANSWER)
    right = after[at + len(ANSWER) :]
    turn = _behind(render, question, before, after)
    if turn is None:
        turn = _thought(before, after, "", right)
    return Frame(turn[: turn.lower().rindex(ANSWER)], right)


def _behind(render: Render, messages: Messages, before: str, after: str) -> str | None:
    """What of a rendered conversation stands behind its prompt, or None if that is not in it.

    Where the answered turns are shown otherwise in the two, it begins behind what asks the assistant to speak.
    """
    if after.startswith(before):
        return after[len(before) :]
    said = render(messages, False)
    asking = before[len(said) :] if before.startswith(said) else ""
    at = after.rfind(asking) if asking else -1
    return after[at + len(asking) :] if at >= 0 else None


def _end_of_turn(chat: ChatFormat) -> int | None:
    """The last special token with which an answer ends whether or not another turn follows; None if there is none.

    Some templates (Phi-3) close the conversation too. Where the last turn ends otherwise than earlier ones (gpt-oss), it
    is the last turn's token: the other also stands between the parts of one answer.
    """
    marks = set(chat.tokenizer.get_added_vocab().values()) | set(chat.tokenizer.all_special_ids)
    last = chat._inside(chat._frame.right) if chat._frame.right else []
    common = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(last, _earlier_end(chat), strict=False))]
    found = [token for token in common if token in marks][-1:] or [token for token in last if token in marks][:1]
    shown = [token for token in found if chat.tokenizer.convert_ids_to_tokens(token).strip("▁ \n")]
    return shown[0] if shown else None


def _earlier_end(chat: ChatFormat) -> list[int]:
    """Tokens behind an answer that is followed by a question; none if the template shows or takes no such answer."""
    question = _question(QUESTION)
    try:
        text = chat._render([*question, _answer(ANSWER), *question], True)
    except BadInput:
        return []
    at = text.lower().rfind(ANSWER)
    return chat._inside(text[at + len(ANSWER) :]) if at >= 0 else []


def _question(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _said(message: dict[str, Any]) -> str:
    """All that a message says, its calls of tools last."""
    first = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls")}
    return f"{first or ''}{message.get('content') or ''}{message.get('tool_calls') or ''}"


def _is_ordinary(text: object) -> bool:
    return isinstance(text, str) and SPECIAL_TEXT.search(text) is None


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _thinks(before: str) -> bool:
    """Whether a rendered prompt leaves the assistant in the middle of a thought."""
    return before.rstrip().endswith(THINK)


def _thought(before: str, after: str, text: str, right: str) -> str:
    """A reply to a prompt that opens a thought, or has closed it, where the template shows it otherwise afterwards.

    ``text`` is one with a thought, or empty.
    """
    asked, opened = before[: before.rfind(THINK)], before.rstrip()
    closed = opened.endswith(THOUGHT)
    if not (closed or _thinks(before)) or not after.startswith(asked):
        raise BadInput(
            "the chat template shows an answer otherwise than it asks for it, so what to learn cannot be told apart; "
            "use a template whose answers follow its generation prompt"
        )
    if text:
        return (text.rsplit(THOUGHT, maxsplit=1)[-1] if closed else text.lstrip().removeprefix(THINK)).lstrip() + right
    if after.startswith(opened + THOUGHT):
        return after[len(opened) :]
    return ("" if closed else f"\n{THOUGHT}\n\n") + after[len(asked) :]
