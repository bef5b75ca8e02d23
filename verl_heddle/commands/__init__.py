"""One module per `verl-heddle` command: `add_parser(subparsers)` declares it, `run(args)` executes it and returns the exit code.

Declaring a command imports nothing but argparse, so `--help` is instant; `run` imports the code that does the work.
"""
