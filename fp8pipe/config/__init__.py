"""The YAML files that people write, as classes: Recipe, EvalSuite, GatePolicy, ReleaseSpec, CollectionSpec.

Unknown keys are errors, bounds are in the types, and every message names the file and the key. A name without a slash
or suffix is looked up in `configs/`; anything else is a path.

Nothing heavy is imported, so a config error is reported at once.
"""

from fp8pipe.config.base import Config
from fp8pipe.config.collection import (
    MAX_TITLE,
    CollectionMeta,
    CollectionSpec,
    ModelEntry,
    load_collection,
)
from fp8pipe.config.files import (
    CONFIG_DIR,
    Kind,
    find,
    load,
    shipped,
    validated,
)
from fp8pipe.config.licences import (
    Licence,
    LicenceClaim,
    LicenceTable,
    load_licences,
)
from fp8pipe.config.parallel import (
    Parallel,
    Parallelism,
)
from fp8pipe.config.policy import (
    LIKELIHOODS,
    GatePolicy,
    PerplexityPolicy,
    TaskPolicies,
    TaskPolicy,
    load_policy,
    look_sizes,
)
from fp8pipe.config.recipe import (
    LOCAL_DATA,
    ActivationScheme,
    CalibrationSpec,
    KeepRule,
    KVCacheScheme,
    Recipe,
    WeightScheme,
    dataset_name,
    is_local_data,
    load_recipe,
)
from fp8pipe.config.release import (
    ReleaseSpec,
    ResolvedRelease,
    Sign,
    Target,
    Visibility,
    check_fit,
    read_template,
)
from fp8pipe.config.suite import (
    SAMPLE_PROMPTS,
    EvalSuite,
    ServingWorkload,
    TaskSpec,
    load_suite,
)

__all__ = [
    "CONFIG_DIR",
    "LIKELIHOODS",
    "LOCAL_DATA",
    "MAX_TITLE",
    "SAMPLE_PROMPTS",
    "ActivationScheme",
    "CalibrationSpec",
    "CollectionMeta",
    "CollectionSpec",
    "Config",
    "EvalSuite",
    "GatePolicy",
    "KVCacheScheme",
    "KeepRule",
    "Kind",
    "Licence",
    "LicenceClaim",
    "LicenceTable",
    "ModelEntry",
    "Parallel",
    "Parallelism",
    "PerplexityPolicy",
    "Recipe",
    "ReleaseSpec",
    "ResolvedRelease",
    "ServingWorkload",
    "Sign",
    "Target",
    "TaskPolicies",
    "TaskPolicy",
    "TaskSpec",
    "Visibility",
    "WeightScheme",
    "check_fit",
    "dataset_name",
    "find",
    "is_local_data",
    "load",
    "load_collection",
    "load_licences",
    "load_policy",
    "load_recipe",
    "load_suite",
    "look_sizes",
    "read_template",
    "shipped",
    "validated",
]
