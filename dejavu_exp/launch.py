"""What Hydra's launchers start: a run, or a cell of a sweep; and what is checked before a sweep and told at its end."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from dejavu_exp import cells, config, safety
from dejavu_exp.cells import Cell, State, Status
from dejavu_exp.config import spoken_errors
from dejavu_exp.errors import ConfigError, DataError, DejavuError

if TYPE_CHECKING:
    from dejavu_exp.stages import Plan

log = logging.getLogger(__name__)

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SLURM_LAUNCHER = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
EXTRAS = {"hydra_submitit_launcher": "slurm", "hydra_ray_launcher": "ray"}
"""The extra of this package that installs a plugin of Hydra."""
LEAST_ROOM = 1 << 16
"""Bytes of a run's smallest files: configuration, log and status."""
STOPPED_BY_GATE = 3
"""Exit status where a run, or a cell of a sweep, is whole but does not pass the release gate."""

# A job imports this module before it reads a configuration, which needs the resolvers.
config.register()


def job(cfg: DictConfig) -> None:
    """Measure one encoder, as configured; in a sweep, unless that is done."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    with told("dejavu_exp") as tell:
        resolved = config.resolve(cfg)
        options = resolved.pop("run")
        if hydra.mode == RunMode.MULTIRUN and not options["again"] and cells.is_finished(folder, resolved):
            log.info("finished before, and not measured again without run.again=true: %s", folder)
            return
        # Imported here: torch takes seconds, and --help must not.
        from dejavu_exp import pipeline, ranks

        if options["plan"]:
            sys.exit(survey([resolved]))
        tell(State.RUNNING)
        plan, judged = _plan(resolved), None
        with ranks.joined(plan.trainer.device_count, plan.trainer.cache) as lead:
            if lead:
                judged = pipeline.run(plan, folder, resolved)["gate"]
        tell(State.FINISHED)
        if judged:
            _heed(judged, sweeping=hydra.mode == RunMode.MULTIRUN)


def _heed(judged: Mapping[str, Any], *, sweeping: bool) -> None:
    """End a run that the gate stops with its status; a cell of a sweep leaves that to the sweep's end."""
    if judged["passed"] or sweeping:
        log.info("release gate %s. %s", "passed" if judged["passed"] else "not passed", judged["reason"])
        return
    sys.stderr.write(f"Release gate not passed. {judged['reason']}\n")
    sys.exit(STOPPED_BY_GATE)


def survey(resolved: Sequence[Mapping[str, Any]]) -> int:
    """Say what runs will need and cost; 1 where something is missing, else 0."""
    from dejavu_exp import preflight

    missing = False
    for values in resolved:
        found = preflight.survey(_plan(values))
        preflight.show(found)
        missing = missing or bool(found.missing)
    return int(missing)


def _plan(resolved: Mapping[str, Any]) -> Plan:
    from dejavu_exp import stages

    return stages.Plan(**config.build(resolved))


@contextmanager
def told(command: str) -> Iterator[Callable[[State], None]]:
    """Keep status.json of a run. An error ends a single run with one sentence, and of a sweep only its cell.

    Args:
        command: the module that is run.

    Yields:
        A function that says the run's new state.
    """
    # Again, for a task of SLURM is a process of its own.
    safety.keep_others_from_writing()
    hydra = HydraConfig.get()
    folder, sweeping = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    given = (*_words(hydra.overrides.hydra), *_words(hydra.overrides.task))
    status = Status.here(State.RUNNING, command, given, sweeping, _log_file(folder, hydra.job.name))

    # Asked now, for the environment may say so no more when the ranks have met.
    leads = is_first_rank()

    def tell(state: State, error: str | None = None) -> None:
        # The ranks that only help say nothing: the first knows when all is done.
        if leads:
            (status if state == State.RUNNING else status.ends(state, error)).write(folder)

    try:
        yield tell
    except Exception as error:
        sentence = f"{type(error).__name__}: {error}"
        with suppress(DataError):  # where the disk is full the status too finds no room
            tell(State.FAILED, sentence)
        if not sweeping:
            with spoken_errors():
                raise
        expected = isinstance(error, DejavuError) and os.environ.get("HYDRA_FULL_ERROR") != "1"
        log.error("%s: %s", folder, sentence, exc_info=not expected)


