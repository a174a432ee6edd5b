"""Select the tests that the default run skips, so that it takes minutes.

The tables below name tests that run over many sizes, dtypes and layouts, and tests that take long.
The cases that they leave out get the marker sweep and run with ``pytest -m sweep``. A test that
has one of the other markers of tests that are left out keeps it and is not marked again.
"""

import pytest
import torch
from cases import INTERPRETED

#: The markers with which a test is not marked again.
NOT_SWEPT = ("slow", "large", "gpu", "vllm", "sglang", "llama_cpp")


class Some:
    """A rule that selects the cases of a test that the default run executes.

    Args:
        one_in: of the cases that match ``values``, the default run executes every ``one_in``-th.
            If it has no common factor with the lengths of the parameter lists, every value of
            every parameter still occurs in some case.
        values: parameter name -> the values with which a case is considered at all.
    """

    def __init__(self, one_in=1, **values):
        self.one_in, self.values = one_in, values

    def includes(self, params):
        """Return whether the parameters of a case have values of this rule."""
        return all(params[name] in values for name, values in self.values.items())


#: "file::function" -> the rule for its cases. A test is listed here if all of its cases together
#: take more than a second.
SOME = {
    "test_cli_hostile.py::test_every_row": Some(5, locale=("utf8",), stdout=(None,)),
    "test_cli_hostile.py::test_streams_of_a_shell": Some(name=("a full stdout",)),
    "test_cli_hostile.py::test_json_is_the_same_in_every_encoding": Some(encoding=("cp1252",)),
    "test_continuous_batching.py::test_any_manager": Some(6),
    "test_continuous_batching.py::test_no_batch_changes_a_token": Some(most=(2, 8)),
    "test_continuous_batching.py::test_sequences_of_a_prompt_have_seeds_of_their_own": Some(
        blocks=(10,)
    ),
    "test_cuda_emulated.py::test_covering_cases": Some(5),
    "test_cuda_emulated.py::test_every_launch": Some(7),
    "test_cuda_emulated.py::test_hostile_values": Some(4),
    "test_cuda_compile.py::test_no_rule_is_broken_in_the_library": Some(3),
    "test_cuda_compile.py::test_resident_rows_copy_together": Some(case=()),
    "test_cuda_compile.py::test_the_maker_of_lists_spills_no_registers": Some(arch=("sm_90",)),
    "test_cuda_compile.py::test_ranges_are_ordered": Some(device=()),
    "test_cuda_emulated.py::test_hostile_histories": Some(3),
    "test_cuda_emulated.py::test_histories_of_every_kind": Some(17),
    "test_cuda_emulated.py::test_layouts": Some(2),
    "test_cuda_emulation.py::test_right_kernels": Some(7),
    "test_cuda_results.py::test_covering_cases": Some(23),
    "test_cuda_results.py::test_layouts": Some(11),
    "test_cuda_results.py::test_long_lists_among_ties": Some(3),
    "test_cuda_results.py::test_rows_that_draw_nothing": Some(3),
    "test_cuda_results.py::test_hostile_values": Some(4),
    "test_cuda_results.py::test_logits_that_change": Some(31),
    "test_cuda_results.py::test_what_is_wrong_is_seen": Some(wrong=()),
    "test_cuda_rules.py::test_random_texts": Some(23),
    "test_cuda_rules.py::test_hostile_values": Some(13),
    "test_cuda_rules.py::test_memory_that_changes": Some(7),
    "test_cuda_rules.py::test_with_sanitizers": Some(markers=()),
    "test_cuda_rules.py::test_wrong_lists_are_seen": Some(wrong=()),
    "test_cuda_rules.py::test_what_is_not_limited_is_seen": Some(wrong=()),
    "test_known_rows.py::test_the_answers_are_those_of_the_reference": Some(3),
    "test_results.py::test_covering_cases": Some(25),
    "test_results.py::test_vllm_ranks_kernel": Some(17),
    "test_self_test.py::test_broken_kernels_are_refused": Some(wrong=()),
    "test_cuda_split.py::test_no_block_samples_such_a_row_alone": Some(parts=(7,)),
    "test_cuda_split.py::test_what_is_wrong_is_seen": Some(wrong=()),
    "test_cuda_emulated.py::test_logits_that_change": Some(17),
    "test_cuda_emulated.py::test_orders_of_threads": Some(4),
    "test_cuda_emulated.py::test_what_is_not_waited_for_is_seen": Some(wrong=()),
    "test_cuda_emulated.py::test_wrong_histories_are_seen": Some(wrong=()),
    "test_cuda_emulated.py::test_wrong_lists_are_seen": Some(wrong=()),
    "test_cuda_emulated.py::test_rules_that_look_at_the_history": Some(5),
    "test_cuda_emulated.py::test_more_listed_tokens_than_have_scores": Some(3),
    "test_interrupt.py::test_a_change_of_rows_that_fails_anywhere": Some(3),
    "test_explain_page.py::test_a_page_whose_rules_are_wrong_is_seen": Some(5),
    "test_explain_page.py::test_the_page_lists_what_the_rules_lower": Some(2),
    "test_penalty_lists.py::test_random_texts": Some(20),
    "test_ops.py::test_other_parameters": Some(name=("top_k", "bias", "seed")),
    "test_tensors.py::test_every_kind_gives_what_a_plain_copy_gives": Some(5),
    "test_tensors.py::test_what_no_kernel_can_read_is_refused_by_name": Some(2),
    "test_three_ways.py::test_the_three_ways_agree": Some(examples=(20,)),
    "test_three_ways.py::test_a_wrong_way_is_seen": Some(wrong=()),
    "test_triton_compile.py::test_every_kind_of_call_compiles": Some(7),
    "test_triton_compile.py::test_every_result_compiles": Some(
        kind=("filtered + kept mask",), arch=("sm_90",)
    ),
    "test_triton_compile.py::test_every_call_with_rules_compiles": Some(
        kind=("unfiltered + history + text + rules + advance",), arch=("sm_90",)
    ),
    "test_triton_compile.py::test_amds_other_families_compile": Some(kind=()),
    "test_triton_compile.py::test_every_history_compiles": Some(7),
    "test_triton_compile.py::test_every_update_compiles": Some(7),
    "test_triton_compile.py::test_every_maker_of_lists_compiles": Some(7),
    "test_triton_compile.py::test_no_maker_of_lists_spills_vector_registers": Some(7),
    "test_triton_compile.py::test_no_rule_is_broken_on_sm_90": Some(7),
    "test_triton_compile.py::test_no_rule_is_broken_elsewhere": Some(arch=("sm_100",)),
    "test_triton_compile.py::test_no_rule_is_broken_where_rows_are_split": Some(9),
    "test_triton_compile.py::test_a_part_is_released_before_it_is_counted_and_acquired_after": Some(
        3
    ),
    "test_triton_compile.py::"
    "test_an_odd_vocabulary_in_aligned_rows_is_loaded_16_bytes_at_a_time": Some(5),
    "test_cpu_paths.py::test_best_tokens_that_are_penalised": Some(3),
    "test_cpu_paths.py::test_masks_and_what_is_under_them": Some(7),
    "test_cpu_paths.py::test_masks_with_penalties_and_biases": Some(5),
    "test_cpu_paths.py::test_masked_logits_at_every_alignment": Some(4),
    "test_cpu_paths.py::test_one_mask_for_all_rows_and_raw_logprobs": Some(3),
    "test_cpu_paths.py::test_masks_in_every_instruction_set": Some(instructions=()),
    "test_vectors_family.py::test_case": Some(3),
    "test_vectors_family.py::test_the_same_after_other_ids_were_taken_away": Some(3),
    "test_rules.py::test_rows_are_those_of_the_reference": Some(7),
    "test_histories.py::test_updates": Some(5),
    "test_histories.py::test_drawings": Some(5),
    "test_parity.py::test_every_case": Some(7),
    "test_parity.py::test_covering_cases": Some(5),
    "test_parity.py::test_raw_logprobs": Some(4),
    "test_parity.py::test_layouts": Some(5),
    "test_parity.py::test_expanded_rows": Some(4),
    "test_parity.py::test_largest_vocabulary": Some(3),
    "test_distributed.py::test_every_row_with_every_mix": Some(3, ranks=(3,)),
    "test_distributed.py::test_every_vocabulary": Some(ranks=(1, 3)),
    "test_distributed.py::test_large_vocabularies": Some(ranks=(1, 3)),
    "test_distributed.py::test_broken_sharding_is_detected": Some(3),
    "test_distributed.py::test_digits_of_any_width_give_the_same_tokens": Some(5),
    "test_distribution.py::test_frequencies_are_the_softmax": Some(3),
    "test_golden.py::test_every_build_gives_them": Some(11),
    "test_grammar.py::test_every_text_conforms": Some(5),
    "test_grammar.py::test_padded_vocabularies": Some(3),
    "test_grammar_texts.py::test_texts_of_a_model": Some(engine=()),
    "test_differential.py::test_a_broken_backend_is_found_and_shown": Some(3),
    "test_benchmarks.py::test_providers_compute_what_they_are_asked_for": Some(4),
    "test_benchmarks.py::test_peers_of_a_gpu_with_functions_that_stand_in_for_theirs": Some(4),
    "test_table.py::test_every_case_in_a_table": Some(13),
    "test_table.py::test_covering_cases_in_a_table": Some(3),
    "test_table.py::test_every_case_by_slot": Some(13),
    "test_table.py::test_covering_cases_by_slot": Some(7),
    "test_cuda_emulated.py::test_parameters_of_slots": Some(11),
    "test_contract.py::test_code_in_docs_runs": Some(path=("README.md",)),
    "test_stop_strings.py::test_the_cost_is_linear": Some(size=(2**10, 2**13)),
}
#: The rules for cases whose backend runs in Triton's interpreter, which takes milliseconds for
#: what a compiled kernel does in microseconds.
SOME_INTERPRETED = {
    "test_histories.py::test_updates": Some(vocab_size=(33,)),
    "test_histories.py::test_drawings": Some(kind=("windows",), turn=(4, 5)),
    "test_edges.py::test_extremes_are_those_of_the_reference": Some(23),
    "test_edges.py::test_status_bits": Some(11),
    "test_edges.py::test_filters_beyond_the_row_keep_all": Some(4),
    "test_edges.py::test_results_have_their_dtypes_and_shapes": Some(4),
    "test_edges.py::test_nothing_that_is_given_changes": Some(4),
    "test_parity.py::test_covering_cases": Some(vocab_size=(33,)),
    "test_vectors.py::test_case": Some(11),
    "test_vectors.py::test_all_rows_in_one_batch": Some(vocab_size=(7,)),
    "test_triton_interpreted.py::test_hostile_values": Some(12),
    "test_triton_known_rows.py::test_the_same_kernel_answers_known_rows": Some(6),
    "test_triton_known_rows.py::test_a_broken_kernel_is_refused": Some(3),
    "test_results.py::test_covering_cases": Some(24, vocab_size=(33,)),
    "test_results.py::test_kept_sets_where_the_order_of_ids_matters": Some(30),
    "test_results.py::test_kept_sets_of_other_rows": Some(20),
    "test_results.py::test_vllm_ranks_kernel": Some(12),
    "test_triton_results.py::test_small_tiles": Some(12),
    "test_triton_results.py::test_ties": Some(8),
    "test_triton_results.py::test_split_rows": Some(4),
    "test_triton_results.py::test_logits_that_change": Some(14),
    "test_rules.py::test_rows_are_those_of_the_reference": Some(79, vocab_size=(7, 600)),
    "test_rules.py::test_the_parity_table_with_lists": Some(vocab_size=()),
    "test_rules.py::test_parameters_of_slots": Some(position_of=("slot",), seed=(0,)),
    "test_rules.py::test_a_decode_loop_is_the_same_in_every_form": Some(seed=()),
    "test_vectors_family.py::test_case": Some(13),
    "test_vectors_family.py::test_the_same_after_other_ids_were_taken_away": Some(17),
    "test_triton_rules.py::test_random_texts": Some(37),
    "test_triton_rules.py::test_rows_without_a_text": Some(4),
    "test_triton_rules.py::test_long_matches": Some(7),
    "test_triton_rules.py::test_long_rows": Some(2, case=(0, 1, 3, 4, 5, 7)),
    "test_triton_rules.py::test_hostile_values": Some(31),
    "test_triton_rules.py::test_memory_that_changes": Some(7),
    "test_triton_rules.py::test_slices_of_a_vocabulary": Some(5),
    "test_triton_rules.py::test_split_rows": Some(9),
    "test_triton_rules.py::test_split_rows_of_slots": Some(position_of=()),
    "test_triton_rules.py::test_lists_that_somebody_overwrites": Some(8),
    "test_triton_split.py::test_parity": Some(parts=()),
    "test_triton_split.py::test_steps_of_a_sampler": Some(2),
    "test_triton_split.py::test_parity_of_hard_rows": Some(9),
    "test_triton_split.py::test_calls_that_record": Some(11),
    "test_triton_split.py::test_parameters_of_slots": Some(position_of=()),
    "test_triton_split.py::test_hostile_values": Some(7),
    "test_triton_split.py::test_whatever_is_in_a_header": Some(13),
    "test_triton_split.py::test_logits_that_change": Some(20),
    "test_triton_interpreted.py::test_hostile_updates": Some(3),
    "test_triton_interpreted.py::test_logits_that_change": Some(change=()),
    "test_triton_interpreted.py::test_small_tiles": Some(dtype=()),
    "test_triton_interpreted.py::test_small_tiles_on_hard_rows": Some(11),
}
#: Whole tests and single cases that take many seconds, or whose fixtures take that long to build.
LONG = {
    "test_continuous_batching.py::test_a_compiled_model",
    "test_ops.py::test_compiled_by_inductor",
    "test_interrupt.py::test_ctrl_c_leaves_a_usable_prompt",
    "test_interrupt.py::test_what_is_interrupted_here_is_so_where_the_parent_ignores_ctrl_c",
    "test_load.py::test_nothing_is_kept",
    "test_load.py::test_gunicorn_with_a_preloaded_application",
    "test_c_interface.py::test_the_oldest_instruction_set_gives_the_same_tokens",
    "test_tune_training.py::"
    "test_a_text_learnt_by_heart_is_overfitted_and_one_hardly_read_underfitted",
    "test_tune_training.py::test_the_command_reports_every_trial_and_keeps_the_best_models",
    "test_explain_page.py::test_the_page_keeps_what_sample_keeps[plateau]",
    "test_cli.py::test_ctrl_c_and_a_closed_pipe_end_a_running_stream",
    "test_distributed.py::test_a_rank_that_does_not_come_is_an_error_of_the_others",
    "test_distributed.py::test_a_dtensor[two dimensions-V100]",
    "test_huggingface.py::test_the_three_ways_on_a_real_model_with_padding",
    "test_c_interface.py::test_the_arithmetic_in_cpp",
    "test_distributed.py::test_the_benchmark_checks_and_times_both",
    "test_fuzz.py::test_a_broken_kernel_is_found[a tie too few]",
    "test_load.py::test_what_is_kept_is_seen",
    "test_triton_compile.py::test_the_floor_of_split_rows_follows_its_formula",
    "test_cuda_compile.py::test_multiply_adds_are_seen",
    "test_cuda_compile.py::test_a_wide_shuffle_takes_two_steps",
    "test_cuda_compile.py::test_the_upper_end_has_less_bandwidth_and_cold_code",
    "test_cuda_compile.py::test_the_code_that_a_case_touches",
    "test_cuda_compile.py::test_a_row_that_is_not_copied_is_read_in_each_pass",
    "test_cuda_compile.py::test_blocks_that_are_no_cluster",
    "test_cuda_split.py::test_a_list_is_released_and_acquired",
    "test_known_rows.py::test_the_file_is_what_its_maker_writes",
    "test_known_rows.py::test_a_kept_set_of_another_length_shows",
    "test_self_test.py::test_fused_multiply_adds_are_refused",
    "test_cuda_compile.py::test_no_rule_is_broken_on_sm_90",
    "test_cuda_compile.py::test_the_lower_bounds_follow_their_formula",
    "test_cuda_compile.py::test_too_many_registers_are_seen",
    "test_cuda_compile.py::test_too_much_shared_memory_is_seen",
    "test_cuda_emulated.py::test_reading_beyond_the_row_is_seen[counts]",
    "test_cuda_emulated.py::test_with_sanitizers[some]",
    "test_tail.py::test_rare_tokens_are_drawn_as_often_as_they_should_be[tiles]",
    "test_stateful.py::test_a_wrong_one_is_seen"
    "[Decoding-llm_sampling.backends.torch-sample-sample_then_check]",
    "test_golden.py::test_a_program_for_every_machine_gives_them[this machine]",
    "test_golden.py::test_a_program_for_every_machine_gives_them[aarch64]",
    "test_golden.py::test_fused_multiply_adds_of_arm_are_reported",
    "test_races.py::test_another_race_is_reported",
    "test_races.py::test_memory_that_changes_during_a_call[all]",
    "test_races.py::test_memory_that_changes_during_a_call[results]",
    "test_races.py::test_the_race_on_the_logits_is_the_only_one",
    "test_races.py::test_the_race_on_the_logits_is_there",
    "test_on_gpu.py::test_the_dry_run",
    "test_on_gpu.py::test_a_killed_step_leaves_its_rows",
    "test_benchmarks.py::test_real_logits",
    "test_benchmarks.py::test_the_command_writes_what_it_prints",
    "test_benchmarks.py::test_the_pictures",
    "test_load.py::test_a_million_calls_take_no_more_memory[sampler]",
    "test_supply.py::test_two_builds_are_the_same_bytes[sdists]",
    "test_supply.py::test_two_builds_are_the_same_bytes[wheels]",
    "test_supply.py::test_the_sdist_is_what_git_has",
    "test_supply.py::test_the_wheel_has_the_package_alone",
    "test_supply.py::test_the_wheel_installs_without_an_index_and_draws",
    "test_allowed_mask.py::test_a_history_that_grows_in_fused_generate",
    "test_cli.py::test_a_chat_that_no_longer_fits_ends",
    "test_cli_hostile.py::test_a_closed_descriptor_is_not_left_to_the_next_file",
    "test_cli_hostile.py::test_bytes_of_utf8_are_read_where_the_locale_has_ascii_alone",
    "test_objectives.py::test_a_real_model_answers_and_repeats_itself",
    "test_benchmarks.py::test_a_wrong_answer_of_ours_fails_the_command",
    "test_benchmarks.py::test_the_compiled_one_too",
    "test_cli_explain.py::test_a_reader_that_has_gone[explain]",
    "test_explain_page.py::test_the_page_keeps_what_sample_keeps[real-sized]",
    "test_explain_page.py::test_the_page_keeps_what_sample_keeps[ties]",
    "test_interrupt.py::test_a_step_with_a_callback_that_is_interrupted_anywhere",
    "test_interrupt.py::test_a_command_that_is_started_with_ctrl_c_ignored_keeps_it_ignored",
    "test_load.py::test_a_data_loader_whose_workers_sample[spawn]",
    "test_tune_training.py::test_a_resumed_search_keeps_its_finished_trials",
}
LONG_INTERPRETED = {
    "test_rules.py::test_rows_of_a_sampler_come_and_go[triton]",
    "test_edges.py::test_num_samples_of_many[triton]",
    "test_parity.py::test_raw_logprobs[V32000-bfloat16-triton]",
    "test_vectors.py::test_half_precision[triton-float16]",
    "test_vectors.py::test_half_precision[triton-bfloat16]",
    "test_table.py::test_requests_that_come_and_go[triton]",
    "test_table.py::test_covering_cases_in_a_table[V33-triton]",
    "test_table.py::test_covering_cases_by_slot[V33-row-triton]",
    "test_table.py::test_covering_cases_by_slot[V33-slot-triton]",
    "test_table.py::test_covering_cases_by_slot[V33-text-triton]",
}
#: "file::function" -> the rule for those of its other cases that -m sweep executes. What is left
#: then gets the marker slow. These are tests with a minute of cases or more; the cases that are
#: executed still have each kind of request, launch, layout and change.
SWEPT = {
    "test_triton_compile.py::test_every_result_compiles": Some(arch=("sm_90",)),
    "test_triton_compile.py::test_every_call_with_rules_compiles": Some(arch=("sm_90",)),
    "test_cuda_results.py::test_covering_cases": Some(5),
    "test_cuda_results.py::test_logits_that_change": Some(5),
    "test_cuda_results.py::test_layouts": Some(3),
    "test_cuda_results.py::test_what_is_wrong_is_seen": Some(4),
    "test_penalty_lists.py::test_random_texts": Some(5),
    "test_cli_hostile.py::test_every_row": Some(5),
    "test_cpu_paths.py::test_best_tokens_that_are_penalised": Some(3),
    "test_cuda_emulated.py::test_covering_cases": Some(2),
    "test_cuda_emulated.py::test_histories_of_every_kind": Some(2),
    "test_cuda_emulated.py::test_logits_that_change": Some(3),
    "test_cuda_emulated.py::test_parameters_of_slots": Some(2),
    "test_parity.py::test_every_case": Some(3),
    "test_parity.py::test_layouts": Some(3),
    "test_results.py::test_covering_cases": Some(3),
    "test_table.py::test_every_case_by_slot": Some(3),
    "test_table.py::test_every_case_in_a_table": Some(3),
}
SWEPT_INTERPRETED = {
    "test_rules.py::test_rows_are_those_of_the_reference": Some(17, vocab_size=(1, 7, 600)),
    "test_rules.py::test_the_parity_table_with_lists": Some(vocab_size=(33,)),
    "test_rules.py::test_parameters_of_slots": Some(3),
    "test_rules.py::test_a_decode_loop_is_the_same_in_every_form": Some(seed=(0,)),
    "test_triton_results.py::test_logits_that_change": Some(3),
    "test_triton_results.py::test_small_tiles": Some(2),
    "test_triton_split.py::test_parity": Some(2),
}
#: The longest cases in the interpreter; other cases of the same tests run there.
SLOW_INTERPRETED = {
    "test_triton_interpreted.py::test_logits_that_change[triton-far above-often]",
    "test_triton_interpreted.py::test_logits_that_change[triton-far above-once]",
    "test_triton_interpreted.py::test_logits_that_change[triton-far below-often]",
    "test_triton_interpreted.py::test_logits_that_change[triton-NaN-often]",
    "test_triton_interpreted.py::test_small_tiles_on_hard_rows[triton-all keep 100-contiguous]",
    "test_triton_interpreted.py::test_small_tiles_on_hard_rows[triton-all keep 100-aligned rows]",
    "test_triton_interpreted.py::test_logits_that_change[triton-infinite-often]",
    "test_triton_interpreted.py::test_logits_that_change[triton-infinite-once]",
    "test_triton_interpreted.py::test_logits_that_change[triton-nothing is left-often]",
    "test_triton_interpreted.py::test_logits_that_change[triton-one-often]",
    "test_triton_interpreted.py::test_logits_that_change[triton-upside down-once]",
    "test_triton_interpreted.py::test_small_tiles[triton-torch.float32-aligned rows]",
    "test_triton_interpreted.py::test_small_tiles[triton-torch.float32-contiguous]",
    "test_results.py::test_covering_cases[long-V513-bfloat16-triton]",
    "test_results.py::test_covering_cases[raw-V513-bfloat16-triton]",
    "test_results.py::test_covering_cases[processed-V513-bfloat16-triton]",
    "test_results.py::test_covering_cases[both-V1000-float16-triton]",
    "test_results.py::test_covering_cases[few-V1000-float16-triton]",
    "test_results.py::test_covering_cases[ids-V1000-float16-triton]",
    "test_results.py::test_covering_cases[processed-V128256-float16-triton]",
    "test_results.py::test_covering_cases[raw-V128256-float16-triton]",
    "test_results.py::test_covering_cases[few-V128256-float16-triton]",
    "test_results.py::test_covering_cases[ids-V128256-float16-triton]",
    "test_results.py::test_covering_cases[long-V1000-float16-triton]",
    "test_results.py::test_covering_cases[long-V128256-float16-triton]",
}
#: The tests with the most rows per backend -> the vocabulary sizes, or pairs of size and dtype,
#: that Triton's interpreter runs. Their other cases get the marker slow for the interpreter.
INTERPRETED_SIZES = {
    "test_drawings": (33,),
    "test_every_case": (),
    "test_every_case_in_a_table": (),
    "test_every_case_by_slot": (),
    "test_covering_cases_in_a_table": (33,),
    "test_covering_cases_by_slot": (33,),
    "test_covering_cases": (
        (33, torch.float32),
        (513, torch.bfloat16),
        (1000, torch.float16),
        (128256, torch.float16),
    ),
    "test_all_rows_in_one_batch": (7, 64),
    "test_raw_logprobs": ((32000, torch.bfloat16),),
    "test_vllm_ranks_kernel": (1, 100),
    "test_layouts": (),
    "test_expanded_rows": (),
    "test_mask_layouts": (),
    "test_masses_to_the_bit": (),
    "test_largest_vocabulary": (),
}


