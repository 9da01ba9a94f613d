"""Figures and codes in words that a person reads: sizes, times, names of figures, kinds, phases, and what to do next.

Used by the report page and the terminal alike, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

NONE = "–"
NOT_MEASURED = "not measured"

FIGURES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95",
    "assd": "ASSD",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "AUC",
    "recall": "Recall",
    "auroc": "AUROC",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "Calibration error",
    "loss": "Loss",
}
FIGURE_NOTES = {
    "dice": "Dice: overlap of prediction and reference, 0 none, 1 perfect.",
    "iou": "IoU: intersection over union, stricter than Dice, 0 to 1.",
    "hd95": "HD95: 95th percentile of the distance between the two outlines, in mm where the pictures state their "
    "spacing, else in pixels; lower is better; a structure that was missed counts as the whole picture's diagonal.",
    "accuracy": "Accuracy: share of cases decided rightly.",
    "balanced_accuracy": "Balanced accuracy: mean recall over the classes that the site has.",
    "recall": "Recall: share of a class's cases that were found.",
    "auc": "AUC: how well positive cases rank above negative ones, 0.5 chance, 1 perfect.",
    "auroc": "AUROC: how well positive cases rank above negative ones, 0.5 chance, 1 perfect.",
}
_MILLIMETRES = frozenset({"hd95", "assd"})
_UNBOUNDED = frozenset({"hd95", "assd", "loss", "nll", "mae", "mse", "rmse"})

KINDS = {
    "model": "Model",
    "update": "Model update",
    "fisher-sketch": "Fisher sketch",
    "sensitivity-mask": "Sensitivity mask",
    "style-spectrum": "Style spectrum",
    "data-sketch": "Data sketch",
    "cluster": "Cluster choice",
    "control": "Control values",
    "header": "Header",
    "config": "Configuration",
    "metrics": "Figures",
    "summary": "Data summary",
}
PHASES = {
    "train": "Train",
    "personal": "Train the personal model",
    "evaluate": "Evaluate",
    "sketch": "Fisher sketch",
    "sensitivity": "Sensitivity mask",
    "save": "Save state",
    "draw": "Draw pictures",
    "encode": "Encode",
    "decode": "Decode",
    "load": "Load data",
    "send": "Send",
}
DOING = {
    "check": "checking data",
    "load": "loading data",
    "evaluate": "evaluating",
    "train": "training",
    "personal": "training the personal model",
    "sketch": "measuring the Fisher information",
    "sensitivity": "measuring the sensitivity",
    "send": "sending",
    "idle": "waiting",
}
TRIAL_PHASES = {
    "data": "preparing the data",
    "check": "checking the sites' data",
    "keys": "making keys and certificates",
    "start": "starting processes",
    "register": "registering the sites' keys",
    "ready": "waiting for the sites",
    "run": "running",
    "report": "writing the report",
    "stop": "stopping processes",
}
RESTARTS = {
    "exited": "It had ended by itself",
    "silent": "It gave no sign of life",
    "lost": "Its connection was lost",
}
MODELS = {"global": "global model", "personal": "personal model"}
RUNTIMES = {
    "fast": "fast (pre-forked relays, short polls)",
    "stock": "stock (Flower's own parts)",
    "simulation": "simulation (one machine, no TLS)",
}
ADVICE = {
    "config": "Correct the named key or option, then start again; `wardround settings` lists what there is.",
    "data": "Correct the named data, look with `wardround site check DIR`, then start again.",
    "payload": "The site and the coordinator do not agree on what travels: install the same version at both ends; if "
    "they are the same, keep the logs and report it.",
    "mismatch": "Make the two ends fit (version, labels, channels, spacing) as the sentence says, then start again.",
    "policy": "The hospital's policy decides: choose another method, or ask the hospital to allow it in its site.toml.",
    "base": "The site no longer had the model it was sent, and got the whole one; if it comes again, look at the site's "
    "volume.",
    "worker": "Look at the site's worker log; start its worker again.",
    "quorum": "Look at the reasons of the missing sites and correct those sites; a lower quorum needs a new run.",
    "process": "Look at the named process's log in the run folder's logs/.",
    "credential": "Make or hand out the named key or certificate again, then start again; a site whose key was revoked needs "
    "a new one that is approved.",
    "revoked": "Nothing, if it was meant; else let the site make a new key and approve its request.",
    "admitted": "Nothing: the site connects by itself.",
    "waiting": "Ask the named sites to look with `wardround site status KIT`, or start the run without them (--sites).",
    "cancelled": "Go on when you like; nothing of the run is lost up to its last whole round.",
    "interrupted": "Go on when you like; what was written until then is in this run folder.",
    "deadline": "The site was too slow or gone: look at its worker and SuperNode logs, or give the round a longer "
    "deadline.",
    "transport": "Look at the site's SuperNode and relay logs, and at the network between.",
    "storage": "Free space on the named volume and allow writing there, then start the site's worker or the run again.",
    "training": "The loss was no finite number: look at the site's data and worker log, or train with a smaller step.",
    "ledger": "Look with `wardround ledger verify` at the site; its data-protection officer decides how it goes on.",
    "silent": "Start the site's SuperNode and worker, and check that its key is registered.",
    "internal": "Look at the logs of the process concerned; keep them when you report it.",
}


def size(count: float | None) -> str:
    """Return a number of bytes in decimal units: "19.0 kB"; a dash for None."""
    if count is None:
        return NONE
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | None) -> str:
    """Return a time span: "0.45 s", "2 min 10 s", "3 h 05 min"; a dash for None."""
    if seconds is None:
        return NONE
    if abs(seconds) < 9.995:
        return f"{seconds:.2f} s"
    if abs(seconds) < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(megabytes: float | None) -> str:
    """Return a size given in MB of 2^20 bytes: "542 MB", "3.1 GB"; a dash for None."""
    if megabytes is None:
        return NONE
    return f"{megabytes:.0f} MB" if megabytes < 1024 else f"{megabytes / 1024:.1f} GB"


def count(value: int | None) -> str:
    """Return a whole number with thin spaces between thousands; a dash for None."""
    return NONE if value is None else f"{value:,}".replace(",", "\u202f")


def figure(name: str, value: float | None, *, signed: bool = False) -> str:
    """Return a figure with the digits that its kind deserves; a dash for None.

    Args:
        name: Name of the figure, with or without a class ("dice/CSF").
        value: Its value.
        signed: Always write the sign (differences).
    """
    if value is None:
        return NONE
    digits = 2 if base(name) in _MILLIMETRES else 3
    return (f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}").replace("-", "\N{MINUS SIGN}")


def base(name: str) -> str:
    """Return a figure's name without its class: "dice/CSF" gives "dice"."""
    return name.partition("/")[0]


