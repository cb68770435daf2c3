"""The documentation: it builds without a warning, its links end somewhere, and its commands and keys exist."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

import dejavu_exp
from dejavu_exp import compare, config

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"
DOCUMENTS = sorted({ROOT / "README.md", ROOT / "launchers" / "README.md", *(ROOT / "docs").rglob("*.md")})
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAMS = ("python", "make", "pip", "wandb", "git")
"""What a command starts with, apart from scripts of this repository and a leading `NAME=value`."""

NOT_LOOKED_AT = {
    "wandb login": "needs an account at W&B",
    "wandb sync FOLDER": "needs an account at W&B",
}
"""Commands of which no part is checked here."""

NOT_RUN = {
    "dataset=imagenet": "needs ImageNet; tests/test_datasets.py reads a small folder of its form",
    "dataset=tiny_imagenet": "needs the archive; tests/test_real_data.py measures it where it is at hand",
    "experiment=replicate": "as dataset=tiny_imagenet",
    "experiment=coco": "needs COCO; tests/test_object_pipeline.py reads a small folder of its form",
    "experiment=flickr8k": "as experiment=coco",
    "dataset=manifest": "a file of the reader's; tests/test_pipeline.py measures one",
    "hydra/launcher=slurm": "needs SLURM; tests/test_slurm.py runs sweeps where one answers",
    "model=clip_": "fetches weights, or trains for minutes; tests/test_encoders.py loads such files",
    "model=torchscript": "a file of the reader's; the block of README.md is run as it stands",
    "model=huggingface": "as model=torchscript",
    "model=callable": "as model=torchscript",
    "model=trained": "trains for minutes; tests/test_ssl.py trains small networks with every recipe",
    "model.roles=": "trains for minutes; tests/test_acceptance.py runs both",
    "experiment=": "trains for minutes; tests/test_config.py builds every cell, tests/test_acceptance*.py run some",
    "reference=[two_model": "trains three networks; tests/test_trained_references.py does",
    "tracking.project=": "needs an account at W&B; tests/test_tracking.py writes and reads the records",
    "gate.max_gap=": "as the command without it, which tests/conftest.py runs whole; tests/test_gate.py has its status",
}
"""By a setting of a command of the main module: why the command is only composed and built here."""


RUN = {
    "python -m dejavu_exp": "tests/conftest.py, default_run",
    "python -m dejavu_exp --help": "tests/test_config.py",
    "python -m dejavu_exp run.plan=true": "tests/test_preflight.py",
}
"""Commands of the main module that tests run as they stand, and where."""


@dataclass(frozen=True)
class Command:
    """A command of a document, as words."""

    document: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


def load(path: Path) -> ModuleType:
    """A script of docs/site as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


reference = load(SITE / "reference.py")


def blocks(text: str) -> Iterator[tuple[bool, str]]:
    """Fenced blocks of shell, then indented blocks and inline code; True where every line must be a command."""
    fenced = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    for found in fenced.finditer(text):
        if found[2] in ("bash", "sh", "shell"):
            yield True, found[3]
    rest = fenced.sub("", text)
    for found in re.finditer(r"(?:^ {4,}\S.*\n)+", rest, re.MULTILINE):
        yield False, found[0]
    for found in re.finditer(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", rest):
        if " " in found[1]:
            yield False, " ".join(found[1].split())


def lines_of(block: str) -> Iterator[str]:
    """The lines of a block, those that go on joined, and variables that the block sets put in."""
    waiting, variables = "", {}
    for line in block.splitlines():
        waiting = f"{waiting} {line.strip()}".strip()
        if waiting.endswith("\\"):
            waiting = waiting[:-1].rstrip()
            continue
        if waiting.count('"') % 2:
            continue
        assigned = re.fullmatch(r"(\w+)=\"([^\"]*)\"", waiting)
        if assigned:
            variables[assigned[1]] = assigned[2]
        elif waiting:
            for name, value in variables.items():
                waiting = waiting.replace(f"${name}", value)
            yield waiting
        waiting = ""


def is_command(words: list[str]) -> bool:
    """True for what is meant to be typed: a program and what it is told, or a script of this repository."""
    if not words:
        return False
    return (words[0] in PROGRAMS and len(words) > 1) or words[0].startswith("launchers/") or words[0] == "."


def commands_in(document: Path) -> Iterator[Command]:
    """Every command of a document."""
    name = document.relative_to(ROOT).as_posix()
    for is_shell, block in blocks(document.read_text()):
        for line in lines_of(block):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                words = []
            words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))
            if is_command(words):
                yield Command(name, tuple(words))
            else:
                assert not is_shell, f"{name}: no command that this test knows: {line}"


