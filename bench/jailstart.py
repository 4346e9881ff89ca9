"""How long a jail takes to begin: `python -m bench.jailstart`. Prints medians; needs bubblewrap."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 30
SALLYPORT = [sys.executable, "-P", "-m", "proxy"]


def median(words: list[str], folder: Path) -> float:
    """Milliseconds of a run."""
    took = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        subprocess.run(words, cwd=folder, check=True)
        took.append(time.perf_counter() - begun)
    return statistics.median(took) * 1000


def main() -> None:
    """A proxy in a folder of its own, then the same command without and within a jail."""
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as name:
        home, work = Path(name, "home"), Path(name, "work")
        (home / "rules").mkdir(parents=True)
        work.mkdir()
        (home / "rules" / "none.yaml").write_text("version: 1\nrules: []\n")
        settings = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
        proxy = subprocess.Popen(
            [*SALLYPORT, "run", *settings], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            assert proxy.stdout
            proxy.stdout.readline()
            state = ["--state", str(home / ".sallyport")]
            plain = median(["true"], work)
            jail = median([*SALLYPORT, "exec", *state, "--agent", "bench-1", "--ttl", "1h", "--", "true"], work)
            python = median([sys.executable, "-c", "pass"], work)
        finally:
            proxy.terminate()
            proxy.wait()
    print(f"true          {plain:6.1f} ms\nin a jail     {jail:6.1f} ms\nit adds       {jail - plain:6.1f} ms")
    print(f"of which {python:.1f} ms are Python's own start; {os.getloadavg()[0]:.1f} processes were running")


if __name__ == "__main__":
    main()
