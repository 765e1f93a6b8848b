"""One release: a model, a recipe, a suite, a policy, and where to publish."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from fp8pipe.config.base import Config
from fp8pipe.config.files import validated
from fp8pipe.config.licences import LicenceClaim, load_licences
from fp8pipe.config.parallel import Parallelism
from fp8pipe.config.policy import GatePolicy, load_policy
from fp8pipe.config.recipe import Recipe, load_recipe
from fp8pipe.config.suite import EvalSuite, load_suite
from fp8pipe.errors import ConfigError

Visibility = Literal["private", "gated", "public"]
"""Who may read a repository: its owners; who asked and was granted access; everybody. From few to many."""


class EngineSpec(Config):
    """Where vLLM and lm-eval run."""

    python: str | None = Field(
        default=None,
        min_length=1,
        description="Interpreter of their environment; default: FP8PIPE_ENGINE_PYTHON, else the flow's own",
    )


class Sign(Config):
    """How a release is signed."""

    key: str
    """Path of an EC private key on P-256, P-384 or P-521, as PEM without a password."""


class Target(Config):
    """Where a release is published, and who may see it there."""

    repo_id: str = Field(description="Repository to publish to: namespace/name", pattern=r"^[\w.-]+/[\w.-]+$")
    collection: str | None = Field(default=None, description="Collection: namespace/title, a slug, or its address")
    collection_description: str = Field(
        default="", max_length=150, description="Description of the collection, if this release creates it"
    )
    visibility: Visibility | None = Field(
        default=None, description="Who may see a repository that this release creates; by default, as its base model"
    )
    replace: bool = Field(
        default=False, description="Overwrite a repository of another model, or with files or a README made by hand"
    )
    supersedes: tuple[str, ...] = Field(
        default=(), description="Tags of yanked releases: another may be published in their place"
    )
    sign: Sign | None = Field(default=None, description="Sign the release with an EC key: {key: PATH}")


class ReleaseSpec(Target):
    """One model, one recipe, one release: the parameter of the flow `release_model`."""

    model: str = Field(description="Hub id, Hub id@revision, or folder")
    recipe: str = Field(default="fp8-dynamic", description="Name in configs/recipes or path")
    suite: str = Field(default="quick", description="Name in configs/suites or path")
    policy: str = Field(default="quick", description="Name in configs/gates or path")
    licence: LicenceClaim | None = Field(
        default=None, description="The source's licence, where its card leaves it open: id, reason, file"
    )
    licences: str | None = Field(
        default=None, description="File that says what each licence asks for, instead of the shipped one"
    )
    card_template: str | None = Field(default=None, description="Your own template of the card (Jinja): a path")
    trust_remote_code: bool = Field(default=False, description="Let this model bring its own Python code")
    work_dir: str = Field(default="fp8pipe-work", description="Folder for releases and baselines")
    device: str = Field(default="auto", description="auto, cpu or cuda, for calibration")
    engine: EngineSpec = Field(default=EngineSpec(), description="The environment of vLLM and lm-eval")
    parallel: Parallelism | None = Field(
        default=None, description="How the engines are spread over GPUs; default: as the suite says"
    )
    oracles: bool = Field(default=True, description="Ask vLLM's own model about a checkpoint before it is measured")

    @property
    def target(self) -> Target:
        """Where it is published."""
        return Target(**self.model_dump(include=set(Target.model_fields)))

    def resolve(self) -> ResolvedRelease:
        """Read the files that the spec names. Raises ConfigError if one is wrong or they do not fit together."""
        resolved = ResolvedRelease(self, load_recipe(self.recipe), load_suite(self.suite), load_policy(self.policy))
        if self.parallel is not None:
            resolved = resolved.spread(self.parallel)
        check_fit(resolved.policy, resolved.suite)
        load_licences(self.licences)
        if self.card_template is not None:
            read_template(self.card_template)
        resolved.ladder()  # reports a wrong fallback now, not after hours
        return resolved


def read_template(path: str) -> str:
    """The text of a card template. Raises ConfigError if it cannot be read, or is no Jinja."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = Path(path).expanduser().read_text()
        Environment().parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"card template {path}: cannot be read: {error}") from error
    except TemplateSyntaxError as error:
        raise ConfigError(f"card template {path}, line {error.lineno}: {error}") from error
    return text


def check_fit(policy: GatePolicy, suite: EvalSuite) -> None:
    """Raise ConfigError if the policy limits what the suite does not measure."""
    missing = set(policy.gated_tasks) - set(suite.tasks)
    if missing:
        raise ConfigError(
            f"policy {policy.name} gates on {', '.join(sorted(missing))}, which suite {suite.name} does not "
            f"measure; it measures {', '.join(sorted(suite.tasks))}"
        )
    if policy.serving_limits and suite.serving is None:
        raise ConfigError(
            f"policy {policy.name} limits {', '.join(policy.serving_limits)}, and suite {suite.name} times nothing; "
            "add `serving: {}` to the suite"
        )


@dataclass(frozen=True)
class ResolvedRelease:
    """A ReleaseSpec with the files that it names, read and checked: one attempt of a release."""

    spec: ReleaseSpec
    recipe: Recipe
    suite: EvalSuite
    policy: GatePolicy
    attempt: int = 1
    attempts: int = 1
    """How many recipes the ladder has; the policy's alpha is divided among them."""

    def spread(self, parallel: Parallelism) -> ResolvedRelease:
        """The same, measured in this parallelism."""
        return replace(self, suite=self.suite.model_copy(update={"parallel": parallel}))

    def ladder(self) -> tuple[ResolvedRelease, ...]:
        """This release and its recipe's fallbacks, as many as the policy allows.

        A repository name that ends in the first recipe's suffix ends in the fallback's own instead.
        """
        recipes = (self.recipe, *(_fallback(self.recipe, index) for index in range(len(self.recipe.fallback))))
        recipes = recipes[: self.policy.max_attempts]
        return tuple(
            replace(self, spec=self._named_for(recipe), recipe=recipe, attempt=index + 1, attempts=len(recipes))
            for index, recipe in enumerate(recipes)
        )

    def _named_for(self, recipe: Recipe) -> ReleaseSpec:
        suffix, repo_id = self.recipe.repo_suffix, self.spec.repo_id
        if recipe.repo_suffix and suffix and repo_id.endswith(suffix):
            repo_id = repo_id.removesuffix(suffix) + recipe.repo_suffix
        return self.spec.model_copy(update={"repo_id": repo_id})


def _fallback(recipe: Recipe, index: int) -> Recipe:
    """The recipe at this place of the fallback list, without fallbacks of its own."""
    entry = recipe.fallback[index]
    if isinstance(entry, str):
        return load_recipe(entry).model_copy(update={"fallback": ()})
    content = recipe.model_dump(mode="json") | {"name": f"{recipe.name}-fallback-{index + 1}", "fallback": ()} | entry
    return validated(Recipe, content, f"recipe {recipe.name}, fallback {index + 1}")
