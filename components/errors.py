"""Errors that tell whoever runs a stage what to do about them."""


class MayPassError(OSError):
    """Something outside is away (storage, a server); the same command goes on when it is back."""
