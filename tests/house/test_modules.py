"""The shape of the source: short modules, no banned habits."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 400
SOURCES = sorted(
    p
    for pattern in ("src/**/*.py", "src/**/*.cpp", "src/**/*.h", "benchmarks/**/*.py", "examples/*.py", "tests/**/*.py")
    for p in ROOT.glob(pattern)
)

BANNED = {
    "work left undone": r"\b(TODO|FIXME|XXX|HACK)\b",
    "a path of one machine": r"(?<![\w.:/~-])/(work|root|home|Users)/",
    "pickle, which runs code when read": r"^\s*(import|from) (pickle|dill|cloudpickle)\b|torch\.(load|save)\(",
    "an error swallowed": r"except[^\n]*:\s*(\n\s*)?pass\b",
    "a global seed": r"torch\.(manual_seed|seed)\(",
    "a host of a package registry": "python" "hosted|" r"py" r"pi\.org/simple",
}
USERS_MAY = {"a global seed"}  # the suite seeds other people's code, an example is a program of its own


def test_no_module_is_longer_than_the_limit():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text("utf-8").splitlines())) > LIMIT}
    assert not long


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        return SOURCES
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / n for n in names if n and (ROOT / n).is_file() and (ROOT / n) != Path(__file__)]


@pytest.mark.parametrize("habit", BANNED)
def test_no_file_has(habit):
    pattern = re.compile(BANNED[habit], re.MULTILINE)
    found = []
    for path in _tracked():
        user = path.relative_to(ROOT).parts[0] in {"tests", "examples"}
        if path.suffix not in {".py", ".cpp", ".h", ".md", ".toml", ".yml", ".yaml", ".txt", ""}:
            continue
        if user and habit in USERS_MAY:
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, m.start()) + 1}" for m in pattern.finditer(text)]
    assert not found


def test_the_banned_patterns_find_what_they_ban():
    guilty = {
        "work left undone": "x = 1  # TO" + "DO: y",
        "a path of one machine": 'open("/ho' + 'me/me/x")',
        "pickle, which runs code when read": "import pic" + "kle",
        "an error swallowed": "except ValueError:\n        pa" + "ss",
        "a global seed": "torch.manual_" + "seed(0)",
        "a host of a package registry": "files.python" + "hosted.org",
    }
    assert guilty.keys() == BANNED.keys()
    for habit, text in guilty.items():
        assert re.search(BANNED[habit], text, re.MULTILINE), habit
