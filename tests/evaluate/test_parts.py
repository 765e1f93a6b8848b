"""Parts of an evaluation: how they are found and joined, and how two runs are compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate.flips import flip_rates
from fp8pipe.evaluate.parts import Part, Parts, joined, table_rows
from fp8pipe.records import PROOF_VERSION, MetricSamples, ModuleProof, TaskResult


def result(values: list[float], first: int = 0, metric: str = "acc", weights: tuple[float, ...] = ()) -> TaskResult:
    ids = tuple(range(first, first + len(values)))
    samples = MetricSamples(
        metric=metric,
        filter="none",
        higher_is_better=True,
        mean=math.fsum(values) / len(values),
        stderr=None,
        values=tuple(values),
        weights=weights,
    )
    hashes = tuple(f"h{i}" for i in ids)
    return TaskResult(
        task="t",
        version="1",
        num_fewshot=0,
        doc_ids=ids,
        doc_hashes=hashes,
        prompt_hashes=hashes,
        target_hashes=hashes,
        metrics=(samples,),
    )


def part(values: list[float], start: int, identity: str = "me", **options: Any) -> Part:
    task = result(values, start, **options)
    return Part(identity=identity, start=start, stop=start + len(values), result=task, rows={"results": {"t": {}}})


def test_a_proof_is_found_again_by_its_own_measurement_and_version(tmp_path: Path) -> None:
    proof = ModuleProof(version=PROOF_VERSION, modules=())
    mine, others = Parts(tmp_path, "me"), Parts(tmp_path, "other")
    assert mine.find_proof() is None
    mine.save_proof(proof)
    assert (mine.find_proof(), others.find_proof()) == (proof, None)
    mine.save_proof(proof.model_copy(update={"version": PROOF_VERSION + 1}))
    assert mine.find_proof() is None


def test_parts_are_found_as_a_chain_from_the_first_document(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "me")
    for one in (part([1.0, 0.0], 0), part([1.0], 2), part([0.0], 4)):
        parts.save("a/t", one)
    assert [(p.start, p.stop) for p in parts.find("a/t", [10])] == [(0, 2), (2, 3)]
    assert [(p.start, p.stop) for p in parts.find("a/t", [2])] == [(0, 2)]
    assert parts.find("a/t", [1]) == []


def test_parts_whose_prompts_depend_on_the_pass_are_found_at_their_looks_only(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "me")
    for one in (part([1.0, 0.0], 0), part([1.0], 2), part([0.0] * 3, 0)):
        parts.save("t", one)
    places = [[(p.start, p.stop) for p in parts.find("t", stops, whole_looks=True)] for stops in ([3], [2, 3], [1, 3])]
    assert places == [[(0, 3)], [(0, 2), (2, 3)], []]


def test_parts_of_another_measurement_or_task_are_not_used(tmp_path: Path) -> None:
    Parts(tmp_path, "other").save("t", part([1.0], 0, identity="other"))
    Parts(tmp_path, "me").save("t-2", part([1.0], 0))
    (tmp_path / "t-0-9.json").write_text("{half")
    assert Parts(tmp_path, "me").find("t", [10]) == []


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5), min_size=1, max_size=4))
def test_joined_parts_equal_one_measurement_of_all(pieces: list[list[float]]) -> None:
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    together = joined([part(values, start) for values, start in zip(pieces, starts, strict=True)])
    whole = [value for values in pieces for value in values]
    expected = result(whole)
    assert together.doc_hashes == expected.doc_hashes
    assert together.metrics[0].values == tuple(whole)
    assert together.metrics[0].mean == pytest.approx(sum(whole) / len(whole))


def test_joined_perplexity_weighs_documents_by_their_words() -> None:
    # 10 words at -1 nat each, 30 words at -2 nats each: exp(70 / 40)
    pieces = [
        part([-1.0], 0, metric="word_perplexity", weights=(10.0,)),
        part([-2.0], 1, metric="word_perplexity", weights=(30.0,)),
    ]
    assert joined(pieces).metrics[0].mean == pytest.approx(math.exp(70 / 40))
    plain = [part([-1.0], 0, metric="perplexity"), part([-2.0, -3.0], 1, metric="perplexity")]
    assert joined(plain).metrics[0].mean == pytest.approx(math.exp(2))


def test_joined_standard_error_is_lm_evals() -> None:
    from lm_eval.api.metrics import mean_stderr

    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    together = joined([part(values[:2], 0), part(values[2:], 2)])
    assert together.metrics[0].stderr == pytest.approx(mean_stderr(values))
    row = table_rows("t", [part(values[:2], 0), part(values[2:], 2)])["results"]["t"]
    assert (row["acc,none"], row["acc_stderr,none"]) == (together.metrics[0].mean, together.metrics[0].stderr)


def test_flip_rate_counts_samples_that_changed_and_refuses_other_samples() -> None:
    [rate] = flip_rates(result([1.0, 0.0, 1.0, 1.0]), result([1.0, 1.0, 0.0, 1.0]))
    assert (rate.n, rate.flipped, rate.rate) == (4, 2, 0.5)
    with pytest.raises(EngineFailed, match="scored different samples"):
        flip_rates(result([1.0]), result([1.0], first=1))
