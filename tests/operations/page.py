"""docs/operations.md and the runbooks, taken apart: what they tell people to type, and their tables."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
RUNBOOKS = sorted((ROOT / "docs/runbooks").glob("*.md"))
TYPED = ("kubectl ", "helm ", "alignctl ", "make ")


def sections() -> dict[str, str]:
    """Text by heading."""
    parts = re.split(r"^#{2,3} (.*)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def files() -> dict[str, str]:
    """Files that are shown, by the name in their first line."""
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks("yaml")}


def inline(text: str) -> list[str]:
    """Commands within the text, in tables above all."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith(TYPED)]


def rows(heading: str) -> list[list[str]]:
    """Of the section's table, without its head."""
    lines = [line for line in sections()[heading].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def runbook_commands() -> list[str]:
    return [line for page in RUNBOOKS for block in blocks("bash", page.read_text()) for line in block.splitlines()]
