"""What the commands teach: every help and every job has what goes in, what comes out, and an example that is taken."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from rlfseg import cli
from rlfseg.cli import COMMANDS
from rlfseg.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_the_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)  # examples name settings that lie there


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_and_its_example_is_taken(name: str) -> None:
    command = COMMANDS[name]
    said = "".join(cli.parser(name).format_help().split())  # lines are broken anywhere
    for part in (f"In: {command.goes_in}", f"Out: {command.comes_out}", f"Example: {command.example}"):
        assert "".join(part.split()) in said
    words = shlex.split(command.example)
    assert words[:2] == ["rlfseg", name]
    settings = cli.parse(name, words[2:])
    assert type(settings) is command.settings


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if "out" in c.settings.__dataclass_fields__])
def test_a_url_is_no_folder_to_write_to(name: str) -> None:
    words = shlex.split(COMMANDS[name].example)[2:]
    with pytest.raises(ConfigError, match=r"^out: 's3://bucket/x': a URL; give a local or mounted folder$"):
        cli.parse(name, [*words, "--out=s3://bucket/x"])


def test_checkpoints_and_pictures_may_be_at_a_url() -> None:
    assert cli.parse("train", ["--out=a", "--storage=s3://bucket/x"]).storage == "s3://bucket/x"
    assert cli.parse("predict", ["--out=a", "--images=s3://bucket/x"]).images == "s3://bucket/x"


def test_every_command_is_a_job_and_every_job_a_command(root: Path) -> None:
    assert {p.stem for p in (root / "jobs").glob("[!_]*.py")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_says_what_its_command_says(root: Path, name: str) -> None:
    command, text = COMMANDS[name], (root / "jobs" / f"{name}.py").read_text()
    assert f'cli.main("{name}")' in text
    said = " ".join(str(ast.get_docstring(ast.parse(text))).split())
    assert f"In: {command.goes_in}." in said
    assert f"Out: {command.comes_out}." in said
    line = re.search(rf"python -m jobs\.{name}((?: .*)?)$", said.replace("\\ ", ""))
    assert line, "no line to submit it by"
    words = shlex.split(line[1])
    settings = cli.parse(name, words)
    if name != "serve":  # which is no job; a job's own folder goes with it
        assert getattr(settings, "out", "/").startswith("/")
        assert [word for word in words if re.search(r"^[^/:]+/|\.(jpg|h5|pth)$", word) and word[0] != "/"] == []
    if name == "submit":
        assert cli.parse(settings.command[0], list(settings.command[1:])).phrases  # else `predict` would refuse it


def test_what_the_example_of_submit_submits_has_something_to_train_on() -> None:
    name, *flags = cli.parse("submit", shlex.split(COMMANDS["submit"].example)[2:]).command
    assert cli.parse(name, flags).latents


def test_a_wrong_value_is_named_by_its_whole_setting(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("optimizer: {lr: -3}\n")
    for wrong in (["--optimizer.lr=-3"], ["--optimizer={lr: -3}"], ["--config", str(file)]):
        with pytest.raises(ConfigError, match=r"^optimizer\.lr: -3\.0: input should be .* 0; seed: -1: "):
            cli.parse("train", ["--out=a", "--seed=-1", *wrong])


def test_an_unknown_setting_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main("train", ["--out", "a", "--no_such_setting", "1"])
    assert stopped.value.code == 2
    assert "no_such_setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("predict", ["--images=a", "--phrases=dog", "--out=b"], r"phrases.*a list is written '\[dog, red car\]'$"),
        ("submit", ["train", "--latents", "x"], "the command and its settings come after `--`$"),
    ],
)
def test_what_a_parser_would_leave_a_user_alone_with(
    name: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(name, words)
    assert ended.value.code == 2
    assert re.search(told, capsys.readouterr().err.strip(), re.DOTALL)


def test_the_bench_measures_all_that_is_not_named() -> None:
    assert (list(cli.parse("bench", []).what), list(cli.parse("bench", ["sd"]).what)) == ([], ["sd"])
