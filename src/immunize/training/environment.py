"""What Lightning is told of processes that share a tuning."""

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
