"""A section on memorization for a model card, as Markdown and as JSON; from the figures of a run alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dejavu_exp.report.kinds import KINDS
from dejavu_exp.report.wording import markdown_cell, markdown_table, percent, plain

MEASURED = {
    "label": "How often the encoder names the label of its training images from the {view} view alone, against a "
    "reference that cannot have seen them. The gap is the difference of the two accuracies",
    "objects": "How many of the objects in its training images the encoder names from the {view} view alone, against a "
    "reference that cannot have seen them. PRG is the share of rows where it finds more less the share where it finds "
    "fewer",
}
"""By what a run infers."""
LIMITS = (
    "The interval is about the rows measured; it does not hold the chance in training the encoder or the reference.",
    "A gap that is not above zero shows no memorization in these rows by this test, and is no proof of privacy.",
    "Rows that were not measured, other attacks and the recovery of images are not covered.",
)


def card(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a model card says of a run.

    Args:
        figures: what figures.json holds.

    Returns:
        Ready for JSON: `figures` is a list of estimates, shares of 1 with their intervals, each with its reference.
    """
    kind = KINDS[figures["infers"]]
    level = figures["run"]["config"].get("scoring", {}).get("level", 0.95)
    counts = figures["counts"]
    measured = MEASURED[figures["infers"]].format(view=figures["probe"]["view"])
    corrected = f"; the corrected {kind.compared} is that of target rows less that of rows no encoder has seen"
    found = [
        {"reference": name, "figure": figure, "level": level, **estimate}
        for name in figures["references"]
        for figure, estimate in _estimates(figures, name)
    ]
    return {
        "measured": f"{measured}{corrected if kind.gaps_of(figures, figures['headline'])[2] else ''}.",
        "encoder": {
            # Without the arguments of its architecture, which figures.json has.
            "description": figures["encoder"]["description"].split(", arch_args")[0],
            **{key: figures["encoder"][key] for key in ("weights", "weights_hash", "random")},
        },
        "data": {key: figures["dataset"].get(key) for key in ("name", "rows", "hash")},
        "rows": {role: counts[role]["used"] for role in ("target", "unseen")} | {"public": figures["probe"]["bank"]},
        "excluded": {role: counts[role]["excluded"] for role in ("target", "unseen")},
        "headline": figures["headline"],
        "figures": found,
        "listed": figures["references"][figures["headline"]].get("detected"),
        "gate": figures.get("gate"),
        "verdict": figures["verdict"],
        "notes": list(figures["notes"]),
        "limits": list(LIMITS),
        "made_by": {
            "created": figures["run"]["created"],
            "commit": figures["run"]["commit"],
            "version": figures["run"]["versions"].get("dejavu_exp"),
        },
    }


def _estimates(figures: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The figures of a reference that the run has, with their names."""
    kind = KINDS[figures["infers"]]
    raw, unseen, corrected = kind.gaps_of(figures, name)
    named = {
        f"corrected {kind.compared}": corrected,
        kind.compared: raw,
        f"{kind.compared}, unseen rows": unseen,
        "share of target rows memorized": figures["references"][name].get("rate"),
    }
    yield from ((figure, estimate) for figure, estimate in named.items() if estimate)


def markdown(facts: Mapping[str, Any]) -> str:
    """A section to paste into a model card.

    Args:
        facts: what `card` returns.
    """
    rows = [
        {
            "reference": item["reference"],
            "figure": item["figure"],
            f"% or points [{100 * item['level']:g} % interval]": percent(item),
            "rows": f"{item['n_used']} ({item['n_excluded']} excluded)",
        }
        for item in facts["figures"]
    ]
    encoder, data, used = facts["encoder"], facts["data"], facts["rows"]
    parts = [
        "## Memorization of training data",
        f"**{markdown_cell(facts['verdict'])}**",
        *(["**Random weights: no figure here says anything of a trained model.**"] if encoder["random"] else []),
        facts["measured"],
        "\n".join(
            f"- {name}: {markdown_cell(text)}"
            for name, text in (
                ("Encoder", f"{encoder['description']}; weights {encoder['weights']} (hash {encoder['weights_hash']})"),
                ("Data", f"{data['name']}, {data['rows']} images (hash {plain(data['hash'])})"),
                (
                    "Rows",
                    f"{used['target']} target, {used['unseen']} unseen, {used['public']} public; excluded "
                    f"{facts['excluded']['target']} target, {facts['excluded']['unseen']} unseen",
                ),
                *_listed(facts["listed"]),
                *_gate(facts["gate"]),
            )
        ),
        markdown_table(rows),
        "\n".join(f"- {markdown_cell(text)}" for text in (*facts["notes"], *facts["limits"])),
        f"Measured with dejavu_exp {plain(facts['made_by']['version'])}, {facts['made_by']['created']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _listed(detected: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if detected:
        yield (
            "Rows listed",
            f"{detected['n']} of {detected['n_tested']} target rows at a false-discovery rate of "
            f"{100 * detected['rate']:g} %",
        )


def _gate(gate: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if gate:
        yield "Release gate", f"{'passed' if gate['passed'] else 'not passed'}: {gate['reason']}"
