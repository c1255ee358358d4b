"""The one error for input that cannot be used."""


class UserError(ValueError):
    """What was asked for cannot be done as it was asked: the message names what was expected and
    what was given. Any other exception is a fault of the code.
    """
