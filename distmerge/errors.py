"""The error that is raised for a user's mistakes."""


class UserError(ValueError):
    """A mistake that the user can fix. Its message is one line with the key, its value and what is allowed.

    The command line prints it as ``error: ...`` and exits with status 2. Any other exception is a bug of distmerge and keeps
    its traceback.
    """
