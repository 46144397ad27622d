"""``python -m fxquant.cli``, where the command itself is not on the path."""

import sys

from fxquant.cli.app import main

sys.exit(main())
