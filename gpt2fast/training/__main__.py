"""``python -m gpt2fast.training``: the train command on its own."""

import argparse
import sys

from gpt2fast.training import add_arguments, run

parser = argparse.ArgumentParser(prog="python -m gpt2fast.training", description=run.__doc__)
add_arguments(parser)
sys.exit(run(parser.parse_args()))
