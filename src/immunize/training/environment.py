"""What Lightning is told of processes that share a tuning."""

import signal
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.plugins.environments import LightningEnvironment


class Joined(LightningEnvironment):
    """Processes of one host that are in a process group already: nothing is started and no variable is read or set."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        pass


class OwnSignals(Callback):
    """Keeps what SIGTERM did: Lightning's handler would send to the others amid an exchange, and all would hang."""

    def __init__(self) -> None:
        self._before = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, *args: Any) -> None:
        if signal.getsignal(signal.SIGTERM) is not self._before:
            signal.signal(signal.SIGTERM, self._before)
