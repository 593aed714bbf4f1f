"""`vtoken schema`: what a pipeline file may say, for editors."""

from __future__ import annotations

import argparse
import json

EXAMPLES = """examples:
  vtoken schema > vtoken.schema.json

Editors that speak yaml-language-server then complete and check a pipeline file that starts with this line:
  # yaml-language-server: $schema=vtoken.schema.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints the JSON Schema of pipeline files, with every option of every installed stage."
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="as everywhere else; the output is JSON in any case")


def run(args: argparse.Namespace) -> int:
    from vtoken.config.schema import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0
