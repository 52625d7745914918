"""What runs here."""

HELP = "x"


def add_options(p): ...
def run(o):
    return 0
