"""The one exception a person is meant to read."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the file or field and the remedy. The command line prints
    it without a traceback and exits with code 2; nothing already written is lost.
    """
