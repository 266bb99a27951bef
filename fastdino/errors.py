"""What went wrong on the user's side: the command line prints the message alone, no traceback."""


class UserError(ValueError):
    """A mistake the user can mend; the message says what was expected, what came, what to do.

    `told_elsewhere`: another process of the run met it, and tells it.
    """

    told_elsewhere = False


class ConfigError(UserError):
    """A flag's value, or two flags together, that cannot be."""


class DataError(UserError):
    """A data folder that cannot be trained on."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written, or loaded into this run's networks."""


class NonFiniteError(UserError):
    """The loss, a gradient, or a tensor about to be saved, is NaN or infinite.

    `iteration` is the step that met it, None where the steps before are to blame.
    """

    iteration: int | None = None
