"""What the report of a run may show."""

from __future__ import annotations

from dataclasses import dataclass

from dejavu_exp.errors import ConfigError

IMAGES = ("thumbnails", "none")


@dataclass(frozen=True)
class ReportSettings:
    """What stands in report.html; no figure depends on it.

    Attributes:
        images: "thumbnails" puts small pictures of memorized rows and of copies between roles into the page, with their
            captions and the public images near them; "none" leaves every pixel and caption out of it.
        listed: most rows listed at the false-discovery rate, and most pairs of copies, count; the tables of the run
            folder have all of them.
        classes: most classes, or objects, of a reference, count, those with the largest gap; figures.json has them all.

    >>> ReportSettings(images="none").with_images
    False
    """

    images: str = "thumbnails"
    listed: int = 100
    classes: int = 1000

    def __post_init__(self) -> None:
        if self.images not in IMAGES:
            raise ConfigError(f"report.images={self.images!r}: expected one of {', '.join(IMAGES)}.")
        for key in ("listed", "classes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"report.{key}={getattr(self, key)} is below 1. Set it to how many rows to show.")

    @property
    def pictured(self) -> int:
        """Pairs of copies that may be shown, count."""
        return self.listed if self.with_images else 0

    @property
    def with_images(self) -> bool:
        """True where pictures and captions may be shown."""
        return self.images == "thumbnails"
