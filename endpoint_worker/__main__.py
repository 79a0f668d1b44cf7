"""`python -m endpoint_worker` is the command `endpoint-worker`, for when the script is not on the path."""

import sys

from endpoint_worker.cli import main

if __name__ == "__main__":
    sys.exit(main())
