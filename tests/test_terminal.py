"""What a command ends with: its exit status, one line, and files that are whole."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import warnings

import pytest

from vwt_hf.cli import main
from vwt_hf.terminal import aligned, json_file, markdown, png_file, printable, require_alone, run_command, vwt_option

CLI = [sys.executable, "-W", "ignore", "-m", "vwt_hf.cli"]

SCRIPT = """
import re
import sys
from vwt_hf.cli import main
if __name__ == '__main__':
    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])
    sys.exit(main())
"""
"""What pip installs as `vwt-hf`."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("size is 0"), "size is 0"),
        (FileNotFoundError("x\ndoes not exist"), "x does not exist"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (OverflowError("too large"), "OverflowError: too large"),
        (MemoryError(), "MemoryError:"),
        (KeyError("field"), "KeyError: 'field'"),
        (ValueError("clears the screen \x1b[2J"), r"clears the screen \x1b[2J"),
        (SystemExit("another run"), "another run"),
    ],
)
def test_whatever_goes_wrong_is_status_2_and_one_line(capsys, error, line):
    def work() -> None:
        raise error

    assert run_command("tool", work) == 2
    printed = capsys.readouterr()
    assert printed.err == f"tool: {line}\n" and printed.out == ""


def test_an_interruption_is_status_130_and_what_argparse_raises_goes_on(capsys):
    def work(error: BaseException) -> None:
        raise error

    assert run_command("tool", lambda: work(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"
    with pytest.raises(SystemExit) as end:
        run_command("tool", lambda: work(SystemExit(0)))
    assert end.value.code == 0


def test_a_warning_is_one_line_but_of_how_other_packages_are_written_none(capsys):
    def work() -> None:
        compile("1 is 1", "another_package.py", "eval")  # as at its first import
        warnings.warn("one image is unreadable", stacklevel=1)

    assert run_command("tool", work) == 0
    assert capsys.readouterr().err == "tool: warning: one image is unreadable\n"


def test_what_the_encoding_lacks_is_written_in_other_characters(monkeypatch):
    files = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", files[0])
    monkeypatch.setattr(sys, "stderr", files[1])

    def work() -> None:
        print("17 → 9 × \udce9 語")
        raise ValueError("Δ")

    assert run_command("tool", work) == 2
    assert files[0].buffer.getvalue().split() == [b"17", b"->", b"9", b"\xd7", rb"\udce9", rb"\u8a9e"]
    assert files[1].buffer.getvalue().split() == [b"tool:", b"delta"]
    assert [file.errors for file in files] == ["strict", "strict"]


@pytest.mark.parametrize("arguments", [["--help"], ["show", "--help"]])
def test_a_reader_that_has_gone_is_no_traceback(arguments):
    read, write = os.pipe()
    os.close(read)
    env = dict(os.environ, PYTHONUNBUFFERED="")
    done = subprocess.run([*CLI, *arguments], stdout=write, stderr=subprocess.PIPE, timeout=60, env=env)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["-m", "vwt_hf.cli", *verb] for verb in ([], ["demo"], ["learn"], ["vocab"], ["show"])),
        ["-c", "import sys; from vwt_hf.cli import main; sys.exit(main())"],
        ["vwt-hf"],
    ],
)
def test_help_imports_no_torch_and_can_be_printed_in_any_encoding(arguments, tmp_path):
    (tmp_path / "vwt-hf").write_text(SCRIPT)
    env = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-X", "importtime", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, env=env, cwd=tmp_path)
    assert done.returncode == 0 and b"usage: vwt-hf" in done.stdout
    imported = {line.rpartition(b"|")[2].strip() for line in done.stderr.splitlines()}
    assert b"vwt_hf.cli.demo" in imported and not imported & {b"torch", b"transformers", b"numpy"}


