"""What is said to a vLLM server and what it answers: token ids and log-probabilities. Imports no torch.

By `/v1/completions`, the interface that all of its versions have; `token_ids` in the answer came with 0.10.2.

Names: T tokens of a response, k likeliest next tokens.
"""

from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.contract import BadInput
from trainers.core.served.answers import Part, Scored, plain, scored, shown
from trainers.core.served.server import Server
from trainers.spec import Sampling

LEAST_REST = float(np.log(2.0**-23))
"""Lowest log-probability of all other tokens together: what the kept ones leave of 1, and they are known to fp32's rounding."""

UNTOLD = 2**20
"""Positions of a server that does not say how many it takes."""


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    """Generated tokens, the end token included."""
    logprobs: list[float]
    """Of each, at temperature 1 and without any cut."""


@dataclass(frozen=True)
class Wire:
    """A model of a server."""

    server: Server
    name: str
    positions: int
    """Tokens that prompt and response may have together."""

    def check_length(self, tokens: int, fields: str = "maxNewTokens or maxPromptLength") -> None:
        """Raise BadInput if the server does not take so many of prompt and response, which ``fields`` would lower."""
        if tokens > self.positions:
            raise BadInput(
                f"{self.server.field}: {self.server.url} takes {self.positions} tokens of prompt and response, and {tokens} "
                f"are asked for: {self.server.started_with(f'--max-model-len {tokens}')}, or lower {fields}"
            )

    def respond(
        self,
        prompt: List[int],
        sampling: Sampling,
        seed: int,
        stops: List[int],
        bias: Mapping[str, float],
        vocabulary: int,
    ) -> Answer:
        """A response to a prompt, of ids below ``vocabulary``.

        All is said that the server would else take from its model's files or its own settings.
        """
        found = self._complete(
            prompt,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            stop_token_ids=stops,
            logprobs=0,
            return_token_ids=True,
            return_tokens_as_token_ids=True,
            **({"logit_bias": bias} if bias else {}),
        )
        ids = _generated(found, sampling.max_new_tokens, vocabulary)
        of_tokens = found.member("logprobs").member("token_logprobs")
        logprobs = of_tokens.logprobs()
        if len(logprobs) != len(ids):
            raise of_tokens.wrong(f"a list of {len(ids)}, as many as tokens,")
        if not set(stops).isdisjoint(ids[:-1]):
            raise found.member("token_ids").wrong("a response that its end token ends")
        if len(ids) < sampling.max_new_tokens and ids[-1] not in stops:
            why = ", ".join(shown(found.optional(name).value) for name in ("finish_reason", "stop_reason"))
            raise BadInput(
                f"{self.server.field}: {self.server.url} ended a response by itself ({why}): "
                "start it without stop tokens and token limits of its own"
            )
        return Answer(ids, logprobs)

    def likeliest(self, ids: List[int], first: int, k: int, known: int) -> np.ndarray:
        """The k likeliest next tokens at each position from ``first`` on, as
        :func:`trainers.core.top_k.likeliest` has them: their ids, their log-probabilities and that of all others, (T, 2 k + 1).

        Ids from ``known`` on are among the others. A place that nothing is left for repeats the first id, at -inf.
        """
        return _likeliest(self._scored(ids, first, k, min(k, known)), k, known)

    def continued(self, ids: List[int], new_tokens: int, vocabulary: int) -> list[int]:
        """The likeliest tokens behind these, of ids below ``vocabulary``, whatever ends a response."""
        found = self._complete(ids, max_tokens=new_tokens, temperature=0, return_token_ids=True)
        return _generated(found, new_tokens, vocabulary)

    def logprobs(self, ids: List[int]) -> list[float]:
        """Of every token but the first."""
        found = self._scored(ids, 1, 1, 1)
        stands = found.ids == np.array(ids[1:])[:, None]
        for number in np.flatnonzero(~stands.any(axis=1))[:1]:
            raise BadInput(
                f"{self.server.field}: {self.server.url} answers without the token that stands there, {ids[number + 1]}, "
                f"in prompt_logprobs[{number + 1}]: it must be vLLM 0.10.2 or newer"
            )
        return [float(value) for value in found.logprobs[stands]]

    def takes(self, token: int) -> bool:
        """Whether an id is in the vocabulary."""
        try:
            said = self._said([token], max_tokens=1, temperature=0)
        except BadInput as refusal:
            if "vocabulary" in str(refusal):
                return False
            raise
        self._choice(said)
        return True

    def tokens(self, text: str) -> list[int] | None:
        """Of a text as it stands; None from a server that does not tell."""
        return self._tokenized({"prompt": text, "add_special_tokens": False})

    def conversation_tokens(self, messages: List[Mapping[str, Any]]) -> list[int] | None:
        """Of what the server's own template makes of a conversation; None if it has none, or does not tell."""
        return self._tokenized({"messages": list(messages), "add_generation_prompt": True})

    def _tokenized(self, body: dict[str, Any]) -> list[int] | None:
        try:
            found = self.server.post("/tokenize", {"model": self.name, **body})
        except BadInput:
            return None
        if not isinstance(found, dict) or found.get("tokens") is None:
            return None
        return Part(self._who, "tokens", found["tokens"]).tokens()

    def _scored(self, ids: List[int], first: int, k: int, least: int) -> Scored:
        try:
            said = self._said(ids, max_tokens=1, temperature=0, prompt_logprobs=k)
        except BadInput as refusal:
            if "logprobs" in str(refusal):
                raise BadInput(f"{refusal}; {self.server.started_with(f'--max-logprobs {k}')}") from refusal
            raise
        return scored(self._choice(said).member("prompt_logprobs"), len(ids), first, k, least)

    def _complete(self, prompt: List[int], **settings: Any) -> Part:
        return self._choice(self._said(prompt, **settings))

    def _said(self, prompt: List[int], **settings: Any) -> Any:
        """Raises BadInput for what the server refuses."""
        plainly = {
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "ignore_eos": True,
        }
        return self.server.post("/v1/completions", {"model": self.name, "prompt": list(prompt), **plainly, **settings})

    def _choice(self, said: Any) -> Part:
        choices = Part(self._who, "", said).member("choices")
        for choice in choices.items():
            return choice
        raise choices.wrong("a list of one")

    @property
    def _who(self) -> str:
        return f"{self.server.field}: {self.server.url}"


