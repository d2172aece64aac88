"""How a conversation becomes tokens: the model's chat template if it has one, else the plain format.

The plain format is ``User: …\\n\\nAssistant: …<eos>`` with ``System: …\\n\\n`` before it when there is a system turn.

Prompt and response are always tokenised apart, so the prompt's tokens in training are exactly those that generation
starts from. Special tokens come from the template alone (a second BOS is the most common silent bug of this field).
"""

from dataclasses import dataclass
from typing import Any

from trainers.contract import BadInput

Messages = list[dict[str, str]]


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
        return self._encode(self._render(messages, generation=True), first=True)

    def response(self, text: str) -> list[int]:
        """Ids of a response, up to and including the token that ends it.

        The text is taken from behind the rendered prompt, so whatever the template puts around it is kept.
        """
        probe = [{"role": "user", "content": "x"}]
        before = self._render(probe, generation=True)
        after = self._render([*probe, {"role": "assistant", "content": text}], generation=False)
        return self._ended(self._encode(_suffix(before, after)))

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation and whether each is to be learned: the assistant's turns with their end tokens."""
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

    def _render(self, messages: Messages, generation: bool) -> str:
        if self.tokenizer.chat_template is None:
            return _plain(messages, generation)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    def _encode(self, text: str, first: bool = False) -> list[int]:
        """Ids of a piece of text; in the plain format the first piece gets the tokenizer's BOS, if it uses one."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if first and self.tokenizer.chat_template is None and _adds_bos(self.tokenizer):
            ids.insert(0, self.tokenizer.bos_token_id)
        return ids


def chat_format(tokenizer: Any, model: Any = None) -> ChatFormat:
    """The format of a tokenizer; end tokens come from the model's generation settings too, if a model is given."""
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no end-of-sequence token, so no response could end")
    stop = {int(tokenizer.eos_token_id)}
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stop |= set(more) if isinstance(more, list) else {more} - {None}
    return ChatFormat(tokenizer, frozenset(stop))


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]


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
