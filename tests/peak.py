"""`cli.py` as a program that prints the most memory that it, or a process it started, had at once, in KiB."""

import resource
import sys

if __name__ == "__main__":
    import cli

    code = cli.main(sys.argv[1:])
    print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    sys.exit(code)
