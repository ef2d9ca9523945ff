"""The workers of a sweep: this process, or the jobs of one of Hydra's launchers (joblib, submitit)."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from immunize.cli.compose import Grid
from immunize.config import build

if TYPE_CHECKING:
    from immunize.worker import Tally

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a launcher's job runs: all the cells, in one process among several. Travels by pickle."""

    configs: Sequence[Mapping[str, Any]]
    share_cores: bool

    def __call__(self, config: DictConfig) -> "Tally":
        """`config` is that of the job itself, and the same for all: every worker goes through the whole study."""
        if self.share_cores:
            # Threads that spin while they wait make such workers slower. Read when torch is loaded.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from immunize.progress import Progress
        from immunize.worker import work

        cells = [build(OmegaConf.create(dict(plain))) for plain in self.configs]
        with Progress(enabled=cells[0].runtime.progress, bars=False) as progress:
            return work(cells, progress=progress)


def launch(grid: Grid) -> "list[Tally]":
    """Run all cells by as many workers as asked for, and return what each of them did."""
    cells, master, loader = grid.cells, grid.master, grid.loader
    assert master is not None and loader is not None
    target, workers = master.hydra.launcher._target_, cells[0].runtime.workers
    if target == BASIC:
        if workers > 1:
            raise ValueError(
                f"runtime.workers={workers}: one process is one worker; add hydra/launcher=local (or slurm), or give "
                "the same command in several terminals"
            )
        from immunize.progress import Progress
        from immunize.worker import work

        with Progress(enabled=cells[0].runtime.progress) as progress:
            return [work(cells, progress=progress)]
    processes, threads = workers * cells[0].runtime.devices, cells[0].runtime.threads
    share_cores = "slurm" not in target.lower() and processes * threads > (os.cpu_count() or 1)
    if share_cores:
        print(
            f"immunize: {processes} processes of {threads} threads share {os.cpu_count()} cores; fewer "
            "runtime.threads would be faster (another number makes other stages, since it changes the last bits)",
            file=sys.stderr,
        )
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks(master)),
        task_function=Worker(configs=[cell.config for cell in cells], share_cores=share_cores),
        config=master,
    )
    jobs = launcher.launch([list(grid.first)] * workers, initial_job_idx=0)
    return [job.return_value for job in jobs]
