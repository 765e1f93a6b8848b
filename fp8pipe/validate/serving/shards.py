"""What vLLM cannot cut over a number of GPUs: matrices, heads, experts.

vLLM 0.32. `divide` refuses what does not divide; FP8 blocks must not be cut (`validate_fp8_block_shape` and
`validate_fp8_block_shape_moe` in vllm/model_executor/layers/quantization/utils/fp8_utils.py). Under quant_method fp8
vLLM skips the first check for fused matrices and then raises at load, or reads the scales of other blocks: that counts
as not loading too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fp8pipe.validate.serving.facts import Experts, Facts, Matrix

FINEST = 32
"""The smallest block to which vLLM refines the scales of experts: `refine_fp8_moe_block_shape` in
vllm/model_executor/layers/fused_moe/oracle/fp8.py."""


def objections(facts: Facts, ranks: int, *, expert_parallel: bool = False) -> Iterator[str]:
    """Why vLLM does not load the checkpoint on so many GPUs, each reason with its numbers."""
    if facts.heads and facts.heads % ranks:
        yield f"{facts.heads} attention heads do not divide by {ranks}"
    for name, heads in facts.towers:
        if heads % ranks:
            yield f"{heads} heads of the {name} tower do not divide by {ranks}, unless --mm-encoder-tp-mode is data"
    block = facts.spec.block
    for matrix in facts.matrices:
        yield from _matrix(matrix, ranks, block if matrix.quantized else None)
    for experts in facts.experts:
        yield from _experts(facts, experts, ranks, expert_parallel=expert_parallel)


def local_shape(matrix: Matrix, ranks: int) -> tuple[int, int]:
    """[out, in] on one rank of a matrix that can be cut."""
    if matrix.cut == "columns":
        return sum(part.rows for part in matrix.parts), matrix.columns // ranks
    shares = (part.share(1 if matrix.cut == "whole" else ranks) for part in matrix.parts)
    return sum(share or 0 for share in shares), matrix.columns


def _matrix(matrix: Matrix, ranks: int, block: tuple[int, int] | None) -> Iterator[str]:
    ranks = 1 if matrix.cut == "whole" else ranks
    if matrix.cut == "columns":
        if matrix.columns % ranks:
            yield f"{matrix.name}: {matrix.columns} columns do not divide by {ranks}"
        elif block and ranks > 1 and (share := matrix.columns // ranks) % block[1]:
            yield f"{matrix.name}: {share} columns per GPU are not whole blocks of {block[1]}"
        return
    shares = [part.share(ranks) for part in matrix.parts]
    for part, share in zip(matrix.parts, shares, strict=True):
        if share is None:
            what = f"{part.heads} KV heads" if part.heads else f"{part.rows} rows"
            yield f"{matrix.name}: {what} do not divide by {ranks}"
            return
    last = len(shares) if ranks > 1 else len(shares) - 1  # on one GPU the last part may end within a block
    bad = next((share for share in shares[:last] if block and share and share % block[0]), None)
    if block and bad:
        where = "per GPU" if ranks > 1 else "fused with others"
        yield f"{matrix.name}: {bad} rows {where} are not whole blocks of {block[0]}"


def _experts(facts: Facts, experts: Experts, ranks: int, *, expert_parallel: bool) -> Iterator[str]:
    cut = 1 if expert_parallel else ranks
    if experts.width % cut:
        yield f"{experts.name}: {experts.width} wide do not divide by {ranks}"
        return
    block, share = facts.spec.block if experts.quantized else None, experts.width // cut
    if block is None or not _breaks(share, block, ranks):
        return
    if facts.method == "fp8" and refined(experts, cut, block) is not None:
        return
    yield f"{experts.name}: {share} wide per GPU are not whole blocks of {block[0]}x{block[1]}"


def _breaks(share: int, block: tuple[int, int], ranks: int) -> bool:
    return bool(share % block[0] or (ranks > 1 and share % block[1]))


def refined(experts: Experts, cut: int, block: tuple[int, int]) -> int | None:
    """Side of the finer blocks with which vLLM loads experts that are cut within a block of quant_method fp8: the same
    scales, repeated. None if no block is cut, or none is fine enough."""
    share = experts.width // cut
    if not share % block[0] and (cut == 1 or not share % block[1]):
        return None
    side = math.gcd(*block, share, experts.hidden)
    return side if side >= FINEST else None
