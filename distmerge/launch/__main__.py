"""``python -m distmerge.launch``: torchrun with the same flags, but it reports a failure in one line and returns the job's exit
status."""

import sys

from distmerge.launch.interrupts import SIGNAL_THREAD

if __name__ == "__main__":
    SIGNAL_THREAD.install()
    from distmerge.launch.ranks import torchrun

    sys.exit(torchrun(sys.argv[1:]))
