import hashlib
import http.server
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from client.data.importers.download import download, find_name
from client.data.importers.layout import no_progress
from common.errors import ConfigError, DataError
from ops.data_cli import data_app
from tests.datafiles import PATIENT
from tests.sourcefiles import as_tar, dataset, msd_task

pytestmark = pytest.mark.slow

WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


def run(*arguments):
    return CliRunner().invoke(data_app, [str(argument) for argument in arguments], env=WIDE)


def output(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture
def archive(tmp_path):
    return as_tar(msd_task(tmp_path / "Task04_Tiny", [50.0] * 9), tmp_path / "Task04_Tiny.tar")


def test_import_shows_sites_with_their_cases_and_says_what_they_are(tmp_path, archive):
    said = output("import", "msd", archive, tmp_path / "out", "--sites", 3, "--seed", 1)
    for alias in ("site-1", "site-2", "site-3"):
        assert f"│ {alias} │ 1 │ 1 │ 1 │" in said
        assert len(dataset(tmp_path / "out", alias)["training"]) == 1
    assert "simulated, not hospitals" in said
    assert f"wardround trial --data {tmp_path / 'out'}" in said
    assert PATIENT not in said


def test_import_passes_every_option_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("ops.data_cli.show_root", lambda *_: None)
    monkeypatch.setattr("client.data.importers.luna.run", lambda *given: seen.append(given[:3]))
    monkeypatch.setattr("client.data.importers.brats.run", lambda *given: seen.append(given[:3]))
    output("import", "LUNA", "src", tmp_path / "a", "--partition", "random", "--sites", 4, "--seed", 7, "--table", "c.csv",
           "--negatives-per-positive", 3.5, "--dims", 2, "--patch-mm", 40, "--force")  # fmt: skip
    output("import", "brats", "src", tmp_path / "b", "--binary")
    (_, out, luna), (_, _, brats) = seen
    assert out == tmp_path / "a"
    assert (luna.partition, luna.sites, luna.seed, str(luna.table)) == ("random", 4, 7, "c.csv")
    assert (luna.negatives_per_positive, luna.dims, luna.patch_mm, luna.force) == (3.5, 2, 40, True)
    assert (luna.binary, brats.binary, brats.force) == (None, True, False)


def test_errors_come_through_as_ours(tmp_path, archive):
    with_option = run("import", "heart", archive, tmp_path / "out", "--binary")
    assert isinstance(with_option.exception, ConfigError)
    assert "--binary does not go with 'heart'" in str(with_option.exception)
    assert isinstance(run("import", "msd", tmp_path / "none.tar", tmp_path / "out").exception, DataError)
    output("import", "msd", archive, tmp_path / "out")
    again = run("import", "msd", archive, tmp_path / "out")
    assert isinstance(again.exception, DataError)
    assert "--force" in str(again.exception)
    output("import", "msd", archive, tmp_path / "out", "--force")


def test_default_writes_what_was_asked(tmp_path):
    said = output("default", tmp_path / "out", "--sites", 2, "--subjects", 4, "--voxel-mm", 12, "--seed", 3)
    assert "│ hospital-1 │ 2 │ 1 │ 1 │" in said
    assert "hospital-2" in said
    assert "No patient is in it" in said


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "import",
            ("msd", "vessels", "brats", "luna", "SOURCE", "--partition", "column:Partition_ID", "anonymise"),
        ),
        ("download", ("Task04_Hippocampus", "checksum", "CC-BY-SA")),
        ("default", ("MNI152", "no download", "--voxel-mm")),
    ],
)
def test_help_teaches(command, words):
    said = output(command, "--help")
    assert all(word in said for word in words)


def test_kinds_lists_all_with_their_options():
    said = output("kinds")
    for words in ("TaskNN_Name.tar", "label-ratio:1,2,4", "--negatives-per-positive", "the data's own"):
        assert words in said


def test_the_command_is_light_until_it_works():
    code = (
        "import sys, ops.data_cli; "
        "print([m for m in ('torch', 'monai', 'numpy', 'nibabel', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- download --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch, archive):
    """MONAI's table points at the archive; returns a function that changes address and checksum."""
    from monai.apps import DecathlonDataset

    checksum = hashlib.md5(archive.read_bytes()).hexdigest()

    def point(url="", md5=""):
        monkeypatch.setitem(DecathlonDataset.resource, "Task04_Hippocampus", url or archive.as_uri())
        monkeypatch.setitem(DecathlonDataset.md5, "Task04_Hippocampus", md5 or checksum)

    point()
    return point


@pytest.mark.parametrize("text", ["Task04_Hippocampus", "task04", "04", "4", "Hippocampus"])
def test_a_task_goes_by_name_number_or_organ(text):
    assert find_name(text) == "Task04_Hippocampus"


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'Task04_Hippocampus'"):
        find_name("Task04_Hipocampus")


def test_download_is_checked_and_can_be_imported(served, tmp_path, archive):
    said = output("download", "hippocampus", tmp_path / "down")
    target = tmp_path / "down" / "Task04_Hippocampus.tar"
    assert target.read_bytes() == archive.read_bytes()
    assert f"wardround data import msd {target} data/hippocampus" in said
    output("import", "msd", target, tmp_path / "out")
    served(url="file:///nowhere")  # what is there and right is not downloaded again
    output("download", "04", tmp_path / "down")


def test_progress_counts_bytes(served, tmp_path, archive):
    calls = []
    download("04", tmp_path / "down", lambda *call: calls.append(call))
    size = archive.stat().st_size
    assert calls[-1] == ("Task04_Hippocampus", size, size)


def test_a_wrong_checksum_leaves_nothing(served, tmp_path):
    served(md5="0" * 32)
    with pytest.raises(DataError, match="checksum of Task04_Hippocampus is not the expected one") as caught:
        download("04", tmp_path / "down", no_progress)
    assert "file://" not in str(caught.value)
    assert not list((tmp_path / "down").iterdir())


def test_a_damaged_archive_that_is_there_is_named(served, tmp_path):
    target = tmp_path / "Task04_Hippocampus.tar"
    target.write_bytes(b"half")
    with pytest.raises(DataError, match="Remove it"):
        download("04", tmp_path, no_progress)
    assert target.read_bytes() == b"half"


def test_without_a_network_the_sentence_says_so(served, tmp_path):
    served(url="http://127.0.0.1:9/Task04.tar")
    with pytest.raises(DataError, match="there is no connection") as caught:
        download("04", tmp_path / "down", no_progress)
    assert "127.0.0.1" not in str(caught.value)
    assert "127.0.0.1" in caught.value.detail


class _Broken(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 400)

    def log_message(self, *_):
        pass


def test_refusing_servers_and_broken_transfers(served, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), _Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        served(url=f"{base}/missing.tar")
        with pytest.raises(DataError, match="HTTP 404"):
            download("04", tmp_path / "down", no_progress)
        served(url=f"{base}/short.tar")
        with pytest.raises(DataError, match="or it broke"):
            download("04", tmp_path / "down", no_progress)
        server.shutdown()
    assert not list((tmp_path / "down").iterdir())
