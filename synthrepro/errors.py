"""What goes wrong through no fault of the code."""


class UserError(ValueError):
    """A mistake that a person can put right: one sentence that says what is wrong, where, and what to do.

    The command line prints the sentence and exits with status 1. Every other exception is a defect and keeps its
    traceback.
    """
