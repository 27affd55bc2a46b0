"""A reader of headers that does what the name of a file says: for tests of what its parent makes of that."""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    for line in sys.stdin:
        answers = []
        for _, path in json.loads(line):
            if "crash" in path:
                os.abort()
            if "hang" in path:
                time.sleep(60)
            answers.append([{"file": path}])
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
