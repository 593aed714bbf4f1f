"""`vtoken schema`: what a pipeline file may say, for editors."""

from __future__ import annotations

import json

from vtoken.evals.shared.options import Options, as_json

DESCRIPTION = "Prints the JSON Schema of pipeline files, with every option of every installed stage."
EXAMPLES = """examples:
  vtoken schema > vtoken.schema.json

Editors that speak yaml-language-server then complete and check a pipeline file that starts with this line:
  # yaml-language-server: $schema=vtoken.schema.json
"""


class Settings(Options):
    """Nothing to choose."""

    in_json: bool = as_json("as everywhere else; the output is JSON in any case")


def run(asked: Settings) -> None:
    from vtoken.config.schema import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
