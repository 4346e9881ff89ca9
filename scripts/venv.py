"""Makes a virtual environment that holds exactly what a hashed lock file lists. Run by venv.sh, on any Python >= 3.12.

Only the standard library is there yet. Every word goes to stderr: stdout may be inside `eval "$(./sallyport ...)"`.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def build(venv: Path, lock: Path) -> None:
    """Fill `venv` from `lock`, unless another process did so while this one waited for its turn.

    Raises OSError where the folder cannot be written, subprocess.CalledProcessError where venv or pip failed.
    """
    wanted = lock.read_bytes()
    installed = venv / "installed.lock"
    venv.mkdir(exist_ok=True)
    turn = _wait_for_turn(venv)
    if installed.exists() and installed.read_bytes() == wanted and _runs(venv / "bin/python"):
        return
    print(f"sallyport: setting up {venv.name} (once) ...", file=sys.stderr, flush=True)
    installed.unlink(missing_ok=True)
    _run(turn, sys.executable, "-I", "-m", "venv", "--clear", venv)
    # Wheels only: building a source package would run code that no hash in the lock covers.
    options = ["-qq", "--no-input", "--disable-pip-version-check", "--require-hashes", "--only-binary=:all:"]
    _run(turn, venv / "bin/python", "-I", "-m", "pip", "install", *options, "--requirement", lock)
    # The repository itself, relative so that both can move together.
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))
    (packages / "repository.pth").write_text(os.path.relpath(lock.parent, packages) + "\n")
    installed.write_bytes(wanted)


def _wait_for_turn(venv: Path) -> int:
    """A lock on the folder, held until this process and the children given the descriptor have ended, however."""
    turn = os.open(venv, os.O_RDONLY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"sallyport: waiting for another set-up of {venv.name} ...", file=sys.stderr, flush=True)
        fcntl.flock(turn, fcntl.LOCK_EX)
    return turn


def _run(turn: int, *command: str | Path) -> None:
    # An orphaned pip keeps the descriptor, and with it the lock, so that nobody installs beside it.
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr, pass_fds=(turn,))


def _runs(python: Path) -> bool:
    return python.exists() and subprocess.run([python, "-I", "-S", "-c", ""], check=False).returncode == 0


def main() -> None:
    """`venv.py FOLDER LOCK`; exits 1 with one line that says what to do."""
    venv, lock = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        build(venv, lock)
    except subprocess.CalledProcessError:
        sys.exit(
            f"sallyport: {venv.name} could not be set up from {lock.name} (the reason is above). The first run needs "
            "a network connection to a Python package index; run the same command again to go on."
        )
    except OSError as error:
        sys.exit(f"sallyport: {venv} could not be set up: {error.strerror}. Mend that, then run this again.")
    except KeyboardInterrupt:
        sys.exit(130)


main()
