"""A collection: every model with every recipe, released together."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from fp8pipe.config.base import Config
from fp8pipe.config.files import load, validated
from fp8pipe.config.recipe import load_recipe
from fp8pipe.config.release import EngineSpec, ReleaseSpec, Sign, Visibility
from fp8pipe.errors import ConfigError

MAX_TITLE = 59
"""Characters that the Hub accepts in the title of a collection."""


class ModelEntry(Config):
    """One model of a collection."""

    id: str
    revision: str | None = None
    overrides: dict[str, Any] = Field(default={})
    """Fields of ReleaseSpec for this model alone."""


class CollectionMeta(Config):
    """The Hub collection to fill."""

    namespace: str
    title: str = Field(min_length=1, max_length=MAX_TITLE)
    description: str = Field(default="", max_length=150)
    """Shown by the Hub under the title. Given to a collection that is created, not to one that exists."""


class CollectionSpec(Config):
    """A list of models to release: the parameter of the flow `release_collection`."""

    collection: CollectionMeta
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    recipes: tuple[str, ...] = Field(min_length=1)
    suite: str
    policy: str
    repo_name: str = "{namespace}/{model}{suffix}"
    """Repository of a release, from {namespace}, {model} (last part of its id), {suffix} (of the recipe), {recipe}."""
    licences: str | None = None
    """File that says what each licence asks of a copy; None: the shipped one."""
    visibility: Visibility | None = None
    """Who may see the repositories that the releases create; by default, each as its base model."""
    replace: bool = False
    """Overwrite repositories of other models, or with files or a README made by hand."""
    sign: Sign | None = None
    """Sign the releases with an EC key."""
    card_template: str | None = None
    """Template of the cards, a path; None: the shipped one."""
    work_dir: str = "fp8pipe-work"
    engine: EngineSpec = EngineSpec()
    """The environment of vLLM and lm-eval, for every release that names none of its own."""

    @model_validator(mode="after")
    def _one_repository_each(self) -> Self:
        """Refuse two releases that would overwrite each other. The Hub takes names that differ in case as one."""
        named: dict[str, ReleaseSpec] = {}
        for one in self.releases():
            first = named.setdefault(one.repo_id.lower(), one)
            if first is not one:
                raise ConfigError(
                    f"{one.model} with {one.recipe} and {first.model} with {first.recipe} would both be released as "
                    f"{one.repo_id}; put {{model}} and {{suffix}} or {{recipe}} into repo_name, or override repo_id"
                )
        return self

    def releases(self) -> tuple[ReleaseSpec, ...]:
        """One release spec for every model and recipe."""
        specs = []
        for entry in self.models:
            for recipe_name in self.recipes:
                specs.append(self._release(entry, recipe_name))
        return tuple(specs)

    def _release(self, entry: ModelEntry, recipe_name: str) -> ReleaseSpec:
        recipe = load_recipe(recipe_name)
        repo_id = self.repo_name.format(
            namespace=self.collection.namespace,
            model=entry.id.rstrip("/").rsplit("/", 1)[-1],
            suffix=recipe.repo_suffix,
            recipe=recipe.name,
        )
        fields = {
            "model": entry.id if entry.revision is None else f"{entry.id}@{entry.revision}",
            "recipe": recipe_name,
            "suite": self.suite,
            "policy": self.policy,
            "repo_id": repo_id,
            "collection": f"{self.collection.namespace}/{self.collection.title}",
            "collection_description": self.collection.description,
            "licences": self.licences,
            "visibility": self.visibility,
            "replace": self.replace,
            "sign": self.sign,
            "card_template": self.card_template,
            "work_dir": self.work_dir,
            "engine": self.engine.model_dump(),
        }
        return validated(ReleaseSpec, fields | entry.overrides, f"model {entry.id}")


def load_collection(name: str) -> CollectionSpec:
    """A shipped collection by name, or a collection file by path."""
    return load(CollectionSpec, "collections", name)
