"""Which image plays which role: measured, training for the references, public bank, or never seen by any encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import polars as pl

from dejavu_exp import provenance, tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import IntArray, Role, Status

T = TypeVar("T")

WHOLE_BELOW = 1 << 53
"""Larger numbers are no positions: floats are no longer exact there, and some integers would become negative."""
WITHOUT_ROLE = (Status.UNREADABLE,)
"""A row with one of these cannot serve in any role; splits by class leave out rows without label besides."""


class Split(Protocol):
    """A split as configured: cheap to build; `assign` gives the roles."""

    @property
    def min_side_px(self) -> int:
        """A usable background crop has its smallest side above this, pixels; read by the view."""
        ...

    def assign(self, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Roles of the manifest's rows that got one, columns of `tables.ROLES`, sorted by id."""
        ...

    def report(self, roles: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
        """One sentence for each count that was asked for and not reached.

        Args:
            roles: as `assign` gave them.
            rows: what it was given.
        """
        ...


@dataclass(frozen=True)
class Partition(Generic[T]):
    """The images of one class by role; together they hold no image twice."""

    target: list[T]
    heldout: list[T]
    shared: list[T]
    public: list[T]
    unseen: list[T] = field(default_factory=list)


Pools: TypeAlias = Mapping[str, tuple[list[str], list[str]]]
"""Per class: the ids of images with boxes and of those without, each in the order they are dealt."""


def deal(
    boxed: Sequence[T],
    unboxed: Sequence[T],
    target: int,
    heldout: int,
    shared: int = 0,
    public: int | None = None,
    unseen: int | None = 0,
) -> Partition[T]:
    """Deal the images of one class in the order given.

    Target, heldout and unseen need boxes; where there are too few, each gets its proportional part, rounded down.
    Shared takes images without boxes first, then what is left of the others. Public takes a count likewise, or all
    that is left (images with boxes first).

    Args:
        boxed: images with boxes.
        unboxed: images without.
        target: how many to measure.
        heldout: how many train the references.
        shared: how many train all encoders.
        public: how many form the bank; None for all that is left.
        unseen: how many no encoder sees; None for all images with boxes that public does not need.

    >>> deal([1, 2, 3, 4, 5, 6], [7, 8], target=2, heldout=1, shared=1, public=2, unseen=1)
    Partition(target=[1, 2], heldout=[3], shared=[7], public=[8, 5], unseen=[4])
    """
    wanted = target + heldout + (unseen or 0)
    ends = [0]
    for count in (target, heldout, unseen or 0):
        ends.append(ends[-1] + min(count, len(boxed) * count // max(wanted, 1)))
    measured, trained, kept = (list(boxed[start:end]) for start, end in pairwise(ends))
    rest, plain = list(boxed[ends[-1] :]), list(unboxed)
    common, plain, rest = _take(plain, rest, shared)
    if public is None:
        return Partition(measured, trained, common, rest + plain, kept)
    bank, _, rest = _take(plain, rest, public)
    return Partition(measured, trained, common, bank, rest if unseen is None else kept)


def _take(first: list[T], then: list[T], count: int) -> tuple[list[T], list[T], list[T]]:
    """`count` elements of `first`, then of `then`; and what is left of both."""
    more = max(count - len(first), 0)
    return first[:count] + then[:more], first[count:], then[more:]


def partition(boxed: Sequence[T], unboxed: Sequence[T], num_per_class: int) -> Partition[T]:
    """The authors' rule for one class: two training sets of `num_per_class` images, everything else is public.

    Each training set has its own images with boxes (target, heldout), as many as there are for both; images without
    boxes that both share fill it up. Source: the partition script of arXiv 2304.13850.

    Args:
        boxed: images with boxes, in the order they are dealt.
        unboxed: images without.
        num_per_class: images of the class in each training set.

    >>> partition([1, 2, 3, 4, 5], [6, 7, 8], num_per_class=3)
    Partition(target=[1, 2], heldout=[3, 4], shared=[6], public=[5, 7, 8], unseen=[])
    """
    own = min(num_per_class, len(boxed) // 2)
    # Theirs never fills up with an image that has boxes, even where one is left over.
    shared = min(num_per_class - own, len(unboxed))
    return deal(boxed, unboxed, num_per_class, num_per_class, shared)


@dataclass(frozen=True)
class PerClassSplit:
    """The same number of images of every class for each role, drawn from a seed.

    The draw orders images by a hash of their id, so it does not depend on how the files were listed, and a class more
    or less leaves all others as they are.

    Attributes:
        target: measured images per class; they need boxes.
        heldout: images per class that train the references; they need boxes.
        shared: images per class that train all encoders trained here; those without boxes first.
        public: images per class in the bank; null for all that is left.
        unseen: images per class that no encoder saw; null for all there are. They need boxes.
        min_side_px: a usable background crop has its smallest side above this, pixels; read by the view.
        fit_origin: the part of the data set that encoders are trained on; gives target, heldout, shared and public.
        unseen_origin: the part that gives unseen; the same as fit_origin where the data set has no other with boxes.
    """

    target: int
    heldout: int
    shared: int
    public: int | None
    unseen: int | None
    min_side_px: int
    fit_origin: str = "train"
    unseen_origin: str = "val"

    def __post_init__(self) -> None:
        for key, least in (
            ("target", 1),
            ("heldout", 0),
            ("shared", 0),
            ("public", 1),
            ("unseen", 0),
            ("min_side_px", 1),
        ):
            _check_at_least(key, getattr(self, key), least)
        if self.public is None and self.unseen is None and self.fit_origin == self.unseen_origin:
            raise ConfigError(
                f"split.public=null and split.unseen=null both ask for all that is left of origin {self.fit_origin}. "
                "Give one of them a number."
            )

    def assign(self, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Give roles to the rows of a manifest.

        Args:
            rows: columns of `tables.MANIFEST`, in any order.
            seed: which draw.

        Returns:
            Columns of `tables.ROLES`, sorted by id: the rows that got a role. Rows that are unreadable or have no label
            get none.

        Raises:
            DataError: an origin has no rows, or a class ends without a target or a public image.
        """
        same = self.fit_origin == self.unseen_origin
        unseen = self.unseen if same else 0

        def dealt(boxed: list[str], unboxed: list[str]) -> Partition[str]:
            return deal(boxed, unboxed, self.target, self.heldout, self.shared, self.public, unseen)

        parts = _deal_classes(rows, seed, self.fit_origin, dealt, "split.target, split.heldout or split.shared")
        return _roles(parts, [] if same else _unseen(rows, seed, self.unseen_origin, self.unseen, parts))

    def report(self, roles: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
        """One sentence for each role that has fewer images than asked for in some class."""
        asked: dict[str, int] = {Role.TARGET: self.target, Role.HELDOUT: self.heldout, Role.SHARED: self.shared}
        counts = _counts(roles)
        return _sentences(counts, {**asked, Role.PUBLIC: self.public or 1, Role.UNSEEN: _least(self.unseen)})


@dataclass(frozen=True)
class AuthorsSplit:
    """The partition of arXiv 2304.13850: two training sets of equal size, all other images are public.

    Theirs deals the images in the order in which the file system lists them; here a seed orders them.

    Attributes:
        num_per_class: images per class in each of the two training sets (target + shared, heldout + shared).
        unseen: images per class that no encoder saw; null for all there are. They need boxes.
        min_side_px: a usable background crop has its smallest side above this, pixels; read by the view.
        fit_origin: the part of the data set that gives target, heldout, shared and public.
        unseen_origin: the part that gives unseen; another one, since all that is left of fit_origin is public.
    """

    num_per_class: int
    unseen: int | None
    min_side_px: int
    fit_origin: str = "train"
    unseen_origin: str = "val"

    def __post_init__(self) -> None:
        for key, least in (("num_per_class", 1), ("unseen", 0), ("min_side_px", 1)):
            _check_at_least(key, getattr(self, key), least)
        if self.fit_origin == self.unseen_origin and self.unseen != 0:
            raise ConfigError(
                f"split.unseen_origin={self.unseen_origin} is also split.fit_origin, where the authors' rule leaves no "
                "image unseen. Set split.unseen=0, another origin, or a split with dejavu_exp.splits.PerClassSplit."
            )

    def assign(self, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Give roles to the rows of a manifest; arguments, result and errors as in `PerClassSplit.assign`."""

        def dealt(boxed: list[str], unboxed: list[str]) -> Partition[str]:
            return partition(boxed, unboxed, self.num_per_class)

        parts = _deal_classes(rows, seed, self.fit_origin, dealt, "split.num_per_class")
        return _roles(parts, _unseen(rows, seed, self.unseen_origin, self.unseen, parts))

    def report(self, roles: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
        """One sentence for each role, and for the training sets, with fewer images than asked for in some class."""
        counts = _counts(roles)
        asked: dict[str, int] = {
            Role.TARGET: self.num_per_class,
            Role.HELDOUT: self.num_per_class,
            Role.UNSEEN: _least(self.unseen),
        }
        trained = {
            label: {"target + shared": found[Role.TARGET] + found[Role.SHARED]} for label, found in counts.items()
        }
        return _sentences(counts, asked) + _sentences(trained, {"target + shared": self.num_per_class})


@dataclass(frozen=True)
class NpySplit:
    """Roles from index files, as the authors' partition script saves them.

    An index is a position among the rows of fit_origin (for `unseen`: of unseen_origin) in the order of torchvision's
    ImageFolder: classes sorted, file names sorted within the class. The seed plays no part.

    Attributes:
        target: path of the .npy file of measured images.
        heldout: path of the file of images that train the references; null for none.
        shared: path of the file of images that train all encoders; null for none.
        public: path of the file of images in the bank; null for all rows of fit_origin without another role.
        unseen: path of the file of images that no encoder saw; null for all rows of unseen_origin.
        min_side_px: a usable background crop has its smallest side above this, pixels; read by the view.
        fit_origin: the part of the data set that gives target, heldout, shared and public.
        unseen_origin: the part that gives unseen.
    """

    target: str | None
    heldout: str | None
    shared: str | None
    public: str | None
    unseen: str | None
    min_side_px: int
    fit_origin: str = "train"
    unseen_origin: str = "val"

    def __post_init__(self) -> None:
        _check_at_least("min_side_px", self.min_side_px, 1)
        if self.fit_origin == self.unseen_origin and self.unseen is None:
            raise ConfigError(
                f"split.unseen=null takes all rows of split.unseen_origin={self.unseen_origin}, which is also "
                "split.fit_origin. Name a file or another origin."
            )

    def assign(self, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Give roles to the rows of a manifest.

        Args:
            rows: columns of `tables.MANIFEST`, in any order.
            seed: not used; the files decide.

        Returns:
            Columns of `tables.ROLES`, sorted by id.

        Raises:
            ConfigError: no file of target images is named.
            DataError: a file cannot be read, an index is out of range, or an image would have two roles.
        """
        if self.target is None:
            raise ConfigError("split.target=null: name the .npy file that holds the indices of the measured images.")
        fit = _folder_order(rows, self.fit_origin, "fit_origin")
        named = {
            Role.TARGET: self.target,
            Role.HELDOUT: self.heldout,
            Role.SHARED: self.shared,
            Role.PUBLIC: self.public,
        }
        parts = [_picked(fit, role, path) for role, path in named.items() if path is not None]
        if self.public is None:
            taken = pl.concat(parts)["id"].implode()
            parts.append(fit.filter(~pl.col("id").is_in(taken)).with_columns(role=pl.lit(str(Role.PUBLIC))))
        if self.unseen is not None:
            parts.append(_picked(_folder_order(rows, self.unseen_origin, "unseen_origin"), Role.UNSEEN, self.unseen))
        else:
            # A data set without this origin simply has no unseen rows: null is no request for any.
            unseen = _labelled(rows).filter(pl.col("origin") == self.unseen_origin).select("id", "label")
            parts.append(unseen.with_columns(role=pl.lit(str(Role.UNSEEN))))
        return _checked(pl.concat(parts))

    def report(self, roles: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
        """One sentence for each role without any image."""
        found = set(roles["role"].unique())
        return [f"{role}: the split gives no image this role (split.{role})." for role in Role if role not in found]


@dataclass(frozen=True)
class OriginSplit:
    """A role for each part of the data set; a row needs neither a label nor boxes.

    Roles may share a part where all of them but one have a limit; that one gets what is left.

    Attributes:
        target: origin of the measured rows.
        heldout: origin of the rows that train the references; null for none.
        shared: origin of the rows that train every encoder trained here; null for none.
        public: origin of the bank.
        unseen: origin of the rows that no encoder saw; null for none.
        min_side_px: a usable background crop has its smallest side above this, pixels; read by views of the image.
        limits: the most rows a role gets, drawn by the seed; null, or a role not named, for all.
    """

    target: str
    heldout: str | None
    shared: str | None
    public: str
    unseen: str | None
    min_side_px: int
    limits: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_at_least("min_side_px", self.min_side_px, 1)
        for role in (Role.TARGET, Role.PUBLIC):
            if getattr(self, role) is None:
                raise ConfigError(f"split.{role}=null: name the origin of the {role} rows.")
        for key, limit in self.limits.items():
            self._check_limit(key, limit)
        taken: dict[str, Role] = {}
        for role, origin in self._origins().items():
            if self.limits.get(role) is None and taken.setdefault(origin, role) != role:
                raise ConfigError(
                    f"split.{taken[origin]} and split.{role} are both {origin}, but a row has one role. Set "
                    f"split.limits.{role} to a number of rows, or name another origin."
                )

    def _check_limit(self, key: str, limit: object) -> None:
        if key not in list(Role) or (limit is not None and key not in self._origins()):
            roles = ", ".join(self._origins())
            raise ConfigError(f"split.limits.{key}={limit}: no such role has an origin; those that have: {roles}.")
        if limit is not None and type(limit) is not int:
            raise ConfigError(f"split.limits.{key}={limit}: must be a whole number or null.")
        _check_at_least(f"limits.{key}", limit, 1)

    def _origins(self) -> dict[Role, str]:
        """The origin of each role that has one."""
        named = {role: getattr(self, role) for role in Role}
        return {role: origin for role, origin in named.items() if origin is not None}

    def assign(self, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Give roles to the rows of a manifest.

        Args:
            rows: columns of `tables.MANIFEST`, in any order.
            seed: which rows, where a limit is set.

        Returns:
            Columns of `tables.ROLES`, sorted by id. Unreadable rows get no role.

        Raises:
            DataError: an origin has no rows, or none are left for a role.
        """
        usable = _drawn(rows, seed)
        left = usable
        parts: list[pl.DataFrame] = []
        # Where roles share an origin, the one without a limit gets what the others leave.
        for role, origin in sorted(self._origins().items(), key=lambda item: self.limits.get(item[0]) is None):
            of_origin = _of_origin(usable, origin, role, "readable").join(
                left, on="id", how="semi", maintain_order="left"
            )
            if of_origin.is_empty():
                raise DataError(
                    f"split.{role}={origin}: other roles take all rows of this origin. Lower their split.limits."
                )
            found = of_origin.head(self.limits.get(role) or len(of_origin))
            left = left.join(found, on="id", how="anti", maintain_order="left")
            parts.append(found.select("id", "label", role=pl.lit(str(role))))
        return _checked(pl.concat(parts))

    def report(self, roles: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
        """One sentence for each role with fewer rows than its limit."""
        found = dict(roles.group_by("role").len().iter_rows())
        return [
            f"{role}: origin {getattr(self, role)} has {found.get(role, 0)} images, split.limits.{role} is {limit}."
            for role, limit in self.limits.items()
            if limit is not None and found.get(role, 0) < limit
        ]


@dataclass(frozen=True)
class RandomSplit:
    """So many rows for each role, drawn from a seed; a row needs neither a label nor boxes.

    The draw orders rows by a hash of their id, so it does not depend on how the files were listed.

    Attributes:
        target: measured rows.
        heldout: rows that train the references.
        shared: rows that train every encoder trained here.
        public: rows in the bank; null for all that is left.
        unseen: rows that no encoder saw.
        min_side_px: a usable background crop has its smallest side above this, pixels; read by views of the image.
        fit_origin: the part of the data set that gives target, heldout, shared and public; null for every part that
            unseen_origin does not name.
        unseen_origin: the part that gives unseen; null for the same pool as the others.
    """

    target: int
    heldout: int
    shared: int
    public: int | None
    unseen: int
    min_side_px: int
    fit_origin: str | None = None
    unseen_origin: str | None = None

    def __post_init__(self) -> None:
        least = {"target": 1, "heldout": 0, "shared": 0, "public": 1, "unseen": 0, "min_side_px": 1}
        for key, count in least.items():
            _check_at_least(key, getattr(self, key), count)

    @property
    def _apart(self) -> bool:
        """True where unseen rows come from a pool of their own."""
        return self.unseen_origin not in (None, self.fit_origin)

    def assign(self, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Give roles to the rows of a manifest.

        Args:
            rows: columns of `tables.MANIFEST`, in any order.
            seed: which draw.

        Returns:
            Columns of `tables.ROLES`, sorted by id. Unreadable rows get no role.

        Raises:
            DataError: an origin has no rows, or fewer than are asked for.
        """
        usable = _drawn(rows, seed)
        pool, kept = usable, usable.clear()
        if self.fit_origin is not None:
            pool = _of_origin(usable, self.fit_origin, "fit_origin", "readable")
        if self._apart:
            pool = pool.filter(pl.col("origin").ne_missing(self.unseen_origin))
        if self._apart and self.unseen:
            kept = _of_origin(usable, str(self.unseen_origin), "unseen_origin", "readable")
            _check_enough({Role.UNSEEN: self.unseen}, kept)
        asked = {Role.TARGET: self.target, Role.HELDOUT: self.heldout, Role.SHARED: self.shared}
        unseen = 0 if self._apart else self.unseen
        _check_enough({**asked, Role.PUBLIC: self.public or 1, Role.UNSEEN: unseen}, pool)
        pairs = pool.select("id", "label").rows()
        part = deal(pairs, [], self.target, self.heldout, self.shared, self.public, unseen)
        if self._apart:
            part = replace(part, unseen=kept.select("id", "label").head(self.unseen).rows())
        dealt = [(*pair, str(role)) for role in Role for pair in getattr(part, role)]
        return _checked(pl.DataFrame(dealt, schema=dict(tables.ROLES), orient="row"))

    def report(self, roles: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
        """Nothing: a pool that is too small is an error of `assign`."""
        return []


@dataclass(frozen=True)
class SharesSplit:
    """Shares of the images of each class instead of counts, for classes of any and of unlike sizes.

    Counts are the whole numbers nearest to the shares, by the largest remainder; the draw is that of `PerClassSplit`.
    A class in which a role with a share would get no image is left out, and the report says so.

    An encoder trained elsewhere has seen all of fit_origin, and images drawn from there would make a null run of
    memorized ones. So unseen images come from another origin, or from a list: a statement that no encoder saw them.

    Attributes:
        target: share of measured images; they need boxes.
        heldout: share of images that train the references; they need boxes.
        shared: share of images that train all encoders trained here; those without boxes first.
        public: share of images in the bank; those without boxes first.
        unseen: share, of the images that no encoder saw, that is used; 0 to 1. They need boxes.
        min_side_px: a usable background crop has its smallest side above this, pixels; read by the view.
        fit_origin: the part of the data set that gives target, heldout, shared and public.
        unseen_origin: the part that no encoder saw; where the data set has none, no image is unseen.
        unseen_list: path of a text file with ids, one a line, of further images that no encoder saw; null for none.
    """

    target: float
    heldout: float
    shared: float
    public: float
    unseen: float
    min_side_px: int
    fit_origin: str = "train"
    unseen_origin: str = "val"
    unseen_list: str | Path | None = None

    def __post_init__(self) -> None:
        _check_at_least("min_side_px", self.min_side_px, 1)
        for role in Role:
            share = getattr(self, role)
            # Written so that NaN fails too.
            if not 0 <= share <= 1 or (share == 0 and role in (Role.TARGET, Role.PUBLIC)):
                least = "above 0" if role in (Role.TARGET, Role.PUBLIC) else "at least 0"
                raise ConfigError(f"split.{role}={share}: must be a share, {least} and at most 1.")
        if sum(self._shares().values()) > 1:
            spelled = " + ".join(f"{role} {getattr(self, role)}" for role in self._shares())
            raise ConfigError(f"split: the shares {spelled} are more than 1. Lower one of them.")
        if self.unseen and self.fit_origin == self.unseen_origin:
            raise ConfigError(
                f"split.unseen_origin={self.unseen_origin} is also split.fit_origin, whose images the encoder saw. "
                "Name another origin, or list images that it never saw in a file, split.unseen_list. For an encoder "
                "trained here, dejavu_exp.splits.PerClassSplit deals unseen images from the same origin."
            )

    def assign(self, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Give roles to the rows of a manifest; arguments and result as in `PerClassSplit.assign`.

        Raises:
            DataError: fit_origin has no rows, fewer than two classes are large enough, or the list cannot be read or
                names an image that the data set does not have.
        """
        rows = self._with_listed(rows)
        pools = _pools(_of_origin(rows, self.fit_origin, "fit_origin"), seed, without_boxes=_has_no_boxes(rows))
        parts = {label: self._dealt(*pool) for label, pool in pools.items()}
        needed = [role for role, share in self._shares().items() if share and role != Role.SHARED]
        parts = {label: part for label, part in parts.items() if all(getattr(part, role) for role in needed)}
        if len(parts) < 2:
            largest = max(map(sum, (map(len, pool) for pool in pools.values())), default=0)
            raise DataError(
                f"{len(parts)} of {len(pools)} classes of origin {self.fit_origin} have images for each of "
                f"{', '.join(needed)}, and there must be two to choose from; the largest has {largest} images. Raise "
                "the smallest share, annotate more images, or check what dataset.label makes of them."
            )
        return _roles(parts, self._unseen(rows, seed, parts))

    def _shares(self) -> dict[Role, Fraction]:
        """Of fit_origin; as they are written, for 0.1 + 0.2 is more than 0.3 in binary."""
        return {role: Fraction(str(getattr(self, role))) for role in Role if role != Role.UNSEEN}

    def _dealt(self, boxed: list[str], unboxed: list[str]) -> Partition[str]:
        counts = apportion(self._shares(), len(boxed) + len(unboxed))
        return deal(boxed, unboxed, *(counts[role] for role in self._shares()))

    def _with_listed(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows, with those of the list moved to unseen_origin."""
        if self.unseen_list is None:
            return rows
        path = Path(self.unseen_list).expanduser()
        try:
            ids = list(filter(None, path.read_text(encoding="utf-8-sig").split("\n")))
        except (OSError, UnicodeError) as error:
            raise DataError(f"split.unseen_list={path}: cannot be read: {error}.") from error
        listed = pl.Series([name.removesuffix("\r") for name in ids], dtype=pl.String).unique()
        lost = listed.filter(~listed.is_in(rows["id"].implode())).sort()
        if len(lost) or not len(listed):
            fault = f"{len(lost)} of its lines are no id of the data set, e.g. {lost[0]!r}" if len(lost) else "is empty"
            raise DataError(
                f"split.unseen_list={path}: {fault}. Give the id of one image a line: {rows['id'][0]!r} is one."
            )
        moved = pl.when(pl.col("id").is_in(listed.implode())).then(pl.lit(self.unseen_origin)).otherwise("origin")
        return rows.with_columns(origin=moved)

    def _unseen(self, rows: pl.DataFrame, seed: int, classes: Iterable[str]) -> list[tuple[str, str]]:
        found = _labelled(rows).filter(pl.col("origin") == self.unseen_origin, pl.col("label").is_in(list(classes)))
        share = {Role.UNSEEN: Fraction(str(self.unseen))}
        return [
            (name, label)
            for label, (boxed, _) in _pools(found, seed, without_boxes=_has_no_boxes(rows)).items()
            for name in boxed[: apportion(share, len(boxed))[Role.UNSEEN]]
        ]

    def report(self, roles: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
        """Which classes are left out, in which boxes were too few, and why no image is unseen."""
        listed = self._with_listed(rows)
        fit = _labelled(listed).filter(pl.col("origin") == self.fit_origin)
        sizes: dict[str, int] = dict(fit.group_by("label").len().iter_rows())
        counts = _counts(roles)
        sentences = []
        left = {label: size for label, size in sizes.items() if label not in counts}
        if left:
            smallest = min(left, key=lambda label: (left[label], label))
            sentences.append(
                f"classes: {len(left)} of {len(sizes)} are left out, with {sum(left.values())} images, for they have "
                f"too few images, or images with boxes, for the shares of the split; the smallest has {smallest}, "
                f"{left[smallest]}."
            )
        for role in (Role.TARGET, Role.HELDOUT):
            asked = {label: apportion(self._shares(), sizes[label])[role] for label in counts}
            short = sorted(label for label in counts if counts[label][role] < asked[label])
            if short:
                sentences.append(
                    f"{role}: {len(short)} of {len(counts)} classes have fewer images with boxes than split.{role}="
                    f"{getattr(self, role)} asks for, e.g. {short[0]}, {counts[short[0]][role]} of {asked[short[0]]}."
                )
        if self.unseen and not any(found[Role.UNSEEN] for found in counts.values()):
            sentences.append(
                f"unseen: no image with boxes is of origin {self.unseen_origin} (split.unseen_origin) or listed "
                "(split.unseen_list), so none is known to be unseen."
            )
        return sentences


def apportion(shares: Mapping[Role, Fraction], count: int) -> dict[Role, int]:
    """Whole numbers as near to shares of a count as can be, by the largest remainder.

    What the shares leave is a share like another, so no role gets more than its own, rounded up. Equal remainders go
    to the share that stands first.

    Args:
        shares: above or at 0; at most 1 together.
        count: to be shared out.

    >>> apportion({Role.TARGET: Fraction(1, 4), Role.HELDOUT: Fraction(1, 4), Role.PUBLIC: Fraction(1, 2)}, 6)
    {<Role.TARGET: 'target'>: 2, <Role.HELDOUT: 'heldout'>: 1, <Role.PUBLIC: 'public'>: 3}
    """
    exact = [share * count for share in (*shares.values(), 1 - sum(shares.values()))]
    whole = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: whole[place] - exact[place])
    for place in by_remainder[: count - sum(whole)]:
        whole[place] += 1
    return dict(zip(shares, whole, strict=False))


def _check_enough(asked: Mapping[Role, int], pool: pl.DataFrame) -> None:
    """Refuse to draw more rows than there are."""
    wanted = sum(asked.values())
    if wanted > len(pool):
        spelled = " + ".join(f"{role} {count}" for role, count in asked.items() if count)
        origins = ", ".join(sorted(pool["origin"].drop_nulls().unique())) or "none"
        raise DataError(
            f"the split asks for {wanted} images ({spelled}), but there are {len(pool)} readable ones "
            f"of origin {origins}. Lower {', '.join(f'split.{role}' for role, count in asked.items() if count)}."
        )


def _check_at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"split.{key}={value}: must be at least {least}.")


def _least(unseen: int | None) -> int:
    """Unseen images per class below which the report speaks: "all there are" should still be at least one."""
    return 1 if unseen is None else unseen


def _labelled(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("label").is_not_null())


def _of_origin(rows: pl.DataFrame, origin: str, key: str, kind: str = "labelled") -> pl.DataFrame:
    """The rows of an origin, at least one; labelled ones only, or all that `rows` holds, where `kind` is another."""
    found = (_labelled(rows) if kind == "labelled" else rows).filter(pl.col("origin") == origin)
    if found.is_empty():
        origins = ", ".join(sorted(rows["origin"].drop_nulls().unique())) or "none"
        raise DataError(
            f"split.{key}={origin}: the data set has no {kind} image of this origin; its origins are: {origins}. "
            f"Choose one of them{', or ask for no unseen images' if key.startswith('unseen') else ''}."
        )
    return found


def _drawn(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The rows that can serve, in the order of a hash that depends on the seed and the id alone."""
    usable = rows.filter(~pl.col("status").is_in([str(status) for status in WITHOUT_ROLE]))
    order = [provenance.hash_order(seed, "split", name) for name in usable["id"].to_list()]
    return usable.with_columns(order=pl.Series(order, dtype=pl.UInt64)).sort("order", "id")


def _has_no_boxes(rows: pl.DataFrame) -> bool:
    """True where no image of a data set has boxes: then no view can need them."""
    return rows["boxes"].null_count() == len(rows)


def _pools(rows: pl.DataFrame, seed: int, *, without_boxes: bool) -> Pools:
    """Ids by class, with and without boxes, in the order in which they are drawn.

    Args:
        rows: of one origin.
        seed: which draw.
        without_boxes: True where no image of the data set has boxes; then each counts as one that has.
    """
    boxed = pl.col("boxes").is_not_null() & (pl.col("status") == str(Status.OK))
    if without_boxes:
        boxed = pl.col("status").is_in([str(Status.OK), str(Status.NO_ANNOTATION)])
    grouped = (
        _drawn(rows.select("id", "label", "status", boxed=boxed), seed)
        .group_by("label")
        .agg(pl.col("id").filter(pl.col("boxed")).alias("with"), pl.col("id").filter(~pl.col("boxed")).alias("without"))
        .sort("label")
    )
    return {label: (boxed_ids, unboxed_ids) for label, boxed_ids, unboxed_ids in grouped.iter_rows()}


def _deal_classes(
    rows: pl.DataFrame, seed: int, origin: str, dealt: Callable[[list[str], list[str]], Partition[str]], keys: str
) -> dict[str, Partition[str]]:
    """Deal every class of an origin; each must end with a target and a public image."""
    parts: dict[str, Partition[str]] = {}
    pools = _pools(_of_origin(rows, origin, "fit_origin"), seed, without_boxes=_has_no_boxes(rows))
    for label, (boxed, unboxed) in pools.items():
        part = dealt(boxed, unboxed)
        empty = next((name for name in (Role.TARGET, Role.PUBLIC) if not getattr(part, name)), None)
        if empty is not None:
            raise DataError(
                f"class {label}: no {empty} image is left. It has {len(boxed)} images with boxes and {len(unboxed)} "
                f"without in origin {origin}, of which {len(part.target)} became target, {len(part.heldout)} heldout, "
                f"{len(part.shared)} shared, {len(part.public)} public and {len(part.unseen)} unseen. "
                f"Lower {keys}, annotate more of its images, or leave the class out of the data set."
            )
        parts[label] = part
    if not parts:
        raise DataError(f"origin {origin}: no image is readable and has a label, so none can have a role.")
    return parts


def _unseen(
    rows: pl.DataFrame, seed: int, origin: str, count: int | None, classes: Iterable[str]
) -> list[tuple[str, str]]:
    """(id, label) of images with boxes that no encoder saw; a class that the bank lacks cannot be inferred."""
    if count == 0:
        return []
    found = _of_origin(rows, origin, "unseen_origin").filter(pl.col("label").is_in(list(classes)))
    pools = _pools(found, seed, without_boxes=_has_no_boxes(rows))
    return [(name, label) for label, (boxed, _) in pools.items() for name in boxed[:count]]


def _roles(parts: Mapping[str, Partition[str]], unseen: Iterable[tuple[str, str]]) -> pl.DataFrame:
    """The role table of dealt classes and unseen images."""
    rows = [(name, label, str(role)) for label, part in parts.items() for role in Role for name in getattr(part, role)]
    rows.extend((name, label, str(Role.UNSEEN)) for name, label in unseen)
    return _checked(pl.DataFrame(rows, schema=dict(tables.ROLES), orient="row"))


def _checked(roles: pl.DataFrame) -> pl.DataFrame:
    """The table sorted by id; an image with two roles is an error."""
    twice = roles.filter(pl.col("id").is_duplicated()).sort("id")
    if len(twice):
        name = twice["id"][0]
        first, second, *_ = twice.filter(pl.col("id") == name)["role"]
        raise DataError(
            f"image {name} occurs twice: as {first} and as {second}; {twice['id'].n_unique()} images do. "
            "An image has one role: correct the index files of split.target, heldout, shared, public and unseen."
        )
    return tables.validate(roles, tables.ROLES, "roles").sort("id")


def _counts(roles: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Images by class and role, 0 included."""
    counts: dict[str, dict[str, int]] = {label: dict.fromkeys(Role, 0) for label in roles["label"].unique().sort()}
    for label, role, count in roles.group_by("label", "role").len().iter_rows():
        counts[label][role] = count
    return counts


def _sentences(counts: Mapping[str, Mapping[str, int]], asked: Mapping[str, int]) -> list[str]:
    """One sentence for each role that some class has too few images of."""
    sentences = []
    for role, least in asked.items():
        short = {label: found[role] for label, found in counts.items() if found[role] < least}
        if short:
            worst = min(short, key=lambda label: (short[label], label))
            sentences.append(
                f"{role}: {len(short)} of {len(counts)} classes have fewer than the {least} images asked for; "
                f"the fewest has {worst}, {short[worst]}."
            )
    return sentences


def _folder_order(rows: pl.DataFrame, origin: str, key: str) -> pl.DataFrame:
    """Id and label of an origin's rows in ImageFolder's order. Unreadable rows count: they have a position too."""
    return _of_origin(rows, origin, key).sort("label", "path").select("id", "label")


def _picked(ordered: pl.DataFrame, role: Role, path: str) -> pl.DataFrame:
    """The rows that an index file names, with their role."""
    indices = _read_indices(role, Path(path))
    outside = indices[(indices < 0) | (indices >= len(ordered))]
    if len(outside):
        raise DataError(
            f"{path} (split.{role}): index {outside[0]} is out of range: the data set has {len(ordered)} rows there. "
            "Use the data set that the file was made for."
        )
    return ordered[indices].with_columns(role=pl.lit(str(role)))


def _read_indices(role: Role, path: Path) -> IntArray:
    """Indices of a .npy file; whole numbers stored as floats are cast back, as the authors' script makes such files."""
    try:
        # Mapped, so that a file which claims more values than it has is refused, not made room for.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    # NumPy meets a damaged header with errors of a dozen kinds, down to those of Python's tokenizer.
    except Exception as error:
        raise DataError(f"{path} (split.{role}): cannot be read as a .npy file of numbers: {error}.") from error
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iuf":
        raise DataError(f"{path} (split.{role}): must hold one array of indices with one axis.")
    if not ((values == np.floor(values)) & (values > -WHOLE_BELOW) & (values < WHOLE_BELOW)).all():
        raise DataError(f"{path} (split.{role}): holds numbers that are not whole; it must hold indices of rows.")
    indices: IntArray = values.astype(np.int64)
    return indices
