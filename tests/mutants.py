"""Faults that the tests must find: `scripts/mutants` plants each and runs the tests named with it.

A fault is one text of a file in src/mobilellm, or several, and what takes its place. Each text
occurs exactly once in its file; tests/test_mutants.py holds the table to that.
"""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """A text, in a file of src/mobilellm, and what takes its place."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A fault, and the arguments of the pytest that finds it."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault of one text. A test is FILE::NAME within tests/; a parameter of it too."""
    return Mutant(name, (Edit(file, old, new),), tuple(f"tests/{test}" for test in tests))


def golden(case: str) -> str:
    """The golden run of that case."""
    return f"golden/test_golden.py::test_losses_are_the_golden_ones[{case}]"


def field(name: str) -> str:
    """The proof that a recipe's field acts."""
    return f"train/test_every_field_acts.py::test_two_values_give_two_traces[{name}]"


# Faults that no test can find, or none that is worth its time, with the reason.
SURVIVES: dict[str, str] = {}

GUARD = "train/test_guard.py"
LOOP = "train/test_loop.py"
OPTIMIZER = "train/test_optimizer.py"
SETTINGS = "train/test_settings.py"
START = "train/test_start.py"
LOADER = "data/test_loader.py"
MIXTURE = "data/test_mixture.py"
ORDER = "data/test_order.py"
MASK = "data/test_mask.py"
NETWORK = "model/test_network.py"
LOSS = "model/test_loss.py"
ENGINE = "tasks/test_engine.py"
PERPLEXITY = "evaluate/test_perplexity.py"

