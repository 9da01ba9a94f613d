"""How an error is shown on the operator's terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


def print_failure(code: str, message: str, detail: str = "") -> None:
    """Print an error's sentence, and below it what only this terminal may see, on stderr."""
    errors = Console(stderr=True)
    errors.print(f"[bold red]error[/bold red] ({code}): {escape(message)}", highlight=False, soft_wrap=True)
    if detail:
        errors.print(detail, highlight=False, soft_wrap=True, style="dim", markup=False)
