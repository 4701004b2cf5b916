"""``python -m distmerge.launch``: torchrun with its flags, which ends with one line and the job's exit status."""

import sys

from distmerge.launch.interrupts import EARS

if __name__ == "__main__":
    EARS.install()
    from distmerge.launch.ranks import torchrun

    sys.exit(torchrun(sys.argv[1:]))
