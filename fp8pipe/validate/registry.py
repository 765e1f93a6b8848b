"""The checks in the order in which they run: by the letter of their id, then by its number.

Without the checks of V and D, whose modules need torch, a validation of headers starts in a fraction of the time.
"""

from __future__ import annotations

from fp8pipe.validate.checks import c_config, f_files, k_counts, k_coverage, p_package, r_runtime, s_shapes
from fp8pipe.validate.checks.check import Check

_FILES_TO_SHAPES: tuple[Check, ...] = (
    f_files.headers_are_exact,
    f_files.index_names_existing_files,
    f_files.index_lists_the_tensors,
    f_files.tensors_are_unique,
    f_files.total_size_adds_up,
    f_files.no_stale_shards,
    f_files.no_files_of_other_loaders,
    f_files.metadata_names_the_format,
    f_files.files_are_real,
    c_config.config_is_one_quantization,
    c_config.config_fits_vllm,
    c_config.config_fits_compressed_tensors,
    c_config.scheme_is_supported,
    c_config.ignore_entries_work,
    c_config.fused_groups_are_uniform,
    c_config.config_makes_the_source_s_model,
    c_config.dtype_is_half,
    c_config.transformers_can_load_it,
    c_config.quantization_is_as_planned,
    k_coverage.nothing_is_missing,
    k_coverage.quantized_modules_are_complete,
    k_coverage.scales_have_their_weight,
    k_coverage.only_linears_are_quantized,
    k_coverage.dtypes_follow_the_config,
    k_counts.layers_and_experts_are_complete,
    k_counts.kv_scales_are_complete,
    k_coverage.no_unknown_tensors,
    k_coverage.head_follows_tying,
    k_coverage.most_is_quantized,
    s_shapes.codes_have_their_dtype,
    s_shapes.shapes_equal_source,
    s_shapes.scales_fit_their_strategy,
    s_shapes.kept_tensors_keep_their_dtype,
    s_shapes.fused_blocks_are_aligned,
    s_shapes.columns_are_whole_groups,
    s_shapes.group_scales_have_their_dtype,
)
_PACKAGE_AND_RUNTIME: tuple[Check, ...] = (
    p_package.tokenizer_equals_source,
    p_package.generation_config_equals_source,
    p_package.chat_template_equals_source,
    p_package.processors_and_code_equal_source,
    p_package.licence_travels_along,
    p_package.nothing_private_is_published,
    p_package.records_agree,
    p_package.sizes_are_as_planned,
    p_package.files_are_those_of_the_manifest,
    r_runtime.vllm_reads_every_tensor,
    r_runtime.transformers_reads_the_experts,
)


def header_checks() -> tuple[Check, ...]:
    """The checks that need no torch: among them all that read headers only."""
    return (*_FILES_TO_SHAPES, *_PACKAGE_AND_RUNTIME)


def all_checks() -> tuple[Check, ...]:
    """The whole table."""
    from fp8pipe.validate.checks import d_fidelity, l_loaded, v_values

    return (
        *_FILES_TO_SHAPES,
        v_values.values_are_finite,
        v_values.scales_are_usable,
        v_values.scales_survive_fp16,
        v_values.scales_are_real,
        v_values.weights_are_not_blank,
        v_values.codes_use_the_range,
        v_values.small_weights_survive,
        v_values.scales_have_their_sense,
        v_values.fused_scales_are_equal,
        v_values.fused_input_scales_are_equal,
        v_values.scales_are_those_of_the_calibration,
        d_fidelity.codes_are_roundings,
        d_fidelity.codes_are_nearest,
        d_fidelity.error_is_that_of_the_format,
        d_fidelity.kept_tensors_are_untouched,
        d_fidelity.rows_keep_their_direction,
        d_fidelity.scales_match_their_weights,
        d_fidelity.bytes_are_those_of_the_engine,
        d_fidelity.weights_can_be_compared,
        l_loaded.parameters_are_the_sources,
        l_loaded.parameters_can_be_compared,
        *_PACKAGE_AND_RUNTIME,
    )