COMMANDS = list({command.words: command for document in DOCUMENTS for command in commands_in(document)}.values())
MEASURING = [command for command in COMMANDS if command.words[:3] == ("python", "-m", "dejavu_exp")]


def overrides_of(words: tuple[str, ...]) -> list[list[str]]:
    """The settings of a command line of Hydra: one list, or of a sweep as many as its longest row of values needs."""
    settings = [word for word in words if word not in ("-m", "--multirun")]
    parsed = [OverridesParser.create().parse_override(text) for text in settings]
    values = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [text]
        for one, text in zip(parsed, settings, strict=True)
    ]
    return [[row[min(place, len(row) - 1)] for row in values] for place in range(max(map(len, values), default=1))]


def check_settings(words: tuple[str, ...]) -> None:
    """Compose and build what a command line of Hydra sets; nothing is read and nothing is run."""
    if {"--help", "--cfg"} & set(words):
        return
    for overrides in overrides_of(words):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
            config.build(config.resolve(compose("config", overrides)))


class Parsed(Exception):  # noqa: N818 - no error: how a parser's answer is had without what follows it
    """What a parser made of a command line."""


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsers raise what they have read, so that nothing of the command is run."""
    inside: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            given = args[0] if args and args[0] is not None else sys.argv[1:]
            if inside or list(given)[-1:] != sys.argv[-1:]:  # one inside another, or of the first words only
                return original(self, *args, **kwargs)
            inside.append(name)
            found = original(self, *args, **kwargs)
            raise Parsed(*found if isinstance(found, tuple) else (found, []))

        return parse

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, wrapped(name))


def check_module(name: str, words: tuple[str, ...]) -> None:
    """A command of this repository that is not the main one: its parser takes the words."""
    module = importlib.import_module(reference.module_of(name))
    if not words:
        return  # the text only names it
    if not hasattr(module, "argparse"):
        check_settings(words)
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [name, *words])
        with pytest.raises(Parsed) as read:
            module.main()
    asked, rest = read.value.args
    settings = [*rest, *getattr(asked, "overrides", [])]
    if settings:
        check_settings(tuple(settings))


def check_make(words: tuple[str, ...]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} \?= " if is_variable else rf"^{name}:.*##", text, re.MULTILINE), word


def check_pip(words: tuple[str, ...]) -> None:
    assert words[0] == "install"
    extras = PROJECT["project"]["optional-dependencies"]
    required = [*PROJECT["project"]["dependencies"], *itertools.chain(*extras.values())]
    known = {re.split(r"[\[<>=; ]", one)[0] for one in required}
    for word in words[1:]:
        own = re.fullmatch(r"(?:\.|dejavu_exp)\[([\w,]+)\]", word)
        if own:
            assert set(own[1].split(",")) <= set(extras), word
        else:
            assert word == "-e" or word in known, word


def check_python(words: tuple[str, ...]) -> None:
    match words:
        case ("-m", "dejavu_exp", *settings):
            check_settings(tuple(settings))
        case ("-m", "pytest", *rest):
            assert all((ROOT / word.split("::")[0]).exists() for word in rest if word.startswith("tests"))
        case ("-m", name, *rest):
            check_module(name, tuple(rest))
        case (script, *_):
            assert (ROOT / script).is_file(), script


def check_script(words: tuple[str, ...]) -> None:
    assert (ROOT / words[0]).stat().st_mode & 0o111, words[0]
    if words[0].endswith("local_multi_gpu.sh"):
        check_settings(words[1:])


def check_other(words: tuple[str, ...]) -> None:
    assert words == (".", ".venv/bin/activate") or " ".join(words) in NOT_LOOKED_AT


CHECKS = {"python": check_python, "make": check_make, "pip": check_pip}
"""What looks at the words behind a program's name."""


