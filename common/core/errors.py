"""The one exception a user can cause."""


class InputError(ValueError):
    """Something given from outside is wrong: one sentence that names the file, key, tensor or choice.

    Commands print the sentence and exit with status 2; nothing has been written when it is raised.
    """
