"""What lies in the user's directories: where state is kept, and the secret that proves whose a nick is.

Rules of this file
------------------
- It knows nothing of chat, except that a nick has an owner.
- A file that cannot be used is an OSError; the command line reports it.
- A file appears whole or not at all, and only its owner can read it.

A nick belongs to the first user who registered it. The proof is a token, made of the user's secret for one server and
one nick: a server that learns it can use it nowhere else. The server keeps only a hash of it (see ``registry``).
"""
from __future__ import annotations

import errno
import os


def state_home() -> str:
    """Return our directory in the user's directory for state (XDG_STATE_HOME, or ~/.local/state)."""
    return os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "udpchat")


SECRET_BYTES = 32         # of randomness: nobody guesses it


def token_for(secret: bytes, server_id: bytes, nick: str) -> bytes:
    """Return the proof that ``nick`` is ours, good at one server only: HMAC-SHA256 (RFC 2104)."""
    import hmac     # here: only registrations need it, and a start is measured
    return hmac.digest(secret, server_id + nick.encode(), "sha256")


def load_secret(path: str) -> bytes:
    """Return the secret in the file ``path``; make the file (0600) if there is none. Raise OSError."""
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
