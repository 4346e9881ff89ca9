"""`python -m proxy` is the `sallyport` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. `exec` and `doctor` begin without loading the others, which takes longer."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["exec"]:
        from proxy import jail

        return jail.main(words[1:])
    if words[:1] == ["doctor"]:
        from proxy import doctor

        return doctor.main(words[1:])
    from proxy import cli

    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
