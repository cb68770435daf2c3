"""Which part of an image the encoder gets to see: the background beside all boxes, a corner, or all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, TypeAlias

import polars as pl

from dejavu_exp import tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import NEVER_SHOWN, Status

Rect: TypeAlias = tuple[int, int, int, int]
"""(xmin, ymin, xmax, ymax) in pixels; the upper ends are exclusive."""

Boxes: TypeAlias = Sequence[Sequence[int]]
"""Annotated boxes, each [xmin, ymin, xmax, ymax] in pixels; the upper ends are exclusive."""

Region: TypeAlias = tuple[Rect | None, Status, str]
"""The region of a view, or None with the status and its reason; the reason is empty where the status is ok."""

SHOWN = {name: tables.VIEWS[name] for name in ("texts", "xmin", "ymin", "xmax", "ymax", "status", "detail")}


class AuthorsAnswer(NamedTuple):
    """What the authors' rule finds in an image.

    Attributes:
        crop: the rectangle, or None where no candidate exceeds the threshold.
        n_candidates: how many rectangles were considered.
        best_min_side: the largest shorter side among them, pixels; 0 without a candidate.
        n_tied_best: how many candidates have that shorter side.
    """

    crop: Rect | None
    n_candidates: int
    best_min_side: int
    n_tied_best: int


class ViewRule(Protocol):
    """What `views` needs of a rule."""

    @property
    def name(self) -> str:
        """Short name; ends the ids of the rule's views."""
        ...

    @property
    def reads(self) -> str:
        """What an encoder must be able to embed for it: "images" or "texts"."""
        ...

    def show(self, rows: pl.DataFrame) -> pl.DataFrame:
        """What is shown of each row.

        Args:
            rows: columns of `tables.MANIFEST` with width and height filled.

        Returns:
            Columns texts, xmin, ymin, xmax, ymax, status and detail, in the order of `rows`.
        """
        ...


class RegionRule:
    """A rule that shows a region of the image."""

    @property
    def reads(self) -> str:
        """See `ViewRule.reads`."""
        return "images"

    @property
    def needs_boxes(self) -> bool:
        """True where an image without boxes has no such view."""
        raise NotImplementedError

    def region(self, width: int, height: int, boxes: Boxes | None) -> Region:
        """The region of an image of `width` x `height` pixels; `boxes` is None without annotation."""
        raise NotImplementedError

    def show(self, rows: pl.DataFrame) -> pl.DataFrame:
        """See `ViewRule.show`. A missing or wrong annotation does not exclude a view that needs no boxes.

        Raises:
            DataError: a row that should be measured has no width or height.
        """
        columns = ("id", "width", "height", "boxes", "status", "detail")
        regions = [self._region_of(*row) for row in zip(*(rows[name].to_list() for name in columns), strict=True)]
        rects = [rect or (None, None, None, None) for rect, _, _ in regions]
        shown = {name: [rect[axis] for rect in rects] for axis, name in enumerate(("xmin", "ymin", "xmax", "ymax"))}
        told = {"status": [str(status) for _, status, _ in regions], "detail": [text or None for _, _, text in regions]}
        return pl.DataFrame({"texts": [None] * len(rows), **shown, **told}, schema_overrides=SHOWN)

    def _region_of(
        self,
        name: str,
        width: int | None,
        height: int | None,
        boxes: Boxes | None,
        status: str,
        detail: str | None,
    ) -> tuple[Rect | None, str, str | None]:
        """The region, status and detail of one manifest row."""
        if status in NEVER_SHOWN or (status != Status.OK and self.needs_boxes):
            return None, status, detail
        if width is None or height is None:
            raise DataError(f"image {name}: width and height are not known; read the image sizes before making views.")
        return self.region(width, height, boxes)


def largest_rectangle(width: int, height: int, boxes: Boxes) -> Rect | None:
    """The empty rectangle with the largest shorter side, as a background crop is squared afterwards.

    Ties go to the larger area, then the lowest ymin, the lowest xmin, and the wider one.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        boxes: within the image and of positive area; they may overlap.

    Returns:
        A rectangle within the image that overlaps no box; None where the boxes cover the image.

    Source:
        The rule as arXiv 2304.13850 describes it; the authors' code looks between neighbouring edges only, see
        `authors_rectangle`.

    >>> largest_rectangle(100, 100, [[40, 0, 60, 30]])
    (0, 30, 100, 100)
    """
    by_top = sorted((box[1], box[3], box[0], box[2]) for box in boxes)
    # The best rectangle cannot be extended, so each of its sides touches a box or the border of the image.
    lefts = sorted({0, *(box[2] for box in boxes)})
    rights = sorted({width, *(box[0] for box in boxes)}, reverse=True)
    best: Rect | None = None
    best_rank = (1, 0, 0, 0, 0)
    for left in lefts:
        reaching = [box for box in by_top if box[3] > left]
        for right in rights:
            wide = right - left
            if wide < best_rank[0]:
                break
            top, tall = _tallest_gap(reaching, right, height)
            rank = (min(wide, tall), wide * tall, -top, -left, wide)
            if rank > best_rank:
                best, best_rank = (left, top, right, top + tall), rank
    return best


