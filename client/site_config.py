"""What a hospital decides about its own site: `site.toml`, read by the worker and by nobody else.

alias = "hospital-1"            # the only name the coordinator ever sees
data = "/data"                  # folder with dataset.json
socket = "/run/wardround/worker.sock"
home = "/var/lib/wardround"     # site state, personal models, example slices, events, log

[compute]
device = "auto"                 # auto, cpu, cuda, cuda:1
amp = "auto"                    # auto (on CUDA), on, off
threads = 0                     # CPU threads for torch; 0 leaves torch's choice
cache_mb = 2048                 # decoded volumes kept in memory at most

[policy]
methods = ["*"]                 # methods this hospital takes part in
kinds = ["*"]                   # payload kinds that may leave (common/payload.py, Kind)
sketches = ["*"]                # forms of data sketches that may leave: labels, features, image, gradient
min_cases = 1                   # training cases below which nothing leaves
max_out_mb = 0                  # most that may leave in a round, repetitions included; 0 no limit
max_in_mb = 0                   # most that is taken in a round; 0 no limit

[privacy]
metrics = true                  # evaluation figures may leave
metrics_min_cases = 1           # figures over fewer cases stay in
summary = "full"                # first answer: full, or counts (no intensities, sizes, spacings, class shares)
clip_norm = 0                   # what training adds to the model is scaled down to this L2 norm; 0 off
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import Field

from common.config import Strict, checked
from common.errors import ConfigError


class Compute(Strict):
    """Where and how the worker computes."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")
    amp: Literal["auto", "on", "off"] = "auto"
    threads: int = Field(default=0, ge=0, le=4096)
    cache_mb: int = Field(default=2048, ge=0, le=10_000_000)


class Policy(Strict):
    """What may happen at this site and what may leave it."""

    methods: tuple[str, ...] = ("*",)
    kinds: tuple[str, ...] = ("*",)
    sketches: tuple[Literal["*", "labels", "features", "image", "gradient"], ...] = Field(
        default=("*",), description="forms of data sketches that may leave: labels, features, image, gradient"
    )
    min_cases: int = Field(default=1, ge=1)
    max_out_mb: float = Field(
        default=0, ge=0, description="most MB that may leave in a round, repetitions included; 0 no limit"
    )
    max_in_mb: float = Field(default=0, ge=0, description="most MB taken in a round; 0 no limit")


class Privacy(Strict):
    """What of the site's figures may leave, and how strongly one round may speak."""

    metrics: bool = Field(default=True, description="evaluation figures may leave")
    metrics_min_cases: int = Field(default=1, ge=1, description="figures over fewer cases stay in")
    summary: Literal["full", "counts"] = Field(
        default="full", description="counts leaves out intensities, sizes, spacings and shares"
    )
    clip_norm: float = Field(
        default=0, ge=0, description="L2 norm to which what training adds is scaled down; 0 off"
    )


class SiteConfig(Strict):
    """A hospital's own configuration."""

    alias: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="letters, digits, dots, dashes, underscores"
    )
    data: Path
    socket: Path
    home: Path
    models: Path | None = Field(
        default=None, description="where personal models are written; home/models if unset"
    )
    events: Path | None = Field(default=None, description="events file; home/events-ALIAS.jsonl if unset")
    compute: Compute = Compute()
    policy: Policy = Policy()
    privacy: Privacy = Privacy()


def read_site_config(path: Path) -> SiteConfig:
    """Read a site.toml.

    Raises:
        ConfigError: Missing file, TOML errors, unknown keys (with the nearest known one), values out of range.
    """
    try:
        with path.open("rb") as file:
            mapping = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"The site's configuration cannot be read ({error.strerror}).", detail=str(path)
        ) from error
    except (ValueError, RecursionError) as error:  # TOML's own complaint, or bytes that are not UTF-8
        raise ConfigError(
            "The site's configuration is not valid TOML in UTF-8. Correct the line.",
            detail=f"{path}: {error}",
        ) from error
    return checked(SiteConfig, mapping)


def write_site_config(config: SiteConfig, path: Path) -> None:
    """Write a site.toml."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    os.replace(temporary, path)