def bounded(name: str) -> bool:
    """Tell whether a figure lies between 0 and 1."""
    return base(name) in FIGURES and base(name) not in _UNBOUNDED


def figure_title(name: str) -> str:
    """Return a figure's name for people: "Dice", "Dice of CSF"."""
    of = name.partition("/")[2]
    title = FIGURES.get(base(name), base(name))
    return f"{title} of {of}" if of else title


def plural(number: int, one: str, many: str = "") -> str:
    """Return "1 site", "3 sites"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def advice(code: str) -> str:
    """Return what to do about an error code."""
    return ADVICE.get(code, "Look at the logs of the process concerned.")


def ranges(numbers: Iterable[int]) -> str:
    """Return whole numbers with neighbours put together: "2–4, 7"."""
    found: list[list[int]] = []
    for value in sorted(set(numbers)):
        if found and value == found[-1][1] + 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}\N{EN DASH}{last}" for first, last in found)


def joined(items: Sequence[str]) -> str:
    """Return words in a row: "4", "4 and 7", "4, 7 and 9"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def ordinal(value: int) -> str:
    """Return "1st", "2nd", "3rd", "11th"."""
    teens = value % 100 in {11, 12, 13}
    return f"{value}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(value % 10, 'th')}"


def moment(when: float | None) -> str:
    """Return a time in UTC to the second: "2026-01-01 12:00:00"; a dash for None or what is no time."""
    if when is None:
        return NONE
    try:
        return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return NONE


def continued(number: int | None) -> str:
    """Return how a run was continued: "continued after round 7"."""
    if number is None:
        return "continued"
    return f"continued after round {number}" if number else "continued from the start"