MUTANTS: tuple[Mutant, ...] = (
    # --- pages ---
    fault(
        "the server follows a link out of its folder", "workflows/page_server.py",
        "return path.is_relative_to(root) and path.is_file()", "return path.is_file()",
        "cli/test_serve.py::test_nothing_outside_the_folder_and_no_listing[/link.txt]",
    ),
    fault(
        "a page may connect to anything", "export/web_page.py",
        "connect-src data:{own};", "connect-src *;",
        "export/test_web.py::test_the_page_asks_for_nothing_and_may_not",
    ),
    fault(
        "a page is written without being linked from the report", "workflows/demo_page.py",
        "        write_report(run)\n", "        pass\n",
        "workflows/test_demo_page.py::test_the_page_lies_beside_the_report_which_links_it",
    ),
    fault(
        "a lab compares means of different seeds", "lab/results.py",
        "seeds = sorted(base.keys() & other.keys())\n    if not seeds:",
        "seeds = sorted(other.keys())\n    if not seeds:",
        "lab/test_results.py::test_only_seeds_that_both_have_are_compared",
    ),
    fault(
        "a claim of a process that died is kept for ever", "lab/folder.py",
        "return not _alive(holder.get(\"pid\"))", "return False",
        "lab/test_lab.py::test_claims_are_taken_once_and_stale_ones_taken_over",
    ),
    fault(
        "muP trains wide matrices as fast as narrow ones", "optimizers/transfer.py",
        "learning_rate=1 / (rate * less)", "learning_rate=1 / less",
        "train/test_transfer.py::test_activations_move_alike_at_every_width[adamw]",
    ),
    fault(
        "layers shared in reverse are applied forwards", "model/config.py",
        "reversed(blocks) if back and repeat % 2 else blocks", "blocks",
        "model/test_layer_order.py::test_blocks_are_applied_in_the_order_that_is_named[case2-blocks2]",
    ),
    fault(
        "a sliding window has a token too many", "model/attention_spec.py",
        "seen & (distance < self.window)", "seen & (distance <= self.window)",
        "model/test_windows.py::test_losses_and_gradients_are_those_of_transformers[qwen3]",
    ),
    fault(
        "a cache with a window forgets where it stands", "model/cache.py",
        "ring[:, :, :, last % W] = new", "ring[:, :, :, last % W - 1] = new",
        "model/test_windows.py::test_with_a_cache_the_logits_are_those_without[7-changes0]",
    ),
    fault(
        "MobileLLM-R1's keys stay in pairs of neighbors", "families/llama4.py",
        'reordered(config, name, tensor, to="halves")', "tensor",
        "interop/test_llama4.py::test_without_qk_norm_it_is_llamas_network",
    ),
    fault(
        "long conversations are cut without being counted",
        "conversations/prepare_chat.py",
        "tally.messages_left_out += dropped",
        "tally.messages_left_out += 0",
        "conversations/test_prepare_chat.py"
        "::test_long_conversations_lose_whole_turns_and_are_counted",
    ),
    fault(
        "escape sequences of a model reach the terminal",
        "chat/loop.py",
        "self.show(printable(piece))",
        "self.show(piece)",
        "chat/test_chat.py::test_the_loop_shows_no_escape_of_a_model",
    ),
    fault(
        "a dialogue goes on from tokens that are not the conversation's",
        "runtimes/remembering.py",
        "while same < most and self.held[same] == prompt[same]:",
        "while same < most:",
        "chat/test_chat.py::test_what_the_model_holds_is_checked_before_it_goes_on",
    ),
    # --- conversations ---
    fault(
        "special tokens spelled out in a conversation become tokens", "tokenizer/conversation.py",
        "lambda found: found.group()[0] + breaker + found.group()[1:]",
        "lambda found: found.group()",
        "tokenizer/test_chat_template.py::test_a_marker_that_is_spelled_out_stays_text",
    ),
    fault(
        "a turn's mask ends before the token that ends it", "tokenizer/conversation.py",
        "return begin, last.end()", "return begin, last.start()",
        "tokenizer/test_chat_template.py::test_without_generation_tags_the_mask_is_derived",
    ),
    # --- the six that once passed every fast test ---
    fault(
        "clipping ignored", "train/step.py",
        "limit = section.max_grad_norm or math.inf", "limit = math.inf",
        field("optimizer.max_grad_norm"),
    ),
    fault(
        "muon momentum ignored", "optimizers/optimizer.py",
        "        momentum=section.momentum,\n", "",
        golden("muon"),
    ),
    fault(
        "embedding learning rate ignored", "optimizers/optimizer.py",
        "section.embedding_learning_rate or section.learning_rate", "section.learning_rate",
        golden("scaled_batch"),
    ),
    fault(
        "scaled learning rate ignored", "optimizers/optimizer.py",
        'group["lr"] * factor, group["weight_decay"]', 'group["lr"], group["weight_decay"]',
        golden("scaled_batch"),
    ),
    Mutant(
        "embedding decay swapped",
        (
            Edit(
                "optimizers/optimizer.py",
                "groups = _outside(network, section, embedding_decay=section.weight_decay)",
                "groups = _outside(network, section, embedding_decay=0.0)",
            ),
            Edit(
                "optimizers/optimizer.py",
                "_adamw(_outside(network, section, embedding_decay=0.0)",
                "_adamw(_outside(network, section, embedding_decay=section.weight_decay)",
            ),
        ),
        (f"tests/{OPTIMIZER}::test_the_embedding_is_decayed_by_adamw_alone",),
    ),
    fault(
        "guard fed by skipped steps", "optimizers/guard.py",
        "torch.where(skip, self.state, new)", "new",
        f"{START}::test_a_loss_that_explodes_at_once_is_a_spike",
    ),
    # --- train ---
    fault(
        "guard deaf to the norm", "optimizers/guard.py",
        "(values > means + self.deviations * spread).any()",
        "(values > means + self.deviations * spread)[0]",
        f"{GUARD}::test_a_spike_of_either_is_skipped",
    ),
    fault(
        "guard variance unweighted", "optimizers/guard.py",
        "(1 - weight) * (variances + weight * distance.square())",
        "(variances + weight * distance.square())",
        f"{GUARD}::test_its_statistics_are_numpys",
    ),
    fault(
        "guard never forgets", "optimizers/guard.py",
        "torch.clamp(1 / (count + 1), min=MEMORY)", "1 / (count + 1)",
        f"{GUARD}::test_its_statistics_are_numpys",
    ),
    fault(
        "guard trusts young statistics", "optimizers/guard.py",
        "count >= FIRST", "count >= 1",
        f"{START}::test_a_loss_that_explodes_at_once_is_a_spike",
    ),
    fault(
        "guard not saved", "train/loop.py",
        "guard=guard, averaged=averaged", "averaged=averaged",
        f"{LOOP}::test_interrupted_and_resumed_equals_undisturbed[adamw-False-7]",
    ),
    fault(
        "guard not restored", "train/loop.py",
        "        trainer.step.guard.state.copy_(statistics)\n", "",
        f"{LOOP}::test_interrupted_and_resumed_equals_undisturbed[adamw-False-7]",
    ),
    fault(
        "random state not restored", "train/checkpoint.py",
        '    torch.set_rng_state(tensors["torch_rng"])\n', "",
        f"{LOOP}::test_what_draws_at_random_goes_on_with_the_same_draws",
    ),
    fault(
        "checkpoints not checked", "train/checkpoint.py",
        "            verify(path)\n", "            pass\n",
        f"{LOOP}::test_a_damaged_newest_checkpoint_is_rejected_and_the_one_before_used",
    ),
    fault(
        "every nth checkpoint pruned", "train/checkpoint.py",
        "if keep_every and step_of(path) % keep_every == 0:", "if False:",
        f"{LOOP}::test_every_nth_checkpoint_is_kept",
    ),
    fault(
        "warm-up a step late", "optimizers/schedule.py",
        "(step + 1) / section.warmup_steps", "step / section.warmup_steps",
        f"{OPTIMIZER}::test_schedule",
    ),
    fault(
        "fall ends a step late", "optimizers/schedule.py",
        "max(1, steps - 1 - warmup)", "max(1, steps - warmup)",
        f"{OPTIMIZER}::test_schedule",
    ),
    fault(
        "wsd falls a step late", "optimizers/schedule.py",
        "(step - (steps - decay) + 1) / decay", "(step - (steps - decay)) / decay",
        f"{SETTINGS}::test_the_wsd_schedule_holds_and_falls",
    ),
    fault(
        "wsd shape ignored", "optimizers/schedule.py",
        'done if section.decay_shape == "linear" else math.sqrt(done)', "done",
        f"{SETTINGS}::test_the_wsd_schedule_holds_and_falls",
    ),
    fault(
        "gradients of weights scaled where oneDNN multiplies", "kernels/products.py",
        'flat.t() @ rows if ctx.kind == "mixed" else _by_weight(flat, rows, ctx.kind)',
        "flat.t() @ rows * 1.01",
        "kernels/test_products.py::test_value_and_gradients_are_those_of_torch",
    ),
    fault(
        "float32 out of three products of bfloat16", "kernels/bf16x6.cpp",
        "    TAKE_A(0); TAKE_B(2); MULTIPLY;\n", "    TAKE_A(0); TAKE_B(2);\n",
        "kernels/test_bf16x6.py::test_it_is_as_exact_as_float32",
    ),
    fault(
        "a lab's ninth shape is not compiled", "distributed/parallel.py",
        "            compile_many_kinds()\n", "",
        "lab/test_choice.py::test_runs_stay_compiled_however_many_shapes_a_lab_has",
    ),
    fault(
        "a lab compiles what is no faster so", "lab/plan.py",
        "if gain > MIN_GAIN:", "if gain > 0:",
        "lab/test_choice.py::test_nothing_is_compiled_where_it_does_not_pay[no faster]",
    ),
    fault(
        "a lab measures networks alike whose shapes are not", "lab/plan.py",
        'return repr(cell.recipe.replace("optimizer", learning_rate=1.0))', 'return ""',
        "lab/test_choice.py::test_cells_that_differ_in_the_rate_alone_are_measured_together",
    ),
    fault(
        "AMX's half of a symmetric product is not written to the other side", "kernels/muon.cpp",
        "    if (i == j) return;\n", "    return;\n",
        "kernels/test_muon_step.py::test_it_is_the_step_of_torch",
    ),
    fault(
        "AMX's step of Muon decays nothing", "kernels/muon.cpp",
        "numbers(of.weight + at, columns) * of.kept", "numbers(of.weight + at, columns)",
        "kernels/test_muon_step.py::test_it_is_the_step_of_torch",
    ),
    fault(
        "bf16 takes torch's Muon where AMX is", "train/step.py",
        "tiles=self.parallel.kernels.amx", "tiles=False",
        "train/test_amx.py::test_a_run_in_bf16_takes_it_and_records_it",
    ),
    fault(
        "a norm above the limit clips nothing", "optimizers/optimizer.py",
        "or not limit / (norm + 1e-6) >= 1:", "or not limit:",
        golden("adamw"),
    ),
    fault(
        "blocks are to be compiled where nothing compiles", "distributed/step_kernels.py",
        "if compiled and not compiler_works(device):", "if False:",
        "kernels/test_products.py::test_a_compiler_that_is_not_there_is_said",
    ),
    fault(
        "a lab's runs fail on a machine that cannot compute them", "lab/work.py",
        "    check_machine(folder)\n", "",
        "lab/test_choice.py::test_a_machine_that_cannot_compute_alike_takes_no_run",
    ),
    fault(
        "products measured anew by each process", "kernels/products.py",
        "(known := _remembered(key)) is not None", "(known := None) is not None",
        "kernels/test_products.py::test_what_was_measured_once_is_remembered_for_the_machine",
    ),
    fault(
        "muon without nesterov", "optimizers/muon.py",
        'gradient.lerp(momentum, group["momentum"])', "momentum.clone()",
        f"{OPTIMIZER}::test_muon_equals_torchs_on_each_part",
    ),
    fault(
        "muon scaled by the short side", "optimizers/muon.py",
        "lr * 0.2 * float(max(shape)) ** 0.5", "lr * 0.2 * float(min(shape)) ** 0.5",
        f"{OPTIMIZER}::test_muon_equals_torchs_on_each_part",
    ),
    fault(
        "normuon without its rows", "optimizers/optimizer.py",
        'section.betas[1] if section.name == "normuon" else 0.0', "0.0",
        f"{OPTIMIZER}::test_normuon_is_built_with_its_rows",
    ),
    fault(
        "muon's cautious decay where the update makes a weight larger", "optimizers/muon.py",
        "weight * change < 0", "weight * change > 0",
        f"{OPTIMIZER}::test_cautious_decay_is_only_where_the_update_does_not_make_a_weight_larger"
        "[normuon]",
    ),
    fault(
        "adamw's cautious decay everywhere", "optimizers/cautious.py",
        "(moment * weight > 0)", "1",
        f"{OPTIMIZER}::test_cautious_decay_is_only_where_the_update_does_not_make_a_weight_larger"
        "[adamw]",
    ),
    fault(
        "dropout that a resumed run draws anew", "train/loop.py",
        "place = step * self.world.size", "place = self.made * self.world.size",
        f"{LOOP}::test_interrupted_and_resumed_equals_undisturbed[normuon-True-7]",
    ),
    fault(
        "a resumed run whose batch begins small again", "train/loop.py",
        "self.aim.beside, self.state.step)", "self.aim.beside, 0)",
        "train/test_batch_doublings.py::test_resumed_from_any_step",
    ),
    fault(
        "a lab that holds equal the steps of a batch that grows", "recipe/recipe.py",
        "min(train.batch_doubling_steps, tokens / one)", "0.0",
        "lab/test_lab.py::test_steps_hold_flops_or_time_equal[flops-2]",
    ),
    fault(
        "a feed-forward with ReLU without its ReLU", "model/network.py",
        "up.relu()", "up",
        "model/test_relu.py::test_it_is_two_matrices_with_a_relu_between",
    ),
    fault(
        "a feed-forward with ReLU converted as if it were SwiGLU", "workflows/convert.py",
        'if loaded.config.feed_forward != "swiglu" and to != "mobilellm":', "if False:",
        "model/test_relu.py::test_every_other_format_refuses_it_in_one_line[gguf]",
    ),
    fault(
        "a lab's runs in W8A8 scored without rounded activations",
        "workflows/quantized_scores.py",
        "scored(rounded_activations(network, quantized))", "scored(network)",
        "lab/test_sweep.py::test_a_finished_run_is_scored_as_it_is_and_rounded",
    ),
    fault(
        "dropout where no gradients are taken", "model/dropout.py",
        "if not bound or not torch.is_grad_enabled():", "if not bound:",
        "model/test_dropout.py"
        "::test_it_acts_in_training_alone_at_every_write_to_the_residual_stream",
    ),
    fault(
        "muon takes stacked matrices for one", "optimizers/muon.py",
        'group["parts"] or [parameter.shape[0]]', "[parameter.shape[0]]",
        f"{OPTIMIZER}::test_muon_equals_torchs_on_each_part",
    ),
    fault(
        "muon without decay", "optimizers/muon.py",
        "weight.mul_(1 - decay)\n", "pass\n",
        golden("muon"),
    ),
    fault(
        "muon takes skipped steps", "optimizers/muon.py",
        "            if not keep:\n", "            if False:\n",
        f"{LOOP}::test_a_bad_step_is_skipped_and_counted[muon-False-10000.0]",
    ),
    fault(
        "muon takes skipped steps of a device", "optimizers/muon.py",
        "                updates.mul_(keep)\n", "                pass\n",
        "train/test_optimizer.py::test_a_step_is_skipped_as_well_where_the_host_would_have_to_wait",
    ),
    fault(
        "adamw takes skipped steps", "optimizers/optimizer.py",
        "flag = skip.float()", "flag = torch.zeros_like(skip.float())",
        f"{LOOP}::test_a_bad_step_is_skipped_and_counted[adamw-False-nan]",
    ),
    fault(
        "norms decayed", "optimizers/optimizer.py",
        '{"params": norms, "lr": peak, "weight_decay": 0.0}',
        '{"params": norms, "lr": peak, "weight_decay": section.weight_decay}',
        f"{OPTIMIZER}::test_decay_is_on_matrices_only_and_every_parameter_is_in_one_group",
    ),
    fault(
        "documents not masked in training", "train/step.py",
        "self.parallel(x, y, d, *more) / counted", "self.parallel(x, y) / counted",
        golden("masked_documents"),
    ),
    fault(
        "loss of the last micro-batch alone", "train/step.py",
        "total += loss.detach()", "total = loss.detach()",
        golden("accumulation"),
    ),
    fault(
        "the rejected answer drawn up like the chosen one", "objectives/preference.py",
        "torch.stack((pull, -pull), dim=2)", "torch.stack((pull, pull), dim=2)",
        "objectives/test_preference.py"
        "::test_loss_gradients_and_figures_are_those_of_the_plain_way",
    ),
    fault(
        "mean over targets that do not count", "train/step.py",
        "if not self.masked:", "if True:",
        f"{START}::test_targets_that_do_not_count_are_left_out_of_the_mean",
    ),
    fault(
        "skipped steps never forgotten", "train/rows.py",
        "self.skipped_in_a_row + 1 if skip else 0", "self.skipped_in_a_row + int(skip)",
        f"{LOOP}::test_too_many_bad_steps_in_a_row_stop_and_name_the_samples",
    ),
    fault(
        "tokens not counted", "train/loop.py",
        "trainer.state.tokens + self.recipe.batch_tokens(step)", "self.recipe.batch_tokens(step)",
        f"{LOOP}::test_a_run_documents_itself",
    ),
    fault(
        "given weights not taken", "train/loop.py",
        "            load_weights(self.network, weights.named)\n",
        "            initialize(self.network)\n",
        f"{START}::test_a_run_goes_on_from_given_weights",
    ),
    fault(
        "trackers get every step", "tracking/trackers.py",
        'if row["step"] % self.every and "held_out_loss" not in row:', "if False:",
        field("track.every"),
    ),
    fault(
        "stopwatch forgets earlier laps of a phase", "train/stopwatch.py",
        "found[phase] = found.get(phase, 0.0) + seconds", "found[phase] = seconds",
        f"{SETTINGS}::test_the_stopwatch_adds_up_each_phase",
    ),
    fault(
        "batch scaled linearly always", "recipe/recipe.py",
        'ratio if section.batch_scaling == "linear" else math.sqrt(ratio)', "ratio",
        "train/test_recipe.py::test_the_learning_rate_follows_the_batch",
    ),
    # --- data ---
    fault(
        "targets are the inputs", "data/loader.py",
        "self.tokens[:, :-1], self.tokens[:, 1:]", "self.tokens[:, :-1], self.tokens[:, :-1]",
        f"{LOADER}::test_targets_are_the_next_tokens_on_the_circle",
    ),
    fault(
        "all processes read the first share", "data/loader.py",
        "mine = slice(self.rank * share, (self.rank + 1) * share)", "mine = slice(0, share)",
        f"{LOADER}::test_processes_share_the_same_global_batches",
    ),
    fault(
        "borders at the same places every epoch", "data/loader.py",
        'phase = 0 if fixed else derive_key(*parts, "phase") % len(self.stream)', "phase = 0",
        f"{LOADER}::test_epochs_differ_in_order_and_in_borders",
    ),
    fault(
        "held-out conversations that see each other", "evaluate/conversations.py",
        "tokens, wanted, number\n", "tokens, wanted, 0\n",
        "evaluate/test_conversations.py::test_the_score_is_that_of_the_answers",
    ),
    fault(
        "every part of a reference's table the first one", "derived/reference.py",
        "rows = range(start, min(start + PART_ROWS, count))",
        "rows = range(0, min(PART_ROWS, count - start))",
        "train/test_dpo.py::test_the_table_is_what_the_reference_says_of_each_answer_alone",
    ),
    fault(
        "an edited manifest of what was derived", "derived/parts.py",
        "if own != digest_of(manifest):", "if own is None:",
        "train/test_dpo.py::test_what_is_damaged_or_of_something_else_is_refused",
    ),
    fault(
        "the tail of a teacher's distribution without a pull", "objectives/cached.py",
        "gradient.mul_(1 - taught[:, -1:] / rest)", "gradient.mul_(1.0)",
        "objectives/test_cached.py::test_the_rest_is_one_outcome",
    ),
    fault(
        "every token of a conversation shown as trained on", "data/stats.py",
        '"trained": bool(bits[i])', '"trained": True',
        "data/test_stats_of_conversations.py::test_pieces_are_the_text_and_the_mask",
    ),
    fault(
        "the epoch not counted", "data/loader.py",
        "epoch=epoch + behind // self.samples_per_epoch", "epoch=epoch",
        f"{LOADER}::test_an_epoch_trains_on_each_token_once_but_for_the_remainder",
    ),
    fault(
        "mask a token early", "data/loader.py",
        "np.where(self.trained[:, 1:], targets, NOT_TRAINED)",
        "np.where(self.trained[:, :-1], targets, NOT_TRAINED)",
        f"{MASK}::test_targets_that_are_not_trained_on_are_minus_100",
    ),
    fault(
        "documents run on over the circle's end", "data/loader.py",
        "numbers[-1] + 1 + self.stream.documents", "numbers[-1] + self.stream.documents",
        f"{MIXTURE}::test_documents_are_numbered_within_each_row",
    ),
    fault(
        "a block of the order computed twice", "data/loader.py",
        "np.arange(block * BLOCK, min((block + 1) * BLOCK, self.count))",
        "np.arange(0, min(BLOCK, self.count))",
        f"{LOADER}::test_an_epoch_longer_than_a_block_of_the_order",
    ),
    fault(
        "the order in one round", "data/order.py",
        "ROUNDS = 6", "ROUNDS = 1",
        f"{ORDER}::test_passes_what_numpys_permutation_passes",
    ),
    fault(
        "the order leaves its range", "data/order.py",
        "outside[flat[outside] >= n]", "outside[:0]",
        f"{ORDER}::test_is_a_bijection",
    ),
    fault(
        "seed and epoch run together", "data/order.py",
        '"/".join(map(str, parts))', '"".join(map(str, parts))',
        f"{ORDER}::test_keys_tell_their_parts_apart",
    ),
    fault(
        "a source pays one sample too little", "data/mixture.py",
        "credits[best] -= sum(weights.values())", "credits[best] -= ONE // 2",
        f"{MIXTURE}::test_shares_are_right_to_a_sample_at_every_moment",
    ),
    fault(
        "a stage ends a sample late", "data/mixture.py",
        "tokens < stage.until_tokens", "tokens <= stage.until_tokens",
        f"{MIXTURE}::test_stages_change_the_weights_at_their_token",
    ),
    fault(
        "sources lie together in a batch", "data/mixture.py",
        "if len(self.names) > 1:", "if False:",
        f"{MIXTURE}::test_no_place_in_the_batch_belongs_to_a_source",
    ),
    fault(
        "what a source is owed is not kept", "data/mixture.py",
        "credit=credits[name],", "",
        f"{MIXTURE}::test_shares_are_right_to_a_sample_at_every_moment",
    ),
    fault(
        "bits of the mask read from the byte's beginning", "data/stream.py",
        "bits[a % 8 : a % 8 + b - a]", "bits[: b - a]",
        f"{MASK}::test_what_is_written_is_read",
    ),
    # --- text as it comes ---
    fault(
        "files of other kinds in a folder are passed over in silence", "prepare/sources.py",
        'yield place, "of a kind that is not read"', "continue",
        "streams/test_places.py::test_folders_and_patterns_of_a_store",
    ),
    fault(
        "a connection that broke begins again at the start", "streams/places.py",
        "self.file.seek(self.position)", "self.file.seek(0)",
        "streams/test_places.py::test_a_broken_connection_goes_on_where_it_broke[3-True]",
    ),
    fault(
        "an EOS that a text spells ends its document", "tokenizer/tokenizer.py",
        "if token is not None and not token.special:", "if False:",
        "prepare/test_delimiters.py::test_an_eos_that_a_text_spells_ends_nothing[tokenizers]",
    ),
    # --- model ---
    fault(
        "llama3 scaling takes the fast for the slow", "model/rope.py",
        '(1 - share) * frequencies / scaling["factor"] + share * frequencies',
        'share * frequencies / scaling["factor"] + (1 - share) * frequencies',
        f"{NETWORK}::test_logits_equal_transformers_with_and_without_cache",
    ),
    fault(
        "a token sees the next in bf16", "kernels/attention.py",
        ".triu(1)", ".triu(2)",
        "kernels/test_attention.py::test_value_and_gradients_equal_torchs",
    ),
    fault(
        "gradients pass between documents in bf16", "kernels/attention.py",
        "x.masked_fill_(hidden.unsqueeze(3), MASKED)", "pass",
        "kernels/test_attention.py::test_documents_and_windows_are_kept_to",
    ),
    fault(
        "a gradient passes to the key behind in tiles", "kernels/attention.cpp",
        "hidden = tile.key + c - tile.row;", "hidden = tile.key + c - tile.row - 1;",
        "kernels/test_attention.py::test_tiles_give_values_and_gradients_of_torch_in_any_layout",
    ),
    fault(
        "parts of a head are forgotten in tiles", "kernels/attention.cpp",
        "p = none; p < parts; ++p", "p = none; p < none + 1; ++p",
        "kernels/test_attention.py::test_tiles_divide_few_heads_among_threads",
    ),
    fault(
        "tiles take a mask of one row for all", "kernels/attention.cpp",
        "tile.rows && call.mask[b * call.mask_batch", "tile.rows && call.mask[0 * call.mask_batch",
        "kernels/test_attention.py::test_tiles_divide_few_heads_among_threads",
    ),
    fault(
        "ParetoQ's two bits are rounded to even levels", "families/paretoq.py",
        "(1.5, 0.0) if bits == 0 else (2.0, 0.5)", "(1.5, 0.0) if bits == 0 else (2.0, 0.0)",
        "interop/test_paretoq.py::test_values_are_those_of_the_published_quantizer[2]",
    ),
    fault(
        "a card's table obeys the markup in others' names", "cards/model_card.py",
        "return MARKUP.sub(", "return re.sub('(^a)',",
        "cards/test_model_card.py::test_names_of_others_are_text",
    ),
    fault(
        "Ollama's template opens an answer after each message", "export/modelfile.py",
        "{ask}{{{{ else }}}}{reply}", "{ask}{{{{ else }}}}{ask}",
        "export/test_modelfile.py::test_the_template_writes_what_transformers_renders[PLAIN]",
    ),
    fault(
        "a Unigram vocabulary gives control pieces to a text", "tokenizer/sentencepiece_stages.py",
        "scores.get(piece, below)", "scores.get(piece, 0.0)",
        "tokenizer/test_sentencepiece_kinds.py"
        "::test_sentencepieces_own_defaults_are_read_exactly",
    ),
    fault(
        "a repetition penalty helps tokens of negative logits", "model/generation.py",
        "torch.where(found < 0, found * penalty, found / penalty)", "found / penalty",
        "model/test_sampling.py::test_scores_are_those_of_transformers",
    ),
    fault(
        "info --check compares nothing", "workflows/token_check.py",
        "found = compare_ids(tokenizer, theirs)", "found = compare_ids(tokenizer, theirs)[:0]",
        "workflows/test_token_check.py::test_other_ids_are_shown_and_end_with_status_1",
    ),
    fault(
        "documents see what follows", "model/attention_mask.py",
        "(same & spec.sees(places, places))", "same",
        "model/test_attention_mask.py::test_loss_and_gradients_equal_each_document_alone",
    ),
    fault(
        "norms of queries and keys swapped", "model/network.py",
        "(self.q_norm(q), self.k_norm(k))", "(self.k_norm(q), self.q_norm(k))",
        f"{NETWORK}::test_logits_equal_transformers_with_and_without_cache",
    ),
    fault(
        "first keys of a shared block not reused", "model/network.py",
        "slot, None if fills else shared, wanted", "slot, None, wanted",
        f"{NETWORK}::test_the_two_kinds_of_sharing_are_different_networks",
    ),
    fault(
        "a text that is held to a schema may end anywhere",
        "calls/held.py",
        "allowed[self.grammar.stop] = matcher.is_accepting()",
        "allowed[self.grammar.stop] = True",
        "calls/test_held.py::test_the_text_ends_where_the_value_is_whole_and_nowhere_else",
    ),
    fault(
        "z-loss halved", "model/loss.py",
        "1 + 2 * z_loss * (log_total + peak)", "1 + z_loss * (log_total + peak)",
        f"{LOSS}::test_z_loss_adds_its_gradient_and_leaves_the_value",
    ),
    fault(
        "softmax without its peak", "model/loss.py",
        "peak = logits.amax(dim=1, keepdim=True)", "peak = torch.zeros_like(logits[:, :1])",
        f"{LOSS}::test_large_logits_do_not_overflow",
    ),
    fault(
        "a decoder forgets that keys are shared",
        "decoding/decoder.py",
        "_Application(*each) for each",
        "_Application(each.block, each.slot, True) for each",
        "decoding/test_decoder.py::test_a_token_is_that_of_the_network[first]",
    ),
    fault(
        "a decoder looks beyond its window",
        "decoding/step.cpp",
        "const int64_t place = token_.position % slot.room;",
        "const int64_t place = std::min(token_.position, slot.room - 1);",
        "decoding/test_decoder.py::test_a_token_is_that_of_the_network[windows]",
    ),
    fault(
        "the file of weights stays in memory beside the network",
        "weights/mapped.py",
        "            one.madvise(mmap.MADV_DONTNEED)",
        "            pass",
        "runtimes/test_loading.py::test_opening_takes_little_more_than_the_file[float]",
    ),
    fault(
        "ignored targets have a gradient", "model/loss.py",
        "-counted.unsqueeze(1).to(probabilities.dtype)",
        "-torch.ones_like(counted).unsqueeze(1).to(probabilities.dtype)",
        LOSS,
    ),
    fault(
        "weight gradient of the last chunk alone", "kernels/products.py",
        "return to.addmm_(grad.t(), x)",
        "return grad.t() @ x",
        f"{LOSS}::test_value_and_gradients_equal_the_plain_way",
    ),
    fault(
        "top-p drops the token that reaches p", "model/generation.py",
        "kept = order[before < mass]", "kept = order[before + likeliest < mass]",
        f"{NETWORK}::test_sampling_cuts_match_transformers",
    ),
    fault(
        "new rows of the vocabulary are zero", "model/weights.py",
        "mean.expand(new, -1)", "mean.expand(new, -1) * 0",
        "model/test_weights.py::test_a_grown_vocabulary_keeps_old_logits_and_adds_the_mean_row",
    ),
    fault(
        "what a model calls is run without asking",
        "chat/loop.py",
        "if not self.run_tools and (self.confirm is None or not self.confirm()):",
        "if self.confirm is not None and not self.confirm():",
        "chat/test_chat.py::test_a_call_is_shown_and_not_run",
    ),
    fault(
        "two equal calls answer what asks for two others",
        "calls/matching.py",
        "                del left[number]\n",
        "",
        "calls/test_scores.py::test_wrong_calls",
    ),
    fault(
        "zero residual not zero", "model/network.py",
        '("o_proj.weight", "down_proj.weight")', '("o_proj.weight",)',
        golden("muon"),
    ),
    fault(
        "norm's gradient without its mean", "model/fused.py",
        "grad - normed * mean", "grad",
        "model/test_fused.py::test_rms_norm",
    ),
    # --- evaluate ---
    fault(
        "branches see each other", "tasks/packing.py",
        "seen = np.eye(", "seen = np.tri(",
        f"{ENGINE}::test_scores_equal_the_harness[plain-200]",
    ),
    fault(
        "what items share is hidden from them", "tasks/packing.py",
        "np.ones((end - start, len(path)), dtype=bool)",
        "np.zeros((end - start, len(path)), dtype=bool)",
        "tasks/test_packing.py::test_each_scores_as_it_does_alone[5000-plain]",
    ),
    fault(
        "softmax's sum not carried on", "tasks/engine.py",
        "total * (before - best).exp_()", "total",
        f"{ENGINE}::test_a_vocabulary_in_parts_has_the_softmax_of_the_whole",
    ),
    fault(
        "the likeliest token counted within its part", "tasks/engine.py",
        "torch.where(highest > best, at + start, place)", "torch.where(highest > best, at, place)",
        f"{ENGINE}::test_a_vocabulary_in_parts_has_the_softmax_of_the_whole",
    ),
    fault(
        "a batch that does not fit is not halved", "tasks/engine.py",
        "sum(costs) // 2", "sum(costs) - 1",
        f"{ENGINE}::test_a_batch_without_padding_halves_by_its_sum",
    ),
    fault(
        "overlapping windows score twice", "evaluate/perplexity.py",
        "        target[: scored - start - 1] = IGNORED\n", "",
        f"{PERPLEXITY}::test_every_token_is_a_target_exactly_once",
    ),
    fault(
        "bits are nats", "evaluate/perplexity.py",
        "nats / math.log(2) / text_bytes", "nats / text_bytes",
        f"{PERPLEXITY}::test_equals_a_plain_loop",
    ),
    fault(
        "every process scores every batch", "evaluate/perplexity.py",
        "if number % processes.size != processes.rank:", "if False:",
        "evaluate/test_held_out.py::test_processes_divide_the_batches_and_all_get_the_sum",
    ),
    fault(
        "held-out text begins without a border", "data/token_folder.py",
        "return self.eos_id if self.eos else None", "return None",
        "evaluate/test_held_out.py::test_a_source_begins_after_a_document_border_too",
    ),
    fault(
        "one-sided p value", "tasks/paired.py",
        "float(2 * tail / 2**n)", "float(tail / 2**n)",
        "tasks/test_paired.py::test_the_p_value_is_the_binomial_tests",
    ),
    fault(
        "a request loses a token too many", "tasks/requests.py",
        "max(0, len(tokens) - max_length - 1)", "max(0, len(tokens) - max_length)",
        f"{ENGINE}::test_scores_equal_the_harness[plain-200]",
    ),
    fault(
        "a program's chunks not run before it appears", "workflows/verification.py",
        "for chunks in ([count], _chunks(count), [1] * count):", "for chunks in ([count],):",
        "workflows/test_verification.py::test_chunks_and_single_tokens_are_tried",
    ),
    fault(
        "ONNX: later applications of a block mistake keys for values", "export/onnx_network.py",
        "query[1:] = shared\n", "query[1:] = shared[::-1]\n",
        "export/test_onnx.py::test_float_files_are_the_network[first]",
    ),
    fault(
        "ONNX: the halves of a byte change places", "export/onnx_network.py",
        "unsigned[:, 0::2] | unsigned[:, 1::2] << 4", "unsigned[:, 1::2] | unsigned[:, 0::2] << 4",
        "export/test_onnx.py::test_four_bits_are_the_network_on_its_grid[plain-int8]",
    ),
    fault(
        "onnxruntime: what is held is lost when memory grows", "runtimes/onnxruntime.py",
        "if self.held:\n                array", "if not self.held:\n                array",
        "runtimes/test_onnxruntime.py::"
        "test_chunks_tokens_and_a_second_sequence_give_the_logits_of_the_network[onnxruntime-plain]",
    ),
    fault(
        "another tokenizer in the result goes unseen", "workflows/verification.py",
        "if differences := compare_tokens(wanted, found):", "if differences := []:",
        "workflows/test_verification.py::test_another_result_is_refused",
    ),
    fault(
        "wikitext drops the last whole window", "tasks/wikitext.py",
        "range(length, len(tokens) + 1, length)", "range(length, len(tokens) - length, length)",
        "tasks/test_wikitext.py::test_it_is_the_plain_loops",
    ),
    fault(
        "equal requests of an item computed twice", "tasks/requests.py",
        "if request_ not in seen:", "if True:",
        f"{ENGINE}::test_equal_requests_are_computed_once",
    ),
    # --- after pretraining ---
    fault(
        "the temperature's square is forgotten", "objectives/distillation.py",
        "value = weight * temperature**2 * distance", "value = weight * temperature * distance",
        "objectives/test_distillation.py::test_loss_and_gradients_are_those_of_the_plain_way",
    ),
    fault(
        "masked targets pull toward the teacher", "objectives/distillation.py",
        "pull = weight * temperature * counted.unsqueeze(1)", "pull = weight * temperature",
        "objectives/test_distillation.py::test_loss_and_gradients_are_those_of_the_plain_way",
    ),
    fault(
        "queries of shared blocks are not rounded", "quantize/training.py",
        "on_grid(self.weight[:rows], self.bits)", "self.weight[:rows]",
        "quantize/test_training.py::test_products_see_what_quantizing_leaves",
    ),
    fault(
        "an average is not put back", "train/average.py",
        "            torch._foreach_copy_(self._own(), own)", "            pass",
        "train/test_average.py::test_the_training_itself_is_left_as_it_is",
    ),
    fault(
        "own weights beside an average are not saved", "train/checkpoint.py",
        "        if state.averaged:\n            tensors |= _own_weights(network)\n", "",
        "train/test_average.py::test_a_resumed_run_ends_with_the_same_bits",
    ),
    fault(
        "errors of a column are not made up for behind its group of columns", "quantize/gptq.py",
        "        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)\n", "",
        "quantize/test_gptq.py::test_integers_are_those_of_the_definition",
    ),
    fault(
        "what is left in the residual stream is not made up for", "quantize/gptq.py",
        "                lacking += goal.streams[norm][applied] - stream[applied]\n",
        "                pass\n",
        "quantize/test_gptq.py::test_goals_are_those_of_the_network_as_it_was",
    ),
    fault(
        "goals begin at the embedding on the grid", "quantize/methods.py",
        "calibration, embedded, progress",
        "calibration, network.embed_tokens(calibration), progress",
        "quantize/test_gptq.py::test_goals_begin_at_the_embedding_as_it_was",
    ),
    fault(
        "a scale is fitted beyond the best one", "quantize/gptq.py",
        "step.mul_(step * (2 * slope - step * curvature) > 0)", "step.mul_(2)",
        "quantize/test_gptq.py::test_scales_are_fitted_to_the_integers",
    ),
    fault(
        "later applications of a shared block are not observed", "quantize/gptq.py",
        "            shared = key_value", "            break",
        "quantize/test_gptq.py::test_moments_are_over_every_application_of_the_blocks_on_the_grid",
    ),
    fault(
        "queries of shared blocks see exact activations", "quantize/activations.py",
        "super().first(fake_int8(x), rows)", "super().first(x, rows)",
        "quantize/test_activations.py::test_every_product_on_the_grid_sees_rounded_inputs",
    ),
    fault(
        "gptq is calibrated on the text that is scored", "workflows/quantize.py",
        "part = ids[start:][:max_tokens]", "part = ids[:max_tokens]",
        "workflows/test_quantize.py::test_gptq_records_its_text_and_scores_the_other_half",
    ),
    # --- tokens ---
    fault(
        "tokens of a result are not compared", "workflows/convert.py",
        "            notes += check_tokens(written, after, loaded.tokenizer)\n", "",
        "interop/test_tokens_compared.py::test_a_folder_that_loses_a_token_is_not_written",
    ),
    fault(
        "digits of Qwen are cut in threes", "gguf/pre_tokenizers.py",
        "patterns=(rf\"{CONTRACTIONS}|{WORD}|\\p{{N}}|{REST}\",)",
        "patterns=(rf\"{CONTRACTIONS}|{WORD}|\\p{{N}}{{1,3}}|{REST}\",)",
        "interop/test_gguf_ids.py::test_a_pre_tokenizer_cuts_as_llama_cpp_does",
    ),
    fault(
        "tensors of a GGUF file may overlap", "gguf/header.py",
        "if info.offset < end:", "if info.offset < 0:",
        "interop/test_damaged.py::test_tensors_of_a_gguf_may_not_overlap",
    ),
    fault(
        "a pickle may name anything", "interop/pickled.py",
        'known = argument in ALLOWED if opcode.name == "GLOBAL" else', "known = not argument or",
        "interop/test_pickled.py::test_code_is_named_and_not_run",
    ),
    fault(
        "a metrics row may be damaged in the middle and loses what follows", "train/run_folder.py",
        'if row is not None and row["step"] <= step:', "if not broken and row:",
        "hostile/test_torn_run.py::test_torn_metrics_lose_their_damaged_lines",
    ),
    fault(
        "other layer types than full attention are left out in silence", "interop/huggingface.py",
        "all(kind == ALL for kind in kinds)", "set(kinds)",
        "interop/test_foreign_keys.py"
        "::test_a_key_that_could_is_refused_unless_the_user_says_otherwise",
    ),
    fault(
        "sampling settings of the source are not passed on", "workflows/convert.py",
        "            generation=loaded.generation,\n", "",
        "interop/test_as_stored.py::test_sampling_settings_are_passed_on",
    ),
    fault(
        "a program names one end token of several", "export/executorch.py",
        "config.end_tokens", "[config.eos_token_id]",
        "export/test_executorch.py::test_several_end_tokens_are_all_named",
    ),
    fault(
        "queries of qwen3 have their rows as llama's in GGUF", "interop/gguf_writer.py",
        "        if not config.qk_norm:\n            matrix",
        "        if True:\n            matrix",
        "interop/test_gguf_qwen3.py::test_transformers_qwen3_runs_in_llama_cpp",
    ),
    # --- runtimes ---
    fault(
        "llama.cpp remembers the sequence before", "runtimes/llama_cpp.py",
        "self.api.memory_clear(self.api.get_memory(self.context_handle), True)", "pass",
        "runtimes/test_llama_cpp.py::test_a_prompt_its_parts_and_single_tokens_give_our_logits",
    ),
    fault(
        "a context read twice goes on where the last choice ended", "tasks/session_backend.py",
        "                    held = (*held, token)\n", "",
        "runtimes/test_running.py::test_a_session_scores_items_as_the_network_does",
    ),
)  # fmt: skip