def _tallest_gap(by_top: Sequence[tuple[int, int, int, int]], right: int, height: int) -> tuple[int, int]:
    """Upper end and height of the tallest free run, the upper one among ties, beside boxes that start left of `right`.

    Boxes are (ymin, ymax, xmin, xmax) by ascending ymin.
    """
    reached = start = tall = 0
    for ymin, ymax, xmin, _ in by_top:
        if xmin < right:
            if ymin - reached > tall:
                start, tall = reached, ymin - reached
            if ymax > reached:
                reached = ymax
    if height - reached > tall:
        return reached, height - reached
    return start, tall


def authors_rectangle(width: int, height: int, boxes: Boxes, min_px: int = 0) -> AuthorsAnswer:
    """The rectangle of the authors' released code, which no larger one across an edge of a box can replace.

    The image is cut into strips at every left and right edge of a box; a candidate is a free vertical run of one strip.
    Candidates come from left to right, inside a strip from top to bottom; of those with the largest shorter side the
    last is taken. A box that leaves the image on the right gives no answer; on the other sides nothing is checked, so
    the rectangle can leave the image too. A box with xmin >= xmax blocks nothing but its edges still cut strips, and
    a box with ymin = ymax cuts a run in two.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        boxes: as annotated. The authors' code fails on an empty list; here it gives the whole image.
        min_px: the shorter side must be larger than this, pixels.

    >>> authors_rectangle(100, 100, [[40, 0, 60, 30]])
    AuthorsAnswer(crop=(60, 0, 100, 100), n_candidates=3, best_min_side=40, n_tied_best=2)
    """
    if any(box[2] > width for box in boxes):
        return AuthorsAnswer(None, 0, 0, 0)
    candidates = list(_authors_candidates(width, height, boxes))
    sides = [min(xmax - xmin, ymax - ymin) for xmin, ymin, xmax, ymax in candidates]
    best = max(sides, default=0)
    tied = [rect for rect, side in zip(candidates, sides, strict=True) if side == best]
    return AuthorsAnswer(tied[-1] if best > min_px else None, len(candidates), best, len(tied))


def _authors_candidates(width: int, height: int, boxes: Boxes) -> Iterator[Rect]:
    """The free runs of all strips, left to right, then top to bottom."""
    by_top = sorted((box[1], box[3], box[0], box[2]) for box in boxes)
    edges = sorted({edge for box in boxes for edge in (box[0], box[2])}) or [0]
    if edges[0] > 0:
        edges.insert(0, 0)
    if edges[-1] < width:
        edges.append(width)
    for left, right in pairwise(edges):
        spans = [(ymin, ymax) for ymin, ymax, xmin, xmax in by_top if xmin <= left and xmax >= right]
        yield from ((left, top, right, bottom) for top, bottom in _runs(spans, height))


def _runs(spans: Sequence[tuple[int, int]], height: int) -> Iterator[tuple[int, int]]:
    """Free runs beside spans sorted by start. A first span above the image puts the run's upper end there too."""
    reached: int | None = None
    for start, end in spans:
        if start > (reached or 0):
            yield reached or 0, start
        reached = end if reached is None else max(reached, end)
    if (reached or 0) < height:
        yield reached or 0, height


