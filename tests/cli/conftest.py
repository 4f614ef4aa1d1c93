"""Running the command line in this process."""

from pathlib import Path

import pytest

from icecache.cli.main import main
from tests.cli.running import Cli, Result


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run ``icecache`` with arguments; returns exit code, stdout and stderr."""

    def run(*args: str | Path) -> Result:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["icecache", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """A text of about 600 tokens."""
    lines = [f"Day {day}: the wind came from the north and we mended boots." for day in range(40)]
    path = tmp_path / "log.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
