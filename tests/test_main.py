import subprocess
import sys

import pytest

from lightning_automl import __version__
from lightning_automl.__main__ import COMMANDS, main


@pytest.mark.parametrize("arguments", [["--help"], [], ["fti"], ["--version"]])
def test_answers_without_importing_torch(arguments):
    code = f"import sys; from lightning_automl.__main__ import main; main({arguments!r}); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in COMMANDS)


def test_a_wrong_command_is_told_in_one_sentence(capsys):
    assert main(["fti"]) == 2
    assert capsys.readouterr().err == (f"unknown command 'fti'; did you mean 'fit'? known: {', '.join(COMMANDS)}\n")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-automl {__version__}\n"
