"""The loggers of a run as one; one that fails does not stop the run. Only rank 0 has any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from fastdino.errors import ConfigError, UserError
from fastdino.terminal import print_err
from fastdino.training.csv_logger import CsvLogger
from fastdino.training.metric_logger import MetricLogger, Origin, Pixels
from fastdino.training.tensorboard import Board

# The package and the extra of setup.py that a logger needs.
_REQUIRES = {
    "tensorboard": ("tensorboard", "train"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}


def resolve_names(names: Sequence[str]) -> tuple[str, ...]:
    """Resolve the names of TrainConfig.loggers: none, auto, or names of loggers.

    Raises: ConfigError: a package that a logger needs is not installed.
    """
    if list(names) == ["none"]:
        return ()
    if list(names) == ["auto"]:
        return () if _problem("tensorboard") else ("tensorboard",)
    for name in names:
        if problem := _problem(name):
            raise ConfigError(problem)
    return tuple(names)


def _problem(name: str) -> str | None:
    """Return why a logger cannot be used; None if its package is installed."""
    package, extra = _REQUIRES.get(name, ("", ""))
    try:
        installed = not package or find_spec(package) is not None
    except ValueError:  # an entry of sys.modules without a spec
        installed = False
    if installed:
        return None
    return (
        f"--logger {name} needs the package {package}, which is not installed: "
        f'pip install "fastdino[{extra}]"'
    )


def build_loggers(
    names: Sequence[str],
    origin: Origin,
    warn: Callable[[str], None],
    *,
    required: bool = True,
) -> Loggers:
    """Build the loggers of `resolve_names`; for `required` see Loggers.

    Raises: ConfigError: a logger's package cannot be imported.
    """
    loggers: dict[str, MetricLogger] = {}
    for name in names:
        try:
            loggers[name] = _build(name, origin)
        except ImportError as error:
            raise ConfigError(
                f"--logger {name}: its package cannot be imported ({error}); repair the "
                "installation, or use another --logger"
            ) from error
    return Loggers(loggers, warn, required=required)


def _build(name: str, origin: Origin) -> MetricLogger:
    # Their imports take seconds.
    if name == "mlflow":
        from fastdino.training.mlflow_logger import MlflowLogger

        return MlflowLogger(origin)
    if name == "wandb":
        from fastdino.training.wandb_logger import WandbLogger

        return WandbLogger(origin)
    return CsvLogger(origin) if name == "csv" else Board(origin)


class Loggers:
    """Some loggers as one; after a failure of one the run and the others continue.

    Args:
        loggers: by their names.
        warn: called with the first failure of each, which is tried again after each flush.
        required: a logger that cannot be started is an error; otherwise, its first failure. For
            loggers that the user did not name.
    """

    def __init__(
        self,
        loggers: Mapping[str, MetricLogger] | None = None,
        warn: Callable[[str], None] = print_err,
        *,
        required: bool = True,
    ) -> None:
        self._loggers = dict(loggers or {})
        self._warn = warn
        self._required = required
        self._started = False
        self._failed: set[str] = set()  # since the last flush
        self._warned: set[str] = set()

    def restart(self, iteration: int, *, new: bool) -> None:
        """Start or continue all; see MetricLogger.

        Raises: UserError: a required logger cannot be started at the beginning of the run.
        """
        if self._started or not self._required:
            self._started = True
            self._each(lambda logger: logger.restart(iteration, new=new))
            return
        for name, logger in self._loggers.items():
            try:
                logger.restart(iteration, new=new)
            except UserError:
                raise
            except Exception as error:  # each library has its own types
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"--logger {name}: {logger.problem} ({reason}): check the folder's "
                    "permissions and the logger's settings, or use another --logger"
                ) from error
        self._started = True

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Log a value for each of the named curves; names are KIND/NAME."""
        self._each(lambda logger: logger.add(values, iteration))

    def add_image(self, name: str, pixels: Pixels, iteration: int) -> None:
        """Log a picture [height, width, 3]."""
        self._each(lambda logger: logger.add_image(name, pixels, iteration))

    def flush(self, iteration: int) -> None:
        """Write buffered values; `iteration` is the next one."""
        self._failed.clear()
        self._each(lambda logger: logger.flush(iteration))

    def close(self) -> None:
        """Write buffered values and end."""
        self._failed.clear()
        self._each(lambda logger: logger.close())
        self._started = False

    def _each(self, call: Callable[[MetricLogger], None]) -> None:
        if not self._started:
            return
        for name, logger in self._loggers.items():
            if name in self._failed:
                continue
            try:
                call(logger)
            except Exception as error:  # each library has its own types
                self._failed.add(name)
                if name not in self._warned:
                    self._warned.add(name)
                    self._warn(
                        f"{logger.problem} ({error}): the run continues, and tries again after "
                        "each save"
                    )
