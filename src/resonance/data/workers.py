"""Worker processes of a DataLoader when somebody stops the training."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

STOPPING = frozenset({signal.SIGTERM, signal.SIGINT})


def outliving_signals(loader: Any) -> Any:
    """The DataLoader, with workers that go on when a scheduler signals the whole process group, until the main process has
    saved.

    torch gives them a handler that ends them at SIGTERM, and the main process with them.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's is a shell around it
    start = inner.worker_init_fn

    def begin(worker: int) -> None:
        if hasattr(signal, "sigwaitinfo"):  # Linux
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
            threading.Thread(target=_heed_the_parent, daemon=True).start()
        if start is not None:
            start(worker)

    inner.worker_init_fn = begin
    return loader


def _heed_the_parent() -> None:
    """In a worker: end at a signal from the process that started it, and at no other's."""
    while signal.sigwaitinfo(STOPPING).si_pid != os.getppid():
        pass
    os._exit(0)
