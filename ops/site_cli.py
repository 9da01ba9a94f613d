"""`wardround site`: a hospital's own data folder, looked at without any federation; its way into one; its containers."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from common.config import DataConfig
from common.dataset_json import DATASET_FILE, SPLITS
from common.errors import DataError, nearest
from common.federation import find_sites, is_alias, read_federation_file
from ops.approve_cli import approve_command, list_command, register_command, revoke_command
from ops.kit_cli import commands, request, verify
from ops.preflight import exit_code
from ops.preflight_run import Installation, is_kit
from ops.site_run_cli import CONFIG, DATA, GPU, KEYS, down, preflight_document, run_preflight, status, up

if TYPE_CHECKING:
    from client.data.check import SiteCheck
    from client.data.inspection import Problem

site_app = typer.Typer(
    help="Look after one hospital: its data, its startup kit, its admission, its containers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)
_SHOWN = 20  # problems of one kind that are listed at the terminal; the JSON file has them all


@site_app.callback()
def _group() -> None:
    """Look after one hospital: its data, its startup kit, its admission, its containers."""


AT_SITE, AT_COORDINATOR = "At the hospital", "At the coordinator"
site_app.command("verify", rich_help_panel=AT_SITE)(verify)
site_app.command("request", rich_help_panel=AT_SITE)(request)
site_app.command("commands", rich_help_panel=AT_SITE)(commands)
site_app.command("up", rich_help_panel=AT_SITE)(up)
site_app.command("status", rich_help_panel=AT_SITE)(status)
site_app.command("down", rich_help_panel=AT_SITE)(down)
site_app.command("approve", rich_help_panel=AT_COORDINATOR)(approve_command)
site_app.command("revoke", rich_help_panel=AT_COORDINATOR)(revoke_command)
site_app.command("register", rich_help_panel=AT_COORDINATOR)(register_command)
site_app.command("list", rich_help_panel=AT_COORDINATOR)(list_command)


FOLDER = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="An unpacked kit; or a site's data folder, or a folder with one folder per site."
    ),
]
SITE = Annotated[
    str | None,
    typer.Option(
        "--site", help="Data: alias to use, or the one site to check; the folder's name if left out."
    ),
]
JSON_FILE = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the findings there; with a kit, - prints them only."
    ),
]
AGAINST = Annotated[
    Path | None,
    typer.Option(
        "--against", metavar="federation.json", help="Data: also hold the site against this run's settings."
    ),
]
FULL = Annotated[bool, typer.Option("--full", help="Kit: also read every case of the data.")]


@site_app.command("check", rich_help_panel=AT_SITE)
def check(
    directory: FOLDER,
    site: SITE = None,
    json_file: JSON_FILE = None,
    against: AGAINST = None,
    keys: KEYS = None,
    config: CONFIG = None,
    data: DATA = None,
    gpu: GPU = False,
    full: FULL = False,
) -> None:
    """Check an installation before it is started (DIR is a kit), or a data folder.

    [bold]A kit[/bold]: everything that `wardround site up` needs, a line a check and
    the remedy below what fails: kit, key, site.toml, policy, data, engine,
    images, GPU, memory, disk; the coordinator's name, port, TLS, a proxy on
    the way; the clock. Nothing is changed.

    [bold]A data folder[/bold]: reads every case once and says what would stop or spoil
    a run: geometry, orientation, spacing, values that are no numbers, label
    values, the same image twice (also across the split), empty classes,
    intensities. Nothing is written there; nothing leaves this machine.

    [bold]Examples[/bold]

      oak/ oak-keys/ site.toml data/:  wardround site check oak
      data elsewhere, with a GPU:      wardround site check oak \\
                                         --data /srv/liver --gpu
      one site's data:            wardround site check /data/liver
      every site under a folder:  wardround site check data/vessels
      does it fit that run?       wardround site check /data/liver \\
                                    --against federation.json
      figures to pass on:         wardround site check /data/liver \\
                                    --site alpha --json check.json

    [bold]A minimal /data/liver/dataset.json[/bold] (docs/data.md has all keys)

      {"modality": {"0": "CT"},
       "labels": {"0": "background", "1": "tumour"},
       "training": [{"image": "imagesTr/a.nii.gz",
                     "label": "labelsTr/a.nii.gz"}]}

    Exit code: 0 no errors; data: 3 errors found; kit: that of the first
    failure (2 site.toml, 3 data, 9 engine or network, 10 kit, key or TLS).
    """
    if is_kit(directory):
        if site is not None or against is not None:
            raise typer.BadParameter("--site and --against are for a data folder; this is a kit.")
        _check_kit(Installation(directory, keys, config, data, gpu), json_file, full)
        return
    if gpu or full:
        raise typer.BadParameter("--gpu and --full are for a kit (a folder with kit.json); this is none.")
    _check_data(directory, site, json_file, against)


def _check_kit(place: Installation, json_file: Path | None, full: bool) -> None:
    """Make the preflight of an installation."""
    console = Console()
    printed = json_file == Path("-")
    findings = run_preflight(place, None if printed else console, full=full)
    document = preflight_document(place, findings)
    if printed:
        typer.echo(document, nl=False)
    elif json_file is not None:
        _write(json_file, document)
        said = f"Findings without paths: {escape(str(json_file))}"
        console.print(said, highlight=False, soft_wrap=True)
    code = exit_code(findings)
    if code:
        raise typer.Exit(code)


def _check_data(directory: Path, site: str | None, json_file: Path | None, against: Path | None) -> None:
    """Check one data folder or several."""
    console = Console()
    config = read_federation_file(against).config().data if against is not None else None
    checks = [_checked(alias, folder, config, console) for alias, folder in _sites(directory, site).items()]
    if json_file is not None:
        _write_json(json_file, checks)
        said = f"Findings without identifiers: {escape(str(json_file))}"
        console.print(said, highlight=False, soft_wrap=True)
    errors = sum(found.errors for found in checks)
    warnings = sum(len(found.problems) for found in checks) - errors
    verdict = "[bold red]not ready[/bold red]" if errors else "[bold green]ready[/bold green]"
    counts = f"{len(checks)} site(s), {errors} error(s), {warnings} warning(s)"
    console.print(f"{verdict}: {counts}", highlight=False)
    if errors:
        raise typer.Exit(DataError.exit_code)


def _checked(alias: str, folder: Path, config: DataConfig | None, console: Console) -> SiteCheck:
    """Check one site with a progress bar, and show it."""
    from client.data.check import check_site  # torch and MONAI: seconds that --help must not cost

    with _bar(console) as bar:
        task = bar.add_task(f"{alias}: reading cases", total=None)
        found = check_site(
            folder, alias, config, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    _show(found, console)
    return found


def _sites(directory: Path, site: str | None) -> dict[str, Path]:
    """Return the folders to check by alias."""
    if not directory.is_dir():
        raise DataError(
            "The data folder is not there. Give the folder that holds dataset.json.", detail=str(directory)
        )
    if (directory / DATASET_FILE).exists():
        alias = site or directory.absolute().name
        if not is_alias(alias):
            raise DataError(
                "The folder's name, or what --site gives, cannot be an alias: use 1 to 64 letters, digits, dots, "
                "dashes and underscores. Give another one with --site.",
                detail=str(directory),
            )
        return {alias: directory}
    if not any((path / DATASET_FILE).is_file() for path in directory.iterdir()):
        raise DataError(
            "The folder holds neither a dataset.json nor folders with one, and is no kit (kit.json). Write one "
            "(docs/data.md), or give the unpacked kit.",
            detail=str(directory),
        )
    found = find_sites(directory)
    if site is None:
        return found
    if site not in found:
        raise DataError(
            f"There is no site '{site}' under the folder. {nearest(site, found)}", detail=str(directory)
        )
    return {site: found[site]}


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True)


def _show(check: SiteCheck, console: Console) -> None:
    console.rule(f"[bold]{escape(check.site)}[/bold]")
    if check.datalist is not None:
        _show_cases(check, console)
        _show_classes(check, console)
        _show_values(check, console)
    _show_problems(check.problems, console)


def _show_cases(check: SiteCheck, console: Console) -> None:
    datalist = check.datalist
    if datalist is None:
        return
    summary = check.summary()
    title = f"{datalist.task}, {datalist.spatial_dims}D" if datalist.spatial_dims else datalist.task
    table = Table(
        "Split",
        "Cases",
        "Size (voxels)",
        "Spacing (mm)",
        "Orientation",
        "Format",
        title=title,
        title_justify="left",
    )
    for split in SPLITS:
        facts = [fact for fact in check.facts if fact.split == split]
        sizes, spacings = [fact.size for fact in facts], [fact.spacing for fact in facts]
        table.add_row(
            split,
            str(len(datalist.cases[split])),
            _range(sizes),
            _range(spacings),
            _counted(fact.orientation for fact in facts),
            _counted(f"{fact.format} {fact.dtype}" for fact in facts),
        )
    console.print(table)
    if summary.unlabelled:
        console.print(f"{summary.unlabelled} listed case(s) without a label are not used.", highlight=False)


def _show_classes(check: SiteCheck, console: Console) -> None:
    datalist = check.datalist
    counts = check.class_counts()
    if datalist is None or not sum(counts):
        return
    what = {"segmentation": "Voxels", "classification": "Cases", "tabular": "Rows"}[datalist.task]
    table = Table("Class", what, "Share", *(f"in {split}" for split in SPLITS))
    by_split = [check.class_counts(split) for split in SPLITS]
    for index, name in enumerate(datalist.labels):
        share = f"{100 * counts[index] / sum(counts):.3g} %"
        table.add_row(
            f"{index} {escape(name)}", str(counts[index]), share, *(str(part[index]) for part in by_split)
        )
    console.print(table)


def _show_values(check: SiteCheck, console: Console) -> None:
    summary = check.summary()
    if not summary.intensity and not summary.missing_share:
        return
    tabular = check.table is not None
    table = Table("Feature" if tabular else "Channel", "1st percentile", "Median", "99th percentile")
    if tabular:
        table.add_column("Missing")
    for name in summary.channels:
        values = summary.intensity.get(name, {})
        cells = [_span(*pair) for pair in values.values()] or ["-"] * 3
        missing = [f"{100 * summary.missing_share[name]:.3g} %"] if tabular else []
        table.add_row(escape(name), *cells, *missing)
    console.print(table)


def _show_problems(problems: list[Problem], console: Console) -> None:
    if not problems:
        console.print("[green]No problem found.[/green]")
        return
    seen: Counter[tuple[str, str]] = Counter()
    for problem in sorted(problems, key=lambda item: item.level):
        kind = (problem.level, problem.code)
        seen[kind] += 1
        if seen[kind] > _SHOWN:
            continue
        colour = "red" if problem.level == "error" else "yellow"
        place = f"{problem.case}: " if problem.case else ""
        here = f" (here: {problem.detail})" if problem.detail else ""
        said = escape(place + problem.sentence + here)
        text = f"[{colour}]{problem.level}[/{colour}] {problem.code:<12} {said}"
        console.print(text, highlight=False, soft_wrap=True)
    for (level, code), count in seen.items():
        if count > _SHOWN:
            console.print(
                f"... and {count - _SHOWN} more of {level} {code}; --json lists them all", highlight=False
            )


def _range(rows: list[tuple[int, ...]] | list[tuple[float, ...]]) -> str:
    if not rows:
        return "-"
    return " x ".join(_span(min(axis), max(axis)) for axis in zip(*rows, strict=True))


def _span(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"


def _counted(values: object) -> str:
    counts = Counter(value for value in values if value)  # type: ignore[attr-defined]
    if len(counts) == 1:
        return next(iter(counts))
    return "\n".join(f"{value} {count}" for value, count in sorted(counts.items())) or "-"


def _write_json(path: Path, checks: list[SiteCheck]) -> None:
    text = (
        json.dumps({"sites": [check.to_mapping() for check in checks]}, indent=2, ensure_ascii=False) + "\n"
    )
    _write(path, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".check-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
