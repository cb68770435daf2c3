"""A dashboard of a W&B project, made by code: `python -m dejavu_exp.dashboard --project NAME [--entity NAME]`."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from dejavu_exp import config, tracking
from dejavu_exp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import interface as wr

TITLE = "Déjà vu memorization"
INTRODUCTION = (
    "Each run measures how much one vision encoder remembers of its training images. The gap is how much more often "
    "the encoder infers what it should not know than a reference that cannot have memorized it. The corrected gap "
    "takes off what the encoder also gains on images that it never saw: that part is knowledge. Memorization is shown "
    "where the interval of the corrected gap is above 0. Without unseen images there is no corrected gap, and the raw "
    "gap alone shows nothing."
)
COLUMNS = (
    "run:displayName",
    "run:group",
    "summary:verdict",
    "summary:headline/reference",
    "summary:headline/corrected_gap",
    "summary:headline/corrected_gap_low",
    "summary:headline/corrected_gap_high",
    "summary:headline/gap",
    "summary:random_weights",
)
"""Of the table of runs, first to last."""
BARS = {
    "headline/corrected_gap": "Corrected gap (a fraction; what of the gap is memorization)",
    "headline/corrected_gap_low": "Lower end of its interval",
    "headline/gap": "Gap on target rows (holds what the encoder knows better, too)",
    "headline/unseen_gap": "Gap on rows that the encoder never saw",
}
TABLES = {"comparison": "Every reference", "agreement": "How far references agree", "likeness/tests": "Likeness"}
"""Tables of measurements shown."""
WIDE, HALF, TALL = 24, 12, 10
"""Of panels, in the grid of a report, which is 24 wide."""


def build(project: str, entity: str | None = None, title: str = TITLE) -> wr.Report:
    """The dashboard as a W&B report: measurements, then comparisons; nothing is sent.

    Args:
        project: the W&B project whose runs are shown.
        entity: user or team; None asks W&B for the default one.
        title: of the report.
    """
    from wandb_workspaces.reports.v2 import interface as wr

    measured = wr.Runset(
        name="Measurements", filters=f"Metric('JobType') = '{tracking.MEASURED}'", pinned_columns=list(COLUMNS)
    )
    compared = wr.Runset(name="Comparisons", filters=f"Metric('JobType') = '{tracking.COMPARED_RUNS}'")
    places = [wr.Layout(x=HALF * (n % 2), y=TALL * (n // 2), w=HALF, h=TALL) for n in range(len(BARS))]
    bars = [
        wr.BarPlot(title=name, metrics=[wr.SummaryMetric(metric)], layout=place)
        for (metric, name), place in zip(BARS.items(), places, strict=True)
    ]
    return wr.Report(
        project=project,
        title=title,
        description="Made by python -m dejavu_exp.dashboard",
        width="fluid",
        blocks=[
            wr.P(INTRODUCTION),
            wr.H2("Measurements"),
            wr.PanelGrid(runsets=[measured], panels=[*bars]),
            *(block for key, name in TABLES.items() for block in _table(measured, key, name)),
            wr.H2("Settings and figures side by side"),
            wr.PanelGrid(
                runsets=[measured], panels=[wr.RunComparer(diff_only=True, layout=wr.Layout(w=WIDE, h=2 * TALL))]
            ),
            wr.H2("Comparisons of runs"),
            wr.PanelGrid(
                runsets=[compared],
                panels=[
                    wr.WeavePanelSummaryTable(table_name="tests", layout=wr.Layout(w=WIDE, h=TALL)),
                    wr.MediaBrowser(media_keys=["page"], layout=wr.Layout(y=TALL, w=WIDE, h=3 * TALL)),
                ],
            ),
        ],
        **({} if entity is None else {"entity": entity}),
    )


def _table(runs: wr.Runset, key: str, name: str) -> list[wr.H2 | wr.PanelGrid]:
    """A heading, and a table that runs have logged."""
    from wandb_workspaces.reports.v2 import interface as wr

    panel = wr.WeavePanelSummaryTable(table_name=key, layout=wr.Layout(w=WIDE, h=TALL))
    return [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=[panel])]


def save(project: str, entity: str | None, title: str, timeout_s: float) -> str:
    """Make the dashboard in W&B, a new report at each call.

    Args:
        project: the W&B project; made where it is missing.
        entity: user or team; None for the default one.
        title: of the report.
        timeout_s: seconds that W&B may take.

    Returns:
        The address of the report.

    Raises:
        DataError: W&B cannot be reached, refuses, or does not answer in time.
    """
    for name, value in tracking.RETRIES.items():
        os.environ.setdefault(name, value)
    found: list[str | Exception] = []

    def work() -> None:
        try:
            found.append(str(build(project, entity, title).save().url))
        except Exception as error:  # of many kinds, some of them bare
            found.append(error)

    # A thread that the interpreter does not wait for: a server that never answers holds it for ever.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if found and isinstance(found[0], str):
        return found[0]
    reason = " ".join(str(found[0]).split()) if found else f"no answer within {timeout_s:g} s"
    raise DataError(f"Weights & Biases: {reason}. Log in with `wandb login`, or try again later.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.dashboard",
        description="Make a report in Weights & Biases that shows all runs of a project: gaps, tables, settings and "
        "comparisons. Runs that are logged later appear in it by themselves.",
        epilog="Needs pip install 'dejavu_exp[dashboard]'. Each call makes a new report.",
    )
    parser.add_argument("--project", default=tracking.WandbTracking.project, help="the W&B project (%(default)s)")
    parser.add_argument("--entity", help="user or team (default: yours)")
    parser.add_argument("--title", default=TITLE, help="of the report")
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=tracking.WandbTracking.timeout_s, help="seconds (%(default)s)"
    )
    asked = parser.parse_args(arguments)
    with config.spoken_errors():
        _check_installed()
        address = save(asked.project, asked.entity, asked.title, asked.timeout)
        Console(highlight=False, soft_wrap=True).print(escape(address))


def _check_installed() -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise ConfigError("wandb-workspaces is not installed. Run pip install 'dejavu_exp[dashboard]'.") from None


if __name__ == "__main__":
    main()
