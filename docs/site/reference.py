"""The reference of every configuration key and command, made from `conf/`, the dataclasses and the parsers themselves.

The package is read with griffe and not imported, so that neither torch nor a GPU is needed to build the pages.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import griffe
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"

GROUPS = {
    "model": "The encoder that is measured.",
    "model/network": "The architecture of an encoder that is trained here (`model=trained`).",
    "model/recipe": "How an encoder is trained here (`model=trained`).",
    "model/preprocess": "How images are shown to an encoder of your own.",
    "dataset": "Where the images, captions and boxes come from.",
    "split": "Which row plays which role: target, heldout, shared, public, unseen.",
    "probe": "What the encoder is shown, what answers, how many neighbours vote and how ties are broken.",
    "reference": "What predicts the truth without having seen the row. Several may be listed.",
    "crop_classifier": "Network and recipe of `reference=crop_classifier`; chosen by the data set's name.",
    "text_encoder": "The encoder of `reference=text_embedding`; chosen by the data set's name.",
    "tagger": "Where tags of crops, and objects of images, come from.",
    "scoring": "What is inferred, the score of each row, ties, intervals.",
    "leaks": "How copies of an image in two roles are found, and what becomes of them.",
    "trainer": "Device work: devices, precision, storage, batches, cache.",
    "training": "For all that is trained here: processes, accumulation, precision, epochs kept.",
    "utility": "What else the encoder is good for: k-NN, linear probe, zero-shot, retrieval.",
    "report": "What of the images is in `report.html`.",
    "tracking": "Weights & Biases.",
    "experiment": "Presets that choose several of the above.",
    "hydra/launcher": "Where the cells of a sweep run.",
}
"""The groups of `conf/` in the order in which the pages have them, and what each selects."""

PREFIXES = {
    "model/network": "model.network",
    "model/recipe": "model.recipe",
    "model/preprocess": "model.preprocess",
    "reference": "references.{name}",
    "crop_classifier": "references.crop_classifier",
    "text_encoder": "references.text_embedding.encoder",
    "experiment": "",
    "hydra/launcher": "hydra.launcher",
}
"""Where the keys of a file come to lie, where that is not under the name of its group."""

HEADINGS = ("Reproduces", "Command", "Cost", "Expect")


@dataclass(frozen=True)
class Key:
    """One key of the configuration: where it lies, its type and default, and what it means."""

    path: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class ConfigFile:
    """One file of `conf/`: what its head says, and its keys."""

    group: str
    name: str
    head: dict[str, str]
    defaults: list[tuple[str, object]]
    target: str
    keys: list[Key]

    @property
    def chosen_by(self) -> str:
        """What a command line says to take it."""
        return f"{self.group}={self.name}"

    @property
    def prefix(self) -> str:
        """Where its keys come to lie, with a dot behind it; empty for the top level."""
        where = PREFIXES.get(self.group, self.group).format(name=self.name)
        return f"{where}." if where else ""

    @property
    def builds_on(self) -> str:
        """The other files that it takes, in words."""
        return ", ".join(f"`{_choice(group, name)}`" for group, name in self.defaults)


@functools.cache
def package() -> griffe.Module:
    """The package as its source says."""
    found = griffe.load("dejavu_exp", search_paths=[str(ROOT)])
    if not isinstance(found, griffe.Module):
        raise TypeError("dejavu_exp is no module")
    return found


def files(group: str) -> list[ConfigFile]:
    """The files of a group, by name."""
    return [read(path) for path in sorted((CONF / group).glob("*.yaml"))]


def top() -> ConfigFile:
    """The main file; groups have pages of their own."""
    return read(CONF / "config.yaml")


def read(path: Path) -> ConfigFile:
    """One file of `conf/`."""
    text = path.read_text(encoding="utf-8")
    group, name = path.parent.relative_to(CONF).as_posix(), path.stem
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        raise TypeError(f"{path} holds no mapping")
    values = {key.value: value for key, value in node.value}
    target = values["_target_"].value if "_target_" in values else ""
    made = ConfigFile("" if group == "." else group, name, head(text), _defaults(values.get("defaults")), target, [])
    made.keys.extend(_keys(node, made.prefix, text.splitlines()))
    return made


def head(text: str) -> dict[str, str]:
    """What the comment at the top of a file says under each of `HEADINGS`."""
    found: dict[str, str] = {}
    current = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        said = re.match(rf"# ({'|'.join(HEADINGS)}): *(.*)", line)
        if said:
            current = said[1]
            found[current] = said[2]
        elif current:
            found[current] += "\n" + line.lstrip("#").strip()
    return found


def commands_of(text: str) -> list[str]:
    """The commands in the `Command` of a head, each on one line."""
    joined = re.sub(r" *\\\n *", " ", text)
    parts = [part for line in joined.split("\n") for part in re.split(r", (?:then|or) ", line)]
    return [re.sub(r"\s{2,}\(.*\)$", "", part).strip() for part in parts if part.strip()]


def _defaults(node: yaml.Node | None) -> list[tuple[str, object]]:
    """The entries of a defaults list: group and name; the group is empty for a file of the same group."""
    if not isinstance(node, yaml.SequenceNode):
        return []
    listed = [item for item in yaml.safe_load(yaml.serialize(node)) if item != "_self_"]
    return [("", item) if isinstance(item, str) else next(iter(item.items())) for item in listed]


def _choice(group: str, name: object) -> str:
    """An entry of a defaults list as a command line would have it."""
    if not group:
        return str(name)
    names = f"[{','.join(map(str, name))}]" if isinstance(name, list) else name
    return f"{group.removeprefix('override ').removeprefix('/')}={'null' if names is None else names}"


def _keys(node: yaml.MappingNode, prefix: str, lines: Sequence[str]) -> Iterator[Key]:
    """The keys of a node and of the nodes in it, then those that only its target knows."""
    stated = {key.value: (key, value) for key, value in node.value}
    target = stated["_target_"][1].value if "_target_" in stated else ""
    known = parameters(target)
    for name, (key, value) in stated.items():
        if name in ("_target_", "defaults", "hydra"):
            continue
        path = prefix + name
        annotation, _, told = known.get(name, ("", "", ""))
        said = _comment(key, value, lines) or told
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield Key(path, annotation, "", said)
            yield from _keys(value, f"{path}.", lines)
        else:
            yield Key(path, annotation or _plain_type(value), _shown(value), said)
    for name, (annotation, default, told) in known.items():
        if name not in stated:
            yield Key(prefix + name, annotation, default, told)


def _comment(key: yaml.Node, value: yaml.Node, lines: Sequence[str]) -> str:
    """The comment behind a key."""
    inside = isinstance(value, yaml.CollectionNode) and not value.flow_style
    end = key.end_mark if inside else value.end_mark
    rest = lines[end.line][end.column :]
    return rest.split("#", 1)[1].strip() if "#" in rest else ""


def _shown(value: yaml.Node) -> str:
    """A value as the file has it."""
    return str(yaml.serialize(value, width=1000)).removesuffix("...\n").strip().strip("'\"") or '""'


def _plain_type(value: yaml.Node) -> str:
    """The type that a value without an annotation has."""
    return str(value.tag).rsplit(":", 1)[-1]


@functools.cache
def parameters(target: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning of each argument of one of the package's classes; nothing of classes from elsewhere."""
    if not target.startswith("dejavu_exp."):
        return {}
    found = package()[target.removeprefix("dejavu_exp.")]
    made = found.final_target if isinstance(found, griffe.Alias) else found
    if not isinstance(made, griffe.Class):
        raise TypeError(f"{target} is no class")
    told = _attributes(made)
    return {
        parameter.name: (
            _annotation(made, parameter),
            "" if parameter.default is None else str(parameter.default),
            told.get(parameter.name, ""),
        )
        for parameter in made.parameters
        if parameter.name != "self"
    }


