"""``python -m gpt2fast``: the command line."""

import sys

from gpt2fast.cli import main

sys.exit(main())
