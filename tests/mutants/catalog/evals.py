"""Evaluations of frozen features."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

KNN = "fastdino/evals/knn.py"
FEATURES = "fastdino/evals/features.py"
LINEAR = "fastdino/evals/linear.py"
DATA = "fastdino/evals/linear_data.py"
PROBE = "fastdino/evals/linear_probe.py"
DESCRIPTORS = "fastdino/evals/descriptors.py"
RANKING = "fastdino/evals/ranking_metrics.py"
SEGMENTATION = "fastdino/evals/segmentation_metrics.py"
PROPAGATION = "fastdino/evals/label_propagation.py"
SCORES = "fastdino/evals/davis_scores.py"
MAPS = "fastdino/evals/attention_maps.py"
JACCARD = "fastdino/evals/attention_jaccard.py"
VIDEO_TESTS = (
    "tests/test_flags_effect_maps.py::test_flag_reaches_its_effect[video fps]",
    "tests/test_video.py::test_folder_becomes_a_video_of_attention",
    "tests/test_video.py::test_video_keeps_its_frame_rate_and_is_resized",
)
LINEAR_TESTS = (
    "tests/test_linear.py::test_a_run_learns_and_writes_the_papers_files",
    "tests/test_linear.py::test_each_epoch_sees_every_image_once_in_a_new_order",
    "tests/test_linear.py::test_best_accuracy_is_that_of_the_best_epoch",
)
TWO_LINEAR_RANKS = ("tests/test_linear.py::test_two_processes_with_half_the_batch_match_one",)
DAVIS_TESTS = (
    "tests/test_davis.py::test_scores_are_means_over_objects",
    "tests/test_davis.py::test_true_masks_score_100_and_the_first_and_last_frame_are_ignored",
    "tests/test_davis.py::test_batched_masks_match_frames_computed_one_at_a_time",
    "tests/test_davis.py::test_frames_are_resized_and_normalized_as_in_the_paper",
)
COPYDAYS_TESTS = ("tests/test_copydays.py::test_map_matches_the_papers",)
JACCARD_TESTS = ("tests/test_attention_jaccard.py::test_scores_match_the_paper",)

MUTANTS = (
    Mutant(KNN, ".split(rows), max(ks))", ".split(rows), ks[-1])", reported=True),
    Mutant(KNN, ") / temperature).exp()", ") / 0.07).exp()"),
    Mutant(KNN, "best.values > 0", "best.values > -1"),
    Mutant(KNN, "temperature=args.temperature", "temperature=0.07"),
    Mutant(KNN, "center_crop(args.resize, args.crop)", "center_crop(256, args.crop)"),
    Mutant(KNN, "labels[indices]", "labels[: len(indices[0])].expand_as(indices)"),
    Mutant(
        KNN, "neighbour_labels[:, :k], votes[:, :k])", "neighbour_labels[:, :k], 1 + 0 * votes)"
    ),
    Mutant(KNN, "merged_labels.gather(1, indices)", "merged_labels[:, : indices.shape[1]]"),
    Mutant(
        KNN,
        "share = slice(distributed.rank(), None, distributed.world_size())",
        "share = slice(0, None, distributed.world_size())",
    ),
    Mutant(KNN, 'zip(("train", "test"), datasets', 'zip(("test", "train"), datasets'),
    Mutant(
        FEATURES,
        "batches[distributed.rank() :: distributed.world_size()]",
        "batches[:: distributed.world_size()]",
    ),
    Mutant(FEATURES, "features[indices] = rows", "features[: len(rows)] = rows"),
    Mutant(DESCRIPTORS, "moment += rows.T @ rows", "moment = rows.T @ rows", reported=True),
    Mutant(DESCRIPTORS, "GEM_POWER = 4", "GEM_POWER = 3", COPYDAYS_TESTS),
    Mutant(DESCRIPTORS, "gem(tokens[:, 1:])", "gem(tokens)"),
    Mutant(DESCRIPTORS, "features.double() - self.mean", "features.double()"),
    Mutant(
        "fastdino/evals/copydays.py",
        'torch.cat((database, extra["distractors"]))',
        'torch.cat((extra["distractors"], database))',
        COPYDAYS_TESTS,
    ),
    Mutant("fastdino/evals/copydays.py", "ID_LENGTH = 4", "ID_LENGTH = 3", COPYDAYS_TESTS),
    Mutant(
        PROBE,
        "(labels != UNREADABLE).sum().clamp(min=1)",
        "(labels != UNREADABLE).sum()",
        reported=True,
    ),
    Mutant(PROBE, "momentum=0.9", "momentum=0.0"),
    Mutant(PROBE, "layers[-1][:, 1:].mean(1)", "layers[-1].mean(1)"),
    Mutant(
        PROBE, "[tokens[:, 0] for tokens in layers]", "[tokens[:, 0] for tokens in layers[::-1]]"
    ),
    Mutant(PROBE, "logits.topk(min(5,", "logits.topk(min(6,"),
    Mutant(LINEAR, "lr=args.lr * batch / 256", "lr=args.lr", LINEAR_TESTS),
    Mutant(LINEAR, "max(probe.best_acc, scores", "max(0.0, scores", LINEAR_TESTS),
    Mutant(DATA, "sampler.set_epoch(epoch)", "sampler.set_epoch(0)", LINEAR_TESTS),
    Mutant(
        DATA,
        "seen // distributed.world_size() :]",
        "0 * seen :]",
        ("tests/test_linear.py::test_signal_saves_after_the_step_and_the_resumed_run_matches",),
    ),
    Mutant(
        DATA,
        "share = range(distributed.rank(), number, distributed.world_size())",
        "share = range(0, number, distributed.world_size())",
        ("tests/test_linear.py::test_each_validation_image_is_seen_by_one_rank",),
    ),
    Mutant(DATA, "            rank=distributed.rank(),", "            rank=0,", TWO_LINEAR_RANKS),
    Mutant(MAPS, "cumulative > 1 - share", "cumulative >= 1 - share"),
    Mutant(
        MAPS,
        "maps.flatten(-2).double().sort",
        "maps.flatten(-2).sort",
        reported=True,
    ),
    Mutant(JACCARD, "labels[pixels == void] = VOID", "pass"),
    Mutant(JACCARD, "scores.max(1).values.mean()", "scores.mean(0).max()", JACCARD_TESTS),
    Mutant(JACCARD, "THRESHOLD = 0.6", "THRESHOLD = 0.5", JACCARD_TESTS),
    Mutant(JACCARD, "torch.manual_seed(args.seed)", "torch.manual_seed(1 + args.seed)"),
    Mutant(SEGMENTATION, "both & valid, either & valid", "both & valid, either"),
    Mutant(SEGMENTATION, "radius = math.ceil(", "radius = math.floor("),
    Mutant(SEGMENTATION, "scores[: edges[1] + 1]", "scores[: edges[1]]"),
    Mutant(SEGMENTATION, "nan_to_num(1.0)", "nan_to_num(0.0)"),
    Mutant(SCORES, "stack[1:-1]", "stack[1:]", DAVIS_TESTS),
    Mutant(
        SCORES,
        "truth[0][truth[0] > 0]",
        "truth[truth > 0]",
        ("tests/test_davis.py::test_object_that_leaves_is_scored_and_one_that_appears_is_not",),
    ),
    Mutant("fastdino/evals/davis.py", "PAPER_STD = (0.228,", "PAPER_STD = (0.229,", DAVIS_TESTS),
    Mutant(PROPAGATION, "TEMPERATURE = 0.1", "TEMPERATURE = 0.07"),
    Mutant(PROPAGATION, "cosine < best[:, -1:]", "cosine <= best[:, -1:]"),
    Mutant(PROPAGATION, "rows[near[0]]).abs() > reach", "rows[near[0]]).abs() >= reach"),
    Mutant(PROPAGATION, "deque(maxlen=n_last_frames)", "deque(maxlen=n_last_frames + 1)"),
    Mutant(PROPAGATION, "[(first, first_labels), *recent]", "[*recent] or [(first, first_labels)]"),
    Mutant(
        "fastdino/evals/batching.py",
        "future.result() for future in pending",
        "future.result() for future in pending[::-1]",
        DAVIS_TESTS,
    ),
    Mutant(RANKING, "ranks == 0, 1.0,", "ranks == 0, 0.0,"),
    Mutant(RANKING, "(retrieved + 1) / (ranks + 1)", "(retrieved + 1) / (ranks + 2)"),
    Mutant(RANKING, "(2 * positives))", "(2 * len(ranks)))"),
    Mutant(RANKING, "np.concatenate((self.junk, self.hard))", "self.junk"),
    Mutant(RANKING, "min(int(ranks[-1]) + 1, k)", "min(int(ranks[-1]), k)"),
    Mutant(RANKING, "COPYDAYS_TOP = 20", "COPYDAYS_TOP = 19"),
    Mutant(
        RANKING, "searchsorted(true, true, right=False)", "searchsorted(true, true, right=True)"
    ),
    Mutant(
        "fastdino/evals/retrieval.py",
        "F.normalize(features, dim=1), usable",
        "features, usable",
        ("tests/test_retrieval.py::test_features_and_scores_match_the_papers",),
    ),
    Mutant("fastdino/evals/video.py", "self.totals / count", "self.totals", VIDEO_TESTS),
    Mutant(
        "fastdino/evals/video.py", "count / fps if args.fps", "seconds if args.fps", VIDEO_TESTS
    ),
    Mutant(
        "fastdino/evals/visualize_attention.py",
        "mask_picture(pixels, mask, 1 + head)",
        "mask_picture(pixels, mask, head)",
        ("tests/test_visualize_attention.py::test_image_gives_the_papers_files_and_statistics",),
    ),
)
