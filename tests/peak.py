"""Run `cli.py`, then print the peak memory (KiB) of its process or, if larger, of the largest one it started."""

import resource
import sys

if __name__ == "__main__":
    import cli

    code = cli.main(sys.argv[1:])
    print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    sys.exit(code)
