"""Do the documents say what is, and do their links lead somewhere?"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def test_the_command_line_reference_is_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "cli_reference.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_documents_name_options_that_exist(page: Path) -> None:
    known = set(re.findall(r"`(--[a-z-]+)`", (ROOT / "docs" / "reference" / "cli.md").read_text()))
    foreign = {
        "--cacert",
        "--cert",
        "--key",
        "--gpu-memory-utilization",
        "--help-vllm",
        "--model",
        "--served-model-name",
    }
    commands = re.findall(
        r"(?:dynamo (?:run|doctor|demo-model)|python -m dynamo\.\w+)[^`\n]*(?:\\\n[^`\n]*)*", page.read_text()
    )
    used = {flag for command in commands for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", command)}
    assert used - known - foreign == set()
