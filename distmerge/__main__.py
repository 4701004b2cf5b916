"""``python -m distmerge``: the same as the ``distmerge`` command."""

from distmerge.cli import program

if __name__ == "__main__":
    program()
