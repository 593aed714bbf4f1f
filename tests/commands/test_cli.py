"""The command line: quick to start, one line per error, JSON that is nothing but JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from vtoken import __version__
from vtoken.cli import COMMANDS, main
from vtoken.commands import list as list_command
from vtoken.errors import VtokenError

RUN = [sys.executable, "-c", "import sys; from vtoken.cli import main; sys.exit(main())"]


def exits(argv: list[str]) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_starting_imports_nothing_heavy(flag: str) -> None:
    code = (
        "import sys, vtoken.cli\n"
        f"try: vtoken.cli.main([{flag!r}])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'pydantic', 'transformers', 'rich', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(["--version"]) == 0
    assert capsys.readouterr().out == f"vtoken {__version__}\n"


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits([]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out and all(f"    {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_shows_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits([name, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "examples:" in help_text and f"  vtoken {name}" in help_text.partition("examples:")[2]
    assert "--json" in help_text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lst"], "unknown command 'lst', did you mean 'list'?"),
        (["list", "--jsn", "--nope"], "unrecognized arguments: --jsn --nope"),
        (["list", "--json", "--markdown"], "not allowed with argument --json (see `vtoken list --help`)"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's own way out
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("vtoken: error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [VtokenError("a\n  b"), FileNotFoundError(2, "gone", "a b")])
def test_errors_are_one_line(error: Exception, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(settings: Any) -> None:
        raise error

    monkeypatch.setattr(list_command, "run", fail)
    assert main(["list"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"vtoken: error: {' '.join(str(error).split())}\n"


def test_ctrl_c_and_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(list_command, "run", interrupt)
    assert main(["list"]) == 130

    def bug(settings: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(list_command, "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen([*RUN, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_schema_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["title"] == "vtoken pipeline"
    assert main(["schema", "--json"]) == 0
    assert capsys.readouterr().out == out


def test_options_may_stand_between_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    accounts = []
    for words in (["tiny-llava", "uniform:64", "--images", "2"], ["tiny-llava", "--images", "2", "uniform:64"]):
        assert main(["flops", *words, "--json"]) == 0
        accounts.append(json.loads(capsys.readouterr().out))
    assert accounts[0] == accounts[1] and len(accounts[0]["accounts"]) == 2