def mark(items):
    """Add the marker sweep or slow to each collected test that the default run leaves out."""
    found = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        # test_triton_interpreted.py names its backend through the fixture triton_alone.
        is_interpreted = params.get("backend", params.get("triton_alone")) in INTERPRETED
        function = f"{item.path.name}::{item.originalname}"
        name = f"{item.path.name}::{item.name}"
        if is_interpreted and (
            name in SLOW_INTERPRETED or _is_left_to_slow(item.originalname, params)
        ):
            item.add_marker(pytest.mark.slow)
        if any(map(item.get_closest_marker, NOT_SWEPT)):
            continue
        rules = (SOME_INTERPRETED, SWEPT_INTERPRETED) if is_interpreted else (SOME, SWEPT)
        some, swept = (rule.get(function) for rule in rules)
        if some is not None and some.includes(params):
            is_left = not _is_next(found, (function, is_interpreted), some)
        else:
            long = LONG_INTERPRETED if is_interpreted else LONG
            is_left = some is not None or name in long
        if is_left:
            is_swept = swept is None or (
                swept.includes(params)
                and _is_next(found, (function, is_interpreted, "swept"), swept)
            )
            item.add_marker(pytest.mark.sweep if is_swept else pytest.mark.slow)


def _is_next(found, of, some):
    """Whether the next of the cases that a rule considers is one that it selects."""
    place = found[of] = found.get(of, -1) + 1
    return place % some.one_in == 0


def _is_left_to_slow(name, params):
    sizes = INTERPRETED_SIZES.get(name)
    size = params.get("vocab_size")
    return sizes is not None and size not in sizes and (size, params.get("dtype")) not in sizes
