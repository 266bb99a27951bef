"""Errors caused by the user's input; the command line prints their message without a traceback."""


class UserError(ValueError):
    """A mistake that the user can fix; the message has the expected and actual value and a fix.

    `reported`: another rank prints this error. `agreed`: all ranks raise it. `exit_status`: of the
    command.
    """

    reported = False
    agreed = False
    exit_status = 2


class ConfigError(UserError):
    """An invalid flag value, or an invalid combination of flags."""


class DataError(UserError):
    """A dataset that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written, or loaded into the networks of this run."""


class NonFiniteError(UserError):
    """A NaN or infinite loss, gradient, or tensor to be saved.

    `iteration`: the step with the failure; None if it is unknown.
    """

    iteration: int | None = None


class RankLostError(UserError):
    """Another rank was killed or stopped, or cannot be reached.

    The same command continues the run: EX_TEMPFAIL of sysexits.h, as after a signal.
    """

    exit_status = 75
