"""The README is true: the demo runs and learns, every command after it works, every Python block runs.

One scratch folder stands for the user's checkout; the commands run there in the order of the page.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from partwise import __version__

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "MAINTENANCE.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BIN = Path(sys.executable).parent


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, environment):
    """A folder with examples/ in it, in which the demo has run; and what the demo printed."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples")
    demo = [sys.executable, "examples/digits/demo.py"]
    done = subprocess.run(demo, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.timeout(1200)
def test_the_demo_learns_to_look_at_the_image(checkout) -> None:
    folder, out = checkout
    last = out.strip().splitlines()[-1]
    match = re.fullmatch(r"held-out accuracy (\d\.\d\d) \(shuffled images (\d\.\d\d)\)", last)
    assert match, last
    assert float(match[1]) >= 0.96
    assert float(match[2]) <= 0.2
    assert (folder / "runs/digits/demo.png").stat().st_size > 50_000
    for word in ("vision_tower", "projector", "language_model", "weights moved by", "answer to another scan"):
        assert word in out


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["README.md", "docs/lineage.md"])
def test_every_console_line_runs(checkout, run_cli, monkeypatch, name) -> None:
    """In one process: the demo runs the commands in processes of their own."""
    folder, _ = checkout
    monkeypatch.chdir(folder)
    lines = [line for block in blocks(ROOT / name, "console") for line in block.splitlines()]
    commands = [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]
    assert len(commands) >= 6
    for program, *arguments in commands:
        assert program == "partwise"
        done = run_cli(*arguments)
        assert done.code == 0, f"{shlex.join(arguments)}\n{done.out}{done.err}"
        if arguments[0] == "chat":
            assert re.fullmatch(r"\d", done.out.strip())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["plots.md", "learning-rate.md"])
def test_every_bash_line_of_these_pages_runs(checkout, run_cli, monkeypatch, name) -> None:
    """Range tests with the fewest steps: what they find is the business of test_find_lr."""
    folder, _ = checkout
    monkeypatch.chdir(folder)
    lines = [line for block in blocks(ROOT / "docs" / name, "bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "partwise"
        fewest = ["--steps", "20"] if arguments[0] == "find-lr" else []
        done = run_cli(*arguments, *fewest)
        assert done.code == 0, f"{line}\n{done.out}{done.err}"


@pytest.mark.timeout(1200)
def test_the_python_block_of_the_readme_runs(checkout, environment) -> None:
    folder, _ = checkout
    for code in blocks(ROOT / "README.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, code + done.stderr
        assert "['vision_tower', 'projector', 'language_model']" in done.stdout


def test_no_other_page_has_console_lines() -> None:
    pages = {page.name for page in PAGES if blocks(page, "console")}
    assert pages == {"README.md", "lineage.md"}, "run them above, too"


def test_commands_named_in_running_text_exist() -> None:
    helped = subprocess.run([BIN / "partwise", "--help"], capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for page in PAGES:
        for command in re.findall(r"`partwise ([a-z-]+)", page.read_text()):
            assert re.search(rf"^\W*{command}\b", helped, re.M), f"{page.name}: partwise {command}"
        for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.M):
            assert target in targets, f"{page.name}: make {target}"


def test_links_between_pages_are_whole() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_pins_cover_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().split()
    }
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[><=]", name)[0].lower() for name in wanted} - {"partwise"}
    assert names <= pinned
