"""What comes before anything is started: data written once, checked always, a plan on paper."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from client.site_config import Compute, SiteConfig, read_site_config, write_site_config
from common.errors import DataError, WardroundError
from common.events import EventLog
from ops.options import DEFAULT, Options
from ops.plan import DEFAULT_SITES, DEFAULT_SUBJECTS, Plan, data_root, has_default, make_plan


def progress_bar(console: Console) -> Progress:
    """Return a progress bar that disappears when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def prepare(
    options: Options, out: Path, *, settings: Mapping[str, Any], events: EventLog, console: Console
) -> Plan:
    """Write the default data if it is missing, make the plan, check every site's data.

    Args:
        options: What was typed.
        out: The run folder.
        settings: Fields of the plan: runtime, device, threads, transport, command.
        events: The command's events.
        console: For progress.

    Raises:
        ConfigError, DataError, MismatchError: What is wrong, with the site and the case alias.
    """
    events.emit("trial.phase", phase="data")
    root = data_root(options)
    if options.data == DEFAULT and not has_default(root):
        from client.data.mni import write_mni_trial  # nilearn takes a second to import, and is needed once

        count = int(options.sites) if options.sites and options.sites.isdigit() else DEFAULT_SITES
        console.print(
            f"Writing the default data once: {count} simulated hospitals on the MNI152 brain (real anatomy, simulated scanners)."
        )
        try:
            with progress_bar(console) as bar:
                task = bar.add_task("subjects", total=count * DEFAULT_SUBJECTS)
                write_mni_trial(
                    root,
                    sites=count,
                    subjects=DEFAULT_SUBJECTS,
                    seed=options.seed,
                    progress=lambda *_: bar.advance(task),
                )
        except WardroundError:
            if not has_default(root):  # another trial, started at the same time, may have written it
                raise
    plan = replace(make_plan(options, root, out, runtime="fast"), **settings)
    plan.write()
    check_sites(plan, events, console)
    return plan


def check_sites(plan: Plan, events: EventLog, console: Console) -> None:
    """Check every site's data, as the site itself will once more in its first answer.

    Raises:
        DataError: Problems in a site's cases, each with its alias.
        MismatchError: A site's channels, labels or spacing do not fit the run.
    """
    from client.data.check import check_site  # the readers of volumes: a coordinator without data has none

    events.emit("trial.phase", phase="check")
    with progress_bar(console) as bar:
        task = bar.add_task("checking the sites' data", total=len(plan.sites))
        for alias, folder in plan.sites.items():
            check_site(folder, alias, plan.config.data).raise_errors()
            bar.advance(task)


def short_folder() -> Path:
    """Return a new private folder with a short path: Unix sockets allow 107 bytes, run folders can be deep."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="wr-", dir=base))
    if len(os.fsencode(folder)) > 60:
        shutil.rmtree(folder)
        folder = Path(tempfile.mkdtemp(prefix="wr-", dir="/tmp"))
    return folder


def write_sites(plan: Plan, sockets: Mapping[str, Path], *, threads: int) -> dict[str, Path]:
    """Write each hospital's site.toml into its own folder of the run and return the files by alias.

    One that is there already, of a run that goes on, keeps everything but its socket.

    Raises:
        DataError: A site's folder cannot be made.
    """
    files = {}
    for alias, data in plan.sites.items():
        home = plan.out / "sites" / alias
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{alias}: its folder in the run folder cannot be made ({error.strerror}).", detail=str(home)
            ) from error
        files[alias] = home / "site.toml"
        if files[alias].is_file():  # of a run that goes on: what the hospital decided stands
            config = read_site_config(files[alias]).model_copy(update={"socket": sockets[alias]})
        else:
            config = SiteConfig(
                alias=alias, data=data.resolve(), socket=sockets[alias], home=home, models=plan.out / "models",
                events=plan.out / f"events-{alias}.jsonl", compute=Compute(device=plan.device, threads=threads),
            )  # fmt: skip
        write_site_config(config, files[alias])
    return files
