"""The ``distmerge`` command, and ``python -m distmerge``: signals are heard before anything else is imported."""

from distmerge.launch.interrupts import EARS


def program() -> None:
    EARS.install()
    from distmerge.cli.main import program

    program()


if __name__ == "__main__":
    program()
