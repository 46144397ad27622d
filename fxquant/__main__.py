"""`python -m fxquant` is the command `fxquant`."""

from fxquant.cli import main

raise SystemExit(main())