def check(words: tuple[str, ...]) -> None:
    """A command, as far as it can be looked at without being run."""
    if words[0].startswith("launchers/"):
        check_script(words)
    elif words[0] in CHECKS:
        CHECKS[words[0]](words[1:])
    else:
        check_other(words)


@pytest.mark.usefixtures("parsing")
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_one(command: Command) -> None:
    check(command.words)


@pytest.mark.usefixtures("parsing")
@pytest.mark.parametrize(
    "line",
    [
        "python -m dejavu_exp model=clip_vitl15",
        "python -m dejavu_exp probe.kk=3",
        "python -m dejavu_exp -m probe.k=3,many",
        "python -m dejavu_exp.compare --nothing DIR",
        "python -m dejavu_exp.sensitivity probe.kk=3",
        "python -m dejavu_exp.nothing",
        "python docs/site/nothing.py",
        "make nothing",
        "make run NOTHING=1",
        "pip install -e '.[nothing]'",
        "pip install nothing-of-ours",
        "launchers/nothing.sh",
        "wandb nothing",
    ],
)
def test_a_command_that_is_none_is_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(tuple(shlex.split(line)))


def reasons(command: Command) -> list[str]:
    """Why a command of the main module is not run here."""
    return [key for key in NOT_RUN if any(word.startswith(key) for word in command.words)]


def test_every_measurement_that_is_not_run_has_a_reason() -> None:
    without = {str(command) for command in MEASURING if not reasons(command)}
    assert without <= set(RUN), without - set(RUN)
    unused = set(NOT_RUN) - {key for command in MEASURING for key in reasons(command)}
    assert not unused


KNOWN = reference.known_keys()
FILES = [file for group in reference.GROUPS for file in reference.files(group)]
FREE = ("hydra", "arch_args", "arch_config", "arguments")
"""Keys below one of these are not ours: Hydra's own, and arguments that are passed on."""


def is_known(key: str, value: str | None = None) -> bool:
    """True where the configuration has the key; a group's value must be one of its files, or null."""
    group, _, _ = key.removeprefix("+").partition("@")
    if group in reference.GROUPS and value is not None:
        names = {one.name for one in reference.files(group)} | {"null", ""}
        return set(re.split(r"[\[\],|]+", value.strip("[]"))) <= names
    return group in KNOWN or bool(set(FREE) & set(group.split(".")[:-1]))


@pytest.mark.parametrize("file", [*FILES, reference.top()], ids=lambda file: file.chosen_by)
def test_the_commands_at_the_head_of_a_file_name_keys_that_exist(file: Any) -> None:
    found = reference.commands_of(file.head["Command"])
    assert found
    for line in found:
        words = shlex.split(line, comments=True)
        assert words[0] in PROGRAMS, line
        for key, is_set, value in (word.partition("=") for word in words if "=" in word and words[0] != "make"):
            assert is_known(key, value if is_set else None), f"{line}: {key}={value}"


PART = re.compile(rf"(?:{'|'.join([*config.PARTS, 'references', 'run'])})(?:\.\w+)+")
FILE_ENDINGS = ("html", "md", "json", "parquet", "yaml", "npy", "csv", "svg")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_names_no_key_that_is_none(document: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"(?<!`)`([^`\s]+)`(?!`)", text):
        key, is_set, value = code.strip("'").partition("=")
        if is_set and key not in ("key", "group") and not key.startswith("--") and not key.isupper():
            assert is_known(key, value), code
        elif PART.fullmatch(code) and not code.endswith(FILE_ENDINGS):
            assert is_known(code), code


def test_every_documented_key_has_a_meaning_and_a_type() -> None:
    """What the tables of the reference leave empty: parts that hold others, whose keys say all."""
    for file in FILES:
        told = defaultdict(str, {key.path: key.text for key in file.keys})
        for key in file.keys:
            if file.target and key.default and not set(FREE) & set(key.path.split(".")[:-1]):
                assert key.text or told[key.path.rpartition(".")[0]], f"{file.chosen_by}: {key.path}"


def test_every_group_of_the_configuration_has_a_page() -> None:
    folders = {path.parent.relative_to(config.CONF_DIR).as_posix() for path in config.CONF_DIR.rglob("*.yaml")}
    assert folders - {"."} == set(reference.GROUPS)