def _generated(choice: Part, most: int, vocabulary: int) -> list[int]:
    part = choice.member("token_ids")
    ids = part.tokens(vocabulary)
    if not 0 < len(ids) <= most:
        raise part.wrong(f"a list of 1 to {most}")
    return ids


def connected(server: Server, served_as: str | None) -> Wire:
    """The model of this name, or the only one. Raises BadInput if the server has no such model."""
    data = Part(f"{server.field}: {server.url}", "", server.get("/v1/models")).member("data")
    names = [model.member("id").text() for model in data.items()]
    has = plain(", ".join(names))
    if served_as is None and len(names) != 1:
        raise BadInput(f"{server.field}: {server.url} has {has or 'no models'}: set servedAs to one of them")
    if served_as is not None and served_as not in names:
        raise BadInput(f"{server.field}.servedAs: {server.url} has no {served_as!r}, but {has or 'nothing'}")
    model = data.items()[0 if served_as is None else names.index(served_as)]
    length = model.optional("max_model_len")
    return Wire(server, model.member("id").text(), UNTOLD if length.value is None else length.count())


def _likeliest(found: Scored, k: int, known: int) -> np.ndarray:
    """Beside the k likeliest the server names the token that stands there, which may be none of them."""
    ids, logprobs = found.ids[:, :k], found.logprobs[:, :k]
    order = np.argsort((ids < 0) | (ids >= known), axis=1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
    kept = (ids >= 0) & (ids < known)
    ids = np.where(kept, ids, np.where(kept[:, :1], ids[:, :1], 0))
    logprobs = np.where(kept, logprobs, -np.inf)
    return np.concatenate([ids, logprobs, _rest(logprobs, kept.sum(axis=1) >= known)[:, None]], axis=1)


def _rest(logprobs: np.ndarray, all_kept: np.ndarray) -> np.ndarray:
    """Log-probability of all tokens that are not kept, (T,)."""
    left = 1 - np.exp(logprobs).sum(axis=1)
    some = np.where(left > np.exp(LEAST_REST), np.log(np.maximum(left, np.exp(LEAST_REST))), LEAST_REST)
    return np.where(all_kept, -np.inf, some)
