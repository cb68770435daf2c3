"""What the fuzzer's seeds found stays mended, and the fuzzer itself finds what is there (fuzz.py)."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import CORPUS, KINDS, PLANTED, READERS, SEEDS, TIMEOUT_S, Finding, Reader, check, claim, laid, seeds_of

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.parametrize("name", READERS)
def test_every_seed_is_read_or_refused(name: str, tmp_path: Path) -> None:
    seeds = seeds_of(name)
    assert len(seeds) > 1
    reader = READERS[name]
    folder = laid(reader, tmp_path)
    for seed in seeds:
        started = time.monotonic()
        try:
            check(reader, seed.read_bytes(), folder)
        except Exception as error:
            error.add_note(f"seed: {seed}")
            raise
        assert time.monotonic() - started < TIMEOUT_S, seed


def test_a_field_longer_than_python_reads(tmp_path: Path) -> None:
    """Found by hand, and too large for a seed: `csv.Error` is no ValueError."""
    check(READERS["lists"], b'0,"%s"\n' % (b"x" * (1 << 17)), laid(READERS["lists"], tmp_path))


def test_seeds_belong_to_a_reader_and_are_few() -> None:
    assert {path.name for path in SEEDS.iterdir()} <= {*READERS}
    assert sum(path.stat().st_size for path in SEEDS.rglob("*") if path.is_file()) < 300_000


def test_every_file_of_the_corpus_is_a_seed() -> None:
    used = {path for name in READERS for path in seeds_of(name) if path.is_relative_to(CORPUS)}
    assert used == {path for path in CORPUS.rglob("*") if path.is_file()}


def refuses(folder: Path) -> None:
    del folder
    raise KeyError("dog")


def breaks(folder: Path) -> None:
    claim((folder / "a").read_bytes() == b"", "there is nothing in it")


def runs(folder: Path) -> None:
    subprocess.run(["true"], cwd=folder, check=True)


def writes(folder: Path) -> None:
    (folder / "b").write_bytes(b"")


def removes(folder: Path) -> None:
    (folder / "a").unlink()


@pytest.mark.parametrize(
    ("read", "error", "reason"),
    [
        (refuses, KeyError, "dog"),
        (breaks, Finding, "there is nothing in it"),
        (runs, Finding, "does nothing else.*Popen"),
        (writes, Finding, "does nothing else.*open"),
        (removes, Finding, "does nothing else.*remove"),
    ],
)
def test_a_fault_of_each_kind_is_found(
    read: Callable[[Path], None], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    reader = Reader(("a",), read)
    with pytest.raises(error, match=reason):
        check(reader, b"x", laid(reader, tmp_path))


def test_the_planted_reader_has_one_fault(tmp_path: Path) -> None:
    reader = PLANTED["planted"]
    laid(reader, tmp_path)
    for content in (b"", b"cat", b"do", b"dot"):
        check(reader, content, tmp_path)
    with pytest.raises(KeyError, match="dog"):
        check(reader, b"dogs", tmp_path)


def fuzz(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, str(FUZZ), *arguments], {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no build for this machine"
)


@needs_atheris
def test_the_fuzzer_ends_with_0_where_nothing_is_found(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "yolo", "--seconds", "2")
    assert done.returncode == 0, done.stdout
    assert "nothing found" in done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert int(done.stdout.split("yolo")[1].split()[0]) > len(seeds_of("yolo"))


@needs_atheris
def test_the_fuzzer_finds_a_fault_and_tells_it(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "planted", "--seconds", "60")
    assert done.returncode == 1, done.stdout
    assert "KeyError: 'dog'" in done.stdout
    # On a loaded machine libFuzzer has ended without having kept the input.
    for path in re.findall(rf"^{KINDS[77]}: (.+)$", done.stdout, re.MULTILINE):
        assert Path(path).read_bytes().startswith(b"dog")


@needs_atheris
def test_a_reader_that_is_none_is_told(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "yollo")
    assert done.returncode == 2
    assert "no reader yollo; there are images" in done.stderr
