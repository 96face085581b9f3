"""A process that ends with its parent: its standard input is a pipe that the parent keeps open and never writes to."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path


def end_with_parent(directory: Path) -> None:
    """Ends this process, and removes the private directory, as soon as the parent has gone."""

    def wait_for_end() -> None:
        while os.read(0, 1024):
            pass
        shutil.rmtree(directory, ignore_errors=True)
        # Not sys.exit: the main thread may be in a long step, and there is nobody left to answer.
        os._exit(0)

    threading.Thread(target=wait_for_end, name="parent-watch", daemon=True).start()