@pytest.mark.newest
def test_a_program_that_uses_the_commands_function_is_registered():
    code = "from vwt_hf.cli import main; from transformers import AutoConfig as A; print(A.for_model('vit', vwt=1).vwt)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_names_are_one_line_without_control_characters_or_bytes_that_are_no_text():
    assert printable("café → 9.png") == "café → 9.png"
    assert printable(os.fsdecode(b"a\xe9\n\x1b[2J\xe2\x80\xae.png")) == r"a\udce9\n\x1b[2J\u202e.png"


def test_aligned_cells_stand_below_each_other():
    assert aligned([("a", "1"), ("bcd", "22")]) == "a     1\nbcd   22"
    assert aligned([("a", "1"), ("bcd", "22")], right=True) == "  a    1\nbcd   22"


def test_a_table_has_the_columns_that_have_values_and_cells_stay_cells():
    rows = [{"J/image": None, "KL": None, "name": "a|b\n"}, {"J/image": None, "KL": "1", "name": 2}]
    assert markdown(rows) == "| KL | name |\n|---|---|\n| n/a | a\\|b\\n |\n| 1 | 2 |\n"


@pytest.mark.parametrize("text", ["'{keep_ratio:", "{method:", "'me/my-words'"])  # of cmd.exe and PowerShell 5
def test_a_setting_whose_quotes_a_shell_took_out_is_answered_by_how_to_write_it(text):
    said = r"""write "{\"keep_ratio\": 0.5}" in cmd.exe, and '{\"keep_ratio\": 0.5}' in PowerShell before 7.3"""
    with pytest.raises(argparse.ArgumentTypeError, match=f"is no JSON; expected .* {re.escape(said)}$"):
        vwt_option(text)
    for other in ('{"keep_ratio": 0.5', "gradual"):  # which has its quotes, or needs none
        with pytest.raises(argparse.ArgumentTypeError, match=r"is no JSON; expected (?!.*PowerShell)"):
            vwt_option(other)


def test_a_picture_has_a_name_of_one():
    assert [png_file(name) for name in ("a.png", "b/c.PNG", "/dev/stdout")] == ["a.png", "b/c.PNG", "/dev/stdout"]
    for name in ("a.jpg", "front.pdf"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is to be a PNG picture; expected a name that ends in"):
            png_file(name)


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    names = {"text": b"mine", "picture.png": b"\x89PNG\r\n", "rows.json": b" [1]", "row.json": b"{}", "empty.png": b""}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)

    def taken(of) -> set[str]:
        found = set()
        for name in [*names, "new"]:
            try:
                assert str(of(str(tmp_path / name))) == str(tmp_path / name)
                found.add(name)
            except argparse.ArgumentTypeError as error:
                assert "is there and is no" in str(error) or "is to be a PNG picture" in str(error)
        return found

    assert taken(png_file) == {"picture.png", "empty.png", "new"}
    assert taken(json_file) == {"rows.json", "row.json", "empty.png", "new"}


@pytest.mark.parametrize("verb", ["calibrate model images --tokens 9", "evaluate model --dataset images"])
def test_figures_take_the_place_of_no_photograph(verb, tmp_path, capsys):
    photograph = tmp_path / "a.png"
    photograph.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--json", str(photograph)])
    assert end.value.code == 2
    reason = "a.png' is there and is no file of JSON, and would be replaced by one; name another file, or delete it"
    assert reason in capsys.readouterr().err and photograph.read_bytes() == b"\x89PNG\r\n"


@pytest.mark.parametrize(
    "verb", ["calibrate nowhere nowhere --tokens 9", "demo --images no", "show no --vwt true", "vocab nowhere"]
)
def test_a_command_that_shares_no_work_is_refused_in_several_processes(verb, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_alone()  # a cluster sets it for each shell of a job
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(verb.split()) == 2
    error = capsys.readouterr().err
    assert "this was started in 2 processes (WORLD_SIZE), each of which would do the whole work; expected one" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    require_alone()


def test_an_interrupt_that_an_import_hides_is_one(capsys):
    def work():
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise ImportError("Could not import module") from error

    assert run_command("vwt-hf", work) == 130
    assert capsys.readouterr().err == "vwt-hf: interrupted\n"
