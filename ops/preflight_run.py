"""The preflight of a hospital's installation: every check, in the order in which its failures are mended."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigError
from ops.kit import CA, LIST, SIGNATURE, Kit
from ops.kit_compose import image_names, image_version
from ops.kit_request import keys_folder
from ops.preflight import Finding, failed, skipped
from ops.preflight_clock import check_clock
from ops.preflight_engine import (
    Run,
    check_disk,
    check_engine,
    check_gpu,
    check_images,
    check_memory,
    run_program,
)
from ops.preflight_network import SECONDS, Route, check_connection, check_name, check_tls
from ops.preflight_proxy import Proxy, chosen_proxy
from ops.preflight_site import check_cases, check_config, check_data, check_key, check_kit, check_policy
from ops.provision_files import split_address


@dataclass(frozen=True)
class Installation:
    """Where a hospital's parts lie, by default side by side: oak/, oak-keys/, site.toml, data/.

    Attributes:
        kit: The unpacked kit.
        keys: The site's own key; KIT-keys beside the kit if none (a kit that holds its key has it inside).
        config: site.toml; beside the kit if none.
        data: The data folder; beside the kit if none.
        gpu: The worker shall have a GPU.
        environ: Variables that compose reads.
    """

    kit: Path
    keys: Path | None = None
    config: Path | None = None
    data: Path | None = None
    gpu: bool = False
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def keys_place(self) -> Path:
        """Folder of the site's own key."""
        return (self.keys or keys_folder(self.kit)).absolute()

    @property
    def config_place(self) -> Path:
        """The site.toml."""
        return (self.config or self.kit.absolute().parent / "site.toml").absolute()

    @property
    def data_place(self) -> Path:
        """The data folder."""
        return (self.data or self.kit.absolute().parent / "data").absolute()


def is_kit(folder: Path) -> bool:
    """Return whether a folder is a kit, perhaps a broken one, and not a data folder."""
    try:
        return any((folder / name).is_file() for name in (LIST, SIGNATURE))
    except OSError as error:
        raise ConfigError(
            "This account may not look into the folder. Run this command as root.", detail=str(error)
        ) from error


def route_of(kit: Kit, environ: Mapping[str, str]) -> Route:
    """Return how the coordinator of a kit is called from here.

    Raises:
        ConfigError: The environment names a proxy that cannot be used.
    """
    host, port = split_address(kit.about.server)
    assert port is not None  # every kit has one
    return Route(host, port, chosen_proxy(host, port, environ))


def proxy_variable(kit: Kit, environ: Mapping[str, str]) -> str:
    """Return what WARDROUND_PROXY must be for the containers; empty for a direct connection.

    Raises:
        ConfigError: The environment names a proxy that cannot be used.
    """
    proxy: Proxy | None = route_of(kit, environ).proxy
    return proxy.url if proxy else ""


def preflight(
    place: Installation, *, full: bool = False, run: Run = run_program, seconds: float = SECONDS
) -> Iterator[Finding]:
    """Make every check and yield what each found, as soon as it is known; nothing is changed.

    Args:
        place: Where the parts lie.
        full: Also read every case.
        run: Runs docker, nvidia-smi and timedatectl.
        seconds: Patience of each step on the network.
    """
    engine_found, engine = check_engine(run)
    shifted = engine.shifted if engine else False
    found, kit = check_kit(place.kit.absolute(), shifted=shifted)
    yield found
    alias = kit.about.alias if kit else ""
    yield check_key(kit, place.keys_place, shifted=shifted)
    found, config = check_config(place.config_place, alias, shifted=shifted)
    yield found
    yield check_policy(config)
    yield check_data(place.data_place, alias, shifted=shifted)
    if full:
        yield check_cases(place.data_place, alias, cases_command(place, kit))
    yield engine_found
    device = config.compute.device if config else "auto"
    if engine is None or kit is None:
        yield skipped(
            "images", "The engine does not answer." if engine is None else "The kit is not in order."
        )
    else:
        yield check_images(
            image_names(kit.about, place.environ), image_version(kit.about, place.environ), run
        )
    yield check_gpu(place.gpu, device, engine, run)
    if engine is None:
        yield skipped("machine", "The engine does not answer.")
        yield skipped("disk", "The engine does not answer.")
    else:
        yield check_memory(engine, place.environ)
        yield check_disk(engine)
    yield from _network(kit, place, run, seconds)


def cases_command(place: Installation, kit: Kit | None) -> str:
    """Return the command that reads every case in the worker's image, without network."""
    if kit is None:
        return "bring the kit in order first."
    image = image_names(kit.about, place.environ)["worker"]
    data = shlex.quote(str(place.data_place))
    return (
        f"docker run --rm --network none --read-only --tmpfs /tmp -v {data}:/data:ro {image} "
        f"wardround site check /data --site {kit.about.alias}"
    )


def _network(kit: Kit | None, place: Installation, run: Run, seconds: float) -> Iterator[Finding]:
    begins: float | None = None
    if kit is None:
        for name in ("name", "connection", "tls"):
            yield skipped(name, "The kit is not in order: whom to call is not known.")
    else:
        try:
            route = route_of(kit, place.environ)
        except ConfigError as error:
            yield failed("connection", error)
            route = None
        if route is not None:
            found = check_name(route, seconds=seconds)
            yield found
            connection = (
                skipped("connection", "The name is not known.")
                if found.mark == "fail"
                else check_connection(route, seconds=seconds)
            )
            yield connection
            if connection.mark == "ok":
                shown = check_tls(route, (kit.folder / CA).read_bytes(), seconds=seconds)
                begins = shown.begins
                yield shown.finding
            else:
                yield skipped("tls", "There is no connection.")
    yield check_clock(kit.about if kit else None, begins, run=run)