def is_first_rank() -> bool:
    """True in the process that runs the pipeline, of those that torchrun or SLURM started for one run."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def _log_file(folder: Path, name: str) -> Path:
    """Where this process writes: the file that submitit gave it, or Hydra's."""
    job_id, of_jobs = cells.slurm_job(), os.environ.get("SUBMITIT_FOLDER")
    if job_id and of_jobs:
        return Path(of_jobs.replace("%j", job_id)) / f"{job_id}_0_log.out"
    return folder / f"{name}.log"


def compose(master: DictConfig) -> list[Cell]:
    """The cells of a sweep, in the order in which they will be started; none for a sweeper that chooses as it goes.

    Raises:
        ConfigError: a cell has a key or value that cannot work, or two cells would be the same.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if master.hydra.sweeper._target_ != BASIC_SWEEPER:
        return []
    loader = GlobalHydra.instance().config_loader()
    swept = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*swept, *master.hydra.overrides.task])
    found = []
    for number, overrides in enumerate(BasicSweeper.split_arguments(parsed, None)[0]):
        cfg = loader.load_sweep_config(master, overrides)
        with open_dict(cfg):
            cfg.hydra.job.num = number
        plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        # First, for its errors name the key; those of an interpolation would name hydra.sweep.subdir.
        resolved = config.resolve(plain)
        folder = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir).absolute()
        found.append(Cell(tuple(overrides), folder, resolved))
    _check_distinct(found)
    return found


def _check_distinct(found: Sequence[Cell]) -> None:
    folder, count = Counter(cell.folder for cell in found).most_common(1)[0]
    if count > 1:
        same = "; ".join(" ".join(cell.overrides) for cell in found if cell.folder == folder)
        raise ConfigError(
            f"hydra.sweep.subdir={folder.name}: {count} cells of the sweep would share this folder ({same}). Sweep "
            "over keys that may change a figure, or set hydra.sweep.subdir='${hydra.job.num}'."
        )


class SweepCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Checks a run, and the cells of a sweep, before anything is written; says last which cells did not finish."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        """Refuse secrets, and a folder that cannot be written, before Hydra writes the configuration there."""
        with spoken_errors(), _fatal():
            _refuse_secrets(config)
            _check_writable("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Compose all cells; plan them where that is asked; refuse to queue a sweep with a hole."""
        with spoken_errors(), _fatal():
            _refuse_secrets(config)
            _check_writable("hydra.sweep.dir", config.hydra.sweep.dir)
            _check_launcher(config)
            found = compose(config)
            if found and found[0].resolved["run"]["plan"]:
                sys.exit(survey([cell.resolved for cell in found]))
            waiting = [cell for cell in found if not cell.is_done()]
            # Built here, for a value that cannot work must be found before the first cell has run for hours.
            plans = [_plan(cell.resolved) for cell in waiting]
            if config.hydra.launcher._target_ != BASIC_LAUNCHER:
                _check_holes(plans)
            if config.hydra.launcher._target_ == SLURM_LAUNCHER:
                _check_tasks(config, found)
            self.cells = found
            _say_queued(waiting, config)

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """One line for each cell that did not finish, and status 1; else for each that the gate stops, and status 3."""
        jobs = cells.slurm_jobs()
        with spoken_errors(), _fatal():
            lines = [line for cell in self.cells if (line := _unfinished(cell, jobs))]
            stopped = [line for cell in self.cells if (line := _stopped_cell(cell))]
        if lines:
            told_by = f"python -m dejavu_exp.sweep {config.hydra.sweep.dir}"
            sys.exit("\n".join([*stopped, *lines, f"The same command runs these cells alone. {told_by} shows all."]))
        if stopped:
            sys.stderr.writelines(f"{line}\n" for line in stopped)
            sys.exit(STOPPED_BY_GATE)


@contextmanager
def _fatal() -> Iterator[None]:
    """Let an error end the program: Hydra makes a warning of what a callback raises, and would start the sweep."""
    try:
        yield
    except DejavuError:
        raise
    except Exception:
        log.exception("the sweep was not looked through")
        sys.exit(1)


def _refuse_secrets(master: DictConfig) -> None:
    """Look at what Hydra writes as it stands: values that name the environment (`${oc.env:NAME}`) only show later."""
    for word in (*_words(master.hydra.overrides.hydra), *_words(master.hydra.overrides.task)):
        safety.refuse_secrets(word, word.partition("=")[0])
    safety.refuse_secrets(OmegaConf.to_container(master))