def _attributes(made: griffe.Class) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of its attributes."""
    told: dict[str, str] = {}
    for part in reversed([made, *made.mro()]):
        for section in part.docstring.parse("google") if part.docstring else ():
            if isinstance(section, griffe.DocstringSectionAttributes):
                told |= {one.name: " ".join(one.description.split()) for one in section.value}
    return told


def _annotation(made: griffe.Class, parameter: griffe.Parameter) -> str:
    """The annotation; a name that the module gives to a type is replaced by what it stands for."""
    said = str(parameter.annotation or "")
    named = made.module.members.get(said)
    return str(named.value) if isinstance(named, griffe.Attribute) and named.value is not None else said


def known_keys() -> set[str]:
    """Every key of every file, wherever it comes to lie, and every key above one."""
    all_files = [top(), *(one for group in GROUPS for one in files(group))]
    stated = {key.path for one in all_files for key in one.keys}
    for one in all_files:
        stated |= _brought(one)
    above = {path.rsplit(".", count)[0] for path in stated for count in range(1, path.count(".") + 1)}
    return stated | above | set(GROUPS)


def _brought(one: ConfigFile) -> set[str]:
    """Keys that a file's defaults list puts below its own, as `/text_encoder@encoder: e5_base` does."""
    found = set()
    for entry, _ in one.defaults:
        group, _, place = entry.removeprefix("override ").removeprefix("/").partition("@")
        if place and group in GROUPS:
            below = "" if place == "_here_" else f"{place}."
            found |= {
                one.prefix + below + key.path.removeprefix(other.prefix) for other in files(group) for key in other.keys
            }
    return found


