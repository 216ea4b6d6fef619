"""The one error tree: what went wrong, in one line, and the next step.

    TokenmillError                exit code 1
    ├── UsageError                2   a flag, argument or parameter that cannot be used
    ├── NotFoundError             3   a model, file or name that does not exist
    ├── ModelFormatError          4   a model file that is damaged, hostile or not supported
    ├── StorageError              5   the disk: full, unwritable, or its content changed
    ├── DownloadError             6   a download that failed or did not match its hash
    ├── ResourceError             7   memory, time or a queue bound that was reached
    │   ├── BudgetError           7   money that is not left
    │   └── ExpiredError          7   a request whose time was up before its answer was done
    └── EndpointError             8   a remote endpoint that is out of reach, failed or makes no sense

Every error carries `hint`: what the reader should do next. The command line prints both and exits
with the class's `exit_code`; the table above is the documentation of those codes.
"""

__all__ = [
    "BudgetError",
    "DownloadError",
    "EndpointError",
    "ExpiredError",
    "ModelFormatError",
    "NotFoundError",
    "ResourceError",
    "StorageError",
    "TokenmillError",
    "UsageError",
]

_MAX_CHARS = 800


class TokenmillError(Exception):
    """Root of all errors that tokenmill raises on purpose."""

    exit_code = 1
    default_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(TokenmillError):
    """A flag, argument or parameter that cannot be used."""

    exit_code = 2


class NotFoundError(TokenmillError):
    """A model, file or name that does not exist."""

    exit_code = 3


class ModelFormatError(TokenmillError):
    """A model file that is damaged, hostile or not supported. The message names file and field.

    What it quotes may be hostile too, so the message is made one line of printable, bounded text.
    """

    exit_code = 4
    default_hint = "get the file again (tokenmill pull), or check that it is of a supported kind"

    def __init__(self, message: str, *, hint: str = "") -> None:
        if len(message) > _MAX_CHARS:
            message = f"{message[: _MAX_CHARS // 2]} ... {message[-_MAX_CHARS // 4 :]}"
        if not message.isprintable():
            message = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
        super().__init__(message, hint=hint)


class StorageError(TokenmillError):
    """The disk is full, not writable, or holds something else than the manifest says."""

    exit_code = 5


class DownloadError(TokenmillError):
    """A download that failed, or whose content does not match its hash."""

    exit_code = 6


class ResourceError(TokenmillError):
    """Memory, time or a queue bound was reached."""

    exit_code = 7


class BudgetError(ResourceError):
    """The budget of a key does not have what a request may come to."""


class ExpiredError(ResourceError):
    """The time of a request was up before its answer was done."""


class EndpointError(TokenmillError):
    """A remote endpoint is out of reach, failed, or answered what makes no sense."""

    exit_code = 8
    default_hint = "look at the endpoint's log, its URL and whose API it speaks"
