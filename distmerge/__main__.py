"""The ``distmerge`` command and ``python -m distmerge``. Signals are handled before anything else is imported."""

from distmerge.launch.interrupts import SIGNAL_THREAD


def program() -> None:
    SIGNAL_THREAD.install()
    from distmerge.cli.main import program

    program()


if __name__ == "__main__":
    program()
