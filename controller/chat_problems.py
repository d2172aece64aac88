"""What can be known to be wrong with a model's chat template and end token, without loading either."""

import json
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from controller.api.problems import Problem, shown
from trainers.spec import LARGEST_TEMPLATE, ChatSettings
from trainers.vocabulary import stored_vocabulary

OTHER_TOKENS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that name tokens which loading adds to those of ``tokenizer.json``."""


class _Generation(Extension):
    """The block that chat templates put around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_problems(path: str, settings: ChatSettings, base_dir: Path) -> Iterator[Problem]:
    """A template that is not there, or is none. Raises OSError for one that cannot be looked up."""
    file = settings.chat_template_file(base_dir)
    if file is not None and not file.is_file():
        yield Problem(
            path, f'"{settings.chat_template}" is neither a template nor a file: {file.absolute()} is not there'
        )
        return
    if file is not None and file.stat().st_size > LARGEST_TEMPLATE:
        yield Problem(path, f"{file} is larger than {LARGEST_TEMPLATE:,} bytes, and so no template")
        return
    try:
        text = file.read_text() if file is not None else str(settings.chat_template)
        Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"], autoescape=True).compile(text)
    except TemplateSyntaxError as error:
        yield Problem(
            path, f"{shown(settings.chat_template)} is no valid template: {error.message} (line {error.lineno})"
        )
    except (UnicodeDecodeError, RecursionError, SyntaxError) as error:
        yield Problem(path, f"{shown(settings.chat_template)} is no valid template: {error}")


def end_token_problems(path: str, token: str, folder: Path) -> Iterator[Problem]:
    """A token that a model's folder has not. A tokenizer that cannot be read is left to the phase that loads it."""
    try:
        known = token in stored_vocabulary(folder).ids or any(_names(folder / name, token) for name in OTHER_TOKENS)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return
    if not known:
        yield Problem(path, f"{shown(token)} is no token of the model's vocabulary ({folder / 'tokenizer.json'})")


def _names(file: Path, token: str) -> bool:
    """Whether a JSON file holds the token as a text, anywhere."""
    if not file.is_file():
        return False
    return json.dumps(token) in json.dumps(json.loads(file.read_text()))
