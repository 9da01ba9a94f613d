"""What a container is asked to run, from its environment: the same words for a trial and for a coordinator."""

from __future__ import annotations

from pathlib import Path

from ops.containers import places
from ops.options import Options
from ops.plan import parse_settings


def options_of(variables: places.Variables, out: Path | None = None) -> Options:
    """Return what the environment asks for, as the command line would.

    Args:
        variables: WARDROUND_METHOD, ROUNDS, LOCAL_EPOCHS, SEED, SITES (alias,alias), SETTINGS (key=value, separated by spaces).
        out: The run folder, where it is known.

    Raises:
        ConfigError: A number that is none, or a setting that is not key=value.
    """
    settings = tuple(variables.text("SETTINGS").split())
    parse_settings(settings)
    return Options(
        method=variables.text("METHOD", "fedavg"), sites=variables.text("SITES") or None,
        rounds=variables.number("ROUNDS") or None, local_epochs=variables.number("LOCAL_EPOCHS") or None,
        seed=variables.number("SEED") or 0, out=out, settings=settings,
    )  # fmt: skip