@dataclass(frozen=True)
class BackgroundCrop(RegionRule):
    """The largest rectangle of background beside all boxes.

    The two rules differ often. In 500 random cases of one to three boxes the authors' shorter side is below the largest
    possible one 280 times, and 6 times they find no usable crop though there is one; in the 486 cases for which the
    answers of their code are recorded (`tests/golden`; more boxes), 247 and 25 times.

    Attributes:
        min_side_px: the shorter side of a usable crop is above this, pixels.
        compat: "corrected" takes the true largest rectangle and refuses boxes that leave the image or have no area;
            "authors" follows the released code, see `authors_rectangle`. A rectangle that ends below the image is cut
            at its border, as slicing does; one that starts outside is refused, as their code fails on it.
    """

    min_side_px: int
    compat: Literal["corrected", "authors"] = "corrected"

    def __post_init__(self) -> None:
        if self.min_side_px < 1:
            raise ConfigError(f"view.min_side_px={self.min_side_px}: must be at least 1 pixel.")
        if self.compat not in ("corrected", "authors"):
            raise ConfigError(f"view.compat={self.compat}: must be corrected or authors.")

    @property
    def name(self) -> str:
        """The view's short name."""
        return "background"

    @property
    def needs_boxes(self) -> bool:
        """Without boxes nobody knows where the background is."""
        return True

    def region(self, width: int, height: int, boxes: Boxes | None) -> Region:
        """The crop, or why there is none; an image with an empty list of boxes is all background."""
        if boxes is None:
            return None, Status.NO_ANNOTATION, "the image has no boxes that say where the foreground is"
        if self.compat == "authors":
            return self._authors_region(width, height, boxes)
        misplaced = _misplaced(width, height, boxes)
        if misplaced:
            return None, Status.BOX_OUTSIDE, misplaced
        rect = largest_rectangle(width, height, boxes)
        side = min(rect[2] - rect[0], rect[3] - rect[1]) if rect else 0
        if rect is None or side <= self.min_side_px:
            return None, Status.TOO_SMALL, f"best shorter side {side} px is not above {self.min_side_px} px"
        return rect, Status.OK, ""

    def _authors_region(self, width: int, height: int, boxes: Boxes) -> Region:
        if any(box[2] > width for box in boxes):
            return None, Status.BOX_OUTSIDE, f"a box ends right of the image of {width} x {height} px"
        answer = authors_rectangle(width, height, boxes, self.min_side_px)
        if answer.crop is None:
            detail = f"best shorter side {answer.best_min_side} px is not above {self.min_side_px} px"
            return None, Status.TOO_SMALL, detail
        xmin, ymin, xmax, ymax = answer.crop
        if xmin < 0 or ymin < 0 or ymin >= height:
            detail = f"the authors' rule answers {list(answer.crop)}, outside the image of {width} x {height} px"
            return None, Status.BOX_OUTSIDE, detail
        return (xmin, ymin, xmax, min(ymax, height)), Status.OK, ""


def _misplaced(width: int, height: int, boxes: Boxes) -> str:
    """What is wrong with the first box that leaves the image or has no area; empty where all are right."""
    for xmin, ymin, xmax, ymax in boxes:
        if not (0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height):
            fault = "has no area" if xmin >= xmax or ymin >= ymax else "leaves the image"
            return f"box {[xmin, ymin, xmax, ymax]} {fault} of {width} x {height} px"
    return ""


@dataclass(frozen=True)
class CornerCrop(RegionRule):
    """A corner of the image, whatever it shows: for images without boxes.

    It may show the foreground, so what it measures is weaker than a background crop.

    Attributes:
        fraction: of each side, above 0 to 1; 0.3 of each side is 9 % of the area. The value is this package's own.
        corner: "top_left", as the authors' later code, or "bottom_left", as its text and their earlier code.
    """

    fraction: float = 0.3
    corner: Literal["top_left", "bottom_left"] = "top_left"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"view.fraction={self.fraction}: must lie above 0 and at most at 1 (a share of each side)."
            )
        if self.corner not in ("top_left", "bottom_left"):
            raise ConfigError(f"view.corner={self.corner}: must be top_left or bottom_left.")

    @property
    def name(self) -> str:
        """The view's short name."""
        return "corner"

    @property
    def needs_boxes(self) -> bool:
        """The corner is where it is."""
        return False

    def region(self, width: int, height: int, boxes: Boxes | None) -> Region:
        """The corner, at least one pixel wide and high; boxes play no part."""
        wide, tall = max(1, round(width * self.fraction)), max(1, round(height * self.fraction))
        top = 0 if self.corner == "top_left" else height - tall
        return (0, top, wide, top + tall), Status.OK, ""


@dataclass(frozen=True)
class FullImage(RegionRule):
    """The whole image: what the bank holds, and what encoders are trained on."""

    @property
    def name(self) -> str:
        """The view's short name."""
        return "full"

    @property
    def needs_boxes(self) -> bool:
        """The whole image needs no boxes."""
        return False

    def region(self, width: int, height: int, boxes: Boxes | None) -> Region:
        """All of the image; boxes play no part."""
        return (0, 0, width, height), Status.OK, ""


def views(rows: pl.DataFrame, rule: ViewRule) -> pl.DataFrame:
    """One view of every row; excluded rows stay, with the reason.

    Args:
        rows: columns of `tables.MANIFEST` with width and height filled, and `role` and `content`.
        rule: what is shown of a row.

    Returns:
        Columns of `tables.VIEWS`, in the order of `rows`.

    Raises:
        DataError: a row that should be measured has no width or height.
    """
    known = rows.select("id", "role", "label", "path", "content", truth=pl.lit(None))
    named = known.with_columns(view_id=pl.col("id") + f"#{rule.name}", view=pl.lit(rule.name))
    return tables.validate(named.hstack(rule.show(rows)), tables.VIEWS, f"{rule.name} views", key="view_id")
