"""`python -m proxy` is the `sallyport` command."""

import sys

from proxy.cli import main

sys.exit(main())
