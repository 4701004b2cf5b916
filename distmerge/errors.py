"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Something that the user can mend: one line that names the key, its value and what is allowed.

    The command line prints it as ``error: ...`` and leaves with status 2. Everything else that is raised is our own
    mistake, and keeps its traceback.
    """
