"""Every test sees 8 fake CPU devices, so that each parallel path runs everywhere."""

import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

from minisora_jax.parallel.programs import make_room

# Tests compile much and run little: without LLVM's optimisations they take a third of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
if "PYTHONDONTWRITEBYTECODE" in os.environ:  # or each of the many processes would compile all of jax's Python: 3 s
    directory = Path(tempfile.gettempdir()) / f"minisora-bytecode-{os.getuid()}"
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(directory)}

# The files of which one test or one fixture takes long: they begin, so that no core waits for the last of them.
FIRST = (
    *("test_main_job.py", "test_train.py", "test_tasks.py", "test_processes.py", "test_step.py", "test_codec.py"),
    *("test_finetune.py", "test_public_api.py", "test_ring.py"),
)

# Long cases of parametrised tests. A shorter case of the same test stays among the quick ones.
SLOW_CASES = (
    "test_captions.py::test_byt5",
    "test_checker.py::test_true_clips_pass[heldout]",
    "test_checker.py::test_true_clips_pass[train]",
    "test_codec.py::test_scores_are_the_textbooks",
    "test_codec.py::test_the_bundled_codec_streams",
    "test_codec_losses.py::test_the_weight_is_limited_and_a_critic",
    "test_codec_mesh.py::test_a_device_holds_its_share",
    "test_codec_mesh.py::test_bfloat16",
    "test_codec_mesh.py::test_gradients_are_those_of_one_device",
    "test_codec_mesh.py::test_rows_cut_over_devices_are_the_whole[images",
    "test_codec_mesh.py::test_rows_cut_over_devices_are_the_whole[wan",
    "test_codec_mesh.py::test_streaming_on_a_mesh",
    "test_diffusion.py::test_the_loss_counts_only",
    "test_distillation.py::test_a_run_distils",
    "test_dit.py::test_a_clip_packed_among_others_is_as_if_alone",
    "test_dit.py::test_bfloat16",
    "test_evaluation.py::test_a_codec_is_measured_by_what_was_imported",
    "test_generate.py::test_a_mesh_makes_the_same_video",
    "test_generate.py::test_autoguidance",
    "test_generate.py::test_every_sampler_comes_to_a_like_picture[ddim]",
    "test_generate.py::test_every_sampler_comes_to_a_like_picture[dopri5]",
    "test_generate.py::test_every_sampler_comes_to_a_like_picture[dpm++2m]",
    "test_generate.py::test_every_sampler_comes_to_a_like_picture[sde]",
    "test_generate.py::test_guidance_can_be_limited_and_rescaled",
    "test_generate.py::test_other_objectives_are_read_back_and_sampled[ve",
    "test_generate.py::test_samplers_agree_in_the_end",
    "test_generate.py::test_steps_are_one_program_whatever_their_number[ddpm]",
    "test_generate.py::test_steps_are_one_program_whatever_their_number[unipc]",
    "test_guidance.py::test_it_makes_no_difference_which_prediction_is_guided",
    "test_guided.py::test_what_is_left_out_changes_nothing[loops",
    "test_guided.py::test_what_is_left_out_changes_nothing[rescaled",
    "test_guided.py::test_what_is_left_out_changes_nothing[clips]",
    "test_held_out.py::test_a_training_writes_it",
    "test_held_out.py::test_rows_and_meshes_change_nothing[MeshConfig(data=2, fsdp=2",
    "test_jobs.py::test_a_picture_may_begin_a_long_video",
    "test_jobs.py::test_any_size_is_made",
    "test_jobs.py::test_on_the_command_line_made_and_made_again",
    "test_known.py::test_held_latents_end_as_they_are_and_the_rest_depends_on_them[dpm++2m]",
    "test_known.py::test_held_latents_end_as_they_are_and_the_rest_depends_on_them[sde]",
    "test_known.py::test_held_latents_end_as_they_are_and_the_rest_depends_on_them[unipc]",
    "test_known.py::test_what_is_held_is_said_once",
    "test_levels.py::test_a_table_of_levels_changes_nothing",
    "test_levels.py::test_nor_does_a_mesh",
    "test_lora.py::test_merged_is_unmerged[all]",
    "test_lora.py::test_merged_is_unmerged[text",
    "test_lora.py::test_several_are_one_of_a_larger_rank",
    "test_model_folders.py::test_a_precision_may_be_chosen",
    "test_model_folders.py::test_a_result_that_is_not_finite_is_an_error",
    "test_mup.py::test_muon_keeps_the_spectral_norm_that_the_widths_ask_for",
    "test_mup.py::test_nothing_changes_at_the_base_width[muon]",
    "test_noise_path.py::test_a_weight_is_of_the_error_and_not_of_how_it_is_predicted[edm-ddpm]",
    "test_noise_path.py::test_a_weight_is_of_the_error_and_not_of_how_it_is_predicted[min-snr-ddpm]",
    "test_noise_path.py::test_every_prediction_gives_every_other[ddpm]",
    "test_parity_dit.py::test_gradients_are_the_references[latte]",
    "test_parity_dit.py::test_gradients_are_the_references[sized]",
    "test_parity_dit.py::test_it_runs_on_a_mesh[latte]",
    "test_parity_dit.py::test_packed_is_clip_by_clip[latte]",
    "test_parity_image_to_video.py::test_images_become_the_pipelines_videos[wan2.1",
    "test_parity_image_to_video.py::test_requests_of_several_sizes_share_rows",
    "test_parity_image_to_video.py::test_the_command_makes_a_video_and_makes_it_again[wan2.1",
    "test_parity_image_to_video.py::test_a_model_of_one_image_or_of_two_says_so",
    "test_parity_image_to_video.py::test_a_mesh_changes_nothing",
    "test_parity_image_to_video.py::test_images_become_the_pipelines_videos",
    "test_parity_lora.py::test_gradients_are_pefts",
    "test_parity_sd_vae.py::test_a_video_is_coded_frame_by_frame",
    "test_parity_sd_vae.py::test_gradients_are_the_references",
    "test_parity_sd_vae.py::test_values_are_the_references[12-4]",
    "test_parity_sd_vae.py::test_values_are_the_references[20-36]",
    "test_parity_trajectories.py::test_a_class_becomes_the_same_picture",
    "test_parity_trajectories.py::test_every_family_samples_as_its_pipeline_does[latte]",
    "test_parity_wan_vae.py::test_gradients_are_the_references[wan22",
    "test_parity_wan_vae.py::test_gradients_are_the_references[wan_vae",
    "test_parity_wan_vae.py::test_values_are_the_references[wan22",
    "test_parity_wan_vae.py::test_values_are_those_of_wans_own_code",
    "test_prepare.py::test_a_run_killed_outright",
    "test_public_api.py::test_generate_upscales_what_the_raw_call_refuses",
    "test_public_api.py::test_its_example_runs_as_printed[Codec]",
    "test_public_api.py::test_its_example_runs_as_printed[VideoPipeline.extend]",
    "test_public_api.py::test_its_example_runs_as_printed[VideoPipeline.generate]",
    "test_public_api.py::test_its_example_runs_as_printed[VideoPipeline.interpolate]",
    "test_public_api.py::test_its_example_runs_as_printed[VideoPipeline.long_video]",
    "test_public_api.py::test_its_example_runs_as_printed[VideoPipeline.loop]",
    "test_public_api.py::test_its_example_runs_as_printed[VideoPipeline.transition]",
    "test_ring.py::test_every_mesh_is_the_dense_path[fsdp",
    "test_ring.py::test_every_mesh_is_the_dense_path[ring2-tensor4]",
    "test_ring.py::test_every_mesh_is_the_dense_path[ring2-ulysses4]",
    "test_ring.py::test_every_mesh_is_the_dense_path[ring4-tensor2]",
    "test_ring.py::test_every_mesh_is_the_dense_path[ring4-ulysses2]",
    "test_ring.py::test_nothing_is_kept_but_the_inputs_and_the_result",
    "test_ring.py::test_tiles_of_any_side",
    "test_room.py::test_the_number_grows_with_the_pixels",
    "test_samplers.py::test_known_tokens_do_not_move[ddpm-velocity]",
    "test_source_kinds.py::test_every_kind_of_source_gives_the_same_prepared_bytes[parquet_of_datasets",
    "test_step_cache.py::test_a_video_does_not_depend",
    "test_step_cache.py::test_it_is_what_a_loop_by_hand_makes[heun",
    "test_step_cache.py::test_less_noise_takes_the_last_steps",
    "test_step_cache.py::test_one_that_reuses_nothing_is_full_sampling[heun",
    "test_step.py::test_eight_devices_step_as_one",
    "test_step_cache.py::test_it_is_what_a_loop_by_hand_makes[euler",
    "test_step_cache.py::test_one_that_reuses_nothing_is_full_sampling[ddpm]",
    "test_survival.py::test_a_damaged_first_record_stops_no_training",
    "test_survival.py::test_strict_stops_instead",
    "test_tasks.py::test_a_loop_of_a_model_that_leads_over",
    "test_tasks.py::test_company_changes_nothing",
    "test_tasks.py::test_what_fades_is_said",
    "test_text.py::test_a_caption_is_read_alone",
    "test_triton.py::test_it_goes_round_the_ring",
    "test_triton.py::test_it_is_the_definition",
    "test_ui_queue.py::test_a_group_that_fails_is_done_one_by_one",
    "test_ui_queue.py::test_those_who_go_together",
    "test_vae.py::test_an_image_is_the_first_frame_of_a_clip[plain]",
    "test_vae.py::test_an_image_is_the_first_frame_of_a_clip[wan2.2]",
    "test_vae.py::test_an_image_is_the_first_frame_of_a_clip[wan]",
    "test_vae.py::test_streaming_equals_whole[plain",
    "test_vae.py::test_streaming_equals_whole[tiny-chunks1",
    "test_vae.py::test_streaming_equals_whole[tiny-chunks2",
    "test_vae.py::test_streaming_equals_whole[wan-",
    "test_vae.py::test_streaming_equals_whole[wan2.2",
    "test_vae.py::test_the_future_changes_nothing_before_it",
)


def pytest_configure(config):
    """Programs that took long to compile are kept for later runs and for the processes that tests start."""
    if cache := getattr(config, "cache", None):
        options = {
            "jax_compilation_cache_dir": str(cache.mkdir("compiled")),
            "jax_persistent_cache_min_compile_time_secs": 0.2,
        }
        for name, value in options.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(case in item.nodeid for case in SLOW_CASES):
            item.add_marker("slow")
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        make_room()  # a worker compiles thousands of programs, and files share few of them


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a test that skips because a package is missing fails: .ci/run installs all of them."""
    report = yield
    if report.skipped and os.environ.get("MINISORA_NO_SKIPS") and "could not import" in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr[-1]}"
    return report


# The first example of a property often compiles.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture
def parity(record_property):
    """parity(system, kind, ours, theirs, case): the largest error relative to the largest value is below 1e-4.

    It is recorded, and docs/parity.md is made of the records (tests/parity/table.py). `kind`: "forward", "gradient".
    """

    def check(system: str, kind: str, ours, theirs, case: str = "") -> None:
        error = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
        record_property("parity", json.dumps([system, kind, case, error]))
        assert error < 1e-4, f"{system} {kind} {case}: {error}"

    return check
