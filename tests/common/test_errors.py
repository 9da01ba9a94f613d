"""Errors: every code and exit code once, and no foreign text across the border."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.errors import DataError, WardroundError, nearest, safe_sentence

CLASSES = [
    item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, WardroundError)
]


def test_codes_and_exit_codes_tell_the_classes_apart():
    assert len(CLASSES) >= 12
    assert len({item.code for item in CLASSES}) == len(CLASSES)
    assert sorted(item.exit_code for item in CLASSES) == list(range(1, len(CLASSES) + 1))


def test_every_class_stands_in_the_modules_table():
    lines = errors.__doc__.splitlines()
    for item in CLASSES:
        (line,) = (line for line in lines if f" {item.__name__} " in f" {line} ")
        assert line.endswith(f"exit {item.exit_code}")


@pytest.mark.parametrize("item", CLASSES)
def test_the_sentence_is_the_message_and_the_detail_stays(item):
    error = item("alpha: the case is empty.", detail="/data/patients/mueller.nii", site="alpha")
    assert str(error) == "alpha: the case is empty."
    assert safe_sentence(error) == (item.code, "alpha: the case is empty.")
    assert (error.detail, error.site) == ("/data/patients/mueller.nii", "alpha")


SECRET = "Mueller^Hans 1961 /mnt/pacs/17.dcm"
FOREIGN = [
    FileNotFoundError(2, "No such file", SECRET),
    ValueError(SECRET),
    KeyError(SECRET),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]),
    KeyboardInterrupt(SECRET),
    type("Secret", (Exception,), {"__str__": lambda self: SECRET})(),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_a_foreign_exception_gives_its_class_name_alone(error):
    error.add_note(SECRET)
    code, sentence = safe_sentence(error)
    assert code == "internal"
    assert sentence == f"unexpected {type(error).__name__}; the full text is in the site's own worker log"


def test_the_cause_of_our_own_error_does_not_leak():
    error = DataError("alpha: unreadable.", detail=SECRET)
    error.__cause__ = ValueError(SECRET)
    assert safe_sentence(error) == ("data", "alpha: unreadable.")
    assert str(error) == "alpha: unreadable."


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fedavgg", "Did you mean 'fedavg'? Known: ditto, fedavg, local-only."),
        ("FedAvg", "Did you mean 'fedavg'? Known: ditto, fedavg, local-only."),
        ("local_only", "Did you mean 'local-only'? Known: ditto, fedavg, local-only."),
        ("zzz", "Known: ditto, fedavg, local-only."),
    ],
)
def test_nearest_names(name, hint):
    assert nearest(name, ["fedavg", "local-only", "ditto"]) == hint


def test_nearest_of_nothing():
    assert nearest("x", []) == "Known: none."


@given(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=4))
def test_nearest_suggests_only_what_is_known(name, known):
    hint = nearest(name, iter(known))
    if hint.startswith("Did you mean"):
        assert any(hint.startswith(f"Did you mean '{item}'?") for item in known)
