"""What commands say. Names, values and reasons in it may be a stranger's, and a terminal obeys what it is sent."""

import typer

from controller.api.text import for_terminal


def say(text: str = "", *, err: bool = False, color: str | None = None, bold: bool | None = None) -> None:
    """A line, or some, in a colour where it is a terminal that reads."""
    typer.secho(for_terminal(text), fg=color, bold=bold, err=err)
