"""scaffold"""


def print_closing(out, console):
    console.print("closing", out)
