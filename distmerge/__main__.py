"""``python -m distmerge``: the same as the ``distmerge`` command."""

from distmerge.cli import main

if __name__ == "__main__":
    main()
