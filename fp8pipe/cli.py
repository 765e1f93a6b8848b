"""The command line. A command parses its arguments, calls a stage, or runs a flow, and shows what comes back.

Heavy imports happen inside the commands, so that `--help` answers at once.

Exit codes: 0 done or accepted, 1 findings or rejected, 2 input, 3 inconclusive, 4 environment, 5 internal defect,
130 interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec

import typer
from rich.console import Console

from fp8pipe.errors import EnvironmentFault, from_system
from fp8pipe.machine.loopback import exempt_loopback
from fp8pipe.model.untrusted import printable
from fp8pipe.records import VERDICT_EXIT_CODES

if TYPE_CHECKING:
    from fp8pipe.config import CollectionSpec, Recipe, ReleaseSpec
    from fp8pipe.machine.prefect_server import EmbeddedServer
    from fp8pipe.records import BatchResult, Outcome
    from fp8pipe.ui.terminal import StageDisplay

app = typer.Typer(
    name="fp8pipe",
    help="Quantize Hub models to FP8 for vLLM, measure them against their baseline, gate them, publish what passes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
hub_app = typer.Typer(help="A Hub on loopback, for rehearsals and tests.", no_args_is_help=True)
app.add_typer(hub_app, name="hub")

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)

P = ParamSpec("P")


def main() -> None:
    """Console script."""
    exempt_loopback()
    app()


def guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """Exit with the code that a command returns; show an error as one message and exit with its code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs) or 0
        except KeyboardInterrupt:
            err.print("interrupted; run the same command again to resume")
            code = 130
        except SystemExit:
            raise
        except BaseException as error:  # the outermost frame: an unforeseen error, such as a panic in Rust, is a defect
            found = from_system(error)
            if found is None:
                code = 5
                err.print(f"[red]internal error[/red]: {_store_trace()}")
            else:
                code = found.exit_code
                err.print(f"[red]error[/red] ({type(found).__name__}):", end=" ")
                err.print("\n".join(map(printable, str(found).split("\n"))), markup=False)
        raise typer.Exit(code)

    return run


def _store_trace() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="fp8pipe-", suffix=".trace", delete=False) as file:
        file.write(traceback.format_exc())
    last = traceback.format_exc().strip().splitlines()[-1]
    return f"{last}\nThis is a defect of fp8pipe; the full trace is in {file.name}"


def emit_json(value: Any) -> None:
    """Write `value` to stdout as JSON."""
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------ options