EXTERNAL = {
    "https://squidfunk.github.io/mkdocs-material/",
    "https://keepachangelog.com/en/1.1.0/",
    "https://semver.org/spec/v2.0.0.html",
}
"""Every address that a page links to; whether it answers cannot be seen without a network."""


class Links(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.places: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.places |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif tag == "link" and found.get("rel") != "canonical" and "href" in found:
            self.loaded.add(found["href"])
        elif "src" in found:
            self.loaded.add(found["src"])


def built(folder: Path, **settings: Any) -> None:
    """Build the site into a folder; raises where there is a warning."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    found = load_config(str(SITE / "mkdocs.yml"), site_dir=str(folder), **settings)
    found.plugins.on_startup(command="build", dirty=False)
    build(found)
    found.plugins.on_shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Links]:
    """The pages of the site by file."""
    folder = tmp_path_factory.mktemp("site")
    built(folder)
    return {path: Links(path.read_text()) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_every_link_of_the_site_ends_somewhere(site: dict[Path, Links]) -> None:
    external = set()
    for path, page in site.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme:
                external.add(link)
                continue
            end = (path.parent / parts.path).resolve() if parts.path else path
            end = end / "index.html" if end.is_dir() else end
            assert end.is_file(), f"{path}: {link}"
            if parts.fragment:
                assert parts.fragment in site[end].places, f"{path}: {link}"
    assert external == EXTERNAL
    assert all(urlsplit(link).scheme == "https" and "." in urlsplit(link).netloc for link in external)


def test_a_page_loads_nothing_from_elsewhere(site: dict[Path, Links]) -> None:
    assert not [link for page in site.values() for link in page.loaded if urlsplit(link).netloc]


def test_every_configuration_key_is_on_a_page(site: dict[Path, Links]) -> None:
    folder = next(path for path in site if path.parent.name == "probe").parents[1]
    pages = {path.parent.name: path.read_text() for path in folder.rglob("index.html")}
    for file in FILES:
        page = pages[reference.page_name(file.group).removesuffix(".md")]
        assert f'id="{reference.anchor(file)}"' in page
        for key in file.keys:
            assert f"<code>{key.path}</code>" in page, key.path


def test_formulas_are_built_in(site: dict[Path, Links]) -> None:
    text = next(path for path in site if path.parent.name == "method").read_text()
    assert "<math" in text
    assert "arithmatex" not in text


@pytest.mark.parametrize(
    "text",
    ["[dead](nowhere.md)", "[dead](#nowhere)", "[dead](other.md#nowhere)", "![dead](nowhere.svg)", "[dead](/nowhere/)"],
)
def test_a_dead_link_ends_the_build(text: str, tmp_path: Path) -> None:
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{text}\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    with pytest.raises(Abort, match="strict mode"):
        built(tmp_path / "site", docs_dir=str(tmp_path / "docs"), nav=None, hooks=[], plugins=[])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_the_sources_end_at_files(document: Path) -> None:
    """Those who read the repository itself follow them too."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not urlsplit(link).scheme and not link.startswith("#"):
            assert (document.parent / urlsplit(link).path).is_file(), link


def named(title: str) -> set[str]:
    """The names in the first two columns of a table of the README."""
    rows = re.search(rf"\| `{title}=`.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    assert rows is not None
    cells = [cell for row in rows[1].splitlines() for cell in row.split("|")[1:3]]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("group", ["model", "reference"])
def test_the_readme_has_every_encoder_and_every_reference(group: str) -> None:
    assert named(group) == {file.name for file in reference.files(group)}


def test_the_readme_is_short_and_shows_a_picture_and_the_promised_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert re.search(r"!\[[^\]]+\]\(docs/gaps\.svg\)", text)
    assert "\npython -m dejavu_exp model=clip_vitl14 reference=naive_bayes\n" in text


def test_version_and_licence_are_the_same_wherever_they_are_told() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert f"\n## {project['version']}\n" in (ROOT / "docs" / "CHANGELOG.md").read_text()
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def python_calls(text: str) -> Iterator[list[str]]:
    """The settings of every call of `dejavu_exp.measure` in the Python blocks of a document."""
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "dejavu_exp.measure":
                known = {word.arg for word in node.keywords}
                assert known <= set(inspect.signature(dejavu_exp.measure).parameters), known
                settings = {word.arg: word.value for word in node.keywords}.get("settings", ast.Dict([], []))
                assert isinstance(settings, ast.Dict)
                pairs = zip(settings.keys, settings.values, strict=True)
                values = [f"{ast.literal_eval(key)}={plain(value)}" for key, value in pairs if key is not None]
                yield [*(ast.literal_eval(word) for word in node.args), *values]


def plain(node: ast.expr) -> str:
    """A value as a command line has it; of `Path("a b")` the text."""
    value = ast.literal_eval(node.args[0] if isinstance(node, ast.Call) else node)
    return f"'{value}'" if isinstance(value, str) else str(value)


def test_the_calls_from_python_have_settings_that_work() -> None:
    calls = list(python_calls((ROOT / "docs" / "python.md").read_text()))
    assert len(calls) == 3
    for overrides in calls:
        check_settings(tuple(overrides))
    for name in re.findall(r"^::: dejavu_exp\.(\w+)", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE):
        assert name in dejavu_exp.__all__


def own_images(folder: Path) -> None:
    """200 images of four classes, a fifth of them in val, with one COCO file."""
    colours = np.random.default_rng(0).integers(0, 255, (200, 3))
    images, annotations = [], []
    for number, colour in enumerate(colours):
        origin, kind = "val" if number % 5 == 0 else "train", number % 4
        name, left, top = f"{origin}/{number:03}.png", 4 * (number % 7), 3 * (number % 5)
        picture = Image.new("RGB", (96, 80), tuple(int(part) for part in colour))
        picture.paste((60 * kind, 255 - 60 * kind, 128), (left, top, left + 40, top + 36))
        (folder / "images" / origin).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": 96, "height": 80})
        annotations.append({"id": number, "image_id": number, "category_id": kind, "bbox": [left, top, 40, 36]})
    categories = [{"id": kind, "name": f"kind {kind}"} for kind in range(4)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document))


def own_encoder(folder: Path) -> None:
    """A small network in a TorchScript file."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        torch.jit.save(torch.jit.script(network.eval()), str(folder / "encoder.pt"))


QUICKER = {
    "dejavu_exp": ("references.crop_classifier.recipe.epochs=1", "scoring.resamples=100", "trainer.workers=0"),
    "dejavu_exp.doctor": (),
}
"""Settings that are added to the commands of the README, so that a run takes seconds."""


@pytest.mark.slow
def test_a_strangers_path_from_a_folder_and_a_file_to_a_report(tmp_path: Path) -> None:
    """The commands of the README's section as they stand, in another folder."""
    section = re.search(r"^## Your own images and encoder\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    assert section is not None
    (shell,) = [block for is_shell, block in blocks(section[1]) if is_shell]
    commands = [shlex.split(line) for line in lines_of(shell)]
    assert len(commands) <= 5
    own_images(tmp_path)
    own_encoder(tmp_path)
    settings = {**os.environ, "DEJAVU_CACHE": str(tmp_path / "cache"), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    output = ""
    for program, *words in commands:
        if program == "pip":
            continue  # the environment of the tests has it
        assert (program, words[0]) == ("python", "-m")
        done = subprocess.run(
            [sys.executable, *words, *QUICKER[words[1]]],
            cwd=tmp_path, env=settings, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        output = done.stdout
    report = Path(output.split()[-1])
    assert "<html" in report.read_text()
    figures = json.loads((report.parent / "figures.json").read_text())
    used = figures["references"]["crop_classifier"]["roles"]
    for role in ("target", "unseen"):
        gap = used[role]["top1"]["100"]["gap"]
        assert gap["n_used"] + gap["n_excluded"] == 40
        assert gap["n_used"] >= 35, "of some images no background is left"
    compare.main([str(report.parent), "--out", str(tmp_path / "compared")])
    assert (tmp_path / "compared" / "comparison.html").is_file()
    drawn = load(SITE / "picture.py").picture(figures, (ROOT / "dejavu_exp/report/templates/page.css").read_text())
    assert drawn.startswith("<svg")
    assert "crop_classifier" in drawn
    assert set(re.findall(r"var\((--[\w-]+)\)", drawn)) <= set(re.findall(r"(--[\w-]+):", drawn))