def page(group: str) -> str:
    """The page of a group, in Markdown."""
    found = files(group)
    lines = [f"# `{group}`", "", GROUPS[group], "", "| choose | what it is |", "|---|---|"]
    for one in found:
        lines.append(f"| [`{one.chosen_by}`](#{anchor(one)}) | {_cell(_one_line(one.head['Reproduces']))} |")
    for one in found:
        lines += ["", f"## `{one.chosen_by}` {{ #{anchor(one)} }}", "", *_body(one)]
    return "\n".join(lines) + "\n"


def anchor(one: ConfigFile) -> str:
    """Where a file stands on the page of its group."""
    return re.sub(r"\W+", "-", one.chosen_by)


def _body(one: ConfigFile) -> list[str]:
    lines = [f"Reproduces {_one_line(one.head['Reproduces'])}" if one.head.get("Reproduces") else "", ""]
    lines += ["```bash", *commands_of(one.head["Command"]), "```", ""]
    expected = re.sub(r"docs/(\w+)\.md", r"[\1](../\1.md)", _one_line(one.head["Expect"]))
    lines += [f"**Cost**: {_one_line(one.head['Cost'])}", "", f"**Expect**: {expected}", ""]
    if one.builds_on:
        lines += [f"Builds on {one.builds_on}.", ""]
    if one.target:
        lines += [f"Makes a `{one.target}`.", ""]
    return lines + table(one.keys)


def table(keys: Sequence[Key]) -> list[str]:
    """Keys as a table, in Markdown."""
    if not keys:
        return ["It has no keys of its own."]
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for key in keys:
        shown = [f"`{_cell(part)}`" if part else "" for part in (key.path, key.type, key.default)]
        lines.append(f"| {' | '.join(shown)} | {_cell(key.text)} |")
    return lines


def index() -> str:
    """The first page: the groups, and the keys of the top level."""
    lines = [
        "# Configuration",
        "",
        "Choose parts with `group=name`, set single values with `key=value`. An unknown key, a value of another type",
        "and a missing value end the command with one sentence, before any work. `python -m dejavu_exp --help` shows",
        "the groups and all values, `--cfg job` the configuration that a command line makes.",
        "",
        "| group | what it selects | choices |",
        "|---|---|---|",
    ]
    for group, said in GROUPS.items():
        names = ", ".join(f"`{one.name}`" for one in files(group))
        lines.append(f"| [`{group}`]({page_name(group)}) | {said} | {names} |")
    lines += ["", "## Top level", "", f"Without choices: {top().builds_on}.", "", *table(top().keys)]
    return "\n".join(lines) + "\n"


def page_name(group: str) -> str:
    """The file of a group's page."""
    return f"{group.replace('/', '-')}.md"


def commands() -> str:
    """The page of the commands: what each says of itself with --help."""
    lines = [
        "# Commands",
        "",
        "`python -m dejavu_exp` measures; [its settings](index.md) are the configuration. The other commands:",
    ]
    for name in command_names():
        lines += ["", f"## `python -m dejavu_exp.{name}` {{ #{name} }}", "", *_help(name)]
    return "\n".join(lines) + "\n"


def _help(name: str) -> list[str]:
    module = importlib.import_module(module_of(f"dejavu_exp.{name}"))
    said = [_one_line((module.__doc__ or "").split("\n\n")[0]), ""]
    if not hasattr(module, "argparse"):
        return [*said, "It takes the same settings as `python -m dejavu_exp`."]
    # A fixed width: the page must not depend on the terminal that built it.
    with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        contextlib.suppress(SystemExit),
        mock.patch.dict("os.environ", {"COLUMNS": "110", "NO_COLOR": "1"}),
    ):
        module.main(["--help"])
    return [*said, "```text", shown.getvalue().strip(), "```"]


def command_names() -> list[str]:
    """Modules and packages that `python -m dejavu_exp.NAME` runs."""
    source = ROOT / "dejavu_exp"
    modules = [
        path.stem for path in source.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    return sorted({*modules, *(path.parent.name for path in source.glob("*/__main__.py"))} - {"__main__"})


def module_of(name: str) -> str:
    """The module that `python -m NAME` runs."""
    is_package = (ROOT / name.replace(".", "/") / "__main__.py").is_file()
    return f"{name}.__main__" if is_package else name


def pages() -> dict[str, str]:
    """All pages by file name."""
    made = {"index.md": index(), "commands.md": commands()}
    return made | {page_name(group): page(group) for group in GROUPS}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
