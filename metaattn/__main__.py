"""The command ``python -m metaattn``, see :mod:`metaattn.cli`."""

import sys

from .cli import main

sys.exit(main())
