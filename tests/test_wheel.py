"""The wheel works from any folder, without the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_runs_in_a_clean_environment_from_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dejavu_exp/conf/config.yaml" in names
    assert "dejavu_exp/conf/tagger/vocabulary/scenes.txt" in names
    assert "dejavu_exp/report/templates/base.html" in names
    # A clean environment that sees the libraries of this one, but not the source tree.
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "clean")], check=True, timeout=120)
    python = tmp_path / "clean" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=120
    )
    libraries = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    site = next((tmp_path / "clean").rglob("site-packages"))
    others = tmp_path / "libraries"
    others.mkdir()
    for entry in libraries.iterdir():
        if "dejavu_exp" not in entry.name:
            (others / entry.name).symlink_to(entry)
    (site / "libraries.pth").write_text(f"{others}\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    where = subprocess.run(
        [python, "-c", "import dejavu_exp.config as c; print(c.CONF_DIR)"], cwd=folder, capture_output=True, text=True
    )
    assert str(tmp_path / "clean") in where.stdout, where.stderr
    small = [
        "dataset.classes=2", "dataset.train_per_class=20", "split.target=5", "split.heldout=5", "split.public=10",
        "split.unseen=5", "probe.k=5", "model.recipe.epochs=1", "scoring.resamples=100", "tracking=none",
    ]  # fmt: skip
    done = subprocess.run(
        [python, "-m", "dejavu_exp", "hydra.run.dir=out", *small],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "DEJAVU_CACHE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "report.html").exists()
