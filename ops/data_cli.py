"""`wardround data`: bring public data into wardround's layout, or make the default data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from client.data.importers.kinds import FORMS, KINDS, ImportOptions, check_options, get_kind
from common.dataset_json import SPLITS

if TYPE_CHECKING:
    from client.data.importers.layout import Progress as Report

data_app = typer.Typer(
    help="Get data: public data sets cut into sites, or simulated hospitals without a download.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)

OUT = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="Data root to write: new or empty; one folder per site and federation.json."
    ),
]
SEED = Annotated[
    int,
    typer.Option("--seed", help="Every random choice derives from it; same seed, same files.", min=0),
]
FORCE = Annotated[bool, typer.Option("--force", help="Replace OUT, if wardround wrote it.")]


KIND = Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS)}; see `wardround data kinds`.")]
SOURCE = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="What was downloaded: an archive or a folder.")
]
SITES = Annotated[
    int | None, typer.Option("--sites", min=1, help="How many sites to simulate (random, intensity).")
]
PARTITION = Annotated[
    str | None,
    typer.Option(
        "--partition",
        help="How sites are made: random; intensity (msd); column:NAME of --table (msd, brats); "
        "missing-channel (brats); label-ratio:1,2,4 (luna, cifar); delta:4 (cifar).",
    ),
]
TABLE = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="CSV",
        help="One row per case, keyed by a column id or Subject_ID; a column group keeps a subject's cases together. "
        "For luna: the candidates.",
    ),
]
BINARY = Annotated[bool, typer.Option("--binary", help="brats: whole tumour against the rest.")]
NEGATIVES = Annotated[float | None, typer.Option("--negatives-per-positive", help="luna: 2 if left out.")]
DIMS = Annotated[int | None, typer.Option("--dims", help="luna: 3 for cubes (if left out), 2 for slices.")]
PATCH = Annotated[int | None, typer.Option("--patch-mm", help="luna: edge of a patch, 32 if left out.")]
CLASSES = Annotated[
    str | None, typer.Option("--classes", help="cifar: negative and positive class, 1,9 if left out.")
]
IMAGES = Annotated[
    int | None,
    typer.Option("--images", help="cifar: training and validation images of a site, 400 if left out."),
]


@data_app.callback()
def _group() -> None:
    """Get data: public data sets cut into sites, or simulated hospitals without a download."""


@data_app.command("kinds")
def kinds() -> None:
    """List what can be imported, and from what."""
    table = Table("KIND", "What it is, and what it takes", title="Importers", show_lines=True)
    for kind in KINDS.values():
        lines = [f"[bold]{escape(kind.title)}[/bold]", f"SOURCE: {escape(kind.source)}"]
        ways = " | ".join(FORMS[name] for name in kind.partitions)
        lines.append(f"sites: --partition {ways}" if ways else "sites: the data's own")
        if kind.options:
            lines.append("also: " + " ".join(f"--{name.replace('_', '-')}" for name in kind.options))
        table.add_row(kind.name, "\n".join(lines))
    Console().print(table)


@data_app.command("import")
def import_data(
    kind: KIND,
    source: SOURCE,
    out: OUT,
    sites: SITES = None,
    partition: PARTITION = None,
    seed: SEED = 0,
    table: TABLE = None,
    binary: BINARY = False,
    negatives_per_positive: NEGATIVES = None,
    dims: DIMS = None,
    patch_mm: PATCH = None,
    classes: CLASSES = None,
    images: IMAGES = None,
    force: FORCE = False,
) -> None:
    """Bring a public data set into OUT, cut into sites, each split 60/20/20.

    KIND is one of msd, vessels, heart, brats, luna, cifar. SOURCE is what was downloaded, an archive or a folder;
    `wardround data kinds` says what each kind expects. OUT is a new or empty folder.

    Files get neutral names. Sites that are simulated are called so in federation.json and in every report.
    Importers do not anonymise: they are for data that is public already.

    [bold]Examples[/bold]

      wardround data import vessels retinal_vessels data/vessels

      wardround data import msd Task04_Hippocampus.tar data/hippocampus --partition intensity --sites 3

      wardround data import brats FeTS2022 data/fets --table partitioning_1.csv --partition column:Partition_ID

      wardround data import luna LUNA16 data/luna --dims 2 --partition label-ratio:1,2,4,7

      wardround data import cifar cifar10_jpeg60k.npz data/cifar --partition delta:4

    Then: wardround site check data/vessels, and wardround trial --data data/vessels
    """
    chosen = get_kind(kind)
    options = ImportOptions(
        sites=sites,
        partition=partition,
        seed=seed,
        table=table,
        binary=True if binary else None,
        negatives_per_positive=negatives_per_positive,
        dims=dims,
        patch_mm=patch_mm,
        classes=classes,
        images=images,
        force=force,
    )
    check_options(chosen, options)
    console = Console()
    with _progress(console) as report:
        chosen.load()(source, out, options, report)
    show_root(out, console)


@data_app.command("download")
def download(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="Task04_Hippocampus, or 04, or hippocampus; 10 tasks.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the archive.")],
) -> None:
    """Download a task of the Medical Segmentation Decathlon (CC-BY-SA 4.0) and check its checksum.

    TASK is a name (Task04_Hippocampus), its number (04) or its organ (hippocampus); OUT is a folder for the archive.
    The only command of wardround that looks for a public address. An archive that is there already is only checked.

    [bold]Example[/bold]

      wardround data download hippocampus downloads
    """
    from client.data.importers.download import download as fetch

    console = Console()
    with _progress(console, transfer=True) as report:
        archive = fetch(task, out, report)
    console.print(f"{archive.name} is complete; its checksum is right.", highlight=False)
    name = archive.stem.partition("_")[2].lower()
    console.print(
        f"Next: wardround data import msd {archive} data/{name}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


@data_app.command("default")
def default(
    out: OUT,
    sites: Annotated[int, typer.Option("--sites", help="Hospitals, 1 to 99.")] = 3,
    subjects: Annotated[int, typer.Option("--subjects", help="Subjects per hospital, at least 3.")] = 10,
    seed: SEED = 0,
    voxel_mm: Annotated[
        float, typer.Option("--voxel-mm", help="Edge of a voxel, 1 to 12; 4 gives 48x56x48 voxels.")
    ] = 4.0,
    force: FORCE = False,
) -> None:
    """Write simulated hospitals on the MNI152 brain: real anatomy, simulated scanners and subjects, no download.

    OUT is a new or empty folder. The first hospital's scanner is clean, the second's has low contrast and shading,
    the third's thick and noisy slices; further ones are drawn from the seed. `wardround trial` writes this data
    by itself where none is given.

    [bold]Example[/bold]

      wardround data default data/mni --sites 5 --subjects 20 --seed 1
    """
    from client.data.mni import write_mni_trial

    console = Console()
    with _progress(console) as report:
        write_mni_trial(
            out,
            sites=sites,
            subjects=subjects,
            seed=seed,
            voxel_mm=voxel_mm,
            progress=report,
            force=force,
        )
    show_root(out, console)


def show_root(root: Path, console: Console) -> None:
    """Print a data root's title, sites with their cases by split, and note, as the sites' own reader sees them."""
    from client.data.importers.layout import counts
    from common.federation import read_federation

    federation = read_federation(root)
    table = Table("Site", *(split for split in SPLITS), "Note", title=escape(federation.title))
    for index in range(1, 1 + len(SPLITS)):
        table.columns[index].justify = "right"
    for alias, (cases, note) in counts(root).items():
        table.add_row(alias, *(str(cases[split]) for split in SPLITS), escape(note))
    console.print(table)
    console.print(escape(federation.note), highlight=False)
    console.print(f"Next: wardround trial --data {root}", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _progress(console: Console, *, transfer: bool = False) -> Iterator[Report]:
    """Show one bar per phase; they vanish when done."""
    counted: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if transfer else [MofNCompleteColumn()]
    )
    columns = [TextColumn("{task.description}"), BarColumn(), *counted, TimeElapsedColumn()]
    bars = {}
    with Progress(*columns, console=console, transient=True) as shown:

        def report(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                bars[phase] = shown.add_task(phase, total=total)
            shown.update(bars[phase], completed=done, total=total)

        yield report
