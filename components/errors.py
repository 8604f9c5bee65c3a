"""Errors that tell whoever runs a stage what to do about them."""

# What waiting doesn't mend, by the names that S3's client and server have for it.
MISTAKES = {
    "AccountProblem",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ConfigParseError",
    "ExpiredToken",
    "IllegalLocationConstraintException",
    "InvalidAccessKeyId",
    "InvalidBucketName",
    "InvalidConfigError",
    "InvalidRegionError",
    "InvalidToken",
    "MethodNotAllowed",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "PermanentRedirect",
    "ProfileNotFound",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TypeError",
    "UnknownCredentialError",
    "ValueError",
}
NO_BUCKET = "NoSuchBucket"


class MayPassError(OSError):
    """Something outside is away (storage, a server); the same command goes on when it is back."""


def causes_of(error: BaseException | None) -> set[str]:
    """What an error and those behind it are called, by class and by S3's code."""
    names: set[str] = set()
    while error is not None:
        names.add(type(error).__name__)
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            names.add(str(response.get("Error", {}).get("Code")))
        error = error.__cause__ or error.__context__
    return names