Model = Annotated[str, typer.Argument(help="Hub id, Hub id@revision, or folder", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", help="Name in configs/recipes, or path")]
SuiteName = Annotated[str, typer.Option("--suite", help="Name in configs/suites, or path")]
PolicyName = Annotated[str, typer.Option("--policy", help="Name in configs/gates, or path")]
Folder = Annotated[Path, typer.Argument(help="Checkpoint folder", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to", show_default=False)]
RepoId = Annotated[str, typer.Option("--repo-id", help="Where to publish: namespace/name", show_default=False)]
Collection = Annotated[str | None, typer.Option("--collection", help="namespace/title, a slug, or its address")]
Spread = Annotated[
    str | None,
    typer.Option("--parallel", help="auto, or tensor=4,pipeline=2,data=2,expert; default: as the suite says"),
]
Visible = Annotated[
    Literal["private", "gated", "public"] | None,
    typer.Option("--visibility", help="Who may see a new repository", show_default="as its base model"),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Overwrite another model's repository, or files and README made by hand")
]
Supersedes = Annotated[
    list[str] | None,
    typer.Option("--supersedes", metavar="TAG", help="The yanked release that this one takes the place of"),
]
SignKey = Annotated[
    Path | None, typer.Option("--sign-key", help="EC private key (PEM) that signs the release", show_default="unsigned")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, logs on stderr")]
WorkDir = Annotated[str, typer.Option("--work-dir", help="Folder for releases and baselines")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let this model bring its own Python code")]

CardTemplate = Annotated[str | None, typer.Option(help="Your own template of the card (Jinja)")]
LicenceId = Annotated[
    str | None,
    typer.Option("--licence", help="The source's licence, where its card leaves it open"),
]
LicenceReason = Annotated[str | None, typer.Option(help="How you know the licence; published in the card")]
LicenceFile = Annotated[
    Path | None, typer.Option(help="The licence's text, where it must go along and the source has none")
]
Licences = Annotated[str | None, typer.Option(help="Your own table of licences, instead of configs/licences.yaml")]

AskVllm = Annotated[
    bool,
    typer.Option("--oracles/--no-oracles", help="Ask vLLM's own model, where vLLM is installed, whether it reads this"),
]


def _recipe_with(
    name: str,
    *,
    num_samples: int | None = None,
    max_seq_len: int | None = None,
    dataset: str | None = None,
    activation_scheme: str | None = None,
    checkpoint_format: str | None = None,
) -> Recipe:
    """The recipe with the command line's overrides, validated as a whole."""
    from fp8pipe.config import Recipe as RecipeClass
    from fp8pipe.config import load_recipe, validated

    content = load_recipe(name).model_dump(mode="json")
    calibration = {"num_samples": num_samples, "max_seq_len": max_seq_len, "dataset": dataset}
    content["calibration"] |= {key: value for key, value in calibration.items() if value is not None}
    if activation_scheme == "static":
        content["activations"] = {"mode": "static", "strategy": "tensor"}
    if activation_scheme == "dynamic":
        strategy = "group" if content["weights"]["strategy"] == "block" else "token"
        content["activations"] = {"mode": "dynamic", "strategy": strategy}
    if checkpoint_format is not None:
        content["checkpoint_format"] = checkpoint_format
    return validated(RecipeClass, content, f"recipe {name} with these options")


def _licensing(
    licence: str | None, licence_reason: str | None, licence_file: Path | None, licences: str | None
) -> dict[str, Any]:
    """The options as fields of a ReleaseSpec."""
    fields: dict[str, Any] = {} if licences is None else {"licences": licences}
    claim = {"id": licence, "reason": licence_reason, "file": licence_file and str(licence_file)}
    given = {key: value for key, value in claim.items() if value is not None}
    return fields | ({"licence": given} if given else {})


# ------------------------------------------------------------------------------------------ stages


@app.command()
@guarded
def plan(
    model: Model,
    recipe: RecipeName = "fp8-dynamic",
    trust_remote_code: TrustRemoteCode = False,
    oracles: AskVllm = True,
    as_json: AsJson = False,
) -> None:
    """Show what would become of every tensor, from headers alone: no weight is read."""
    from fp8pipe import stages
    from fp8pipe.config import load_recipe
    from fp8pipe.release.admission import licence_terms
    from fp8pipe.ui.sheets import plan_sheet, serving_sheet, terminal, terms_lines

    chosen = load_recipe(recipe)
    snapshot = stages.pin(model)
    made = stages.plan(snapshot, chosen, trust_remote_code=trust_remote_code, oracles=oracles)
    if as_json:
        emit_json(made.model_dump(mode="json"))
    else:
        out.print(terminal(plan_sheet(made)))
        if made.serving is not None:
            out.print(terminal(serving_sheet(made.serving)))
        for line in terms_lines(*licence_terms(snapshot)):
            out.print(line, markup=False)


@app.command()
@guarded
def quantize(
    model: Model,
    output: Output,
    recipe: RecipeName = "fp8-dynamic",
    num_samples: Annotated[int | None, typer.Option(help="Calibration samples")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Tokens per calibration sample")] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration dataset: Hub id or local file")] = None,
    device: Annotated[
        str,
        typer.Option(help="auto (calibrates on a GPU if there is one, quantizes on the CPU), cpu, cuda or cuda:<n>"),
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    activation_scheme: Annotated[Literal["static", "dynamic"] | None, typer.Option(help="Override the recipe")] = None,
    checkpoint_format: Annotated[
        Literal["compressed-tensors", "fp8"] | None, typer.Option(help="Override the recipe")
    ] = None,
    oracles: AskVllm = True,
    licence: LicenceId = None,
    licence_reason: LicenceReason = None,
    licence_file: LicenceFile = None,
    licences: Licences = None,
    card_template: CardTemplate = None,
) -> None:
    """Write the FP8 checkpoint, after calibrating if the recipe needs it."""
    from fp8pipe import stages
    from fp8pipe.config import LicenceClaim, validated
    from fp8pipe.progress import human_bytes
    from fp8pipe.records import Terms, record_path

    chosen = _recipe_with(
        recipe,
        num_samples=num_samples,
        max_seq_len=max_seq_len,
        dataset=dataset,
        activation_scheme=activation_scheme,
        checkpoint_format=checkpoint_format,
    )
    licensing = _licensing(licence, licence_reason, licence_file, licences)
    if "licence" in licensing:
        licensing["claim"] = validated(LicenceClaim, licensing.pop("licence"), "licence")
    with _stage_display("quantize") as display:
        made = stages.quantize_model(
            model,
            chosen,
            output,
            device=device,
            trust_remote_code=trust_remote_code,
            oracles=oracles,
            card_template=card_template,
            progress=display,
            **licensing,
        )
    sizes = f"{human_bytes(made.source_bytes)} -> {human_bytes(made.output_bytes)}"
    out.print(f"{output}: {made.quantized_tensors} tensors in FP8, {made.kept_tensors} kept, {sizes}")
    out.print(f"fingerprint {made.fingerprint}")
    terms = Terms.load(record_path(output, "terms"))
    if terms.problem:
        err.print(f"licence: {printable(terms.problem)}", markup=False)


@app.command()
@guarded
def validate(
    model: Model,
    source: Annotated[str | None, typer.Option(help="Source model, for fidelity checks")] = None,
    depth: Annotated[
        Literal["headers", "values", "fidelity", "loaded"] | None,
        typer.Option(
            help="How much to read. On the Hub, more than headers is downloaded",
            show_default="as deep as the files at hand allow, without loaded",
        ),
    ] = None,
    oracles: Annotated[
        bool | None,
        typer.Option(
            "--oracles/--no-oracles",
            help="Demand the answers of transformers' and vLLM's own model, or ask neither",
            show_default="ask vLLM where it is installed",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check the structure and values of any FP8 checkpoint, also on the Hub; with its source, compare the weights."""
    from fp8pipe import stages
    from fp8pipe.ui.sheets import findings_sheet, serving_sheet, terminal

    with _stage_display("validate") as display:
        report = stages.validate_model(model, source=source, depth=depth, oracles=oracles, progress=display)
    if depth is not None and report.depth != depth and not report.loaded_silent:
        err.print(f"depth {report.depth} only: the checkpoint is incomplete, so nothing more was downloaded")
    if as_json:
        emit_json(report.model_dump(mode="json"))
    else:
        out.print(terminal(findings_sheet(report)))
        if report.serving is not None:
            out.print(terminal(serving_sheet(report.serving)))
    if report.sound and report.loaded_silent:
        raise EnvironmentFault(report.loaded_silent)
    return 0 if report.sound else 1


@app.command()
@guarded
def convert(
    model: Model,
    to: Annotated[Literal["compressed-tensors", "fp8"] | None, typer.Option(help="Format to write")] = None,
    migrate: Annotated[bool, typer.Option("--migrate", help="Rename legacy tensors; --to does so too")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder", show_default="source name and format")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite an FP8 checkpoint in another format, or rename its legacy tensors; no FP8 byte changes."""
    from fp8pipe import stages
    from fp8pipe.errors import InputError
    from fp8pipe.ui.sheets import conversion_sheet, terminal

    if to is None and not migrate:
        raise InputError("nothing to do: give --to compressed-tensors, --to fp8, or --migrate")
    with _stage_display("convert") as display:
        done, folder = stages.convert(model, output, to=to, progress=display)
    if as_json:
        emit_json(done.model_dump(mode="json") | {"folder": str(folder) if done.changes else None})
    else:
        out.print(terminal(conversion_sheet(done, folder)))


@app.command()
@guarded
def sensitivity(folder: Folder, as_json: AsJson = False) -> None:
    """Show what FP8 costs each Linear of a calibrated checkpoint: the ten worst, and a plot of all."""
    from fp8pipe import stages
    from fp8pipe.ui.sheets import sensitivity_sheet, terminal

    calibration, plot = stages.sensitivity(folder)
    if as_json:
        fields = {"model_id", "sensitivity", "layers", "expert_tokens", "kept", "kv_absent", "assumed"}
        emit_json(calibration.model_dump(mode="json", include=fields))
        return
    out.print(terminal(sensitivity_sheet(calibration)))
    if plot is not None:
        out.print(f"plot: {plot} and {plot.with_suffix('.svg').name}", soft_wrap=True)


@app.command()
@guarded
def evaluate(
    model: Model,
    output: Output,
    suite: SuiteName = "quick",
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"],
        typer.Option(help="KV cache dtype to serve with; auto: the recipe's"),
    ] = "auto",
    online: Annotated[Literal["fp8"] | None, typer.Option(help="Let vLLM quantize the BF16 model at load")] = None,
    parallel: Spread = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first N samples of each task", min=1)] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let this model bring its own Python code")] = False,
) -> None:
    """Measure a model or checkpoint with lm-eval in vLLM, and write report.json."""
    from fp8pipe import stages
    from fp8pipe.config import EvalSuite, load_suite, validated
    from fp8pipe.ui.sheets import measurement_notes

    chosen = load_suite(suite)
    if parallel is not None:
        chosen = validated(EvalSuite, chosen.model_dump() | {"parallel": parallel}, "--parallel")
    with _stage_display("evaluate") as display:
        report = stages.evaluate_model(
            model,
            chosen,
            output,
            kv_cache_dtype=kv_cache_dtype,
            online=online,
            limit=limit,
            trust_remote_code=trust_remote_code,
            progress=display,
        )
    out.print(report.table, markup=False)
    for note in measurement_notes(report):
        out.print(note, markup=False, highlight=False)
    out.print(f"{output / 'report.json'}: {report.engine.device_class}, KV cache {report.engine.kv_cache_dtype}")


@app.command()
@guarded
def plan_eval(
    policy: PolicyName = "quick",
    suite: SuiteName = "quick",
    attempts: Annotated[int, typer.Option(help="Recipes that a fallback ladder may try", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Show how many samples the policy's margins need, and whether the suite has them; exit 2 if it does not."""
    from fp8pipe import stages
    from fp8pipe.config import check_fit, load_policy, load_suite
    from fp8pipe.ui.sheets import eval_plan_sheet, terminal

    rules, measured = load_policy(policy), load_suite(suite)
    check_fit(rules, measured)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-plan-eval-") as folder:
        evaluation_plan = stages.plan_evaluation(rules, measured, Path(folder), attempts=attempts)
    if as_json:
        emit_json(evaluation_plan.model_dump(mode="json"))
    else:
        out.print(terminal(eval_plan_sheet(evaluation_plan, rules, measured)))
    evaluation_plan.require()


@app.command()
@guarded
def gate(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE_DIR", help="Folder with the baseline's report.json")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE_DIR", help="Folder with the candidate's report.json")],
    policy: PolicyName = "quick",
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder; writes its fp8pipe/gate.json")] = None,
    as_json: AsJson = False,
) -> int:
    """Decide whether the candidate is non-inferior: exit 0 (accepted), 1 (rejected) or 3 (inconclusive)."""
    from fp8pipe import stages
    from fp8pipe.config import load_policy
    from fp8pipe.ui.sheets import decision_sheet, terminal

    decision = stages.gate_reports(baseline, candidate, load_policy(policy), checkpoint=checkpoint)
    if as_json:
        emit_json(decision.model_dump(mode="json"))
    else:
        out.print(terminal(decision_sheet(decision)))
    return VERDICT_EXIT_CODES[decision.verdict]


@app.command()
@guarded
def approve(
    folder: Folder,
    by: Annotated[str, typer.Option("--by", help="Who decides; published in the card", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why; published in the card", show_default=False)],
) -> None:
    """Approve an inconclusive result, if its policy has on_inconclusive: ask. Then run `publish`."""
    from fp8pipe import stages

    approval = stages.approve(folder, who=by, reason=reason)
    out.print(f"{folder}: released by decision of {approval.who}, {approval.when}", markup=False)


@app.command()
@guarded
def publish(
    folder: Folder,
    repo_id: RepoId,
    collection: Collection = None,
    visibility: Visible = None,
    replace: Replace = False,
    supersedes: Supersedes = None,
    sign_key: SignKey = None,
) -> None:
    """Publish an accepted checkpoint with its card and evidence, then verify it on the Hub."""
    from fp8pipe import stages
    from fp8pipe.config import Target, validated
    from fp8pipe.ui.sheets import release_sheet, terminal

    os.scandir(folder).close()  # raises for what is no folder
    content = {"repo_id": repo_id, "collection": collection, "visibility": visibility, "replace": replace}
    content |= {"supersedes": supersedes or (), "sign": _signing(sign_key)}
    target = validated(Target, content, "publish")
    with _stage_display("publish") as display:
        release = stages.publish(folder, target, progress=display)
    out.print(terminal(release_sheet(release)))


@app.command()
@guarded
def card(
    folder: Folder,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository that the card names", show_default="the folder")
    ] = None,
    card_template: CardTemplate = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the Markdown instead of serving a page")] = False,
) -> None:
    """Preview the card of a gated checkpoint in a browser, as the Hub would show it, until interrupted."""
    from fp8pipe import stages
    from fp8pipe.rehearsal.preview import preview

    name = repo_id or f"preview/{folder.resolve().name}"
    text = stages.card(folder, repo_id=name, template=card_template)
    if markdown:
        sys.stdout.write(text)
        return
    with preview(folder, text, name) as address, suppress(KeyboardInterrupt):
        out.print(f"{address}\nopen it in a browser; Ctrl-C ends it", soft_wrap=True)
        threading.Event().wait()


def _signing(key: Path | None) -> dict[str, str] | None:
    """`sign` of a release's file, from the command line."""
    return {"key": str(key.resolve())} if key is not None else None


@app.command()
@guarded
def verify(
    release: Annotated[str, typer.Argument(help="Repository, repository@tag, or folder", show_default=False)],
    key: Annotated[
        Path | None,
        typer.Option("--key", help="The signer's public key (EC, PEM)", show_default="signature unverified"),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Read every byte of the weights, too")] = False,
    as_json: AsJson = False,
) -> int:
    """Prove a published release with nothing but what was published: exit 0, or 1 if any part of it is broken."""
    from fp8pipe import stages
    from fp8pipe.ui.sheets import terminal, verification_sheet

    with _stage_display("verify") as display:
        verification = stages.verify(release, key=key, download=download, progress=display)
    if as_json:
        emit_json(verification.model_dump(mode="json"))
    else:
        out.print(terminal(verification_sheet(verification)))
    return 0 if verification.holds else 1


@app.command()
@guarded
def yank(
    release: Annotated[
        str, typer.Argument(help="Repository (its newest release), or repository@tag", show_default=False)
    ],
    reason: Annotated[str, typer.Option("--reason", help="Why; published in the card", show_default=False)],
) -> None:
    """Withdraw a release: a banner in its card, no collection lists it any more, its tag stays."""
    from fp8pipe.release.yank import yank
    from fp8pipe.ui.sheets import terminal, withdrawal_sheet

    out.print(terminal(withdrawal_sheet(yank(release, reason))))


@app.command()
@guarded
def reconcile(
    collection: Annotated[str, typer.Argument(help="Collection file, or name in configs/collections")],
    apply: Annotated[bool, typer.Option("--apply", help="Make the changes, instead of showing them")] = False,
    as_json: AsJson = False,
) -> int:
    """Compare a Hub collection with its file and what is published: exit 1 if it differs, 0 once it does not."""
    from fp8pipe.config import load_collection
    from fp8pipe.release.reconcile import reconcile
    from fp8pipe.ui.sheets import reconciliation_sheet, terminal

    found = reconcile(load_collection(collection), apply=apply)
    if as_json:
        emit_json(found.model_dump(mode="json"))
    else:
        out.print(terminal(reconciliation_sheet(found, collection)))
    return 1 if found.changes and not found.applied else 0


# ------------------------------------------------------------------------------------------ flows


@app.command()
@guarded
def release(
    model: Model,
    repo_id: RepoId,
    recipe: RecipeName = "fp8-dynamic",
    suite: SuiteName = "quick",
    policy: PolicyName = "quick",
    collection: Collection = None,
    visibility: Visible = None,
    replace: Replace = False,
    supersedes: Supersedes = None,
    sign_key: SignKey = None,
    work_dir: WorkDir = "fp8pipe-work",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for calibration")] = "auto",
    parallel: Spread = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let this model bring its own Python code")] = False,
    oracles: Annotated[
        bool, typer.Option("--oracles/--no-oracles", help="Ask vLLM's own model before anything is measured")
    ] = True,
    licence: LicenceId = None,
    licence_reason: LicenceReason = None,
    licence_file: LicenceFile = None,
    licences: Licences = None,
    card_template: CardTemplate = None,
) -> int:
    """Quantize, validate, evaluate, gate and publish one model: the Prefect flow, run here and now."""
    from fp8pipe.config import ReleaseSpec, validated
    from fp8pipe.ui.sheets import outcome_sheet, terminal

    content = {
        "model": model,
        "repo_id": repo_id,
        "recipe": recipe,
        "suite": suite,
        "policy": policy,
        "collection": collection,
        "visibility": visibility,
        "replace": replace,
        "supersedes": supersedes or (),
        "sign": _signing(sign_key),
        "work_dir": work_dir,
        "device": device,
        "parallel": parallel,
        "trust_remote_code": trust_remote_code,
        "oracles": oracles,
        "card_template": card_template,
    }
    content |= _licensing(licence, licence_reason, licence_file, licences)
    spec = validated(ReleaseSpec, content, "release")
    spec.resolve()  # reports a wrong name before any server starts
    with _flow_session(Path(spec.work_dir), "release") as session:
        outcome = session.release(spec)
    out.print(terminal(outcome_sheet(outcome)))
    return outcome.exit_code


@app.command()
@guarded
def batch(collection: Annotated[str, typer.Argument(help="Collection file, or name in configs/collections")]) -> int:
    """Release every model of a collection with every recipe: the Prefect flow, run here and now."""
    from fp8pipe.config import load_collection
    from fp8pipe.ui.sheets import batch_sheet, terminal

    spec = load_collection(collection)
    for one in spec.releases():
        one.resolve()
    with _flow_session(Path(spec.work_dir), "batch") as session:
        result = session.batch(spec)
    out.print(terminal(batch_sheet(result)))
    return worst_exit([entry.exit_code for entry in result.entries])


def worst_exit(codes: list[int]) -> int:
    """The worst of `codes`: the first of 5, 4, 2, 1, 3, 0 that occurs."""
    return next(code for code in (5, 4, 2, 1, 3, 0) if code in codes)


@contextmanager
def _flow_session(work_dir: Path, name: str, prefect_home: Path | None = None) -> Iterator[FlowSession]:
    """A quiet terminal with a stage display, and a Prefect server starting in the background."""
    from fp8pipe.machine.prefect_server import prefect_api
    from fp8pipe.release.workspace import Workspace
    from fp8pipe.ui.terminal import StageDisplay, quiet_terminal

    workspace = Workspace(work_dir)
    log = workspace.log(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    err.print(f"full log: {log}")
    with (
        quiet_terminal(log) as console,
        StageDisplay(console) as display,
        prefect_api(workspace.log("prefect-server"), prefect_home) as server,
    ):
        yield FlowSession(display, server)


@dataclass(frozen=True)
class FlowSession:
    """The display and the Prefect server of flows that run here and now."""

    display: StageDisplay
    server: EmbeddedServer | None

    def release(self, spec: ReleaseSpec) -> Outcome:
        """Run release_model."""
        self._prefect()
        from flows import here

        return here.release(spec, self.display)

    def batch(self, spec: CollectionSpec) -> BatchResult:
        """Run release_collection."""
        self._prefect()
        from flows import here

        return here.batch(spec, self.display)

    def _prefect(self) -> None:
        """Wait for the server. Prefect may be imported only after this, since it reads its settings once."""
        from fp8pipe.progress import ProgressEvent

        where = self.server.api_url if self.server else "the configured server"
        self.display(ProgressEvent("prefect", 0, None, note=where))
        if self.server is not None:
            self.server.ready()


@contextmanager
def _stage_display(name: str) -> Iterator[StageDisplay]:
    """A quiet terminal with a stage display, for a single stage."""
    from fp8pipe.ui.terminal import StageDisplay, quiet_terminal

    log = Path(tempfile.gettempdir()) / f"fp8pipe-{name}-{os.getpid()}.log"
    with quiet_terminal(log) as console, StageDisplay(console) as display:
        yield display


# ------------------------------------------------------------------------------------------ other commands


@app.command()
@guarded
def demo(
    workdir: Annotated[Path, typer.Option(help="Work folder of the demo")] = Path("fp8pipe-demo"),
    sabotage: Annotated[bool, typer.Option("--sabotage", help="Calibrate badly, so that the gate rejects")] = False,
) -> int:
    """Run the whole pipeline on a tiny model with a local Hub and real vLLM: five minutes, nothing to set up."""
    from fp8pipe.machine import device

    device.require([])
    from fp8pipe.rehearsal.demo.run import recipe_for, rehearse
    from fp8pipe.ui.sheets import outcome_sheet, terminal

    machine = device.examine()
    if machine.problems:
        err.print(f"The demo leaves the KV cache in 16 bits: {'; '.join(machine.problems)}", markup=False)
    outcome = rehearse(workdir, recipe_for(machine), sabotage=sabotage, session=_flow_session)
    out.print(terminal(outcome_sheet(outcome)))
    return outcome.exit_code


@app.command()
@guarded
def status(
    collection: Annotated[str | None, typer.Argument(help="Collection file; default: every release")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Ask the Hub: what is published, yanked, or stale")] = False,
    work_dir: WorkDir = "fp8pipe-work",
    as_json: AsJson = False,
) -> None:
    """Show which releases are published, missing, rejected or in progress; with --hub also stale or yanked."""
    from fp8pipe.config import load_collection
    from fp8pipe.errors import InputError
    from fp8pipe.release.status import collection_status, release_status
    from fp8pipe.ui.sheets import status_sheet, terminal

    spec = load_collection(collection) if collection else None
    if hub and spec is None:
        raise InputError("--hub: which releases? Give the collection file: fp8pipe status FILE --hub")
    offline = Path(spec.work_dir if spec else work_dir)
    rows = collection_status(spec) if hub and spec else release_status(offline, spec)
    if as_json:
        emit_json({"releases": [row.model_dump(mode="json") for row in rows]})
    else:
        out.print(terminal(status_sheet(rows)))


@app.command()
@guarded
def doctor(as_json: AsJson = False) -> int:
    """Check that this machine can do the work: device, packages, Hub, disk, Prefect. Exit 4 if it cannot."""
    from fp8pipe.ui.doctor import examine
    from fp8pipe.ui.sheets import doctor_sheet, terminal

    checks = examine()
    if as_json:
        emit_json({"checks": [check.model_dump(mode="json") for check in checks]})
    else:
        out.print(terminal(doctor_sheet(checks)))
    return 4 if any(check.outcome == "failed" for check in checks) else 0


@hub_app.command()
@guarded
def serve(
    root: Annotated[Path, typer.Option(help="Folder that holds the Hub's state", show_default=False)],
    port: Annotated[int, typer.Option(help="Port on loopback")] = 8765,
) -> None:
    """Serve the Hub stored in a folder, until interrupted."""
    from fp8pipe.rehearsal.localhub import local_token
    from fp8pipe.rehearsal.localhub import serve as serve_hub

    def announce(address: str) -> None:
        out.print(f"serving {root} at {address}", markup=False, soft_wrap=True)
        out.print(f"export HF_ENDPOINT={address} HF_TOKEN={local_token(root)}", markup=False, soft_wrap=True)

    serve_hub(root, port, on_ready=announce)
