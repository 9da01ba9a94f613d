"""scaffold"""


def report(run: str) -> None:
    "x"


def watch(run: str) -> None:
    "x"
