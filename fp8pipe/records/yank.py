"""Releases that were withdrawn after they were published."""

from __future__ import annotations

from fp8pipe.records.base import Record


class Yank(Record):
    """Who withdrew a release, when and why."""

    tag: str
    """The release."""
    by: str
    """Name on the Hub."""
    when: str
    """UTC, ISO 8601."""
    reason: str

    def sentence(self) -> str:
        """Who withdrew what, when and why."""
        return f"{self.tag} was yanked by {self.by} on {self.when[:10]}: {self.reason}"

    def remedy(self) -> str:
        """How to publish there again."""
        return f"to publish there again, say --supersedes {self.tag} (in a file, supersedes: [{self.tag}])"


class Yanked(Record):
    """Every release of a repository that was withdrawn. `fp8pipe/yanked.json` on main, beside the newest release.

    It belongs to the repository and to no release: the next one leaves it where it is.
    """

    releases: tuple[Yank, ...] = ()

    def of(self, tag: str) -> Yank | None:
        """How the release `tag` was withdrawn; None if it was not."""
        return next((yank for yank in self.releases if yank.tag == tag), None)

    def adding(self, yank: Yank) -> Yanked:
        """The same with this one, in place of an earlier one of its release."""
        others = [one for one in self.releases if one.tag != yank.tag]
        return Yanked(releases=tuple(sorted([*others, yank], key=lambda one: one.tag)))


class Withdrawal(Record):
    """What `yank` left on the Hub."""

    repo_id: str
    yank: Yank
    newest: bool
    """Whether main shows the release that was withdrawn."""
    commit: str
    """The commit of main that says so."""
    new_commit: bool
    """False if main said so already."""
    left: tuple[str, ...]
    """Slugs of the collections that listed the repository until now."""
