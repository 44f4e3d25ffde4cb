"""The one exception a user can cause."""


class InputError(ValueError):
    """Something given from outside is wrong: one sentence that names the file, key, tensor or choice.

    Commands print the sentence and exit with status 2; nothing has been written when it is raised.
    """


class NotFetched(InputError):
    """In a dry run: a model that a run would fetch first, so that nothing is known of it yet. It is no refusal."""
