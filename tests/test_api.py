"""The Python API: the same figures as the command line's, in one process, and errors instead of exits."""

import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from mypy import api as mypy_api
from PIL import Image
from polars.testing import assert_frame_equal
from properties import examples
from torch import Tensor, nn

import dejavu_exp
from dejavu_exp import api, cells, config, ranks
from dejavu_exp.api import Measurement, measure
from dejavu_exp.encoders import TimmEncoder
from dejavu_exp.encoders.in_memory import fingerprint
from dejavu_exp.errors import ConfigError

ARCH = "test_resnet.r160_in1k"
QUICK = (*(value for value in SMALL if not value.startswith("model.")), "utility=none", "report=none")
RANDOM = ("model=efficientnet_lite0", f"model.arch={ARCH}", "model.weights=random")
HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path_factory.getbasetemp() / "api_cache"))
    yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """The network of `RANDOM`, and its transform."""
    loaded = TimmEncoder(ARCH, weights="random").load()
    return loaded.module, loaded.transform


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """A measurement of an encoder by its name."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DEJAVU_CACHE", str(tmp_path_factory.getbasetemp() / "api_cache"))
    chosen = {"reference": ["naive_bayes", "class_prior"], "gate.max_gap": 1.0}
    found = measure(*QUICK, *RANDOM, out=tmp_path_factory.mktemp("named"), settings=chosen)
    patch.undo()
    return found


def test_the_import_is_light_and_the_names_are_few() -> None:
    code = (
        "import sys, dejavu_exp\n"
        "print([name for name in ('torch', 'polars', 'hydra', 'numpy') if name in sys.modules])\n"
        "print([name for name in dejavu_exp.__all__ if not getattr(dejavu_exp, name).__doc__])\n"
        "print('torch' in sys.modules, set(dejavu_exp.__all__) <= set(dir(dejavu_exp)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]", "False True"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dejavu_exp.nothing


def test_the_result_is_what_the_files_say(named: Measurement) -> None:
    assert {"scores.parquet", "figures.json", "report.html", "config.yaml", api.LOG} <= {
        path.name for path in named.folder.iterdir()
    }
    found = named.figures["references"]["naive_bayes"]
    widest = found["roles"]["target"]["top1"]["100"]["gap"]
    assert named.reference == "naive_bayes"
    assert named.gap is not None
    assert named.corrected_gap is not None
    assert named.gap.as_dict() == widest
    assert named.corrected_gap.as_dict() == found["corrected_gap"]["top1"]["100"]
    assert named.scores["reference"].unique().sort().to_list() == ["class_prior", "naive_bayes"]
    assert named.verdict == named.figures["verdict"]
    # Random weights pass no gate, whatever the gap.
    assert named.passed is False
    assert "corrected gap" in (named.folder / api.LOG).read_text()


def test_the_folder_says_how_it_was_made_and_counts_as_finished(named: Measurement) -> None:
    status = cells.read(named.folder)
    assert status is not None
    assert status.state == cells.State.FINISHED
    assert f"model.arch={ARCH}" in status.repeat()


def test_an_encoder_in_memory_gives_the_figures_that_its_name_gives(
    named: Measurement, network: tuple[nn.Module, Callable[[Image.Image], Tensor]], tmp_path: Path
) -> None:
    module, transform = network
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    # Hydra is in use already, and stays as it was.
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.2"):
        held = measure(
            *QUICK,
            out=tmp_path,
            encoder=module,
            transform=transform,
            settings={"reference": ["naive_bayes", "class_prior"]},
        )
        assert compose("config", ["probe.k=7"]).probe.k == 7
    assert_frame_equal(held.scores, named.scores)
    assert held.passed is None
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert held.figures["encoder"]["weights"] == "in memory"
    assert set(held.figures["run"]["config"]["model"]) == {"in_memory", "weights_hash", "transform"}
    assert not (tmp_path / cells.STATUS).exists()


def test_without_unseen_rows_there_is_no_corrected_gap(tmp_path: Path) -> None:
    found = measure(*QUICK, *RANDOM, "reference=class_prior", "split.unseen=0", out=tmp_path)
    assert found.corrected_gap is None
    assert found.gap is not None
    assert not math.isnan(found.gap.value)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)[:, None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["+probe.kk=3"]}, r"probe\.kk is not a key of the configuration: did you mean probe\.k\?"),
        ({"overrides": ["nothing=1"]}, r"nothing"),
        ({"settings": {"probe.k": 0}}, r"probe\.k=0: must be at least 1"),
        ({"settings": {"probe.k": {1, 2}}}, r"settings: .*is a set; expected"),
        ({"overrides": ["run.plan=true"]}, r"run\.plan=true measures nothing"),
        ({"transform": to_tensor}, r"transform is given without encoder"),
        ({"encoder": nn.Flatten()}, r"encoder needs transform="),
        ({"encoder": "resnet", "transform": to_tensor}, r"encoder=str: must be a torch\.nn\.Module"),
        ({"encoder": nn.Flatten(), "transform": to_tensor, "overrides": ["model=clip_vitb32"]}, r"given twice"),
        ({"encoder": nn.Flatten(), "transform": to_tensor, "settings": {"model.arch": "x"}}, r"given twice"),
        ({"encoder": nn.Flatten(), "transform": str}, r"encoder: its transform gives str"),
        ({"encoder": nn.Flatten(0), "transform": to_tensor}, r"encoder: for a batch of 2 the network gives shape"),
        (
            {"encoder": nn.Flatten(), "transform": to_tensor, "overrides": ["trainer.devices=2"]},
            r"trainer\.devices=2: an encoder that is only in memory",
        ),
    ],
)
def test_what_cannot_work_is_an_error_that_names_it(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        measure(*arguments.pop("overrides", ()), out=out, **arguments)
    assert not out.exists()


def test_one_of_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "place", lambda: ranks.Place(rank=1, size=2))
    with pytest.raises(ConfigError, match="torchrun or srun has started several"):
        measure(*QUICK, out=tmp_path)


def test_a_failure_is_written_down(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"probe\.k=5000 is more than the bank holds"):
        measure(*QUICK, *RANDOM, "probe.k=5000", out=tmp_path)
    status = cells.read(tmp_path)
    assert status is not None
    assert status.state == cells.State.FAILED
    assert "probe.k=5000" in str(status.error)


VALUES: st.SearchStrategy[object] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**12), 10**12),
        st.floats(allow_nan=False, allow_infinity=False),
        # A text of spaces alone, and line ends, are nothing that a path or a name has.
        st.text(st.characters(blacklist_categories=("Cc", "Cs"))).filter(lambda text: "${" not in text),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@examples(100)
@given(VALUES)
def test_a_value_of_python_is_the_same_value_on_the_command_line(value: object) -> None:
    assert OverridesParser.create().parse_override(f"x={api._spelled(value)}").value() == value


def test_paths_and_mappings_are_spelled_too() -> None:
    spelled = api._spelled({"a": Path("/my data/it's"), "b": (1, None)})
    assert OverridesParser.create().parse_override(f"x={spelled}").value() == {"a": "/my data/it's", "b": [1, None]}


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.layer = nn.Linear(2, 2)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * images.mean((2, 3))


def test_a_fingerprint_is_of_tensors_state_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fingerprint(Scaled(1.0)) == fingerprint(Scaled(1.0)) != fingerprint(Scaled(2.0))
    other = Scaled(1.0)
    with torch.no_grad():
        other.layer.weight[0, 0] = 2
    assert fingerprint(other) != fingerprint(Scaled(1.0))

    def with_helper(code: str) -> str:
        (tmp_path / "a_helper.py").write_text(code)
        (tmp_path / "a_transform.py").write_text("import a_helper\ndef show(image):\n    return a_helper.show(image)\n")
        for name in ("a_helper", "a_transform"):
            sys.modules.pop(name, None)
        __import__("a_transform")
        return fingerprint(sys.modules["a_transform"].show)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    first = with_helper("def show(image):\n    return 1\n")
    assert with_helper("def show(image):\n    return 1\n") == first
    # The module of the transform is the same, and what it uses is not.
    assert with_helper("def show(image):\n    return 1 + 1\n") != first


def test_what_cannot_be_read_to_the_last_is_never_taken_from_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    typed = types.ModuleType("typed_in")
    exec("def show(image):\n    return image\n", typed.__dict__)
    sys.modules["typed_in"] = typed
    for value in (typed.show, lambda image: image):
        assert fingerprint(value) != fingerprint(value)
    del sys.modules["typed_in"]
    assert "nothing of it is taken from the cache" in caplog.text


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = "import test_api; print(test_api.fingerprint(test_api.Scaled(3.0)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": HERE, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == fingerprint(Scaled(3.0)), done.stderr


SCRIPT = """
from pathlib import Path

import dejavu_exp

found = dejavu_exp.measure("reference=naive_bayes", out=Path("out"), settings={"probe.k": 5})
gap: dejavu_exp.Estimate | None = found.corrected_gap
verdict: str = found.verdict
passed: bool | None = found.passed
try:
    dejavu_exp.measure("reference=naive_bayes")
except dejavu_exp.ConfigError as error:
    number: int = found.folder
"""

# What a user's checker reads of the package; torch and the like are left out, for they take a minute.
CHECKER = """
[mypy]
strict = True
follow_imports = skip
[mypy-dejavu_exp,dejavu_exp.api,dejavu_exp.tables,dejavu_exp.errors]
follow_imports = normal
"""


def test_a_script_is_checked_against_the_types_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(CHECKER)
    monkeypatch.chdir(tmp_path)
    said, errors, _ = mypy_api.run(["--config-file", "mypy.ini", "--cache-dir", "cache", "script.py"])
    assert not errors
    assert [line for line in said.splitlines() if "error:" in line] == [
        'script.py:11: error: Missing named argument "out" for "measure"  [call-arg]',
        'script.py:13: error: Incompatible types in assignment (expression has type "Path", variable has type "int")  '
        "[assignment]",
    ]
