"""One module per command of `verl-heddle`: `add_parser(subparsers)` declares it, `run(args)` answers with an exit code.

Declaring imports nothing but argparse, so that `--help` is instant; `run` imports the room that knows.
"""
