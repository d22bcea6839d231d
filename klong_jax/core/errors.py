"""The exception a person is meant to read, and the one that ends a run that was told to stop."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the file or field and the remedy. The command line prints
    it without a traceback and exits with code 2; nothing already written is lost.
    """


class Preempted(BaseException):
    """A run was asked to stop by SIGTERM and has saved its state.

    No error, and not to be caught on the way, like KeyboardInterrupt. Its message is empty or says
    what to add to the command that resumes the run. The command line exits with code 143.
    """
