"""What lies in the user's directories."""
from __future__ import annotations

import errno
import os


def state_home() -> str:
    """The user's directory for state (XDG_STATE_HOME, or ~/.local/state), with ours in it."""
    return os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "udpchat")


SECRET_BYTES = 32


def token_for(secret: bytes, server_id: bytes, nick: str) -> bytes:
    """The proof that a nick is one's own, good at one server only: HMAC-SHA256 (RFC 2104)."""
    import hmac
    return hmac.digest(secret, server_id + nick.encode(), "sha256")


def load_secret(path: str) -> bytes:
    """The secret in the file ``path``, which is made (0600, whole or not at all) if there is none. Raises OSError."""
    try:
        with open(path, "rb") as file:
            secret = bytes.fromhex(file.read(1024).decode("ascii", "replace").strip())
        if len(secret) != SECRET_BYTES:
            raise ValueError
        return secret
    except ValueError:
        raise OSError(errno.EINVAL, "is not a udpchat identity") from None
    except FileNotFoundError:
        pass
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
    draft = f"{path}.{os.urandom(8).hex()}"    # not the process's number: a container gives the same to each
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(os.urandom(SECRET_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)        # fails if another process was faster: then its secret is ours
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)
    return load_secret(path)