def _words(overrides: Sequence[str]) -> list[str]:
    """Overrides as they were given; to iterate would put in what they interpolate, which may be a secret."""
    return [str(word) for word in OmegaConf.to_container(overrides, resolve=False) or ()]


def _check_writable(key: str, folder: str) -> None:
    """Make the folder, and see whether a file finds room in it; Hydra would show a traceback where it does not."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(LEAST_ROOM))
            stream.flush()
            os.fsync(stream.fileno())  # some file systems only find out then
    except OSError as error:
        raise ConfigError(
            f"{key}={folder}: cannot be written ({error}). Free some space, or name another folder with {key}=DIR."
        ) from error


def _unfinished(cell: Cell, jobs: Mapping[str, str] | None) -> str | None:
    """What to say of a cell that did not finish, or None."""
    status = cells.read(cell.folder)
    state = status.now(jobs) if status else State.STOPPED
    if state == State.FINISHED:
        return None
    return f"{state}: {cell.folder}" + (f": {status.error}" if status and status.error else "")


def _stopped_cell(cell: Cell) -> str | None:
    """Why the release gate stops a cell; None where it does not, or the cell has no figures."""
    try:
        judged = json.loads((cell.folder / "figures.json").read_text()).get("gate")
    except FileNotFoundError:
        return None
    return f"release gate not passed: {cell.folder}: {judged['reason']}" if judged and not judged["passed"] else None


def _check_launcher(master: DictConfig) -> None:
    """Refuse a launcher that is not installed; give SLURM's the patience that it lacks."""
    target = str(master.hydra.launcher._target_)
    if not target.startswith("hydra_plugins."):
        return
    plugin = target.split(".")[1]
    there = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{plugin}")
    if not there:
        extra = EXTRAS.get(plugin, plugin)
        raise ConfigError(
            f"hydra/launcher={extra}: {plugin} is not installed. Run pip install 'dejavu_exp[{extra}]', "
            "or leave the launcher out to run the sweep here."
        )
    if target == SLURM_LAUNCHER:
        from hydra.core.plugins import Plugins

        from dejavu_exp.slurm import SlurmLauncher

        # Hydra takes launchers from the package hydra_plugins only; a class of ours has to stand under a name there.
        Plugins.instance().class_name_to_class[SLURM_LAUNCHER] = SlurmLauncher


def _check_holes(plans: Sequence[Plan]) -> None:
    """Refuse a sweep of which a cell would fail for want of weights or data, before anything is queued."""
    from dejavu_exp import preflight

    holes = dict.fromkeys(hole for plan in plans for hole in preflight.missing(plan))
    if holes:
        raise ConfigError("nothing is queued, for these are missing:\n" + "\n".join(f"  {hole}" for hole in holes))


def _check_tasks(master: DictConfig, found: Sequence[Cell]) -> None:
    """Refuse a number of tasks that is not the number of devices: some would have nothing to do, or not exist."""
    launcher = master.hydra.launcher
    tasks = launcher.nodes * launcher.tasks_per_node if isinstance(launcher.tasks_per_node, int) else None
    for devices in dict.fromkeys(cell.resolved["trainer"]["devices"] for cell in found):
        if devices != tasks:
            raise ConfigError(
                f"trainer.devices={devices}: hydra/launcher=slurm starts {launcher.nodes} x {launcher.tasks_per_node} "
                "tasks a cell (hydra.launcher.nodes, tasks_per_node), one for each device. Make the numbers equal."
            )


def _say_queued(waiting: Sequence[Cell], master: DictConfig) -> None:
    """Write down which cells will be started, except those of another call that still run."""
    jobs = cells.slurm_jobs()
    command = "dejavu_exp.train" if JobRuntime.instance().get("name") == "train" else "dejavu_exp"
    for cell in waiting:
        if cell.state(jobs) not in (State.QUEUED, State.RUNNING):
            (cell.folder / cells.SUBMITTED).unlink(missing_ok=True)
            given = (*_words(master.hydra.overrides.hydra), *cell.overrides)
            Status.here(State.QUEUED, command, given, True, None).write(cell.folder)
