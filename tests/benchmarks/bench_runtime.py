"""Gateway and mock endpoints against their bars: `almanac bench-runtime` and `bench-mock`."""

import sys

from planner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench-runtime", *sys.argv[1:]]) or main(["bench-mock"]))
